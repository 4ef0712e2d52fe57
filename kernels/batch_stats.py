"""Statistics of the branches' convolutions over a batch: by tiles, then combined in a fixed order."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .config import ReductionConfig
from .geometry import cdiv, next_power_of_2
from .launch import Launch
from .norm import join_moments, lane_moments, update_statistics
from .running import Running, momentum_of, pointers_of


@triton.jit(do_not_specialize=("ROWS", "TILES"))
def tile_moments_fwd_kernel(
    y_ptr, moments_ptr,
    ROWS, C, TILES,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A tile of STEPS * BLOCK_P pixels, for BLOCK_C channels."""
    tile = tl.program_id(0).to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    first = tile * (STEPS * BLOCK_P)
    left = tl.minimum(ROWS - first, STEPS * BLOCK_P).to(tl.int32)
    y_ptr += first * C
    offs = offs_p[:, None] * C + c[None, :]
    pivot = tl.load(y_ptr + offs, mask=(offs_p < left)[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for step in range(1, STEPS):
        mask = (step * BLOCK_P + offs_p < left)[:, None] & mask_c[None, :]
        y = tl.load(y_ptr + step * BLOCK_P * C + offs, mask=mask, other=0.0).to(tl.float32)
        away = tl.where(mask, y - pivot, 0.0)
        total += away
        squares += away * away
    count = tl.maximum((left - offs_p + BLOCK_P - 1) // BLOCK_P, 0).to(tl.float32)
    count = tl.broadcast_to(count[:, None], [BLOCK_P, BLOCK_C])
    mean, m2 = lane_moments(pivot, total, squares, count)
    mean, m2, count = join_moments(mean, m2, count, 0)
    moments_ptr += tile * C + c
    stride_part = TILES.to(tl.int64) * C
    tl.store(moments_ptr, count, mask=mask_c)
    tl.store(moments_ptr + stride_part, mean, mask=mask_c)
    tl.store(moments_ptr + 2 * stride_part, m2, mask=mask_c)


@triton.jit(do_not_specialize=("ROWS", "TILES"))
def combine_moments_fwd_kernel(
    moments_ptr, mean_ptr, rstd_ptr, var_ptr, running_mean_ptrs, running_var_ptrs, counter_ptrs,
    ROWS, C, TILES, epsilon, correction, momentum,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, HAS_RUNNING: tl.constexpr,
):  # fmt: skip
    """Mean, 1 / deviation and variance of one branch from the moments of its tiles, BLOCK_T tiles at a time.

    A lane takes every BLOCK_T-th tile, from its first one's mean on: a large mean costs no digits.
    """
    m = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    t = tl.arange(0, BLOCK_T)
    stride_part = TILES.to(tl.int64) * C
    count_ptr = moments_ptr + m * 3 * stride_part + t.to(tl.int64)[:, None] * C + c[None, :]
    mask = (t < TILES)[:, None] & mask_c[None, :]
    count = tl.load(count_ptr, mask=mask, other=0.0)
    first = tl.load(count_ptr + stride_part, mask=mask, other=0.0)
    within = tl.load(count_ptr + 2 * stride_part, mask=mask, other=0.0)
    # An infinite one would make NaN of an infinite mean.
    pivot = tl.where(tl.abs(first) < float("inf"), first, 0.0)
    total = count * (first - pivot)
    squares = total * (first - pivot)
    for t0 in range(BLOCK_T, TILES, BLOCK_T):
        count_ptr += BLOCK_T * C
        mask = (t0 + t < TILES)[:, None] & mask_c[None, :]
        tile_count = tl.load(count_ptr, mask=mask, other=0.0)
        tile_mean = tl.load(count_ptr + stride_part, mask=mask, other=0.0)
        within += tl.load(count_ptr + 2 * stride_part, mask=mask, other=0.0)
        away = tl.where(mask, tile_mean - pivot, 0.0)
        count += tile_count
        total += tile_count * away
        squares += tile_count * away * away
    mean, m2 = lane_moments(pivot, total, squares, count)
    mean, m2, _ = join_moments(mean, m2 + within, count, 0)
    tl.store(mean_ptr + m * C + c, mean, mask=mask_c)
    var = m2 / ROWS
    tl.store(rstd_ptr + m * C + c, 1.0 / tl.sqrt_rn(var + epsilon), mask=mask_c)
    var *= correction
    tl.store(var_ptr + m * C + c, var, mask=mask_c)
    for i in tl.static_range(len(HAS_RUNNING)):
        if HAS_RUNNING[i] and m == i:
            update_statistics(
                running_mean_ptrs[i], running_var_ptrs[i], counter_ptrs[i], mean, var, c, mask_c, momentum,
                tl.program_id(0) == 0,
            )  # fmt: skip


def moment_tiles(pixels: int, config: ReductionConfig) -> int:
    """Tiles that `tile_moments_fwd` cuts `pixels` pixels of all samples into."""
    return cdiv(pixels, config.BLOCK_P * config.STEPS)


def tile_moments_fwd(y: torch.Tensor, moments: torch.Tensor, *, config: ReductionConfig) -> Launch:
    """Write `moments [3, TILES, C]` fp32: number, mean and centred second moment of each tile's values of a channel.

    `y [N, H, W, C]`, a branch's convolution, is contiguous; TILES is `moment_tiles(N * H * W, config)`.
    """
    n, h, w, c = y.shape
    tiles = moments.shape[1]
    arguments = (y, moments, n * h * w, c, tiles)
    constexprs = {"BLOCK_P": config.BLOCK_P, "BLOCK_C": config.BLOCK_C, "STEPS": config.STEPS}
    grid = (tiles, cdiv(c, config.BLOCK_C))
    options = {"num_warps": config.num_warps}
    return Launch(tile_moments_fwd_kernel, grid, arguments, constexprs, options, (config.STEPS - 1,))


def combine_moments_fwd(
    moments: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    var: torch.Tensor,
    running: Sequence[Running | None],
    *,
    pixels: int,
    epsilon: float,
    is_unbiased: bool,
) -> Launch:
    """Write `mean`, `rstd = 1 / sqrt(biased variance + epsilon)` and the variance `var`, `[M, C]` fp32, over `pixels`
    pixels from `moments [M, 3, TILES, C]`; update the `running` statistics of each branch's norm, if any.
    """
    m, _, tiles, c = moments.shape
    # 8 sums of each kind a thread; adjacent channels share a sector of memory.
    block_t = max(16, min(512, next_power_of_2(tiles)))
    correction = pixels / max(1, pixels - 1) if is_unbiased else 1.0
    return Launch(
        combine_moments_fwd_kernel,
        (cdiv(c, 8), m),
        (
            moments,
            mean,
            rstd,
            var,
            *pointers_of(running, mean),
            pixels,
            c,
            tiles,
            float(epsilon),
            correction,
            momentum_of(running),
        ),
        {"BLOCK_T": block_t, "BLOCK_C": 8, "HAS_RUNNING": tuple(own is not None for own in running)},
        {"num_warps": max(1, block_t // 32)},
        (cdiv(tiles, block_t) - 1,),
    )
