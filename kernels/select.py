"""Select: the attention-weighted sum of the branches (Li et al. 2019, Eq. 6)."""

import torch
import triton
import triton.language as tl

from .config import SelectConfig
from .geometry import cdiv


@triton.jit
def select_fwd_kernel(
    u_ptr, attention_ptr, v_ptr,
    H, W, C, TILES,
    stride_um, stride_un, stride_uh, stride_uw, stride_vn, stride_vc, stride_vh, stride_vw,
    M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_P pixels x BLOCK_C channels of one sample."""
    if IS_LARGE:
        stride_uh = tl.cast(stride_uh, tl.int64)
        stride_uw = tl.cast(stride_uw, tl.int64)
        stride_vc = tl.cast(stride_vc, tl.int64)
        stride_vh = tl.cast(stride_vh, tl.int64)
        stride_vw = tl.cast(stride_vw, tl.int64)
    pid = tl.program_id(0)
    n = (pid // TILES).to(tl.int64)
    offs_p = pid % TILES * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    y = offs_p // W
    x = offs_p % W
    mask = (y < H)[:, None] & mask_c[None, :]
    offs_u = (y * stride_uh + x * stride_uw)[:, None] + offs_c[None, :]
    u_ptr += n * stride_un
    attention_ptr += n * M * C
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for m in tl.static_range(M):
        a = tl.load(attention_ptr + m * C + offs_c, mask=mask_c, other=0.0)
        u = tl.load(u_ptr + offs_u, mask=mask, other=0.0)
        acc += u.to(tl.float32) * a[None, :]
        u_ptr += stride_um
    offs_v = (y * stride_vh + x * stride_vw)[:, None] + (offs_c * stride_vc)[None, :]
    tl.store(v_ptr + n * stride_vn + offs_v, acc.to(v_ptr.dtype.element_ty), mask=mask)


def select_fwd(u: torch.Tensor, attention: torch.Tensor, v: torch.Tensor, *, config: SelectConfig) -> None:
    """Write `v [N, C, H, W]` (any strides) = sum over m of `attention [N, M, C]` (fp32) times `u [M, N, H, W, C]`."""
    kernel, arguments, constexprs, launch = plan_select_launch(u, attention, v, config=config)
    kernel[launch["grid"]](*arguments, **constexprs, num_warps=launch["num_warps"])


def plan_select_launch(u, attention, v, *, config):
    """The launch that `select_fwd` makes, as (kernel, arguments, constexprs, grid and options); nothing is run."""
    m, n, h, w, c = u.shape
    tiles = cdiv(h * w, config.BLOCK_P)
    extent_u = (h - 1) * u.stride(2) + (w - 1) * u.stride(3) + c
    extent_v = (h - 1) * v.stride(2) + (w - 1) * v.stride(3) + (c - 1) * v.stride(1)
    arguments = (
        u, attention, v, h, w, c, tiles,
        u.stride(0), u.stride(1), u.stride(2), u.stride(3), v.stride(0), v.stride(1), v.stride(2), v.stride(3),
    )  # fmt: skip
    constexprs = {
        "M": m,
        "BLOCK_P": config.BLOCK_P,
        "BLOCK_C": config.BLOCK_C,
        "IS_LARGE": max(extent_u, extent_v) >= 2**31,
    }
    launch = {"grid": (n * tiles, cdiv(c, config.BLOCK_C)), "num_warps": config.num_warps}
    return select_fwd_kernel, arguments, constexprs, launch
