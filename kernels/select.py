"""Select: the attention-weighted sum of the branches (Li et al. 2019, Eq. 6)."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .config import SelectConfig
from .geometry import cdiv, needs_64_bits, pixel_stride
from .launch import Launch
from .norm import activated, load_norm, normalized, shifted
from .tiling import widen


@triton.jit(do_not_specialize=("PIXELS", "TILES"))
def select_fwd_kernel(
    u_ptrs, attention_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, v_ptr,
    PIXELS, C, TILES,
    stride_un, stride_up, stride_vn, stride_vc, stride_vp,
    M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_P pixels x BLOCK_C channels of one sample; without a norm, `beta_ptr` may hold shifts."""
    stride_up, stride_vc, stride_vp = widen(stride_up, stride_vc, stride_vp, IS_LARGE)
    # Backwards: what the launch before read or wrote last is still in L2.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    n = (pid // TILES).to(tl.int64)
    p = pid % TILES * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    mask = (p < PIXELS)[:, None] & mask_c[None, :]
    offs_u = (p * stride_up)[:, None] + c[None, :]
    attention_ptr += n * (M * C)
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for m in tl.static_range(M):
        a = tl.load(attention_ptr + m * C + c, mask=mask_c, other=0.0)
        u = tl.load(u_ptrs[m] + n * stride_un + offs_u, mask=mask, other=0.0)
        u = shifted(u, beta_ptr, m * C + c, mask_c, HAS_SHIFT)
        mean, rstd, gamma, beta = load_norm(
            mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, m * C + c, mask_c, HAS_NORM
        )
        u = activated(normalized(u, mean, rstd, HAS_NORM), gamma, beta, HAS_NORM, HAS_RELU)
        acc += u * a[None, :]
    offs_v = (p * stride_vp)[:, None] + (c * stride_vc)[None, :]
    tl.store(v_ptr + n * stride_vn + offs_v, acc.to(v_ptr.dtype.element_ty), mask=mask)


def output_pixel_stride(v: torch.Tensor) -> int:
    """:func:`.geometry.pixel_stride` of an output `v [N, C, H, W]`.

    Raises:
        ValueError: pixels that are not equally spaced.
    """
    stride = pixel_stride(v)
    if not stride:
        raise ValueError(
            f"v must have equally spaced pixels, got strides {v.stride()} for shape {tuple(v.shape)}"
        )
    return stride


def select_fwd(
    u: torch.Tensor | Sequence[torch.Tensor],
    attention: torch.Tensor,
    v: torch.Tensor,
    *,
    norm: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    shift: torch.Tensor | None = None,
    has_relu: bool = False,
    config: SelectConfig,
) -> Launch:
    """Write `v [N, C, H, W]` = sum over m of `attention [N, M, C]` (fp32) times `u [M, N, H, W, C]` (contiguous).

    `u` may be M tensors `[N, H, W, C]` instead. It holds the branches, or their convolutions; then the sum is over
    `act((u - mean) * rstd * gamma + beta)` with `norm = (mean, rstd, gamma, beta)`, or over `act(u + shift)`, each
    `[M, C]` fp32 or None. `v` is contiguous in NCHW or channels_last: its pixels are equally spaced.

    Raises:
        ValueError: both a norm and a shift, or a `v` whose pixels are not equally spaced.
    """
    us = tuple(u)
    n, h, w, c = us[0].shape
    if norm is not None and shift is not None:
        raise ValueError("shift must be None where there is a norm, whose beta it is")
    stride_vp = output_pixel_stride(v)
    tiles = cdiv(h * w, config.BLOCK_P)
    stride_un, _, stride_up, _ = us[0].stride()
    absent = attention  # any pointer: it is not followed
    arguments = (
        us, attention, *(norm or (absent, absent, absent, absent if shift is None else shift)), v, h * w, c, tiles,
        stride_un, stride_up, v.stride(0), v.stride(1), stride_vp,
    )  # fmt: skip
    constexprs = {
        "M": len(us),
        "BLOCK_P": config.BLOCK_P,
        "BLOCK_C": config.BLOCK_C,
        "HAS_NORM": norm is not None,
        "HAS_SHIFT": shift is not None,
        "HAS_RELU": has_relu,
        "IS_LARGE": needs_64_bits(us[0], v),
    }
    grid = (n * tiles, cdiv(c, config.BLOCK_C))
    return Launch(select_fwd_kernel, grid, arguments, constexprs, {"num_warps": config.num_warps})
