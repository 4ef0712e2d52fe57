"""The kernel that pools what a library has convolved, interpreted, against float64."""

import contextlib
import math

import pytest
import torch

from sk_triton.bench.interpreted.meter import Meter
from sk_triton.kernels.config import ReductionConfig
from sk_triton.kernels.geometry import cdiv

from .interpreter import exact_bfloat16
from .tolerances import assert_errs_like_eager

pytestmark = pytest.mark.interpret


def run(y, shift, *, has_relu=True):
    """Of `y [M, N, H, W, C]` as M tensors apart; every access lies inside of them."""
    from sk_triton.kernels.pooled_sums import pooled_sums_fwd

    _, n, h, w, c = y.shape
    config = ReductionConfig(BLOCK_P=4, BLOCK_C=16, STEPS=3)
    apart = [branch.clone() for branch in y]
    partial = torch.full((n, cdiv(h * w, config.BLOCK_P * config.STEPS), c), math.nan)
    launch = pooled_sums_fwd(apart, shift, partial, has_relu=has_relu, config=config)
    tensors = {"y": apart, "partial": partial} | ({} if shift is None else {"shift": shift})
    with (
        exact_bfloat16() if y.dtype == torch.bfloat16 else contextlib.nullcontext(),
        Meter(tensors).watch() as rows,
    ):
        launch()
    assert {row.tensor: row.touched for row in rows}["y"] == y.numel() * y.element_size()
    return partial


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_shift", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, 3, 7, 5, 20), (1, 1, 1, 1, 1), (3, 2, 5, 5, 33), (2, 1, 1, 13, 16)], ids=str
)
def test_matches_float64(shape, has_shift, dtype):
    m, _, _, _, c = shape
    y, shift = torch.randn(shape).to(dtype), torch.randn(m, c) if has_shift else None

    def pooled(y, added):
        return (y + added[:, None, None, None]).relu().sum((0, 2, 3))

    added = torch.zeros(m, c) if shift is None else shift
    found = run(y, shift).sum(1)
    assert_errs_like_eager(found, pooled(y.float(), added), pooled(y.double(), added.double()))


def test_each_tile_holds_its_own_pixels():
    """12 pixels to a tile: what lies past the last pixel adds no shift."""
    y, shift = torch.randn(2, 1, 3, 5, 8), torch.full((2, 8), 3.0)
    u = (y + 3.0).reshape(2, 1, 15, 8)
    expected = torch.stack([u[:, :, :12].sum((0, 2)), u[:, :, 12:].sum((0, 2))], 1)
    torch.testing.assert_close(run(y, shift, has_relu=False), expected)


def test_without_relu_negative_values_count():
    y = torch.randn(1, 2, 3, 3, 8)
    torch.testing.assert_close(run(y, None, has_relu=False).sum(1), y[0].sum((1, 2)))


def test_bad_values_stay_in_their_sample_and_channel():
    y = torch.randn(2, 2, 3, 3, 8)
    y[1, 0, 1, 1, 3], y[0, 1, 2, 2, 5] = math.nan, math.inf
    found = run(y, torch.zeros(2, 8)).sum(1)
    assert found.isnan().nonzero().tolist() == [[0, 3]]
    assert found.isinf().nonzero().tolist() == [[1, 5]]


def test_the_selection_adds_shifts_too():
    from sk_triton.kernels.config import SelectConfig
    from sk_triton.kernels.select import select_fwd

    y, shift, attention = torch.randn(2, 3, 5, 4, 20), torch.randn(2, 20), torch.randn(3, 2, 20).softmax(1)
    v = torch.full((3, 20, 5, 4), math.nan)
    config = SelectConfig(BLOCK_P=8, BLOCK_C=16)
    select_fwd([branch.clone() for branch in y], attention, v, shift=shift, has_relu=True, config=config)()
    u = (y + shift[:, None, None, None]).relu()
    torch.testing.assert_close(v, torch.einsum("nmc,mnhwc->nchw", attention, u))
    with pytest.raises(ValueError, match="shift must be None where there is a norm"):
        select_fwd(y, attention, v, norm=(shift,) * 4, shift=shift, config=config)
