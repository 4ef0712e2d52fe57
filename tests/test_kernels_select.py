"""The select kernel, interpreted, against float64."""

import math

import pytest
import torch

from sk_triton.kernels.config import SelectConfig

from .tolerances import assert_errs_like_eager
from .watched import run_watched

pytestmark = pytest.mark.interpret


def run(u, attention, memory_format=torch.channels_last):
    from sk_triton.kernels.select import select_fwd

    _, n, h, w, c = u.shape
    v = torch.full((n, c, h, w), math.nan, dtype=u.dtype).contiguous(memory_format=memory_format)
    launch = select_fwd(u, attention, v, config=SelectConfig(BLOCK_P=16, BLOCK_C=16))
    run_watched(launch)
    return v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 13, 17, 20), (1, 1, 1, 1, 1), (3, 2, 7, 5, 33), (2, 1, 1, 9, 16), (2, 1, 9, 1, 16)],
    ids=str,
)
def test_matches_float64(shape, dtype, memory_format):
    m, n, _, _, c = shape
    u, attention = torch.randn(shape).to(dtype), torch.randn(n, m, c).softmax(1)
    v = run(u, attention, memory_format)
    assert v.is_contiguous(memory_format=memory_format)
    eager = torch.einsum("nmc,mnhwc->nchw", attention.to(dtype), u)
    exact = torch.einsum("nmc,mnhwc->nchw", attention.double(), u.double())
    assert_errs_like_eager(v, eager, exact)


def test_bad_values_stay_where_they_are():
    u, attention = torch.randn(2, 2, 3, 3, 8), torch.rand(2, 2, 8)
    u[1, 0, 1, 1, 3], u[0, 1, 2, 2, 5] = math.nan, math.inf
    v = run(u, attention)
    assert v.isnan().sum() == 1
    assert v[0, 3, 1, 1].isnan()
    assert v.isinf().sum() == 1
    assert v[1, 5, 2, 2].isinf()


def test_unequally_spaced_output_is_refused():
    from sk_triton.kernels.select import select_fwd

    u, attention = torch.randn(1, 1, 2, 2, 4), torch.rand(1, 1, 4)
    with pytest.raises(ValueError, match=r"v must have equally spaced pixels, got strides \(24, 6, 3, 1\)"):
        select_fwd(u, attention, torch.empty(1, 4, 2, 3)[..., :2], config=SelectConfig(16, 16))
