"""Branch convolutions for small groups: input rows are streamed once and feed every kernel row that needs them.

Formulation. One tensor-core product takes a weight block `[RUN_W * BLOCK_CO, SPAN * BLOCK_CI]` (block-diagonal over
groups, block-Toeplitz along the image row) times an input row `[SPAN * BLOCK_CI, BLOCK_P]`; outputs stand on the M side
so that the accumulator can start from the shift, and so that its 16-bit result is already the left operand of the
product with the pixel mask that pools it. Derivation and instruction counts: `kernels/README.md`.
"""

import triton
import triton.language as tl

from .tiling import SIZES, fold_pool, locate_tile, pooled_pixels, relu, run_origin, widen


@triton.jit
def stream_branch(
    x_ptr, w_ptr, shift_ptr, u_ptr, pool,
    sample, run_h, run_w, N_LEFT, H_IN, W_IN, H, W, CI_END, CO_END,
    stride_xn, stride_xh, stride_xw, stride_un, stride_uh, stride_uw,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr,
    SPACING: tl.constexpr, SPAN: tl.constexpr, IS_EVEN_H: tl.constexpr, IS_EVEN_W: tl.constexpr,
    RUN_H: tl.constexpr, RUN_W: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_POOL: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr,
    POOL_BY_DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One branch of one tile: stores `u` and returns `pool` with the tile's sums added."""
    HALF: tl.constexpr = KERNEL // 2
    STEP: tl.constexpr = SPACING * STRIDE // DILATION
    TAPS_W: tl.constexpr = 1 if RUN_W > 1 else KERNEL
    BLOCK_M: tl.constexpr = RUN_W * BLOCK_CO
    BLOCK_K: tl.constexpr = SPAN * BLOCK_CI

    y = run_origin(run_h, RUN_H, SPACING)
    x = run_origin(run_w, RUN_W, SPACING)
    offs_k = tl.arange(0, BLOCK_K)
    offs_m = tl.arange(0, BLOCK_M)
    ci = offs_k % BLOCK_CI
    co = offs_m % BLOCK_CO
    mask_p = (y < H) & (x < W) & (sample < N_LEFT)
    x_in = x[:, None] * STRIDE + (offs_k // BLOCK_CI - HALF)[None, :] * DILATION  # [BLOCK_P, BLOCK_K]
    offs_x = (sample * stride_xn + y * STRIDE * stride_xh)[:, None] + x_in * stride_xw + ci[None, :]

    rows = ()
    for i in tl.static_range((RUN_H - 1) * STEP + KERNEL):
        for kx in tl.static_range(TAPS_W):
            dx = kx * DILATION
            mask = mask_p[:, None] & (x_in + dx >= 0) & (x_in + dx < W_IN)
            if not (IS_EVEN_H and i >= HALF and i <= HALF + (RUN_H - 1) * STEP):
                y_in = y * STRIDE + (i - HALF) * DILATION
                mask &= ((y_in >= 0) & (y_in < H_IN))[:, None]
            if HAS_CHANNEL_MASK:
                mask &= (ci < CI_END)[None, :]
            # The row term is uniform: one scalar offset per row, not one per element.
            row = (i - HALF) * DILATION * stride_xh + dx * stride_xw
            rows = rows + (tl.load(x_ptr + row + offs_x, mask=mask, other=0.0),)

    weights = ()
    for tap in tl.static_range(KERNEL * TAPS_W):
        offs_w = (tap * BLOCK_M + offs_m[:, None]) * BLOCK_K + offs_k[None, :]
        weights = weights + (tl.load(w_ptr + offs_w),)

    if HAS_SHIFT:
        shift = tl.load(shift_ptr + co, mask=co < CO_END, other=0.0)
        start = tl.broadcast_to(shift[:, None], [BLOCK_M, BLOCK_P])
    else:
        start = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)

    x_out = x[None, :] + (offs_m // BLOCK_CO)[:, None] * SPACING  # [BLOCK_M, BLOCK_P]
    offs_u = (sample * stride_un + y * stride_uh)[None, :] + x_out * stride_uw + co[:, None]
    mask_out = mask_p[None, :] & (x_out < W)
    if HAS_CHANNEL_MASK:
        mask_out &= (co < CO_END)[:, None]
    pooled = pooled_pixels(x, mask_p, W, RUN_W, SPACING, BLOCK_POOL)
    for r in tl.static_range(RUN_H):
        acc = start
        for tap in tl.static_range(KERNEL * TAPS_W):
            row = rows[(r * STEP + tap // TAPS_W) * TAPS_W + tap % TAPS_W]
            acc = tl.dot(weights[tap], tl.trans(row), acc, input_precision=PRECISION)
        if HAS_RELU:
            acc = relu(acc)
        u = acc.to(u_ptr.dtype.element_ty)
        mask_r = mask_out
        pooled_r = pooled
        if not IS_EVEN_H:
            in_image = y + r * SPACING < H
            mask_r = mask_out & in_image[None, :]
            pooled_r = pooled & in_image[:, None]
        tl.store(u_ptr + r * SPACING * stride_uh + offs_u, u, mask=mask_r)
        if POOL_BY_DOT:
            # Outputs beyond the image see part of it; one that overflows must not meet the product as infinity.
            if not (IS_EVEN_H and IS_EVEN_W):
                u = tl.where(mask_r, u, 0.0)
            pool = tl.dot(u, pooled_r.to(u.dtype), pool)
        else:
            pool += tl.where(mask_r, acc, 0.0)
    return pool


@triton.jit(do_not_specialize=SIZES)
def branch_conv_stream_fwd_kernel(
    x_ptr, w_ptr, shift_ptr, u_ptr, partial_ptr,
    N, H_IN, W_IN, H, W, C_IN, C_OUT, TILES_H, TILES_W, CHANNEL_PROGRAMS,
    stride_xn, stride_xh, stride_xw, stride_um, stride_un, stride_uh, stride_uw,
    stride_partial_n, stride_partial_t,
    KERNELS: tl.constexpr, DILATIONS: tl.constexpr, SPACINGS: tl.constexpr, SPANS: tl.constexpr,
    W_OFFSETS: tl.constexpr, IS_EVEN_H: tl.constexpr, IS_EVEN_W: tl.constexpr, STRIDE: tl.constexpr,
    CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr, SPLIT_CI: tl.constexpr,
    BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN_H: tl.constexpr, RUN_W: tl.constexpr, BLOCKS_PER_PROGRAM: tl.constexpr,
    BLOCK_POOL: tl.constexpr, POOL_BY_DOT: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Every branch of one tile: `u[m]` and the tile's pooled sums over branches and pixels.

    A tile is BLOCK_N samples x BLOCK_H column runs (RUN_H outputs each) x BLOCK_W row runs (RUN_W outputs each).
    A channel block is CHANNELS_CI inputs and CHANNELS_CO outputs (whole groups), padded to BLOCK_CI and BLOCK_CO.
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
    run_w = tile_w * BLOCK_W + offs_p % BLOCK_W
    x_ptr += n0 * stride_xn
    u_ptr += n0 * stride_un
    partial_ptr += n0 * stride_partial_n + tile.to(tl.int64) * stride_partial_t
    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_CO)

    for b in range(BLOCKS_PER_PROGRAM):
        block = channel_program * BLOCKS_PER_PROGRAM + b
        ci0 = block * CHANNELS_CI
        co0 = block * CHANNELS_CO
        ci_end = tl.minimum(CHANNELS_CI, C_IN - ci0)
        co_end = tl.minimum(CHANNELS_CO, C_OUT - co0)
        pool = tl.zeros([RUN_W * BLOCK_CO, BLOCK_POOL if POOL_BY_DOT else BLOCK_P], tl.float32)
        u_block_ptr = u_ptr + co0
        for m in tl.static_range(len(KERNELS)):
            pool = stream_branch(
                x_ptr + m * SPLIT_CI + ci0,
                w_ptr + block * W_OFFSETS[len(KERNELS)] + W_OFFSETS[m],
                shift_ptr + m * C_OUT + co0,
                u_block_ptr,
                pool,
                sample, run_h, run_w, n_left, H_IN, W_IN, H, W, ci_end, co_end,
                stride_xn, stride_xh, stride_xw, stride_un, stride_uh, stride_uw,
                KERNELS[m], DILATIONS[m], STRIDE, SPACINGS[m], SPANS[m], IS_EVEN_H[m], IS_EVEN_W[m],
                RUN_H, RUN_W, BLOCK_CI, BLOCK_CO, BLOCK_P, BLOCK_POOL,
                HAS_SHIFT, HAS_RELU, HAS_CHANNEL_MASK, POOL_BY_DOT, PRECISION,
            )  # fmt: skip
            u_block_ptr += stride_um
        sums = fold_pool(pool, RUN_W, BLOCK_CO, BLOCK_N, POOL_BY_DOT)
        mask = (offs_n < n_left)[:, None] & (offs_c < co_end)[None, :]
        tl.store(partial_ptr + offs_n[:, None] * stride_partial_n + co0 + offs_c[None, :], sums, mask=mask)
