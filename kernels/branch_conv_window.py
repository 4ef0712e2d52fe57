"""Branch convolutions of 16-bit activations whose groups fit a block of 16 channels: a window of rows in registers.

A lane of the tensor core's right operand walks down the image with RUN_W adjacent pixels. The rows that all branches'
kernels reach are held in registers as products take them, so an input element is loaded once per strip, whatever the
kernels, and neighbouring pixels of a row are other registers of the same lane. What is loaded at once are 32 adjacent
bytes of a pixel, a whole sector.
"""

import triton
import triton.language as tl

from .norm import lane_moments, store_moments
from .prefetch import prefetch_l2
from .tiling import (
    SIZES,
    branch_attention,
    fold_pool,
    locate_tile,
    packed,
    pairs,
    relu,
    widen,
)

# Up to 3.7, Triton gives a thread four adjacent elements along K of an operand that was joined; from 3.8 on, two.
JOINED_FOURS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8))

# Rows that are on their way into L2 before a loop over rows asks for them.
PREFETCH_ROWS = tl.constexpr(3)


@triton.jit
def load_row(
    ptrs, row, stride_xw, y, x, mask_p, ci, H_IN, W_IN, CI_END,
    REACH: tl.constexpr, RUN_W: tl.constexpr, IS_EVEN_W: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr,
):  # fmt: skip
    """One input row of every lane, RUN_W pixels and those that kernels reach beyond them: tensors `[16, 8]`.

    `ptrs [8, 16]` points to a lane's first own pixel in image row `y`; `row` is added to it. `mask_p`: lanes whose
    first own pixel lies inside the image; where runs divide it (IS_EVEN_W), so do all.
    """
    pixels = ()
    mask_y = mask_p & (y >= 0) & (y < H_IN)
    for s in tl.static_range(-REACH, RUN_W + REACH):
        mask_x = mask_y
        if s < 0:
            mask_x = mask_y & (x + s >= 0)
        if s >= RUN_W or not IS_EVEN_W:
            mask_x = mask_x & (x + s < W_IN)
        mask = mask_x[:, None]
        if HAS_CHANNEL_MASK:
            mask = mask & (ci < CI_END)[None, :]
        taps = tl.load(ptrs + (row + s * stride_xw), mask=mask, other=0.0)
        pixels = pixels + (packed(taps),)
    return pixels


@triton.jit
def lead_strip(
    x_ptr, block, tile_h, tile_w, n_left, H, W, stride_xn, stride_xh, stride_xw,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, RUN_H: tl.constexpr, RUN_W: tl.constexpr,
):  # fmt: skip
    """The strip whose rows a program prefetches, all channels, for all channel blocks of its tile: pointer to its first
    row, that row in the image, bytes of a row, and whether there is one. `x_ptr` points to the tile's first sample.
    """
    sample = block // BLOCK_H
    y = (tile_h * BLOCK_H + block % BLOCK_H) * RUN_H
    x = tile_w * (BLOCK_W * RUN_W)
    ptr = x_ptr + (sample * tl.cast(stride_xn, tl.int64) + y * tl.cast(stride_xh, tl.int64) + x * stride_xw)
    size = tl.minimum(W - x, BLOCK_W * RUN_W) * stride_xw * (x_ptr.dtype.element_ty.primitive_bitwidth // 8)
    return ptr, y, size, (sample < tl.minimum(n_left, BLOCK_N)) & (y < H)


@triton.jit
def prefetch_row(strip, r, row_stride, H_IN, RUN_H: tl.constexpr, REACH: tl.constexpr):
    """Prefetch what trip `r + PREFETCH_ROWS` of the loop over the rows of a `lead_strip` will load."""
    ptr, y0, size, is_lead = strip
    ahead = r + PREFETCH_ROWS
    y = y0 + ahead + REACH
    prefetch_l2(ptr + (ahead + REACH) * row_stride, size, is_lead & (ahead < RUN_H) & (y >= 0) & (y < H_IN))


@triton.jit
def prefetch_first_rows(strip, row_stride, H_IN, RUN_H: tl.constexpr, REACH: tl.constexpr):
    """Prefetch the rows that the loop does not, those of its first trips."""
    for i in tl.static_range(PREFETCH_ROWS):
        prefetch_row(strip, i - PREFETCH_ROWS - 2 * REACH, row_stride, H_IN, RUN_H, REACH)


@triton.jit
def empty_window(PIXELS: tl.constexpr, LANES: tl.constexpr, BLOCK_CI: tl.constexpr):
    """What a loop may carry before the first row is loaded."""
    window = ()
    for _ in tl.static_range(PIXELS):
        window = window + (tl.zeros([LANES, BLOCK_CI // 2], tl.int32),)
    return window


@triton.jit
def without_first(window, WIDTH: tl.constexpr):
    """The window, less its first row."""
    left = ()
    for i in tl.static_range(WIDTH, len(window)):
        left = left + (window[i],)
    return left


@triton.jit
def unpacked(words, dtype: tl.constexpr):
    """The channels that `packed` made words `[lanes, 8]` of, as a right operand `[16, lanes]` in the order in which the
    threads hold them: no register moves."""
    taps = tl.reshape(pairs(words, dtype), [words.shape[0], 4, 2, 2])
    taps = tl.permute(taps, (1, 2, 3, 0)) if JOINED_FOURS else tl.permute(taps, (2, 1, 3, 0))
    return tl.reshape(taps, [16, words.shape[0]])


@triton.jit
def load_taps(w_ptr):
    """A weight block `[16, 16]`, its columns in the order of the rows of `unpacked`, from the memory order of
    `packing.window_order`: each thread reads the four registers of its left operand at once.
    """
    flat = tl.reshape(tl.load(w_ptr + tl.arange(0, 256)), [8, 4, 2, 2, 2])
    flat = tl.permute(flat, (3, 0, 1, 2, 4)) if JOINED_FOURS else tl.permute(flat, (3, 0, 2, 1, 4))
    return tl.reshape(flat, [16, 16])


@triton.jit
def window_outputs(
    operands, taps, start,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, REACH: tl.constexpr, RUN_W: tl.constexpr,
):  # fmt: skip
    """Every lane's RUN_W output pixels of one branch, before its activation: tensors `[16, 8]`.

    Tap by tap, so that products that wait for one another are RUN_W apart.
    """
    WIDTH: tl.constexpr = RUN_W + 2 * REACH
    FIRST: tl.constexpr = (REACH - KERNEL // 2 * DILATION) * (WIDTH + 1)
    outputs = ()
    for _ in tl.static_range(RUN_W):
        outputs = outputs + (start,)
    for ky in tl.static_range(KERNEL):
        for kx in tl.static_range(KERNEL):
            added = ()
            for s in tl.static_range(RUN_W):
                operand = operands[FIRST + (ky * WIDTH + kx) * DILATION + s]
                added = added + (tl.dot(taps[ky * KERNEL + kx], operand, outputs[s]),)
            outputs = added
    return outputs


@triton.jit
def window_tile(
    x_ptr, w_ptr, shift_ptr, attention_ptr, tag, out_ptr, partial_ptr,
    block, tile, tile_h, tile_w, block_n, N, H_IN, W_IN, H, W, C_IN, C_OUT,
    stride_xn, stride_xh, stride_xw, stride_om, stride_on, stride_oc, stride_oh, stride_ow,
    stride_partial_n, stride_partial_t,
    TASK: tl.constexpr, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, W_OFFSETS: tl.constexpr,
    REACH: tl.constexpr, IS_EVEN_H: tl.constexpr, IS_EVEN_W: tl.constexpr,
    STRIDE_XW: tl.constexpr, STRIDE_OW: tl.constexpr,
    CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN_H: tl.constexpr, RUN_W: tl.constexpr, HOLD_WEIGHTS: tl.constexpr, PREFETCH: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """Every branch of one tile and channel block; TASK, `tile` and `tag` as in `stream_tile`.

    A tile is BLOCK_N samples x BLOCK_H strips of RUN_H rows x BLOCK_W lanes of RUN_W pixels. A channel block is
    CHANNELS_CI inputs and CHANNELS_CO outputs (whole groups), padded to BLOCK_CI and BLOCK_CO. Kernels reach REACH
    pixels beyond their own. STRIDE_XW and STRIDE_OW: `stride_xw` and `stride_ow`, or 0 where a compilation is for any.
    """
    M: tl.constexpr = len(KERNELS)
    BLOCK_P: tl.constexpr = BLOCK_N * BLOCK_H * BLOCK_W
    WIDTH: tl.constexpr = RUN_W + 2 * REACH
    ROWS: tl.constexpr = 2 * REACH + 1
    IS_STORED: tl.constexpr = TASK == "store" or TASK == "train"
    IS_MEASURED: tl.constexpr = TASK == "train" or TASK == "measure"
    dtype = x_ptr.dtype.element_ty
    stride_xn, stride_xh, stride_xw = widen(stride_xn, stride_xh, stride_xw, IS_LARGE)
    stride_on, stride_oh, stride_ow = widen(stride_on, stride_oh, stride_ow, IS_LARGE)
    # What the compiler knows, loads and stores add to an address without an instruction.
    stride_xw = STRIDE_XW if STRIDE_XW > 0 else stride_xw
    stride_ow = STRIDE_OW if STRIDE_OW > 0 else stride_ow
    n0 = block_n.to(tl.int64) * BLOCK_N
    n_left = tl.minimum(N - n0, BLOCK_N).to(tl.int32)
    lane = tl.arange(0, BLOCK_P)
    sample = lane // (BLOCK_H * BLOCK_W)
    y0 = (tile_h * BLOCK_H + lane // BLOCK_W % BLOCK_H) * RUN_H
    x0 = (tile_w * BLOCK_W + lane % BLOCK_W) * RUN_W
    mask_p = (y0 < H) & (x0 < W) & (sample < n_left)
    ci = tl.arange(0, BLOCK_CI)
    co = tl.arange(0, BLOCK_CO)
    ci0 = block * CHANNELS_CI
    co0 = block * CHANNELS_CO
    ci_end = tl.minimum(CHANNELS_CI, C_IN - ci0)
    co_end = tl.minimum(CHANNELS_CO, C_OUT - co0)
    # Where each lane reads, once; rows and pixels are offsets that all lanes add.
    own = sample * stride_xn + y0 * stride_xh + x0 * stride_xw
    ptrs = x_ptr + n0 * stride_xn + ci0 + (own[:, None] + ci[None, :])
    offs_out = (sample * stride_on + y0 * stride_oh + x0 * stride_ow)[None, :] + co[:, None] * stride_oc
    out_ptrs = out_ptr + n0 * stride_on + co0 * stride_oc + offs_out
    mask_out = mask_p[None, :]  # [BLOCK_CO, BLOCK_P]
    if HAS_CHANNEL_MASK:
        mask_out &= (co < co_end)[:, None]
    row_stride = tl.cast(stride_xh, tl.int64)
    if PREFETCH:
        strip = lead_strip(
            x_ptr + n0 * stride_xn, block, tile_h, tile_w, n_left, H, W, stride_xn, stride_xh, stride_xw,
            BLOCK_N, BLOCK_H, BLOCK_W, RUN_H, RUN_W,
        )  # fmt: skip
        prefetch_first_rows(strip, row_stride, H_IN, RUN_H, REACH)

    weights = ()
    starts = ()
    attention = ()
    for m in tl.static_range(M):
        if HOLD_WEIGHTS:
            for tap in tl.static_range(KERNELS[m] * KERNELS[m]):
                tap_ptr = w_ptr + block * W_OFFSETS[M] + W_OFFSETS[m] + tap * (BLOCK_CO * BLOCK_CI)
                weights = weights + (load_taps(tap_ptr),)
        if HAS_SHIFT:
            shift = tl.load(shift_ptr + m * C_OUT + co0 + co, mask=co < co_end, other=0.0)
            starts = starts + (tl.broadcast_to(shift[:, None], [BLOCK_CO, BLOCK_P]),)
        else:
            starts = starts + (tl.zeros([BLOCK_CO, BLOCK_P], tl.float32),)
        if TASK == "select":
            a = branch_attention(
                attention_ptr, n0, sample, n_left, m, co0, co, co_end, C_OUT, tag, M, BLOCK_N
            )
            attention = attention + (a,)

    zeros = tl.zeros([BLOCK_CO, BLOCK_P], tl.float32)
    sums = ()  # the tile's sum, or for each branch pivot, sum and sum of squares of its distances, number
    if IS_MEASURED:
        for _ in tl.static_range(M):
            sums = sums + (zeros, zeros, zeros, zeros)
    elif TASK != "select":
        sums = (zeros,)

    # The first rows only fill the window. All in one loop: of each load Triton looks for all that depends on it, which
    # takes half a minute where there is one for every pixel of the window.
    window = empty_window(2 * REACH * WIDTH, BLOCK_P, BLOCK_CI)
    for r in range(-2 * REACH, RUN_H):
        if PREFETCH:
            prefetch_row(strip, r, row_stride, H_IN, RUN_H, REACH)
        window = window + load_row(
            ptrs, (r + REACH) * row_stride, stride_xw, y0 + r + REACH, x0, mask_p, ci, H_IN, W_IN, ci_end,
            REACH, RUN_W, IS_EVEN_W, HAS_CHANNEL_MASK,
        )  # fmt: skip
        if r >= 0:
            operands = ()
            for i in tl.static_range(ROWS * WIDTH):
                operands = operands + (unpacked(window[i], dtype),)
            mask_r = mask_out
            if not IS_EVEN_H:
                mask_r = mask_out & (y0 + r < H)[None, :]
            selection = ()
            added = ()
            for m in tl.static_range(M):
                taps = ()
                for tap in tl.static_range(KERNELS[m] * KERNELS[m]):
                    if HOLD_WEIGHTS:
                        taps = taps + (weights[W_OFFSETS[m] // (BLOCK_CO * BLOCK_CI) + tap],)
                    else:
                        tap_ptr = w_ptr + block * W_OFFSETS[M] + W_OFFSETS[m] + tap * (BLOCK_CO * BLOCK_CI)
                        taps = taps + (load_taps(tap_ptr),)
                if IS_MEASURED:
                    pivot = sums[4 * m]
                    total = sums[4 * m + 1]
                    squares = sums[4 * m + 2]
                    count = sums[4 * m + 3]
                outputs = window_outputs(operands, taps, starts[m], KERNELS[m], DILATIONS[m], REACH, RUN_W)
                chosen = ()
                for s in tl.static_range(RUN_W):
                    acc = outputs[s]
                    if HAS_RELU:
                        acc = relu(acc)
                    mask = mask_r
                    if not IS_EVEN_W:
                        mask = mask_r & (x0 + s < W)[None, :]
                    if TASK == "select":
                        acc *= attention[m]
                        if m > 0:
                            acc += selection[s].to(tl.float32)
                        # In 16 bits between branches, as eager adds them: half the registers.
                        chosen = chosen + (acc.to(dtype),)
                    else:
                        u = acc.to(dtype)
                        if IS_STORED:
                            at = tl.cast(r * stride_oh + s * stride_ow, tl.int64)
                            tl.store(out_ptrs + m * tl.cast(stride_om, tl.int64) + at, u, mask=mask)
                        if IS_MEASURED:
                            value = u.to(tl.float32)
                            if s == 0:
                                pivot = tl.where(r == 0, value, pivot)
                            away = value - pivot
                            if not (IS_EVEN_H and IS_EVEN_W):
                                away = tl.where(mask, away, 0.0)
                                count += tl.where(mask, 1.0, 0.0)
                            total += away
                            squares += away * away
                        else:
                            if not (IS_EVEN_H and IS_EVEN_W):
                                acc = tl.where(mask, acc, 0.0)
                            sums = (sums[0] + acc,)
                selection = chosen
                if IS_MEASURED:
                    added = added + (pivot, total, squares, count)
            if IS_MEASURED:
                sums = added
            if TASK == "select":
                for s in tl.static_range(RUN_W):
                    mask = mask_r
                    if not IS_EVEN_W:
                        mask = mask_r & (x0 + s < W)[None, :]
                    at = tl.cast(r * stride_oh + s * stride_ow, tl.int64)
                    tl.store(out_ptrs + at, selection[s], mask=mask)
        window = without_first(window, WIDTH)

    if IS_MEASURED:
        for m in tl.static_range(M):
            count = sums[4 * m + 3]
            if IS_EVEN_H and IS_EVEN_W:
                count = tl.broadcast_to(tl.where(mask_out, RUN_H * RUN_W * 1.0, 0.0), [BLOCK_CO, BLOCK_P])
            mean, m2 = lane_moments(sums[4 * m], sums[4 * m + 1], sums[4 * m + 2], count)
            store_moments(
                partial_ptr + m * 3 * stride_partial_n + co0, mean, m2, count, co, co < co_end,
                stride_partial_n, 1, BLOCK_CO,
            )  # fmt: skip
    elif TASK != "select":
        pool = tl.where(mask_p[None, :], sums[0], 0.0)
        pooled = fold_pool(pool, 1, BLOCK_CO, BLOCK_N, False)
        offs_n = tl.arange(0, BLOCK_N)
        offs_partial = (n0 + offs_n)[:, None] * stride_partial_n + tile.to(tl.int64) * stride_partial_t
        mask = (offs_n < n_left)[:, None] & (co < co_end)[None, :]
        tl.store(partial_ptr + offs_partial + co0 + co[None, :], pooled, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def branch_conv_window_fwd_kernel(
    x_ptr, w_ptr, shift_ptr, attention_ptr, out_ptr, partial_ptr,
    N, H_IN, W_IN, H, W, C_IN, C_OUT, TILES_H, TILES_W, CHANNEL_PROGRAMS,
    stride_xn, stride_xh, stride_xw, stride_om, stride_on, stride_oc, stride_oh, stride_ow,
    stride_partial_n, stride_partial_t,
    TASK: tl.constexpr, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, W_OFFSETS: tl.constexpr,
    REACH: tl.constexpr, IS_EVEN_H: tl.constexpr, IS_EVEN_W: tl.constexpr,
    STRIDE_XW: tl.constexpr, STRIDE_OW: tl.constexpr,
    CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN_H: tl.constexpr, RUN_W: tl.constexpr, HOLD_WEIGHTS: tl.constexpr, PREFETCH: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """One tile of one channel block: `window_tile`."""
    block, tile, tile_h, tile_w, block_n = locate_tile(tl.program_id(0), CHANNEL_PROGRAMS, TILES_H, TILES_W)
    if TASK == "train" or TASK == "measure":  # moments of tiles of all samples
        partial_ptr += tl.program_id(0).to(tl.int64) // CHANNEL_PROGRAMS * stride_partial_t
    window_tile(
        x_ptr, w_ptr, shift_ptr, attention_ptr, 0, out_ptr, partial_ptr,
        block, tile, tile_h, tile_w, block_n, N, H_IN, W_IN, H, W, C_IN, C_OUT,
        stride_xn, stride_xh, stride_xw, stride_om, stride_on, stride_oc, stride_oh, stride_ow,
        stride_partial_n, stride_partial_t,
        TASK, KERNELS, DILATIONS, W_OFFSETS, REACH, IS_EVEN_H, IS_EVEN_W, STRIDE_XW, STRIDE_OW,
        CHANNELS_CI, CHANNELS_CO,
        BLOCK_CI, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, RUN_H, RUN_W, HOLD_WEIGHTS, PREFETCH,
        HAS_SHIFT, HAS_RELU, HAS_CHANNEL_MASK, IS_LARGE,
    )  # fmt: skip
