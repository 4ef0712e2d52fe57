"""What the gate pools in training, in terms that its gradient needs again: one pass over the branches' convolutions."""

import torch
import triton
import triton.language as tl

from .config import ReductionConfig
from .geometry import cdiv, needs_64_bits
from .lanes import lane_sums, lanes
from .launch import Launch
from .norm import activation_mask, load_norm, normalized
from .tiling import widen


@triton.jit(do_not_specialize=("PIXELS", "TILES", "N"))
def pooled_moments_fwd_kernel(
    y_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, active_ptr, pooled_ptr,
    N, PIXELS, C, TILES, stride_ym, stride_yn, stride_yp,
    M: tl.constexpr, BLOCK_P: tl.constexpr, LANES_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_RELU: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """One branch of one sample, STEPS * BLOCK_P of its pixels, by LANES_P lanes: counts and sums over active ones."""
    stride_yp, _, _ = widen(stride_yp, stride_yp, stride_yp, IS_LARGE)
    tile = tl.program_id(0) % TILES
    n = (tl.program_id(0) // TILES).to(tl.int64)
    m = tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    mean, rstd, gamma, beta = load_norm(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, m * C + c, mask_c, HAS_NORM)
    y_ptr += m.to(tl.int64) * stride_ym + n * stride_yn
    count = tl.zeros([LANES_P, BLOCK_C], tl.float32)
    total = tl.zeros([LANES_P, BLOCK_C], tl.float32)
    p = tile * STEPS * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (p < PIXELS)[:, None] & mask_c[None, :]
    y_next = tl.load(y_ptr + (p * stride_yp)[:, None] + c[None, :], mask=mask, other=0.0)
    for step in range(STEPS):
        # The next step's loads are on their way while this one's values are added.
        y, mask = y_next, (p < PIXELS)[:, None] & mask_c[None, :]
        p += BLOCK_P
        mask_next = ((p < PIXELS) & (step + 1 < STEPS))[:, None] & mask_c[None, :]
        y_next = tl.load(y_ptr + (p * stride_yp)[:, None] + c[None, :], mask=mask_next, other=0.0)
        y_hat = normalized(y, mean, rstd, HAS_NORM)
        is_active = activation_mask(y_hat, gamma, beta, mask, HAS_NORM, HAS_RELU)
        count += lane_sums(tl.where(is_active, 1.0, 0.0), LANES_P)
        total += lane_sums(tl.where(is_active, y_hat, 0.0), LANES_P)
    offs = ((tile.to(tl.int64) * N + n) * M + m) * C + c
    tl.store(active_ptr + offs, tl.sum(count, axis=0), mask=mask_c)
    tl.store(pooled_ptr + offs, tl.sum(total, axis=0), mask=mask_c)


def pooled_moments_fwd(
    y: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    active: torch.Tensor,
    pooled: torch.Tensor,
    *,
    has_norm: bool,
    has_relu: bool,
    config: ReductionConfig,
) -> Launch:
    """Write `active = sum mask` and `pooled = sum mask * y_hat` over the pixels of each tile, `[TILES, N, M, C]` fp32.

    `y [M, N, H, W, C]` contiguous; `mean`, `rstd`, `gamma`, `beta` `[M, C]` fp32, read with `has_norm`;
    `y_hat = (y - mean) * rstd`, `mask = gamma * y_hat + beta > 0`. Without a norm y_hat is y, without ReLU the mask
    is 1. TILES is the size of `active`: `cdiv(H * W, BLOCK_P * STEPS)`.
    """
    m, n, h, w, c = y.shape
    tiles = active.shape[0]
    arguments = (
        y, mean, rstd, gamma, beta, active, pooled, n, h * w, c, tiles, y.stride(0), y.stride(1), y.stride(3),
    )  # fmt: skip
    constexprs = {
        "M": m,
        "BLOCK_P": config.BLOCK_P,
        "LANES_P": lanes(y.dtype, config),
        "BLOCK_C": config.BLOCK_C,
        "STEPS": config.STEPS,
        "HAS_NORM": has_norm,
        "HAS_RELU": has_relu,
        "IS_LARGE": needs_64_bits(y),
    }
    grid = (n * tiles, cdiv(c, config.BLOCK_C), m)
    options = {"num_warps": config.num_warps}
    return Launch(pooled_moments_fwd_kernel, grid, arguments, constexprs, options, (config.STEPS,))
