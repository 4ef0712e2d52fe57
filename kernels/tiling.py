"""Device helpers that every branch-convolution kernel shares: how outputs are grouped into runs, and the pooled sums.

A *run* is `RUN` outputs along one axis, `SPACING` pixels apart. With `SPACING = dilation / gcd(dilation, stride)` the
input pixels that neighbouring outputs of a run read fall on one lattice of pitch `dilation`, so a run of `RUN` outputs
reads `(RUN - 1) * STEP + k` lattice points, `STEP = stride / gcd(dilation, stride)`, instead of `RUN * k`.
"""

import triton
import triton.language as tl

# Arguments whose values Triton must not specialise for.
SIZES = ("N", "H_IN", "W_IN", "H", "W", "TILES_H", "TILES_W", "CHANNEL_PROGRAMS")


@triton.jit
def run_origin(run, RUN: tl.constexpr, SPACING: tl.constexpr):
    """First output of each run: runs 0, 1, 2, … tile the axis without gaps or overlaps."""
    return (run // SPACING) * (RUN * SPACING) + run % SPACING


@triton.jit
def locate_tile(pid, CHANNEL_PROGRAMS, TILES_H, TILES_W):
    """(channel program, tile within a sample, tile row, tile column, block of samples) of a program."""
    tile = pid // CHANNEL_PROGRAMS
    tiles = TILES_H * TILES_W
    return pid % CHANNEL_PROGRAMS, tile % tiles, tile // TILES_W % TILES_H, tile % TILES_W, tile // tiles


@triton.jit
def widen(a, b, c, IS_LARGE: tl.constexpr):
    """Three strides, in 64 bits where offsets inside a tile's samples may reach 2^31 elements."""
    if IS_LARGE:
        return tl.cast(a, tl.int64), tl.cast(b, tl.int64), tl.cast(c, tl.int64)
    else:
        return a, b, c


@triton.jit
def packed(values):
    """Pairs of 16-bit channels `[rows, channels]` as words: LLVM takes apart what a loop carries as 16 bits."""
    low, high = tl.split(tl.reshape(values, [values.shape[0], values.shape[1] // 2, 2]))
    low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return high.to(tl.int16, bitcast=True).to(tl.int32) << 16 | low


@triton.jit
def pairs(words, dtype: tl.constexpr):
    """The channels that `packed` made words `[rows, words]` of. [rows, words, 2]"""
    low = words.to(tl.int16).to(dtype, bitcast=True)
    high = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, high)


@triton.jit
def relu(v):
    """ReLU that hands NaN on, as `torch.relu` does (a plain maximum would drop it)."""
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_attention(attention_ptr, mask, tag):
    """Attention in fp32 from pointers to fp32, or to words that another program of the launch may yet have to write.

    A word is 64 bits: `tag` in its upper half says that the lower half, the attention's bits, belongs to this launch.
    Each word vouches for itself, so nothing else need be ordered by it: an acquire would empty the processor's L1 at
    every wait. Volatile loads are relaxed ones of the widest scope in PTX.
    """
    if attention_ptr.dtype.element_ty == tl.int64:
        words = tl.load(attention_ptr, mask=mask, other=0, volatile=True)
        while tl.max(tl.where(mask & ((words >> 32).to(tl.int32) != tag), 1, 0)) > 0:
            words = tl.load(attention_ptr, mask=mask, other=0, volatile=True)
        return words.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return tl.load(attention_ptr, mask=mask, other=0.0)


@triton.jit
def branch_attention(
    attention_ptr, n0, sample, n_left, m: tl.constexpr, co0, co, co_end, C_OUT, tag,
    M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Branch m's attention for the outputs of a tile. [channels, pixels], or [channels, 1] of a single sample"""
    if BLOCK_N == 1:
        offs = (n0 * M + m) * C_OUT + co0 + co[:, None]
        mask = (co < co_end)[:, None]
    else:
        offs = ((n0 + sample) * M + m)[None, :] * C_OUT + co0 + co[:, None]
        mask = (co < co_end)[:, None] & (sample < n_left)[None, :]
    return load_attention(attention_ptr + offs, mask, tag)


@triton.jit
def store_tagged(word_ptr, values, mask, tag):
    """Write fp32 `values` as the words that `load_attention` waits for, each in one access."""
    bits = values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    words = tl.cast(tag, tl.int64) << 32 | bits
    tl.atomic_xchg(word_ptr, words, mask=mask, sem="relaxed", scope="gpu")


@triton.jit
def pooled_pixels(origin, mask_p, W, RUN_W: tl.constexpr, SPACING: tl.constexpr, BLOCK_POOL: tl.constexpr):
    """Whether row run `p` has a pixel of the image at position `column`. [BLOCK_P, BLOCK_POOL]"""
    offs_col = tl.arange(0, BLOCK_POOL)
    in_image = origin[:, None] + offs_col[None, :] * SPACING < W
    return in_image & (offs_col < RUN_W)[None, :] & mask_p[:, None]


@triton.jit
def fold_pool(
    pool, RUN_W: tl.constexpr, BLOCK_CO: tl.constexpr, BLOCK_N: tl.constexpr, POOL_BY_DOT: tl.constexpr
):
    """Sums per sample and channel, `[BLOCK_N, BLOCK_CO]`, from what a tile's branches accumulated.

    `POOL_BY_DOT`: `pool` is `[RUN_W * BLOCK_CO, BLOCK_POOL]`, of which each row uses its own run position's column.
    Otherwise it is `[RUN_W * BLOCK_CO, BLOCK_N * pixels]`.
    """
    if POOL_BY_DOT:
        BLOCK_POOL: tl.constexpr = pool.shape[1]
        position = tl.arange(0, RUN_W * BLOCK_CO) // BLOCK_CO
        own = position[:, None] == tl.arange(0, BLOCK_POOL)[None, :]
        sums = tl.sum(tl.where(own, pool, 0.0), axis=1)
        sums = tl.sum(tl.reshape(sums, [RUN_W, BLOCK_CO]), axis=0)
        return tl.reshape(sums, [1, BLOCK_CO])
    else:
        PIXELS: tl.constexpr = pool.shape[1] // BLOCK_N
        sums = tl.sum(tl.reshape(pool, [RUN_W * BLOCK_CO, BLOCK_N, PIXELS]), axis=2)
        sums = tl.sum(tl.reshape(sums, [RUN_W, BLOCK_CO, BLOCK_N]), axis=0)
        return tl.trans(sums)


@triton.jit
def in_image_order(
    values, RUN_W: tl.constexpr, BLOCK_CO: tl.constexpr, BLOCK_P: tl.constexpr, SPACING: tl.constexpr
):
    """Outputs of row runs whose pixels are SPACING apart, where adjacent runs have them. [RUN_W * BLOCK_CO, BLOCK_P]

    SPACING is a power of two that divides the row runs of a tile. For SPACING 2 all pixels that change places are
    registers of one thread of the tensor core's layout, so nothing moves.
    """
    if RUN_W > 1 and SPACING > 1:
        # A pixel is (block of SPACING runs, position in the run, run in the block), most significant first.
        values = tl.reshape(values, [RUN_W, BLOCK_CO, BLOCK_P // SPACING, SPACING])
        values = tl.reshape(tl.permute(values, (1, 2, 0, 3)), [BLOCK_CO, BLOCK_P, RUN_W])
        values = tl.reshape(tl.permute(values, (2, 0, 1)), [RUN_W * BLOCK_CO, BLOCK_P])
    return values


@triton.jit
def part_elements(BLOCK_CI: tl.constexpr, BLOCK_K: tl.constexpr, IS_SHORT: tl.constexpr):
    """(lattice point, channel) of the elements of a part of a row, in the order of reading. [BLOCK_K] each"""
    k = tl.arange(0, BLOCK_K)
    if IS_SHORT:
        # Bits 2 and 3 swapped: a thread reads 4 adjacent elements, not 8. Spelt so that Triton sees they are adjacent.
        if BLOCK_CI == 8:
            return k // 4 % 2, k // 8 * 4 + k % 4
        else:
            return k // 16, k // 8 * 4 + k // 4 % 2 * 8 + k % 4
    else:
        return k // BLOCK_CI, k % BLOCK_CI


@triton.jit
def right_operand(tile, IS_SHORT: tl.constexpr):
    """`tile [columns, BLOCK_K]` as a right operand `[BLOCK_K, columns]`, its rows in another order: that in which a
    warp's threads, each of which has read adjacent elements, already hold what the tensor core wants of them. No shared
    memory is needed, and no barrier that would hold back the loads of the next rows. A product whose operands are both
    in this order is the same product.

    One permutation, not one and a transposition: Triton 3.8 sends what it sees transposed through shared memory.
    """
    COLUMNS: tl.constexpr = tile.shape[0]
    BLOCK_K: tl.constexpr = tile.shape[1]
    if tile.dtype.primitive_bitwidth == 32:
        tile = tl.permute(tl.reshape(tile, [COLUMNS, 4, 2, 2]), [2, 3, 1, 0])
    elif IS_SHORT:
        tile = tl.permute(tl.reshape(tile, [COLUMNS, 4, 2, 2]), [2, 1, 3, 0])
    else:
        tile = tl.permute(tl.reshape(tile, [COLUMNS, 4, 2, 2, 2]), [2, 3, 1, 4, 0])
    return tl.reshape(tile, [BLOCK_K, COLUMNS])


@triton.jit
def load_weight_operand(w_ptr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """A weight block `[BLOCK_M, BLOCK_K]`, its columns in the order of `right_operand`'s rows, from the memory order of
    `weight_orders.operand_order`: each thread reads the four registers of its left operand at once.
    """
    flat = tl.load(w_ptr + tl.arange(0, BLOCK_M * BLOCK_K))
    flat = tl.reshape(flat, [BLOCK_K // 16, BLOCK_M // 16, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(flat, (1, 5, 2, 0, 4, 3, 6)), [BLOCK_M, BLOCK_K])
