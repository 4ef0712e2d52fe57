"""Depthwise branch convolutions (one channel per group): fp32 multiply-adds vectorised over channels."""

import triton
import triton.language as tl

from .branch_call import BranchCall, branch_constexprs
from .config import DepthwiseConfig
from .launch import Launch
from .tiling import SIZES, locate_tile, relu, run_origin, widen


@triton.jit
def depthwise_branch(
    x_ptr, w_ptr, shift_ptr, u_ptr, pool,
    sample, run_h, x, offs_c, mask_c, N_LEFT, H_IN, W_IN, H, W, C,
    stride_xn, stride_xh, stride_xw, stride_un, stride_uh, stride_uw,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, SPACING: tl.constexpr, RUN_H: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr,
):  # fmt: skip
    """One branch of one tile: stores `u` and returns `pool` with the tile's sums added."""
    HALF: tl.constexpr = KERNEL // 2
    STEP: tl.constexpr = SPACING * STRIDE // DILATION
    y = run_origin(run_h, RUN_H, SPACING)
    mask_p = (y < H) & (x < W) & (sample < N_LEFT)
    y_in = y * STRIDE - HALF * DILATION
    x_in = x * STRIDE - HALF * DILATION
    offs_x = (sample * stride_xn + y_in * stride_xh + x_in * stride_xw)[:, None] + offs_c[None, :]
    offs_u = (sample * stride_un + y * stride_uh + x * stride_uw)[:, None] + offs_c[None, :]

    rows = ()
    for i in tl.static_range((RUN_H - 1) * STEP + KERNEL):
        in_rows = mask_p & (y_in + i * DILATION >= 0) & (y_in + i * DILATION < H_IN)
        for kx in tl.static_range(KERNEL):
            mask = (in_rows & (x_in + kx * DILATION >= 0) & (x_in + kx * DILATION < W_IN))[:, None] & mask_c[
                None, :
            ]
            row = i * DILATION * stride_xh + kx * DILATION * stride_xw
            rows = rows + (tl.load(x_ptr + row + offs_x, mask=mask, other=0.0),)
    weights = ()
    for tap in tl.static_range(KERNEL * KERNEL):
        weights = weights + (tl.load(w_ptr + tap * C + offs_c, mask=mask_c, other=0.0),)

    if HAS_SHIFT:
        shift = tl.load(shift_ptr + offs_c, mask=mask_c, other=0.0)
        start = tl.broadcast_to(shift[None, :], [BLOCK_P, BLOCK_C])
    else:
        start = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for r in tl.static_range(RUN_H):
        acc = start
        for tap in tl.static_range(KERNEL * KERNEL):
            row = rows[(r * STEP + tap // KERNEL) * KERNEL + tap % KERNEL]
            acc += row.to(tl.float32) * weights[tap].to(tl.float32)[None, :]
        if HAS_RELU:
            acc = relu(acc)
        mask = (mask_p & (y + r * SPACING < H))[:, None] & mask_c[None, :]
        tl.store(u_ptr + r * SPACING * stride_uh + offs_u, acc.to(u_ptr.dtype.element_ty), mask=mask)
        pool += tl.where(mask, acc, 0.0)
    return pool


@triton.jit(do_not_specialize=SIZES)
def branch_conv_depthwise_fwd_kernel(
    x_ptr, w_ptr, shift_ptr, u_ptr, partial_ptr,
    N, H_IN, W_IN, H, W, C, TILES_H, TILES_W, CHANNEL_PROGRAMS,
    stride_xn, stride_xh, stride_xw, stride_um, stride_un, stride_uh, stride_uw,
    stride_partial_n, stride_partial_t,
    KERNELS: tl.constexpr, DILATIONS: tl.constexpr, SPACINGS: tl.constexpr, W_OFFSETS: tl.constexpr,
    STRIDE: tl.constexpr, SPLIT_CI: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, RUN_H: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """Every branch of one tile: `u[m]` and the tile's pooled sums over branches and pixels.

    A tile is BLOCK_N samples x BLOCK_H column runs (RUN_H outputs each) x BLOCK_W columns x BLOCK_C channels.
    """
    BLOCK_P: tl.constexpr = BLOCK_N * BLOCK_H * BLOCK_W
    stride_xn, stride_xh, stride_xw = widen(stride_xn, stride_xh, stride_xw, IS_LARGE)
    stride_un, stride_uh, stride_uw = widen(stride_un, stride_uh, stride_uw, IS_LARGE)
    channel_program, tile, tile_h, tile_w, block_n = locate_tile(
        tl.program_id(0), CHANNEL_PROGRAMS, TILES_H, TILES_W
    )
    n0 = block_n.to(tl.int64) * BLOCK_N
    n_left = tl.minimum(N - n0, BLOCK_N).to(tl.int32)
    offs_p = tl.arange(0, BLOCK_P)
    sample = offs_p // (BLOCK_H * BLOCK_W)
    run_h = tile_h * BLOCK_H + offs_p // BLOCK_W % BLOCK_H
    x = tile_w * BLOCK_W + offs_p % BLOCK_W
    offs_c = channel_program * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    x_ptr += n0 * stride_xn
    u_ptr += n0 * stride_un
    partial_ptr += n0 * stride_partial_n + tile.to(tl.int64) * stride_partial_t
    pool = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for m in tl.static_range(len(KERNELS)):
        pool = depthwise_branch(
            x_ptr + m * SPLIT_CI, w_ptr + W_OFFSETS[m] * C, shift_ptr + m * C, u_ptr, pool,
            sample, run_h, x, offs_c, mask_c, n_left, H_IN, W_IN, H, W, C,
            stride_xn, stride_xh, stride_xw, stride_un, stride_uh, stride_uw,
            KERNELS[m], DILATIONS[m], STRIDE, SPACINGS[m], RUN_H,
            BLOCK_P, BLOCK_C, HAS_SHIFT, HAS_RELU,
        )  # fmt: skip
        u_ptr += stride_um
    sums = tl.sum(tl.reshape(pool, [BLOCK_N, BLOCK_H * BLOCK_W, BLOCK_C]), axis=1)
    offs_n = tl.arange(0, BLOCK_N)
    mask = (offs_n < n_left)[:, None] & mask_c[None, :]
    tl.store(partial_ptr + offs_n[:, None] * stride_partial_n + offs_c[None, :], sums, mask=mask)


def branch_conv_depthwise_fwd(call: BranchCall[DepthwiseConfig]) -> Launch:
    constexprs = {**branch_constexprs(call), "SPACINGS": call.layout.spacings}
    arguments = call.storing_arguments(call.shape.c_out)
    return Launch(branch_conv_depthwise_fwd_kernel, call.grid, arguments, constexprs, call.options)
