"""Branch convolutions for small groups: input rows are streamed once and feed every kernel row that needs them.

Formulation. One tensor-core product takes a weight block `[RUN_W * BLOCK_CO, SPAN * BLOCK_CI]` (block-diagonal over
groups, block-Toeplitz along the image row) times an input row `[SPAN * BLOCK_CI, BLOCK_P]`; outputs stand on the M side
so that the accumulator can start from the shift, and so that its 16-bit result is already the left operand of the
product with the pixel mask that pools it. Derivation and instruction counts: `kernels/README.md`.
"""

from typing import Any

import triton
import triton.language as tl

from .branch_call import BranchCall, block_constexprs, even_rows, run_constexprs
from .config import StreamConfig
from .launch import Launch
from .norm import lane_moments, store_moments
from .tiling import (
    SIZES,
    branch_attention,
    fold_pool,
    in_image_order,
    load_weight_operand,
    locate_tile,
    pooled_pixels,
    relu,
    right_operand,
    run_origin,
    widen,
)


@triton.jit
def stream_loads(
    x_ptr, w_ptr, shift_ptr, sample, y, x, mask_p, H_IN, W_IN, CI_END, CO_END, stride_xn, stride_xh, stride_xw,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr,
    PITCH: tl.constexpr, STEP_R: tl.constexpr, STEP_K: tl.constexpr, SPAN: tl.constexpr, IS_EVEN_H: tl.constexpr,
    RUN_H: tl.constexpr, RUN_W: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_P: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr,
):  # fmt: skip
    """What one branch of one tile reads: its input rows, its weights by tap, and what its accumulators start from.

    Row i is `i * PITCH` input pixels below the topmost. Output r of a run needs, for kernel row ky, row
    `r * STEP_R + ky * STEP_K`.
    """
    HALF: tl.constexpr = KERNEL // 2
    TAPS_W: tl.constexpr = 1 if RUN_W > 1 else KERNEL
    BLOCK_M: tl.constexpr = RUN_W * BLOCK_CO
    BLOCK_K: tl.constexpr = SPAN * BLOCK_CI
    FIRST_OWN: tl.constexpr = HALF * STEP_K
    LAST_OWN: tl.constexpr = FIRST_OWN + (RUN_H - 1) * STEP_R
    # Rows of 32 16-bit elements go from memory to the tensor core without passing through shared memory.
    IS_DIRECT: tl.constexpr = (
        BLOCK_K == 32 and BLOCK_M % 16 == 0 and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    )
    offs_k = tl.arange(0, BLOCK_K)
    offs_m = tl.arange(0, BLOCK_M)
    ci = offs_k % BLOCK_CI
    co = offs_m % BLOCK_CO
    x_in = x[:, None] * STRIDE + (offs_k // BLOCK_CI - HALF)[None, :] * DILATION  # [BLOCK_P, BLOCK_K]
    offs_x = (sample * stride_xn + y * STRIDE * stride_xh)[:, None] + x_in * stride_xw + ci[None, :]

    rows = ()
    for i in tl.static_range((RUN_H - 1) * STEP_R + (KERNEL - 1) * STEP_K + 1):
        for kx in tl.static_range(TAPS_W):
            # Outputs closer together than the dilation leave rows out.
            if STEP_R > 1 or i % STEP_K < RUN_H:
                dx = kx * DILATION
                mask = mask_p[:, None] & (x_in + dx >= 0) & (x_in + dx < W_IN)
                if not (IS_EVEN_H and i >= FIRST_OWN and i <= LAST_OWN):
                    y_in = y * STRIDE + i * PITCH - HALF * DILATION
                    mask &= ((y_in >= 0) & (y_in < H_IN))[:, None]
                if HAS_CHANNEL_MASK:
                    mask &= (ci < CI_END)[None, :]
                # The row term is uniform: one scalar offset per row, not one per element.
                row = (i * PITCH - HALF * DILATION) * stride_xh + dx * stride_xw
                taps = tl.load(x_ptr + row + offs_x, mask=mask, other=0.0)
                rows = rows + (right_operand(taps, False) if IS_DIRECT else tl.trans(taps),)
            else:
                rows = rows + (rows[0],)

    weights = ()
    for tap in tl.static_range(KERNEL * TAPS_W):
        if IS_DIRECT:
            weights = weights + (load_weight_operand(w_ptr + tap * (BLOCK_M * BLOCK_K), BLOCK_M, BLOCK_K),)
        else:
            offs_w = (tap * BLOCK_M + offs_m[:, None]) * BLOCK_K + offs_k[None, :]
            weights = weights + (tl.load(w_ptr + offs_w),)

    if HAS_SHIFT:
        shift = tl.load(shift_ptr + co, mask=co < CO_END, other=0.0)
        start = tl.broadcast_to(shift[:, None], [BLOCK_M, BLOCK_P])
    else:
        start = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    return rows, weights, start


@triton.jit
def stream_output(
    rows, weights, start, r: tl.constexpr,
    KERNEL: tl.constexpr, STEP_R: tl.constexpr, STEP_K: tl.constexpr, RUN_W: tl.constexpr,
    HAS_RELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output r of every run of one branch. [RUN_W * BLOCK_CO, BLOCK_P]"""
    TAPS_W: tl.constexpr = 1 if RUN_W > 1 else KERNEL
    acc = start
    for tap in tl.static_range(KERNEL * TAPS_W):
        row = rows[(r * STEP_R + tap // TAPS_W * STEP_K) * TAPS_W + tap % TAPS_W]
        acc = tl.dot(weights[tap], row, acc, input_precision=PRECISION)
    if HAS_RELU:
        acc = relu(acc)
    return acc


@triton.jit
def stream_tile(
    x_ptr, w_ptr, shift_ptr, attention_ptr, tag, out_ptr, partial_ptr,
    channel_program, tile, tile_h, tile_w, block_n, N, H_IN, W_IN, H, W, C_IN, C_OUT,
    stride_xn, stride_xh, stride_xw, stride_om, stride_on, stride_oc, stride_oh, stride_ow,
    stride_partial_n, stride_partial_t,
    TASK: tl.constexpr, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, STRIDE: tl.constexpr,
    SPACINGS_H: tl.constexpr, SPACINGS_W: tl.constexpr, PITCHES: tl.constexpr,
    STEPS_R: tl.constexpr, STEPS_K: tl.constexpr, SPANS: tl.constexpr, W_OFFSETS: tl.constexpr,
    IS_EVEN_H: tl.constexpr, IS_EVEN_W: tl.constexpr,
    CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr, SPLIT_CI: tl.constexpr,
    BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN_H: tl.constexpr, RUN_W: tl.constexpr, BLOCKS_PER_PROGRAM: tl.constexpr,
    BLOCK_POOL: tl.constexpr, POOL_BY_DOT: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Every branch of one tile: TASK "store" writes `u[m]` and the tile's pooled sums over branches and pixels, "pool"
    the sums alone, "select" writes `v`, the sum of the branches weighted by the attention, "train" writes `u[m]` and
    the moments of each branch's tile to `partial`, which points to the tile's there: `[M, 3, C]`; "measure" writes the
    moments of what "train" would store.

    A tile is BLOCK_N samples x BLOCK_H column runs (RUN_H outputs each) x BLOCK_W row runs (RUN_W outputs each);
    `block_n`, `tile_h` and `tile_w` say which, `tile` is its number within a sample. A channel block is CHANNELS_CI
    inputs and CHANNELS_CO outputs (whole groups), padded to BLOCK_CI and BLOCK_CO.
    To select, all branches of a tile must cover the same pixels: SPACINGS_H are 1 there. `tag`: as `load_attention`.
    """
    M: tl.constexpr = len(KERNELS)
    BLOCK_P: tl.constexpr = BLOCK_N * BLOCK_H * BLOCK_W
    BLOCK_M: tl.constexpr = RUN_W * BLOCK_CO
    IS_STORED: tl.constexpr = TASK == "store" or TASK == "train"
    IS_MEASURED: tl.constexpr = TASK == "train" or TASK == "measure"
    dtype = x_ptr.dtype.element_ty
    stride_xn, stride_xh, stride_xw = widen(stride_xn, stride_xh, stride_xw, IS_LARGE)
    stride_on, stride_oh, stride_ow = widen(stride_on, stride_oh, stride_ow, IS_LARGE)
    n0 = block_n.to(tl.int64) * BLOCK_N
    n_left = tl.minimum(N - n0, BLOCK_N).to(tl.int32)
    offs_p = tl.arange(0, BLOCK_P)
    sample = offs_p // (BLOCK_H * BLOCK_W)
    run_h = tile_h * BLOCK_H + offs_p // BLOCK_W % BLOCK_H
    run_w = tile_w * BLOCK_W + offs_p % BLOCK_W
    offs_m = tl.arange(0, BLOCK_M)
    position = offs_m // BLOCK_CO
    co = offs_m % BLOCK_CO
    x_ptr += n0 * stride_xn
    out_ptr += n0 * stride_on

    for b in range(BLOCKS_PER_PROGRAM):
        block = channel_program * BLOCKS_PER_PROGRAM + b
        ci0 = block * CHANNELS_CI
        co0 = block * CHANNELS_CO
        ci_end = tl.minimum(CHANNELS_CI, C_IN - ci0)
        co_end = tl.minimum(CHANNELS_CO, C_OUT - co0)
        out_block_ptr = out_ptr + co0 * stride_oc
        pool = tl.zeros([BLOCK_M, BLOCK_POOL if POOL_BY_DOT else BLOCK_P], tl.float32)
        selection = ()
        # Where it must be waited for, all branches' attention comes first, while nothing else takes registers.
        IS_TAGGED: tl.constexpr = attention_ptr.dtype.element_ty == tl.int64
        attention = ()
        if TASK == "select" and IS_TAGGED:
            for m in tl.static_range(M):
                a = branch_attention(
                    attention_ptr, n0, sample, n_left, m, co0, co, co_end, C_OUT, tag, M, BLOCK_N
                )
                attention = attention + (a,)
        for m in tl.static_range(M):
            y = run_origin(run_h, RUN_H, SPACINGS_H[m])
            x = run_origin(run_w, RUN_W, SPACINGS_W[m])
            mask_p = (y < H) & (x < W) & (sample < n_left)
            rows, weights, start = stream_loads(
                x_ptr + m * SPLIT_CI + ci0,
                w_ptr + block * W_OFFSETS[M] + W_OFFSETS[m],
                shift_ptr + m * C_OUT + co0,
                sample, y, x, mask_p, H_IN, W_IN, ci_end, co_end, stride_xn, stride_xh, stride_xw,
                KERNELS[m], DILATIONS[m], STRIDE, PITCHES[m], STEPS_R[m], STEPS_K[m], SPANS[m], IS_EVEN_H[m],
                RUN_H, RUN_W, BLOCK_CI, BLOCK_CO, BLOCK_P, HAS_SHIFT, HAS_CHANNEL_MASK,
            )  # fmt: skip
            if TASK == "select":
                if IS_TAGGED:
                    a = attention[m]
                else:
                    a = branch_attention(
                        attention_ptr, n0, sample, n_left, m, co0, co, co_end, C_OUT, tag, M, BLOCK_N
                    )
            else:
                x_out = x[None, :] + position[:, None] * SPACINGS_W[m]  # [BLOCK_M, BLOCK_P]
                offs_out = (sample * stride_on + y * stride_oh)[None, :] + x_out * stride_ow + co[:, None]
                mask_out = mask_p[None, :] & (x_out < W)
                if HAS_CHANNEL_MASK:
                    mask_out &= (co < co_end)[:, None]
                pooled = pooled_pixels(x, mask_p, W, RUN_W, SPACINGS_W[m], BLOCK_POOL)
            if IS_MEASURED:
                total = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
                squares = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
                count = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
                pivot = count
            added = ()
            for r in tl.static_range(RUN_H):
                acc = stream_output(
                    rows, weights, start, r, KERNELS[m], STEPS_R[m], STEPS_K[m], RUN_W, HAS_RELU, PRECISION
                )
                if TASK == "select":
                    acc = in_image_order(acc * a, RUN_W, BLOCK_CO, BLOCK_P, SPACINGS_W[m])
                    if m > 0:
                        acc += selection[r]
                    added = added + (acc,)
                else:
                    u = acc.to(dtype)
                    mask_r = mask_out
                    pooled_r = pooled
                    if not IS_EVEN_H[m]:
                        in_image = y + r * SPACINGS_H[m] < H
                        mask_r = mask_out & in_image[None, :]
                        pooled_r = pooled & in_image[:, None]
                    if IS_STORED:
                        tl.store(out_block_ptr + r * SPACINGS_H[m] * stride_oh + offs_out, u, mask=mask_r)
                    if IS_MEASURED:
                        value = u.to(tl.float32)
                        if r == 0:
                            pivot = value
                        else:
                            away = value - pivot
                            if not IS_EVEN_H[m]:
                                away = tl.where(mask_r, away, 0.0)
                            total += away
                            squares += away * away
                        if not IS_EVEN_H[m]:
                            count += tl.where(mask_r, 1.0, 0.0)
                    elif POOL_BY_DOT:
                        # Outputs beyond the image see part of it; one that overflows must not meet the product as
                        # infinity.
                        if not (IS_EVEN_H[m] and IS_EVEN_W[m]):
                            u = tl.where(mask_r, u, 0.0)
                        pool = tl.dot(u, pooled_r.to(dtype), pool)
                    else:
                        pool += tl.where(mask_r, acc, 0.0)
            selection = added
            out_block_ptr += stride_om
            if IS_MEASURED:
                if IS_EVEN_H[m]:
                    count = tl.where(mask_out, RUN_H * 1.0, 0.0)
                mean, m2 = lane_moments(pivot, total, squares, count)
                offs_c = tl.arange(0, BLOCK_CO)
                store_moments(
                    partial_ptr + m * 3 * stride_partial_n + co0, mean, m2, count, offs_c, offs_c < co_end,
                    stride_partial_n, RUN_W, BLOCK_CO,
                )  # fmt: skip
        if TASK == "select":
            y = run_h * RUN_H
            x_out = (run_w * RUN_W)[None, :] + position[:, None]
            offs_out = (
                (sample * stride_on + y * stride_oh)[None, :] + x_out * stride_ow + co[:, None] * stride_oc
            )
            mask_out = ((y < H) & (sample < n_left))[None, :] & (x_out < W)
            if HAS_CHANNEL_MASK:
                mask_out &= (co < co_end)[:, None]
            for r in tl.static_range(RUN_H):
                mask_r = mask_out
                if not IS_EVEN_H[0]:
                    mask_r = mask_out & (y + r < H)[None, :]
                tl.store(out_block_ptr + r * stride_oh + offs_out, selection[r].to(dtype), mask=mask_r)
        elif not IS_MEASURED:
            sums = fold_pool(pool, RUN_W, BLOCK_CO, BLOCK_N, POOL_BY_DOT)
            offs_n = tl.arange(0, BLOCK_N)
            offs_c = tl.arange(0, BLOCK_CO)
            offs_partial = (n0 + offs_n)[:, None] * stride_partial_n + tile.to(tl.int64) * stride_partial_t
            mask = (offs_n < n_left)[:, None] & (offs_c < co_end)[None, :]
            tl.store(partial_ptr + offs_partial + co0 + offs_c[None, :], sums, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def branch_conv_stream_fwd_kernel(
    x_ptr, w_ptr, shift_ptr, attention_ptr, out_ptr, partial_ptr,
    N, H_IN, W_IN, H, W, C_IN, C_OUT, TILES_H, TILES_W, CHANNEL_PROGRAMS,
    stride_xn, stride_xh, stride_xw, stride_om, stride_on, stride_oc, stride_oh, stride_ow,
    stride_partial_n, stride_partial_t,
    TASK: tl.constexpr, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, STRIDE: tl.constexpr,
    SPACINGS_H: tl.constexpr, SPACINGS_W: tl.constexpr, PITCHES: tl.constexpr,
    STEPS_R: tl.constexpr, STEPS_K: tl.constexpr, SPANS: tl.constexpr, W_OFFSETS: tl.constexpr,
    IS_EVEN_H: tl.constexpr, IS_EVEN_W: tl.constexpr,
    CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr, SPLIT_CI: tl.constexpr,
    BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN_H: tl.constexpr, RUN_W: tl.constexpr, BLOCKS_PER_PROGRAM: tl.constexpr,
    BLOCK_POOL: tl.constexpr, POOL_BY_DOT: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one channel program: `stream_tile`."""
    channel_program, tile, tile_h, tile_w, block_n = locate_tile(
        tl.program_id(0), CHANNEL_PROGRAMS, TILES_H, TILES_W
    )
    if TASK == "train" or TASK == "measure":  # moments of tiles of all samples
        partial_ptr += tl.program_id(0).to(tl.int64) // CHANNEL_PROGRAMS * stride_partial_t
    stream_tile(
        x_ptr, w_ptr, shift_ptr, attention_ptr, 0, out_ptr, partial_ptr,
        channel_program, tile, tile_h, tile_w, block_n, N, H_IN, W_IN, H, W, C_IN, C_OUT,
        stride_xn, stride_xh, stride_xw, stride_om, stride_on, stride_oc, stride_oh, stride_ow,
        stride_partial_n, stride_partial_t,
        TASK, KERNELS, DILATIONS, STRIDE, SPACINGS_H, SPACINGS_W, PITCHES, STEPS_R, STEPS_K, SPANS, W_OFFSETS,
        IS_EVEN_H, IS_EVEN_W, CHANNELS_CI, CHANNELS_CO, SPLIT_CI, BLOCK_CI, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W,
        RUN_H, RUN_W, BLOCKS_PER_PROGRAM, BLOCK_POOL, POOL_BY_DOT, HAS_SHIFT, HAS_RELU, HAS_CHANNEL_MASK,
        IS_LARGE, PRECISION,
    )  # fmt: skip


def stream_constexprs(call: BranchCall[StreamConfig]) -> dict[str, Any]:
    """Constexprs of `stream_tile`, but for its task."""
    h, _ = call.output_size
    return {
        **block_constexprs(call),
        **run_constexprs(call),
        "SPACINGS_H": call.runs.spacings,
        "SPACINGS_W": call.layout.spacings,
        "SPANS": call.layout.spans,
        "IS_EVEN_H": tuple(h % (call.config.RUN_H * spacing) == 0 for spacing in call.runs.spacings),
        "IS_EVEN_W": even_rows(call),
    }


def branch_conv_stream_fwd(call: BranchCall[StreamConfig]) -> Launch:
    constexprs = {**stream_constexprs(call), "TASK": call.task}
    trips = (call.config.BLOCKS_PER_PROGRAM,)
    return Launch(
        branch_conv_stream_fwd_kernel, call.grid, call.selecting_arguments, constexprs, call.options, trips
    )
