"""The backward pass's one reduction: what the gradient of the selected output says of each branch and channel."""

import torch
import triton
import triton.language as tl

from .config import ReductionConfig
from .geometry import cdiv, needs_64_bits, pixel_stride
from .lanes import lane_sums, lanes
from .launch import Launch
from .norm import activation_mask, load_norm, normalized
from .tiling import widen


@triton.jit(do_not_specialize=("PIXELS", "TILES", "N"))
def select_bwd_kernel(
    dv_ptr, y_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, grad_ptr, scaled_ptr, active_ptr, pooled_ptr,
    N, PIXELS, C, TILES, stride_dn, stride_dp, stride_ym, stride_yn, stride_yp,
    M: tl.constexpr, BLOCK_P: tl.constexpr, LANES_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_RELU: tl.constexpr, HAS_POOLED: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """All branches of one sample, STEPS * BLOCK_P of its pixels, by LANES_P lanes. Branches after the first find dv in
    a cache.
    """
    stride_dp, stride_yp, _ = widen(stride_dp, stride_yp, stride_yp, IS_LARGE)
    tile = tl.program_id(0) % TILES
    n = (tl.program_id(0) // TILES).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    dv_ptr += n * stride_dn
    y_ptr += n * stride_yn
    for m in tl.static_range(M):
        mean, rstd, gamma, beta = load_norm(
            mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, m * C + c, mask_c, HAS_NORM
        )
        grad = tl.zeros([LANES_P, BLOCK_C], tl.float32)
        scaled = tl.zeros([LANES_P, BLOCK_C], tl.float32)
        if HAS_POOLED:
            active = tl.zeros([LANES_P, BLOCK_C], tl.float32)
            pooled = tl.zeros([LANES_P, BLOCK_C], tl.float32)
        p = tile * STEPS * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (p < PIXELS)[:, None] & mask_c[None, :]
        dv_next = tl.load(dv_ptr + (p * stride_dp)[:, None] + c[None, :], mask=mask, other=0.0)
        y_next = tl.load(y_ptr + (p * stride_yp)[:, None] + c[None, :], mask=mask, other=0.0)
        for step in range(STEPS):
            # The next step's loads are on their way while this one's values are added.
            dv, y, mask = dv_next.to(tl.float32), y_next, (p < PIXELS)[:, None] & mask_c[None, :]
            p += BLOCK_P
            mask_next = ((p < PIXELS) & (step + 1 < STEPS))[:, None] & mask_c[None, :]
            dv_next = tl.load(dv_ptr + (p * stride_dp)[:, None] + c[None, :], mask=mask_next, other=0.0)
            y_next = tl.load(y_ptr + (p * stride_yp)[:, None] + c[None, :], mask=mask_next, other=0.0)
            y_hat = normalized(y, mean, rstd, HAS_NORM)
            is_active = activation_mask(y_hat, gamma, beta, mask, HAS_NORM, HAS_RELU)
            grad += lane_sums(tl.where(is_active, dv, 0.0), LANES_P)
            scaled += lane_sums(tl.where(is_active, dv * y_hat, 0.0), LANES_P)
            if HAS_POOLED:
                active += lane_sums(tl.where(is_active, 1.0, 0.0), LANES_P)
                pooled += lane_sums(tl.where(is_active, y_hat, 0.0), LANES_P)
        offs = ((tile.to(tl.int64) * N + n) * M + m) * C + c
        tl.store(grad_ptr + offs, tl.sum(grad, axis=0), mask=mask_c)
        tl.store(scaled_ptr + offs, tl.sum(scaled, axis=0), mask=mask_c)
        if HAS_POOLED:
            tl.store(active_ptr + offs, tl.sum(active, axis=0), mask=mask_c)
            tl.store(pooled_ptr + offs, tl.sum(pooled, axis=0), mask=mask_c)
        y_ptr += stride_ym


def select_bwd(
    dv: torch.Tensor,
    y: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    grad: torch.Tensor,
    scaled: torch.Tensor,
    active: torch.Tensor | None = None,
    pooled: torch.Tensor | None = None,
    *,
    has_norm: bool,
    has_relu: bool,
    config: ReductionConfig,
) -> Launch:
    """Write `grad = sum mask * dv` and `scaled = sum mask * dv * y_hat` over each tile's pixels, `[TILES, N, M, C]`
    fp32; `active` and `pooled` too where they are given.

    `dv [N, C, H, W]` with adjacent channels and equally spaced pixels; the rest as `pooled_moments_fwd`.
    """
    m, n, h, w, c = y.shape
    tiles = grad.shape[0]
    stride_dp = gradient_pixel_stride(dv)
    arguments = (
        dv, y, mean, rstd, gamma, beta, grad, scaled,
        grad if active is None else active, grad if pooled is None else pooled, n, h * w, c, tiles,
        dv.stride(0), stride_dp, y.stride(0), y.stride(1), y.stride(3),
    )  # fmt: skip
    constexprs = {
        "M": m,
        "BLOCK_P": config.BLOCK_P,
        "LANES_P": lanes(y.dtype, config),
        "BLOCK_C": config.BLOCK_C,
        "STEPS": config.STEPS,
        "HAS_NORM": has_norm,
        "HAS_RELU": has_relu,
        "HAS_POOLED": active is not None,
        "IS_LARGE": needs_64_bits(dv, y),
    }
    grid = (n * tiles, cdiv(c, config.BLOCK_C))
    options = {"num_warps": config.num_warps}
    return Launch(select_bwd_kernel, grid, arguments, constexprs, options, (config.STEPS,) * m)


def gradient_pixel_stride(dv: torch.Tensor) -> int:
    """:func:`.geometry.pixel_stride` of a gradient `dv [N, C, H, W]`.

    Raises:
        ValueError: channels that are not adjacent, or pixels that are not equally spaced.
    """
    stride = pixel_stride(dv)
    if not stride or (dv.shape[1] > 1 and dv.stride(1) != 1):
        raise ValueError(
            f"dv must have adjacent channels and equally spaced pixels, got strides {dv.stride()} for shape "
            f"{tuple(dv.shape)}"
        )
    return stride
