"""Lines of L1 that the compiled gradients of narrow branches touch: what bounds them on an H100."""

import pytest
import torch

from sk_triton.kernels.branch_grad import branch_grad
from sk_triton.kernels.config import GradStreamConfig
from sk_triton.kernels.geometry import ConvShape
from sk_triton.kernels.grad_geometry import partial_shape

from .conftest import emulated_chip
from .emulator.lines import counted_lines
from .versions import needs_narrow_products

pytestmark = pytest.mark.interpret

SIZE, CHANNELS, REACH = 28, 64, 2


def aligned(*shape):
    """Zeros from where a line begins, as a GPU's allocator hands them out."""
    tensor = torch.zeros(torch.Size(shape).numel() + 256, dtype=torch.float16)
    return tensor[-tensor.data_ptr() % 512 // 2 :][: torch.Size(shape).numel()].view(shape)


@needs_narrow_products
@pytest.mark.parametrize("warps", [1, 2])
def test_a_row_is_read_once_for_both_branches(warps, pytestconfig):
    """A pixel's 128 bytes are a line, touched by each block of 8 channels: one for each of dv, x and two y, and one for
    `dx`; the rest are weights. Tiles of four rows touched 11.9 a pixel and block at 128 @ 56², where this is 7.9."""
    if not emulated_chip(pytestconfig):
        pytest.skip("needs --emulate")
    shape, config = ConvShape(CHANNELS, CHANNELS, 16, (3, 3), (1, 2)), GradStreamConfig(SIZE, 1, warps)
    x, dv, dx = (aligned(1, SIZE, SIZE, CHANNELS).permute(0, 3, 1, 2) for _ in range(3))
    y, weights = aligned(2, 1, SIZE, SIZE, CHANNELS), aligned(2**17)
    terms, partial = torch.zeros(1, 2, CHANNELS, 6), torch.zeros(partial_shape(shape, config, 1, SIZE, SIZE))
    (launch,) = branch_grad(x, dv, y, terms, weights, dx, partial, shape=shape, has_relu=True, config=config)
    with counted_lines() as lines:
        launch()
    pixels = SIZE * SIZE * CHANNELS // 8
    read = 4 * pixels
    weights_and_moves = (SIZE + REACH) * CHANNELS // 8 * 16 * 4
    assert read + weights_and_moves <= lines["loads"] <= 1.03 * (read + weights_and_moves)
    assert lines["stores"] <= 1.5 * pixels
