"""The gradient of each branch's convolution, written out: for convolutions whose own gradients a library computes."""

import torch
import triton
import triton.language as tl

from .config import SelectConfig
from .geometry import cdiv, needs_64_bits
from .launch import Launch
from .norm import activation_mask, load_norm, normalized
from .select_bwd import gradient_pixel_stride
from .tiling import widen


@triton.jit(do_not_specialize=("PIXELS", "TILES"))
def norm_bwd_kernel(
    dv_ptr, y_ptr, attention_ptr, pooled_grad_ptr,
    mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, dbeta_ptr, dgamma_ptr, dy_ptr,
    PIXELS, C, TILES, stride_dn, stride_dp, stride_ym, stride_yn, stride_yp,
    M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_RELU: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """All branches of BLOCK_P pixels x BLOCK_C channels of one sample."""
    stride_dp, stride_yp, _ = widen(stride_dp, stride_yp, stride_yp, IS_LARGE)
    n = (tl.program_id(0) // TILES).to(tl.int64)
    p = tl.program_id(0) % TILES * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    mask = (p < PIXELS)[:, None] & mask_c[None, :]
    offs_dv = (p * stride_dp)[:, None] + c[None, :]
    dv = tl.load(dv_ptr + n * stride_dn + offs_dv, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(pooled_grad_ptr + n * C + c, mask=mask_c, other=0.0)[None, :]
    offs = (p * stride_yp)[:, None] + c[None, :]
    y_ptr += n * stride_yn
    dy_ptr += n * stride_yn
    for m in tl.static_range(M):
        mean, rstd, gamma, beta = load_norm(
            mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, m * C + c, mask_c, HAS_NORM
        )
        a = tl.load(attention_ptr + (n * M + m) * C + c, mask=mask_c, other=0.0)[None, :]
        y_hat = normalized(tl.load(y_ptr + offs, mask=mask, other=0.0), mean, rstd, HAS_NORM)
        is_active = activation_mask(y_hat, gamma, beta, mask, HAS_NORM, HAS_RELU)
        dy = tl.where(is_active, a * dv + g, 0.0)
        if HAS_NORM:
            dbeta = tl.load(dbeta_ptr + m * C + c, mask=mask_c, other=0.0)[None, :]
            dgamma = tl.load(dgamma_ptr + m * C + c, mask=mask_c, other=0.0)[None, :]
            dy = (dy - dbeta - y_hat * dgamma) * (gamma * rstd)
        tl.store(dy_ptr + offs, dy.to(dy_ptr.dtype.element_ty), mask=mask)
        y_ptr += stride_ym
        dy_ptr += stride_ym


def norm_bwd(
    dv: torch.Tensor,
    y: torch.Tensor,
    attention: torch.Tensor,
    pooled_grad: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    dbeta: torch.Tensor,
    dgamma: torch.Tensor,
    dy: torch.Tensor,
    *,
    has_norm: bool,
    has_relu: bool,
    config: SelectConfig,
) -> Launch:
    """Write `dy = gamma * rstd * (mask * (attention * dv + pooled_grad) - dbeta - y_hat * dgamma)`, of y's layout.

    `attention [N, M, C]` and `pooled_grad [N, C]` fp32 contiguous; `dbeta`, `dgamma` `[M, C]` fp32: the norm's
    gradients over the number of pixels, 0 where the statistics are not the batch's. Without a norm,
    `dy = mask * (attention * dv + pooled_grad)`. The rest as `select_bwd`.
    """
    m, n, h, w, c = y.shape
    tiles = cdiv(h * w, config.BLOCK_P)
    stride_dp = gradient_pixel_stride(dv)
    arguments = (
        dv, y, attention, pooled_grad, mean, rstd, gamma, beta, dbeta, dgamma, dy, h * w, c, tiles,
        dv.stride(0), stride_dp, y.stride(0), y.stride(1), y.stride(3),
    )  # fmt: skip
    constexprs = {
        "M": m,
        "BLOCK_P": config.BLOCK_P,
        "BLOCK_C": config.BLOCK_C,
        "HAS_NORM": has_norm,
        "HAS_RELU": has_relu,
        "IS_LARGE": needs_64_bits(dv, y),
    }
    grid = (n * tiles, cdiv(c, config.BLOCK_C))
    return Launch(norm_bwd_kernel, grid, arguments, constexprs, {"num_warps": config.num_warps})
