"""Branch convolutions of 16-bit activations whose groups fit a block of 16 channels: a window of rows in registers.

A lane of the tensor core's right operand walks down the image with RUN_W adjacent pixels. The rows that all branches'
kernels reach are held in registers as products take them, so an input element is loaded once per strip, whatever the
kernels. Each warp of a program does so for a channel block of its own; what it loads at once are 32 adjacent bytes of
a pixel, a whole sector (`window`).
"""

from itertools import chain

import triton
import triton.language as tl

from .branch_call import BranchCall
from .config import WindowConfig
from .geometry import is_crossed, is_full, known_stride, reach
from .launch import Launch
from .norm import lane_moments, store_moments
from .prefetch import can_prefetch
from .sparse_product import SPARSE_ENTRIES, accumulators, load_sparse_left, sparse_right, sparsity
from .tiling import SIZES, branch_attention, fold_pool, locate_tile, relu, widen
from .window import (
    block_channels,
    by_lane,
    empty_window,
    load_row,
    load_taps,
    output_channels,
    prefetch_row,
    rows_ahead,
    store_row,
    unpacked,
    without_first,
)
from .window_geometry import branch_points, partners, places
from .window_products import sparse_outputs, window_outputs


@triton.jit
def load_tap(w_ptr, first, SPARSE: tl.constexpr):
    """One tap's weights of every channel block, as products take them."""
    if SPARSE:
        return load_sparse_left(w_ptr, first)
    else:
        return load_taps(w_ptr, first)


@triton.jit(do_not_specialize=SIZES)
def branch_conv_window_fwd_kernel(
    x_ptr, w_ptr, shift_ptr, attention_ptr, out_ptr, partial_ptr,
    N, H_IN, W_IN, H, W, C_IN, C_OUT, TILES_H, TILES_W, CHANNEL_PROGRAMS,
    stride_xn, stride_xh, stride_xw, stride_om, stride_on, stride_oc, stride_oh, stride_ow,
    stride_partial_n, stride_partial_t,
    TASK: tl.constexpr, KERNELS: tl.constexpr, W_OFFSETS: tl.constexpr, PLACES: tl.constexpr, PARTNERS: tl.constexpr,
    REACH: tl.constexpr, IS_EVEN_H: tl.constexpr, IS_EVEN_W: tl.constexpr,
    STRIDE_XW: tl.constexpr, STRIDE_OW: tl.constexpr,
    BLOCKS: tl.constexpr, CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN_H: tl.constexpr, RUN_W: tl.constexpr, HOLD_WEIGHTS: tl.constexpr, PREFETCH: tl.constexpr,
    SPARSE: tl.constexpr, IS_CROSSED: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """Every branch of one tile and BLOCKS channel blocks, a warp each; TASK as in `stream_tile`.

    A tile is BLOCK_N samples x BLOCK_H strips of RUN_H rows x BLOCK_W lanes of RUN_W pixels. A channel block is
    CHANNELS_CI inputs and CHANNELS_CO outputs (whole groups), padded to BLOCK_CI and BLOCK_CO. Kernels reach REACH
    pixels beyond their own; PLACES and PARTNERS, of all branches' taps, are as in `window_products`. SPARSE: without
    the zeros of groups of up to 8 channels, and a row is loaded a trip ahead, in the registers that this leaves;
    IS_CROSSED is as in `sparse_product`. STRIDE_XW and STRIDE_OW: `stride_xw` and `stride_ow`, or 0 where a compilation
    is for any.
    """
    M: tl.constexpr = len(KERNELS)
    BLOCK_P: tl.constexpr = BLOCK_N * BLOCK_H * BLOCK_W
    OUTPUTS: tl.constexpr = BLOCKS * BLOCK_CO
    WIDTH: tl.constexpr = RUN_W + 2 * REACH
    ROWS: tl.constexpr = 2 * REACH + 1
    AHEAD: tl.constexpr = 1 if SPARSE else 0
    TAP_ENTRIES: tl.constexpr = SPARSE_ENTRIES if SPARSE else BLOCK_CO * BLOCK_CI
    IS_STORED: tl.constexpr = TASK == "store" or TASK == "train"
    IS_MEASURED: tl.constexpr = TASK == "train" or TASK == "measure"
    dtype = x_ptr.dtype.element_ty
    stride_xn, stride_xh, stride_xw = widen(stride_xn, stride_xh, stride_xw, IS_LARGE)
    stride_on, stride_oh, stride_ow = widen(stride_on, stride_oh, stride_ow, IS_LARGE)
    # What the compiler knows, loads and stores add to an address without an instruction.
    stride_xw = STRIDE_XW if STRIDE_XW > 0 else stride_xw
    stride_ow = STRIDE_OW if STRIDE_OW > 0 else stride_ow
    program, tile, tile_h, tile_w, block_n = locate_tile(tl.program_id(0), CHANNEL_PROGRAMS, TILES_H, TILES_W)
    if IS_MEASURED:  # moments of tiles of all samples
        partial_ptr += tl.program_id(0).to(tl.int64) // CHANNEL_PROGRAMS * stride_partial_t
    n0 = block_n.to(tl.int64) * BLOCK_N
    n_left = tl.minimum(N - n0, BLOCK_N).to(tl.int32)
    lane = tl.arange(0, BLOCK_P)
    sample = lane // (BLOCK_H * BLOCK_W)
    y0 = (tile_h * BLOCK_H + lane // BLOCK_W % BLOCK_H) * RUN_H
    x0 = (tile_w * BLOCK_W + lane % BLOCK_W) * RUN_W
    mask_p = (y0 < H) & (x0 < W) & (sample < n_left)
    block = program * BLOCKS + tl.arange(0, BLOCKS)
    co, mask_co = output_channels(program * BLOCKS, BLOCKS, CHANNELS_CO, BLOCK_CO)
    mask_co &= co < C_OUT
    ci, mask_ci = block_channels(block, CHANNELS_CI, BLOCK_CI, IS_CROSSED)
    # Where each lane reads, once; rows and pixels are offsets that all lanes add.
    x_ptr += n0 * stride_xn
    x_ptrs = x_ptr + (by_lane(sample * stride_xn + y0 * stride_xh + x0 * stride_xw) + ci)
    mask_x = by_lane(mask_p)
    mask_out = mask_p[None, :]  # [OUTPUTS, BLOCK_P]
    if HAS_CHANNEL_MASK:
        mask_x = mask_x & mask_ci & (ci < C_IN)
        mask_out &= mask_co[:, None]
    offs_out = (sample * stride_on + y0 * stride_oh + x0 * stride_ow)[None, :] + co[:, None] * stride_oc
    out_ptrs = out_ptr + n0 * stride_on + offs_out
    row_stride = tl.cast(stride_xh, tl.int64)
    if PREFETCH:
        ahead = rows_ahead(
            x_ptr, program, tile_h, tile_w, n_left, H_IN, W, W_IN, C_IN, stride_xn, stride_xh, stride_xw,
            REACH, BLOCKS, BLOCK_N, BLOCK_H, BLOCK_W, RUN_H, RUN_W, CHANNELS_CI,
        )  # fmt: skip

    first = block * W_OFFSETS[M]
    if SPARSE:
        metadata = sparsity(BLOCKS)
    weights = ()
    starts = ()
    attention = ()
    for m in tl.static_range(M):
        if HOLD_WEIGHTS:
            for tap in tl.static_range(KERNELS[m] * KERNELS[m]):
                weights = weights + (load_tap(w_ptr + W_OFFSETS[m] + tap * TAP_ENTRIES, first, SPARSE),)
        start = tl.zeros([BLOCKS, BLOCK_CO, BLOCK_P], tl.float32)
        if HAS_SHIFT:
            shift = tl.load(shift_ptr + m * C_OUT + co, mask=mask_co, other=0.0)
            start += tl.reshape(shift, [BLOCKS, BLOCK_CO, 1])
        starts = starts + (accumulators(start, IS_CROSSED) if SPARSE else start,)
        if TASK == "select":
            a = branch_attention(attention_ptr, n0, sample, n_left, m, 0, co, C_OUT, C_OUT, 0, M, BLOCK_N)
            attention = attention + (tl.reshape(a, [BLOCKS, BLOCK_CO, a.shape[1]]),)

    zeros = tl.zeros([BLOCKS, BLOCK_CO, BLOCK_P], tl.float32)
    sums = ()  # the tile's sum, or for each branch pivot, sum and sum of squares of its distances, number
    if IS_MEASURED:
        for _ in tl.static_range(M):
            sums = sums + (zeros, zeros, zeros, zeros)
    elif TASK != "select":
        sums = (zeros,)

    # The first rows only fill the window. All in one loop: of each load Triton looks for all that depends on it, which
    # takes half a minute where there is one for every pixel of the window.
    window = empty_window((2 * REACH + AHEAD) * WIDTH, BLOCKS * BLOCK_P, BLOCK_CI)
    for r in range(-2 * REACH - AHEAD, RUN_H):
        if PREFETCH:
            prefetch_row(ahead, r + AHEAD, row_stride, H_IN, REACH, BLOCKS, BLOCK_N, RUN_H)
        loaded = r + AHEAD + REACH
        mask_row = mask_x
        if SPARSE:
            mask_row = mask_x & (r + AHEAD < RUN_H)
        window = window + load_row(
            x_ptrs, loaded * row_stride, stride_xw, by_lane(y0) + loaded, by_lane(x0), mask_row, H_IN, W_IN,
            REACH, RUN_W, IS_EVEN_W,
        )  # fmt: skip
        if r >= 0:
            operands = ()
            for i in tl.static_range(ROWS * WIDTH):
                operand = sparse_right(window[i]) if SPARSE else unpacked(window[i], dtype, BLOCKS)
                operands = operands + (operand,)
            mask_r = mask_p
            if not IS_EVEN_H:
                mask_r = mask_p & (y0 + r < H)
            selection = ()
            added = ()
            for m in tl.static_range(M):
                taps = ()
                for tap in tl.static_range(KERNELS[m] * KERNELS[m]):
                    if HOLD_WEIGHTS:
                        taps = taps + (weights[W_OFFSETS[m] // TAP_ENTRIES + tap],)
                    else:
                        taps = taps + (load_tap(w_ptr + W_OFFSETS[m] + tap * TAP_ENTRIES, first, SPARSE),)
                if IS_MEASURED:
                    pivot = sums[4 * m]
                    total = sums[4 * m + 1]
                    squares = sums[4 * m + 2]
                    count = sums[4 * m + 3]
                if SPARSE:
                    outputs = sparse_outputs(
                        operands, taps, starts[m], metadata, dtype, IS_CROSSED, PLACES, PARTNERS,
                        W_OFFSETS[m] // TAP_ENTRIES, RUN_W,
                    )  # fmt: skip
                else:
                    outputs = window_outputs(
                        operands, taps, starts[m], PLACES, W_OFFSETS[m] // TAP_ENTRIES, RUN_W
                    )
                row = ()
                for s in tl.static_range(RUN_W):
                    acc = outputs[s]
                    if HAS_RELU:
                        acc = relu(acc)
                    if TASK == "select":
                        acc *= attention[m]
                        if m > 0:
                            acc += selection[s].to(tl.float32)
                        # In 16 bits between branches, as eager adds them: half the registers.
                        row = row + (acc.to(dtype),)
                    else:
                        mask_s = mask_r
                        if not IS_EVEN_W:
                            mask_s = mask_r & (x0 + s < W)
                        mask_s = mask_s[None, None, :]
                        u = acc.to(dtype)
                        if IS_STORED:
                            row = row + (u,)
                        if IS_MEASURED:
                            value = u.to(tl.float32)
                            if s == 0:
                                pivot = tl.where(r == 0, value, pivot)
                            away = value - pivot
                            if not (IS_EVEN_H and IS_EVEN_W):
                                away = tl.where(mask_s, away, 0.0)
                                count += tl.where(mask_s, 1.0, 0.0)
                            total += away
                            squares += away * away
                        else:
                            if not (IS_EVEN_H and IS_EVEN_W):
                                acc = tl.where(mask_s, acc, 0.0)
                            sums = (sums[0] + acc,)
                if IS_STORED or (TASK == "select" and m == M - 1):
                    row_ptrs = out_ptrs + m * tl.cast(stride_om, tl.int64) if IS_STORED else out_ptrs
                    row_ptrs += r * tl.cast(stride_oh, tl.int64)
                    # Held weights leave few registers.
                    store_row(
                        row_ptrs, row, mask_out & mask_r[None, :], x0, W, stride_ow, IS_EVEN_W,
                        2 if HOLD_WEIGHTS else 4,
                    )  # fmt: skip
                selection = row
                if IS_MEASURED:
                    added = added + (pivot, total, squares, count)
            if IS_MEASURED:
                sums = added
        window = without_first(window, WIDTH)

    if IS_MEASURED:
        for m in tl.static_range(M):
            count = sums[4 * m + 3]
            if IS_EVEN_H and IS_EVEN_W:
                count += tl.where(mask_p, RUN_H * RUN_W * 1.0, 0.0)[None, None, :]
            mean, m2 = lane_moments(sums[4 * m], sums[4 * m + 1], sums[4 * m + 2], count)
            store_moments(
                partial_ptr + m * 3 * stride_partial_n, tl.reshape(mean, [OUTPUTS, BLOCK_P]),
                tl.reshape(m2, [OUTPUTS, BLOCK_P]), tl.reshape(count, [OUTPUTS, BLOCK_P]), co, mask_co,
                stride_partial_n, 1, OUTPUTS,
            )  # fmt: skip
    elif TASK != "select":
        pool = tl.where(mask_p[None, None, :], sums[0], 0.0)
        pooled = fold_pool(tl.reshape(pool, [OUTPUTS, BLOCK_P]), 1, OUTPUTS, BLOCK_N, False)
        offs_n = tl.arange(0, BLOCK_N)
        offs_partial = (n0 + offs_n)[:, None] * stride_partial_n + tile.to(tl.int64) * stride_partial_t
        mask = (offs_n < n_left)[:, None] & mask_co[None, :]
        tl.store(partial_ptr + offs_partial + co[None, :], pooled, mask=mask)


def branch_conv_window_fwd(call: BranchCall[WindowConfig]) -> Launch:
    shape, x, config, is_large = call.shape, call.x, call.config, call.is_large
    h, w = call.output_size
    layout, points = call.layout, branch_points(shape)
    constexprs = {
        "TASK": call.task,
        "KERNELS": shape.kernels,
        "W_OFFSETS": layout.offsets,
        "PLACES": places(list(chain(*points)), shape, config.RUN_W),
        "PARTNERS": tuple(chain(*(partners(own, shape) for own in points))),
        "REACH": reach(shape),
        "IS_EVEN_H": h % config.RUN_H == 0,
        "IS_EVEN_W": w % config.RUN_W == 0,
        "STRIDE_XW": known_stride(x.stride(3), shape.c_in, is_large),
        "STRIDE_OW": known_stride(call.out_strides[-1], shape.c_out, is_large),
        "BLOCKS": config.num_warps,
        "CHANNELS_CI": layout.channels_ci,
        "CHANNELS_CO": layout.channels_co,
        "BLOCK_CI": config.BLOCK_CI,
        "BLOCK_CO": config.BLOCK_CO,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_H": config.BLOCK_H,
        "BLOCK_W": config.BLOCK_W,
        "RUN_H": config.RUN_H,
        "RUN_W": config.RUN_W,
        "HOLD_WEIGHTS": config.HOLD_WEIGHTS,
        "PREFETCH": config.PREFETCH and can_prefetch(x),
        "SPARSE": config.SPARSE,
        "IS_CROSSED": is_crossed(shape, config),
        "HAS_SHIFT": call.shift is not None,
        "HAS_RELU": call.has_relu,
        "HAS_CHANNEL_MASK": not is_full(shape, config),
        "IS_LARGE": is_large,
    }
    trips = (config.RUN_H,)
    return Launch(
        branch_conv_window_fwd_kernel, call.grid, call.selecting_arguments, constexprs, call.options, trips
    )
