"""The gate inside the selection: a launch less where few samples leave it nothing to amortise (Li et al. 2019, Eqs. 2,
3, 5 and 6)."""

import torch
import triton
import triton.language as tl

from .config import GatedSelectConfig
from .gate import all_logits
from .geometry import cdiv, needs_64_bits, next_power_of_2
from .launch import Launch
from .select import output_pixel_stride
from .tiling import widen


@triton.jit(do_not_specialize=("PIXELS", "TILES", "SUMS"))
def gated_select_fwd_kernel(
    u_ptr, partial_ptr, reduce_ptr, scale_ptr, shift_ptr, select_ptr, select_bias_ptr, v_ptr,
    PIXELS, C, D, TILES, SUMS,
    stride_um, stride_un, stride_up, stride_partial_n, stride_partial_t, stride_vn, stride_vc, stride_vp,
    M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, IS_ONE_BLOCK_D: tl.constexpr,
    HAS_RELU: tl.constexpr, HAS_SELECT_BIAS: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_P pixels x BLOCK_C channels of one sample, of TILES; its attention from SUMS pooled tiles.

    Every program computes the whole descriptor, as those of `gate_fwd_kernel` do.
    """
    ROWS: tl.constexpr = 16
    stride_up, stride_vc, stride_vp = widen(stride_up, stride_vc, stride_vp, IS_LARGE)
    pid = tl.program_id(0)
    n = (pid // TILES).to(tl.int64)
    p = pid % TILES * BLOCK_P + tl.arange(0, BLOCK_P)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    mask = (p < PIXELS)[:, None] & (c < C)[None, :]
    # In fp32 the gate leaves no registers for what is loaded early.
    IS_EARLY: tl.constexpr = u_ptr.dtype.element_ty != tl.float32
    u_ptr += n * stride_un
    stride_um = tl.cast(stride_um, tl.int64)
    offs_u = (p * stride_up)[:, None] + c[None, :]
    us = ()
    if IS_EARLY:
        for m in tl.static_range(M):
            us = us + (tl.load(u_ptr + m * stride_um + offs_u, mask=mask, other=0.0),)
    logits = all_logits(
        partial_ptr, reduce_ptr, scale_ptr, shift_ptr, select_ptr, select_bias_ptr,
        n + tl.zeros([BLOCK_T], tl.int64), tl.full([BLOCK_T], True, tl.int1), c0, SUMS, C, D, PIXELS,
        stride_partial_n, stride_partial_t,
        M, BLOCK_M, 1, ROWS, BLOCK_T, BLOCK_S, BLOCK_D, BLOCK_C, IS_ONE_BLOCK_D, HAS_RELU, HAS_SELECT_BIAS,
    )  # fmt: skip
    # The rows of the products are this sample's, all of them.
    logits = tl.reshape(tl.max(logits, axis=0), [BLOCK_M, BLOCK_C])
    # As in `gate_fwd_kernel`: the subtraction hands NaN on.
    e = tl.exp(logits - tl.max(logits, axis=0)[None, :])
    attention = tl.reshape(e / tl.sum(e, axis=0)[None, :], [BLOCK_M * BLOCK_C])
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for m in tl.static_range(M):
        # Gathered, a few values change their layout; else Triton brings the branches to that of the attention.
        a = tl.gather(attention, m * BLOCK_C + tl.arange(0, BLOCK_C), axis=0)
        if IS_EARLY:
            acc += us[m].to(tl.float32) * a[None, :]
        else:
            acc += tl.load(u_ptr + m * stride_um + offs_u, mask=mask, other=0.0) * a[None, :]
    offs_v = (p * stride_vp)[:, None] + (c * stride_vc)[None, :]
    tl.store(v_ptr + n * stride_vn + offs_v, acc.to(v_ptr.dtype.element_ty), mask=mask)


def gated_select_fwd(
    u: torch.Tensor,
    partial: torch.Tensor,
    reduce_weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    select_weight: torch.Tensor,
    select_bias: torch.Tensor | None,
    v: torch.Tensor,
    *,
    has_relu: bool,
    config: GatedSelectConfig,
) -> Launch:
    """Write `v [N, C, H, W]`: what `gate_fwd` and `select_fwd` do, in one launch.

    `u [M, N, H, W, C]` holds the branches, channels adjacent; `partial [N, tiles, C]`, `reduce_weight`, `scale`,
    `shift`, `select_weight` and `select_bias` as `gate_fwd` takes them; `v` as `select_fwd` takes it.

    Raises:
        ValueError: a `v` whose pixels are not equally spaced.
    """
    m, n, h, w, c = u.shape
    d = reduce_weight.shape[0]
    stride_vp = output_pixel_stride(v)
    tiles = cdiv(h * w, config.BLOCK_P)
    arguments = (
        u, partial, reduce_weight, scale, shift, select_weight, scale if select_bias is None else select_bias, v,
        h * w, c, d, tiles, partial.shape[1],
        u.stride(0), u.stride(1), u.stride(3), partial.stride(0), partial.stride(1),
        v.stride(0), v.stride(1), stride_vp,
    )  # fmt: skip
    constexprs = {
        "M": m,
        "BLOCK_M": next_power_of_2(m),
        "BLOCK_P": config.BLOCK_P,
        "BLOCK_C": config.BLOCK_C,
        "BLOCK_T": min(config.BLOCK_T, next_power_of_2(partial.shape[1])),
        "BLOCK_S": config.BLOCK_S,
        "BLOCK_D": config.BLOCK_D,
        "IS_ONE_BLOCK_D": d <= config.BLOCK_D,
        "HAS_RELU": has_relu,
        "HAS_SELECT_BIAS": select_bias is not None,
        "IS_LARGE": needs_64_bits(u, v),
    }
    grid = (n * tiles, cdiv(c, config.BLOCK_C))
    return Launch(gated_select_fwd_kernel, grid, arguments, constexprs, {"num_warps": config.num_warps})
