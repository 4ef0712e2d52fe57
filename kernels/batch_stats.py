"""Statistics of the branches' convolutions over a batch: by tiles, then combined in a fixed order."""

import torch
import triton
import triton.language as tl

from .config import ReductionConfig
from .geometry import cdiv
from .launch import Launch
from .norm import fold_moments


@triton.jit(do_not_specialize=("ROWS", "TILES"))
def tile_moments_fwd_kernel(
    y_ptr, mean_ptr, m2_ptr, count_ptr,
    ROWS, C, TILES, stride_ym,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Mean and centred second moment of one branch over a tile of STEPS * BLOCK_P pixels, for BLOCK_C channels."""
    tile = tl.program_id(0)
    m = tl.program_id(2)
    offs_p = tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    first = tile.to(tl.int64) * (STEPS * BLOCK_P)
    left = tl.minimum(ROWS - first, STEPS * BLOCK_P).to(tl.int32)
    y_ptr += m.to(tl.int64) * stride_ym + first * C
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
    mean, m2 = fold_moments(pivot, total, squares, count[:, None])
    offs_tile = (m * TILES + tile).to(tl.int64)
    tl.store(mean_ptr + offs_tile * C + c, mean, mask=mask_c)
    tl.store(m2_ptr + offs_tile * C + c, m2, mask=mask_c)
    if tl.program_id(1) == 0:
        tl.store(count_ptr + offs_tile, left.to(tl.float32))


@triton.jit(do_not_specialize=("ROWS", "TILES"))
def combine_moments_fwd_kernel(
    tile_mean_ptr, tile_m2_ptr, count_ptr, mean_ptr, var_ptr,
    ROWS, C, TILES,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of one branch from those of its tiles (Chan et al. 1979), BLOCK_T tiles at a time."""
    m = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    tile_mean_ptr += m * TILES * C
    tile_m2_ptr += m * TILES * C
    count_ptr += m * TILES
    pivot = tl.load(tile_mean_ptr + c, mask=mask_c, other=0.0)[None, :]
    total = tl.zeros([BLOCK_C], tl.float32)
    for t0 in range(0, TILES, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        offs = t.to(tl.int64)[:, None] * C + c[None, :]
        mask = (t < TILES)[:, None] & mask_c[None, :]
        count = tl.load(count_ptr + t, mask=t < TILES, other=0.0)[:, None]
        tile_mean = tl.load(tile_mean_ptr + offs, mask=mask, other=0.0)
        total += tl.sum(tl.where(mask, count * (tile_mean - pivot), 0.0), axis=0)
    mean = pivot + (total / ROWS)[None, :]
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for t0 in range(0, TILES, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        offs = t.to(tl.int64)[:, None] * C + c[None, :]
        mask = (t < TILES)[:, None] & mask_c[None, :]
        count = tl.load(count_ptr + t, mask=t < TILES, other=0.0)[:, None]
        away = tl.load(tile_mean_ptr + offs, mask=mask, other=0.0) - mean
        within = tl.load(tile_m2_ptr + offs, mask=mask, other=0.0)
        m2 += tl.sum(tl.where(mask, within + count * away * away, 0.0), axis=0)
    tl.store(mean_ptr + m * C + c, tl.sum(mean, axis=0), mask=mask_c)
    tl.store(var_ptr + m * C + c, m2 / ROWS, mask=mask_c)


def moment_tiles(pixels: int, config: ReductionConfig) -> int:
    """Tiles that `tile_moments_fwd` cuts `pixels` pixels of all samples into."""
    return cdiv(pixels, config.BLOCK_P * config.STEPS)


def tile_moments_fwd(
    y: torch.Tensor,
    tile_mean: torch.Tensor,
    tile_m2: torch.Tensor,
    count: torch.Tensor,
    *,
    config: ReductionConfig,
) -> Launch:
    """Write mean and centred second moment, `[M, TILES, C]`, and pixels, `[M, TILES]`, of the tiles of `y`, all fp32.

    `y [M, N, H, W, C]` is contiguous; TILES is `moment_tiles(N * H * W, config)`.
    """
    m, n, h, w, c = y.shape
    tiles = tile_mean.shape[1]
    arguments = (y, tile_mean, tile_m2, count, n * h * w, c, tiles, y.stride(0))
    constexprs = {"BLOCK_P": config.BLOCK_P, "BLOCK_C": config.BLOCK_C, "STEPS": config.STEPS}
    grid = (tiles, cdiv(c, config.BLOCK_C), m)
    return Launch(
        tile_moments_fwd_kernel,
        grid,
        arguments,
        constexprs,
        {"num_warps": config.num_warps},
        (config.STEPS - 1,),
    )


def combine_moments_fwd(
    tile_mean: torch.Tensor,
    tile_m2: torch.Tensor,
    count: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    *,
    pixels: int,
) -> Launch:
    """Write `mean` and biased `var`, `[M, C]` fp32, over `pixels` pixels from the moments of their tiles."""
    m, tiles, c = tile_mean.shape
    block_t = 256
    arguments = (tile_mean, tile_m2, count, mean, var, pixels, c, tiles)
    trips = (cdiv(tiles, block_t),) * 2
    return Launch(
        combine_moments_fwd_kernel,
        (cdiv(c, 8), m),
        arguments,
        {"BLOCK_T": block_t, "BLOCK_C": 8},
        {"num_warps": 4},
        trips,
    )
