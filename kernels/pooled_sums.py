"""Pooling of convolutions that a library has written: one pass over all branches (Li et al. 2019, Eqs. 1 and 2)."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .config import ReductionConfig
from .geometry import cdiv, needs_64_bits
from .launch import Launch
from .norm import activated, shifted
from .tiling import widen


@triton.jit(do_not_specialize=("PIXELS", "TILES"))
def pooled_sums_fwd_kernel(
    y_ptrs, shift_ptr, partial_ptr,
    PIXELS, C, TILES, stride_yn, stride_yp, stride_partial_n, stride_partial_t,
    M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """All branches of one sample, STEPS * BLOCK_P of its pixels x BLOCK_C channels."""
    stride_yp, _, _ = widen(stride_yp, stride_yp, stride_yp, IS_LARGE)
    tile = tl.program_id(0) % TILES
    n = (tl.program_id(0) // TILES).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for m in tl.static_range(M):
        y_ptr = y_ptrs[m] + n * stride_yn
        for step in range(STEPS):
            p = (tile * STEPS + step) * BLOCK_P + tl.arange(0, BLOCK_P)
            mask = (p < PIXELS)[:, None] & mask_c[None, :]
            y = tl.load(y_ptr + (p * stride_yp)[:, None] + c[None, :], mask=mask, other=0.0)
            u = shifted(y, shift_ptr, m * C + c, mask_c, HAS_SHIFT)
            # A pixel past the last one is 0 before the shift, not after it.
            total += tl.where(mask, activated(u, 1.0, 0.0, False, HAS_RELU), 0.0)
    offs = n * stride_partial_n + tile * stride_partial_t + c
    tl.store(partial_ptr + offs, tl.sum(total, axis=0), mask=mask_c)


def pooled_sums_fwd(
    y: Sequence[torch.Tensor],
    shift: torch.Tensor | None,
    partial: torch.Tensor,
    *,
    has_relu: bool,
    config: ReductionConfig,
) -> Launch:
    """Write `partial [N, TILES, C]` (fp32): sums of `act(y + shift)` over all branches and each tile's pixels.

    `y`: M contiguous tensors `[N, H, W, C]`; `shift`: `[M, C]` fp32 or None. TILES is the size of `partial`:
    `cdiv(H * W, BLOCK_P * STEPS)`. Each sum runs in a fixed order.
    """
    n, h, w, c = y[0].shape
    tiles = partial.shape[1]
    stride_yn, _, stride_yp, _ = y[0].stride()
    arguments = (
        tuple(y), partial if shift is None else shift, partial, h * w, c, tiles,
        stride_yn, stride_yp, partial.stride(0), partial.stride(1),
    )  # fmt: skip
    constexprs = {
        "M": len(y),
        "BLOCK_P": config.BLOCK_P,
        "BLOCK_C": config.BLOCK_C,
        "STEPS": config.STEPS,
        "HAS_SHIFT": shift is not None,
        "HAS_RELU": has_relu,
        "IS_LARGE": needs_64_bits(y[0]),
    }
    grid = (n * tiles, cdiv(c, config.BLOCK_C))
    trips = (config.STEPS,) * len(y)
    return Launch(pooled_sums_fwd_kernel, grid, arguments, constexprs, {"num_warps": config.num_warps}, trips)
