"""Branch convolutions for every other case: wide groups, dense, large kernels. One product per kernel tap.

The same formulation as `branch_conv_stream`, without its unrolling: a run-time loop over kernel rows (and columns,
where `RUN_W == 1`) and chunks of input channels, each of which loads its own input. Registers do not grow with the
kernel.
"""

import triton
import triton.language as tl

from .branch_call import BranchCall, block_constexprs, even_rows
from .config import TapConfig
from .launch import Launch
from .norm import store_moments
from .tiling import SIZES, fold_pool, locate_tile, pooled_pixels, relu, run_origin, widen


@triton.jit
def tap_branch(
    x_ptr, w_ptr, shift_ptr, u_ptr, moments_ptr, pool,
    sample, y, run_w, N_LEFT, H_IN, W_IN, H, W, CI_END, CO_END,
    stride_xn, stride_xh, stride_xw, stride_un, stride_uh, stride_uw, stride_part,
    TASK: tl.constexpr, KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr,
    SPACING: tl.constexpr, SPAN: tl.constexpr, IS_EVEN_W: tl.constexpr, K_CHUNKS: tl.constexpr,
    RUN_W: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_POOL: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr,
    POOL_BY_DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One branch of one tile: stores `u`; adds the tile's sums to `pool`, which it returns, or stores its moments."""
    HALF: tl.constexpr = KERNEL // 2
    TAPS_W: tl.constexpr = 1 if RUN_W > 1 else KERNEL
    BLOCK_M: tl.constexpr = RUN_W * BLOCK_CO
    BLOCK_K: tl.constexpr = SPAN * BLOCK_CI

    x = run_origin(run_w, RUN_W, SPACING)
    offs_k = tl.arange(0, BLOCK_K)
    offs_m = tl.arange(0, BLOCK_M)
    ci = offs_k % BLOCK_CI
    co = offs_m % BLOCK_CO
    mask_p = (y < H) & (x < W) & (sample < N_LEFT)
    y_in = y * STRIDE - HALF * DILATION
    x_in = x[:, None] * STRIDE + (offs_k // BLOCK_CI - HALF)[None, :] * DILATION  # [BLOCK_P, BLOCK_K]
    offs_x = (sample * stride_xn + y_in * stride_xh)[:, None] + x_in * stride_xw + ci[None, :]
    offs_w = offs_m[:, None] * BLOCK_K + offs_k[None, :]

    if HAS_SHIFT:
        shift = tl.load(shift_ptr + co, mask=co < CO_END, other=0.0)
        acc = tl.broadcast_to(shift[:, None], [BLOCK_M, BLOCK_P])
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    for step in range(KERNEL * TAPS_W * K_CHUNKS):
        tap = step // K_CHUNKS
        chunk = step % K_CHUNKS * BLOCK_CI
        dy = tap // TAPS_W * DILATION
        dx = tap % TAPS_W * DILATION
        in_rows = mask_p & (y_in + dy >= 0) & (y_in + dy < H_IN)
        mask = in_rows[:, None] & (x_in + dx >= 0) & (x_in + dx < W_IN)
        if HAS_CHANNEL_MASK:
            mask &= (chunk + ci < CI_END)[None, :]
        taps = tl.load(x_ptr + dy * stride_xh + dx * stride_xw + chunk + offs_x, mask=mask, other=0.0)
        weights = tl.load(w_ptr + step * (BLOCK_M * BLOCK_K) + offs_w)
        acc = tl.dot(weights, tl.trans(taps), acc, input_precision=PRECISION)

    if HAS_RELU:
        acc = relu(acc)
    u = acc.to(u_ptr.dtype.element_ty)
    x_out = x[None, :] + (offs_m // BLOCK_CO)[:, None] * SPACING  # [BLOCK_M, BLOCK_P]
    offs_u = (sample * stride_un + y * stride_uh)[None, :] + x_out * stride_uw + co[:, None]
    mask_out = mask_p[None, :] & (x_out < W)
    if HAS_CHANNEL_MASK:
        mask_out &= (co < CO_END)[:, None]
    tl.store(u_ptr + offs_u, u, mask=mask_out)
    if TASK == "train":
        count = tl.where(mask_out, 1.0, 0.0)
        mean = tl.where(mask_out, u.to(tl.float32), 0.0)
        offs_c = tl.arange(0, BLOCK_CO)
        store_moments(
            moments_ptr,
            mean,
            tl.zeros_like(mean),
            count,
            offs_c,
            offs_c < CO_END,
            stride_part,
            RUN_W,
            BLOCK_CO,
        )
        return pool
    elif POOL_BY_DOT:
        # Outputs beyond the image see part of it; one that overflows must not meet the product as infinity.
        if not IS_EVEN_W:
            u = tl.where(mask_out, u, 0.0)
        pooled = pooled_pixels(x, mask_p, W, RUN_W, SPACING, BLOCK_POOL)
        return tl.dot(u, pooled.to(u.dtype), pool)
    else:
        return pool + tl.where(mask_out, acc, 0.0)


@triton.jit(do_not_specialize=SIZES)
def branch_conv_tap_fwd_kernel(
    x_ptr, w_ptr, shift_ptr, u_ptr, partial_ptr,
    N, H_IN, W_IN, H, W, C_IN, C_OUT, TILES_H, TILES_W, CHANNEL_PROGRAMS,
    stride_xn, stride_xh, stride_xw, stride_um, stride_un, stride_uh, stride_uw,
    stride_partial_n, stride_partial_t,
    TASK: tl.constexpr, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, SPACINGS: tl.constexpr, SPANS: tl.constexpr,
    W_OFFSETS: tl.constexpr, IS_EVEN_W: tl.constexpr, STRIDE: tl.constexpr,
    BLOCKS_PER_GROUP: tl.constexpr, K_CHUNKS: tl.constexpr,
    CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr, SPLIT_CI: tl.constexpr,
    BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, RUN_W: tl.constexpr,
    BLOCK_POOL: tl.constexpr, POOL_BY_DOT: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Every branch of one tile: `u[m]` and, by TASK as in `stream_tile`, the tile's pooled sums over
    branches and pixels ("store") or each branch's moments ("train").

    A tile is BLOCK_N samples x BLOCK_H rows x BLOCK_W row runs (RUN_W outputs each). Its BLOCK_CO outputs belong to
    whole groups (CHANNELS_CO outputs of CHANNELS_CI inputs), or are one of a group's BLOCKS_PER_GROUP blocks.
    """
    BLOCK_P: tl.constexpr = BLOCK_N * BLOCK_H * BLOCK_W
    stride_xn, stride_xh, stride_xw = widen(stride_xn, stride_xh, stride_xw, IS_LARGE)
    stride_un, stride_uh, stride_uw = widen(stride_un, stride_uh, stride_uw, IS_LARGE)
    block, tile, tile_h, tile_w, block_n = locate_tile(tl.program_id(0), CHANNEL_PROGRAMS, TILES_H, TILES_W)
    n0 = block_n.to(tl.int64) * BLOCK_N
    n_left = tl.minimum(N - n0, BLOCK_N).to(tl.int32)
    offs_p = tl.arange(0, BLOCK_P)
    sample = offs_p // (BLOCK_H * BLOCK_W)
    y = tile_h * BLOCK_H + offs_p // BLOCK_W % BLOCK_H
    run_w = tile_w * BLOCK_W + offs_p % BLOCK_W
    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_CO)

    group = block // BLOCKS_PER_GROUP
    ci0 = group * CHANNELS_CI
    co0 = group * CHANNELS_CO + block % BLOCKS_PER_GROUP * BLOCK_CO
    ci_end = tl.minimum(CHANNELS_CI, C_IN - ci0)
    co_end = tl.minimum((group + 1) * CHANNELS_CO, C_OUT) - co0

    x_ptr += n0 * stride_xn + ci0
    u_ptr += n0 * stride_un + co0
    if TASK == "train":
        partial_ptr += tl.program_id(0).to(tl.int64) // CHANNEL_PROGRAMS * stride_partial_t + co0
    else:
        partial_ptr += n0 * stride_partial_n + tile.to(tl.int64) * stride_partial_t
    pool = tl.zeros([RUN_W * BLOCK_CO, BLOCK_POOL if POOL_BY_DOT else BLOCK_P], tl.float32)
    for m in tl.static_range(len(KERNELS)):
        pool = tap_branch(
            x_ptr + m * SPLIT_CI,
            w_ptr + block * W_OFFSETS[len(KERNELS)] + W_OFFSETS[m],
            shift_ptr + m * C_OUT + co0,
            u_ptr,
            partial_ptr + m * 3 * stride_partial_n,
            pool,
            sample, y, run_w, n_left, H_IN, W_IN, H, W, ci_end, co_end,
            stride_xn, stride_xh, stride_xw, stride_un, stride_uh, stride_uw, stride_partial_n,
            TASK, KERNELS[m], DILATIONS[m], STRIDE, SPACINGS[m], SPANS[m], IS_EVEN_W[m], K_CHUNKS,
            RUN_W, BLOCK_CI, BLOCK_CO, BLOCK_P, BLOCK_POOL,
            HAS_SHIFT, HAS_RELU, HAS_CHANNEL_MASK, POOL_BY_DOT, PRECISION,
        )  # fmt: skip
        u_ptr += stride_um
    if TASK == "store":
        sums = fold_pool(pool, RUN_W, BLOCK_CO, BLOCK_N, POOL_BY_DOT)
        mask = (offs_n < n_left)[:, None] & (offs_c < co_end)[None, :]
        tl.store(partial_ptr + offs_n[:, None] * stride_partial_n + co0 + offs_c[None, :], sums, mask=mask)


def branch_conv_tap_fwd(call: BranchCall[TapConfig]) -> Launch:
    layout = call.layout
    constexprs = {
        **block_constexprs(call),
        "TASK": call.task,
        "SPACINGS": layout.spacings,
        "SPANS": layout.spans,
        "IS_EVEN_W": even_rows(call),
        "BLOCKS_PER_GROUP": layout.blocks_per_group,
        "K_CHUNKS": layout.chunks,
    }
    return Launch(
        branch_conv_tap_fwd_kernel,
        call.grid,
        call.storing_arguments(call.shape.c_in, call.shape.c_out),
        constexprs,
        call.options,
        tuple(k * taps * layout.chunks for k, taps in zip(call.shape.kernels, layout.taps_w, strict=True)),
    )
