"""The gate kernel, interpreted, against float64."""

import math
from dataclasses import replace

import pytest
import torch

from sk_triton.kernels.config import GateConfig

from .tolerances import assert_errs_like_eager
from .watched import run_watched

pytestmark = pytest.mark.interpret

# (N, tiles, C, M, d)
CASES = [
    (3, 2, 20, 2, 10),
    (17, 3, 40, 3, 40),
    (1, 1, 16, 1, 32),
    (2, 5, 7, 5, 3),
    (1, 70, 33, 2, 17),
    (8, 2, 20, 2, 17),
]


CONFIG = GateConfig(BLOCK_N=16, BLOCK_S=16, BLOCK_D=16, BLOCK_C=16)


def run(n, tiles, c, m, d, dtype, *, has_bias=True, partial=None, config=CONFIG):
    from sk_triton.kernels.gate import gate_fwd

    partial = torch.randn(n, tiles, c) * 7 if partial is None else partial
    reduce_weight = (torch.randn(d, c) / math.sqrt(c)).to(dtype)
    select_weight = (torch.randn(m, c, d) / math.sqrt(d)).to(dtype)
    scale, shift = torch.rand(d) + 0.5, torch.randn(d)
    bias = torch.randn(m, c) if has_bias else None
    attention = torch.full((n, m, c), math.nan)
    launch = gate_fwd(
        partial, reduce_weight, scale, shift, select_weight, bias, attention,
        pixels=7, has_relu=True, config=config,
    )  # fmt: skip
    run_watched(launch)

    def attend(to):
        s = (partial.double().sum(1) / 7).to(to)
        z = torch.relu((s @ reduce_weight.to(to).T) * scale.to(to) + shift.to(to))
        logits = torch.einsum("mcd,nd->nmc", select_weight.to(to), z)
        return (logits if bias is None else logits + bias.to(to)).softmax(1)

    return attention, attend(dtype), attend(torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case, dtype):
    attention, eager, exact = run(*case, dtype)
    assert_errs_like_eager(attention.to(dtype), eager, exact)
    torch.testing.assert_close(attention.sum(1), torch.ones(case[0], case[2]))


@pytest.mark.parametrize("block_n", [1, 2, 8, 32])
@pytest.mark.parametrize("block_t", [1, 2, 4, 32])
def test_any_samples_and_tiles_at_a_time(block_n, block_t):
    config = replace(CONFIG, BLOCK_N=block_n, BLOCK_T=block_t)
    attention, eager, exact = run(9, 5, 20, 2, 17, torch.float16, config=config)
    assert_errs_like_eager(attention.to(torch.float16), eager, exact)


def test_without_bias():
    attention, eager, exact = run(2, 2, 20, 2, 10, torch.float32, has_bias=False)
    assert_errs_like_eager(attention, eager, exact)


@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, BLOCK_N=2, BLOCK_T=2)], ids=["rows", "repeated rows"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_sums_stay_in_their_sample(value, config):
    partial = torch.randn(3, 2, 20)
    partial[1, 0, 5] = value
    attention, _, exact = run(3, 2, 20, 2, 10, torch.float32, partial=partial, config=config)
    assert torch.equal(attention.isnan(), exact.isnan())
    assert attention[[0, 2]].isfinite().all()
