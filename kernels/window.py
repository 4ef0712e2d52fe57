"""Device helpers of convolutions that hold a window of rows in registers: reading, holding and writing rows.

Every warp of a program takes a channel block of its own, 16 channels: the blocks lie side by side in memory, so that
four of them fill the lines of 128 bytes which caches look up. A lane of the tensor core's right operand walks down the
image with adjacent pixels; neighbouring pixels of a row are other registers of the same lane.
"""

import triton
import triton.language as tl

from .channel_blocks import JOINED_FOURS, LAST_FIRST
from .prefetch import prefetch_l1, prefetch_l2
from .sparse_product import slot_channel
from .tiling import packed, pairs

# Rows that are on their way into L2 before a loop over rows asks for them.
ROWS_INTO_L2 = tl.constexpr(3)

# Channels of a sector of 32 bytes.
SECTOR = tl.constexpr(16)


@triton.jit
def by_lane(values):
    """`values [lanes]`, broadcastable with what is read: the axes are as `channel_blocks` says."""
    return values[None, :, None] if LAST_FIRST else values[:, None, None]


@triton.jit
def block_channels(block, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, IS_CROSSED: tl.constexpr):
    """Channels of the blocks `block [BLOCKS]`, CHANNELS each, padded to BLOCK_C: (channel, whether it is one of the
    block's), broadcastable with what is read; IS_CROSSED is as in `sparse_product`."""
    first = block * CHANNELS
    first = first[:, None, None] if LAST_FIRST else first[None, :, None]
    c = slot_channel(tl.arange(0, BLOCK_C), IS_CROSSED)[None, None, :]
    return first + c, c < CHANNELS


@triton.jit
def output_channels(first_block, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Output channels of BLOCKS blocks from `first_block` on, as `block_channels`. [BLOCKS * BLOCK_C]"""
    c = tl.arange(0, BLOCKS * BLOCK_C)
    if CHANNELS == BLOCK_C:  # Triton sees that they are adjacent
        return first_block * CHANNELS + c, c >= 0
    else:
        return first_block * CHANNELS + c // BLOCK_C * CHANNELS + c % BLOCK_C, c % BLOCK_C < CHANNELS


@triton.jit
def load_row(
    ptrs, row, stride_xw, y, x, mask, H_IN, W_IN,
    REACH: tl.constexpr, RUN_W: tl.constexpr, IS_EVEN_W: tl.constexpr,
):  # fmt: skip
    """One input row of every lane, RUN_W pixels and those that kernels reach beyond them: words `[BLOCKS * lanes, 8]`.

    `ptrs` points to a lane's first own pixel in image row `y`; `row` is added to it. `mask`: lanes whose first own
    pixel lies inside the image (where runs divide it, IS_EVEN_W, so do all), and channels that there are.
    """
    pixels = ()
    mask = mask & (y >= 0) & (y < H_IN)
    for s in tl.static_range(-REACH, RUN_W + REACH):
        mask_x = mask
        if s < 0:
            mask_x = mask & (x + s >= 0)
        if s >= RUN_W or not IS_EVEN_W:
            mask_x = mask_x & (x + s < W_IN)
        taps = tl.load(ptrs + (row + s * stride_xw), mask=mask_x, other=0.0)
        if not LAST_FIRST:
            taps = tl.permute(taps, (1, 0, 2))
        pixels = pixels + (packed(tl.reshape(taps, [taps.shape[0] * taps.shape[1], taps.shape[2]])),)
    return pixels


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
def unpacked(words, dtype: tl.constexpr, BLOCKS: tl.constexpr):
    """The channels that `packed` made words `[BLOCKS * lanes, 8]` of, as right operands `[BLOCKS, 16, lanes]` in the
    order in which the threads hold them: no register moves."""
    LANES: tl.constexpr = words.shape[0] // BLOCKS
    taps = tl.reshape(pairs(words, dtype), [BLOCKS, LANES, 4, 2, 2])
    taps = tl.permute(taps, (0, 2, 3, 4, 1)) if JOINED_FOURS else tl.permute(taps, (0, 3, 2, 4, 1))
    return tl.reshape(taps, [BLOCKS, 16, LANES])


@triton.jit
def load_taps(w_ptr, first):
    """A weight block for each entry of `first [BLOCKS]`, which says where it begins, its columns in the order of the
    rows of `unpacked`, from the memory order of `weight_orders.window_order`: each thread reads the four registers of
    its left operand at once. [BLOCKS, 16, 16]
    """
    BLOCKS: tl.constexpr = first.shape[0]
    flat = tl.load(w_ptr + first[:, None] + tl.arange(0, 256)[None, :])
    flat = tl.reshape(flat, [BLOCKS, 8, 4, 2, 2, 2])
    flat = tl.permute(flat, (0, 4, 1, 2, 3, 5)) if JOINED_FOURS else tl.permute(flat, (0, 4, 1, 3, 2, 5))
    return tl.reshape(flat, [BLOCKS, 16, 16])


@triton.jit
def joined(values, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT entries of a tuple, a power of 2, from FIRST on: `[..., 2, 2, …]`, the lowest bit of the index in the first
    of the new axes. Beyond the tuple's end stands its last entry again."""
    if COUNT == 1:
        return values[min(FIRST, len(values) - 1)]
    else:
        HALF: tl.constexpr = COUNT // 2
        return tl.join(joined(values, FIRST, HALF), joined(values, FIRST + HALF, HALF))


@triton.jit
def joined_index(COUNT: tl.constexpr):
    """Which entry of the tuple stands where in what `joined` gives, its new axes made one. [COUNT]"""
    i = tl.arange(0, COUNT)
    index = i * 0
    for bit in tl.static_range(COUNT.bit_length() - 1):
        index += (i >> bit) % 2 * (COUNT >> (bit + 1))
    return index


@triton.jit
def store_exchanged(
    ptrs, outputs, mask, x, W, stride_w, FIRST: tl.constexpr, COUNT: tl.constexpr, IS_EVEN_W: tl.constexpr
):
    """Of `store_row`, COUNT pixels of each lane from its FIRST one on, in one store."""
    PIXELS: tl.constexpr = triton.next_power_of_2(COUNT)
    pixels = tl.reshape(joined(outputs, FIRST, PIXELS), [ptrs.shape[0], ptrs.shape[1], PIXELS])
    s = FIRST + joined_index(PIXELS)[None, None, :]
    mask = mask[:, :, None] & (s < FIRST + COUNT)
    if not IS_EVEN_W:
        mask &= x[None, :, None] + s < W
    tl.store(ptrs[:, :, None] + (s * stride_w).to(tl.int64), pixels, mask=mask)


@triton.jit
def store_row(ptrs, outputs, mask, x, W, stride_w, IS_EVEN_W: tl.constexpr, AT_ONCE: tl.constexpr):
    """Write one row of every lane, a tuple of its pixels `[BLOCKS, 16, lanes]`, from `ptrs [BLOCKS * 16, lanes]` on;
    `x [lanes]` is a lane's first pixel.

    Several blocks exchange pixels first, AT_ONCE of each lane, so that each warp writes longer pieces of lines.
    """
    RUN_W: tl.constexpr = len(outputs)
    CHANNELS: tl.constexpr = ptrs.shape[0]
    LANES: tl.constexpr = ptrs.shape[1]
    if outputs[0].shape[0] == 1:
        for s in tl.static_range(RUN_W):
            mask_s = mask
            if not IS_EVEN_W:
                mask_s = mask & (x + s < W)[None, :]
            value = tl.reshape(outputs[s], [CHANNELS, LANES])
            tl.store(ptrs + tl.cast(s * stride_w, tl.int64), value, mask=mask_s)
    else:
        for first in tl.static_range(0, RUN_W, AT_ONCE):
            store_exchanged(
                ptrs, outputs, mask, x, W, stride_w, first, min(AT_ONCE, RUN_W - first), IS_EVEN_W
            )


@triton.jit
def strip_ahead(
    x_ptr, program, tile_h, tile_w, n_left, H, W, stride_xn, stride_xh, stride_xw,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, RUN_H: tl.constexpr, RUN_W: tl.constexpr,
):  # fmt: skip
    """The strip whose rows a program of one warp fetches ahead, all channels, for the programs of all channel blocks of
    its tile: (its first row, that row in the image, bytes of a row, 0 where there is none). `x_ptr` points to the
    tile's first sample.
    """
    sample = program // BLOCK_H
    y = (tile_h * BLOCK_H + program % BLOCK_H) * RUN_H
    x = tile_w * (BLOCK_W * RUN_W)
    ptr = x_ptr + (sample * tl.cast(stride_xn, tl.int64) + y * tl.cast(stride_xh, tl.int64) + x * stride_xw)
    size = tl.minimum(W - x, BLOCK_W * RUN_W) * stride_xw * (x_ptr.dtype.element_ty.primitive_bitwidth // 8)
    return ptr, y, tl.where((sample < n_left) & (y < H), size, 0)


@triton.jit
def sectors_ahead(
    x_ptr, program, tile_h, tile_w, n_left, W_IN, C_IN, stride_xn, stride_xh, stride_xw,
    REACH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN_H: tl.constexpr, RUN_W: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What a program of several warps, CHANNELS channels, reads of one row of each strip of a sample, in sectors: (the
    tile's first sample, offsets to the strips' first rows, those rows in the image, how many samples there are, and how
    far apart). Where there is no pixel or channel, the nearest that there is again: masks would take registers.
    """
    PIXELS: tl.constexpr = triton.next_power_of_2(BLOCK_W * RUN_W + 2 * REACH)
    # Channels that begin inside of a sector may end inside of one more.
    SECTORS: tl.constexpr = triton.next_power_of_2(2 * triton.cdiv(CHANNELS, SECTOR) - CHANNELS // SECTOR)
    entry = tl.arange(0, BLOCK_H * PIXELS * SECTORS)
    x = tile_w * (BLOCK_W * RUN_W) - REACH + entry // SECTORS % PIXELS
    x = tl.minimum(tl.maximum(x, 0), W_IN - 1)
    first = program * CHANNELS
    channel = first // SECTOR * SECTOR + entry % SECTORS * SECTOR
    channel = tl.minimum(channel, tl.minimum(first + CHANNELS, C_IN) - 1)
    y = tile_h * (BLOCK_H * RUN_H)
    if BLOCK_H > 1:
        y += entry // (SECTORS * PIXELS) * RUN_H
    return x_ptr, y * stride_xh + x * stride_xw + channel, y, n_left, stride_xn


@triton.jit
def rows_ahead(
    x_ptr, program, tile_h, tile_w, n_left, H_IN, W, W_IN, C_IN, stride_xn, stride_xh, stride_xw,
    REACH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN_H: tl.constexpr, RUN_W: tl.constexpr, CHANNELS_CI: tl.constexpr,
):  # fmt: skip
    """What `prefetch_row` fetches of a tile's rows, of `n_left` samples, for a program of BLOCKS warps. Of one warp, it
    fetches the first rows here: the loop begins with those after them."""
    if BLOCKS == 1:
        # `n_left` is no more than BLOCK_N. Of several samples, pooling spills under Triton 3.9 unless it is told so
        # again; of one, it spills if it is.
        samples = tl.minimum(n_left, BLOCK_N) if BLOCK_N > 1 else n_left
        strip = strip_ahead(
            x_ptr, program, tile_h, tile_w, samples, H_IN, W, stride_xn, stride_xh, stride_xw,
            BLOCK_H, BLOCK_W, RUN_H, RUN_W,
        )  # fmt: skip
        for i in tl.static_range(ROWS_INTO_L2):
            r = i - ROWS_INTO_L2 - 2 * REACH
            prefetch_row(strip, r, tl.cast(stride_xh, tl.int64), H_IN, REACH, BLOCKS, BLOCK_N, RUN_H)
        return strip
    else:
        return sectors_ahead(
            x_ptr, program, tile_h, tile_w, n_left, W_IN, C_IN, stride_xn, stride_xh, stride_xw,
            REACH, BLOCK_H, BLOCK_W, RUN_H, RUN_W, BLOCKS * CHANNELS_CI,
        )  # fmt: skip


@triton.jit
def prefetch_row(
    ahead, r, row_stride, H_IN,
    REACH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, RUN_H: tl.constexpr,
):  # fmt: skip
    """In trip r of the loop over the rows, fetch what a later trip loads: three later into L2, where a program is one
    warp; the next one's into L1 where it is several."""
    if BLOCKS == 1:
        ptr, y0, size = ahead
        later = r + ROWS_INTO_L2
        y = y0 + later + REACH
        is_wanted = (size > 0) & (later < RUN_H) & (y >= 0) & (y < H_IN)
        prefetch_l2(ptr + (later + REACH) * row_stride, size, is_wanted)
    else:
        x_ptr, offs, y0, n_left, stride_xn = ahead
        row = r + 1 + REACH
        is_wanted = (r + 1 < RUN_H) & (y0 + row >= 0) & (y0 + row < H_IN)
        # One after the other: offsets into all samples would take a register each.
        for i in tl.static_range(BLOCK_N):
            sample_ptr = x_ptr + (tl.minimum(i, n_left - 1) * tl.cast(stride_xn, tl.int64) + row * row_stride)
            prefetch_l1(sample_ptr + offs, is_wanted)
