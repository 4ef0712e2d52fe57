"""Products on the tensor core whose left operand has two zeros in every four entries of a row (PTX `mma.sp`).

Weights of a channel block `[16 outputs, 16 inputs]` in groups of up to 8 channels are such operands: a row of four
inputs, two of each of two groups, has zeros for one of them. What is zero is neither held nor multiplied, so a block
takes half of the registers, and two blocks are one product.

A *slot* is a channel's place in its block. Thread `4 g + t` of a warp holds slots `4 t` to `4 t + 3` of pixel g; those
that the tensor core takes for four adjacent entries are two of them and two of the next thread's. So in groups of 8
channels the second four channels of a block and the third exchange their slots (IS_CROSSED).
"""

import triton
import triton.language as tl

from .tiling import packed, pairs

# Of a weight block, without its zeros.
SPARSE_ENTRIES = tl.constexpr(128)

IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def slot_channel(slot, IS_CROSSED: tl.constexpr):
    """The channel of a slot, and the slot of a channel."""
    # Spelt so that Triton sees fours of adjacent channels.
    return slot // 8 * 4 + slot // 4 % 2 * 8 + slot % 4 if IS_CROSSED else slot


@triton.jit
def _crossed(tile, IS_CROSSED: tl.constexpr):
    """`tile [BLOCKS, 16, pixels]` with slots in the place of channels, or channels in that of slots."""
    if IS_CROSSED:
        fours = tl.reshape(tile, [tile.shape[0], 2, 2, 4, tile.shape[2]])
        return tl.reshape(tl.permute(fours, (0, 2, 1, 3, 4)), [tile.shape[0], 16, tile.shape[2]])
    else:
        return tile


@triton.jit
def accumulators(tile, IS_CROSSED: tl.constexpr):
    """`tile [BLOCKS, 16, 8]`, channels of pixels, as the four values that each thread of BLOCKS warps accumulates:
    slots g and g + 8, each of pixels 2 t and 2 t + 1. `[BLOCKS * 32]` each."""
    BLOCKS: tl.constexpr = tile.shape[0]
    tile = tl.reshape(_crossed(tile, IS_CROSSED), [BLOCKS, 2, 8, 4, 2])
    even, odd = tl.split(tl.reshape(tl.permute(tile, (0, 2, 3, 1, 4)), [BLOCKS * 32, 2, 2]))
    first_even, second_even = tl.split(even)
    first_odd, second_odd = tl.split(odd)
    return first_even, first_odd, second_even, second_odd


@triton.jit
def accumulated(values, IS_CROSSED: tl.constexpr):
    """The tile that `accumulators` took apart. [BLOCKS, 16, 8]"""
    BLOCKS: tl.constexpr = values[0].shape[0] // 32
    tile = tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[3]))
    tile = tl.permute(tl.reshape(tile, [BLOCKS, 8, 4, 2, 2]), (0, 3, 1, 2, 4))
    return _crossed(tl.reshape(tile, [BLOCKS, 16, 8]), IS_CROSSED)


@triton.jit
def sparse_right(words):
    """Words `[BLOCKS * 8, 8]` of pixels, their slots in order, as the two that each thread holds. `[BLOCKS * 32]`"""
    low, high = tl.split(tl.reshape(words, [words.shape[0], 4, 2]))
    return tl.reshape(low, [words.shape[0] * 4]), tl.reshape(high, [words.shape[0] * 4])


@triton.jit
def load_sparse_left(w_ptr, first):
    """A weight block for each entry of `first [BLOCKS]`, which says where it begins, from the memory order of
    `weight_orders.sparse_order`: the two words that each thread holds. `[BLOCKS * 32]`"""
    flat = tl.load(w_ptr + first[:, None] + tl.arange(0, SPARSE_ENTRIES)[None, :])
    return tl.split(packed(tl.reshape(flat, [first.shape[0] * 32, 4])))


@triton.jit
def row_entries(words, dtype: tl.constexpr):
    """The two entries of a word of `load_sparse_left`, in fp32. `[BLOCKS * 32, 2]`"""
    entries = pairs(tl.reshape(words, [words.shape[0], 1]), dtype)
    return tl.reshape(entries, [words.shape[0], 2]).to(tl.float32)


@triton.jit
def row_word(entries):
    """The word of two entries. `[BLOCKS * 32]`"""
    return tl.reshape(packed(entries), [entries.shape[0]])


@triton.jit
def sparsity(BLOCKS: tl.constexpr):
    """Which two of four entries a thread's rows hold, for each four: 0 and 1 (binary 0100) in rows 0 to 3 and 8 to 11,
    2 and 3 (1110) in the others. `[BLOCKS * 32]`"""
    thread = tl.arange(0, BLOCKS * 32) % 32
    return tl.where(thread < 16, 0x44444444, -0x11111112)


@triton.jit
def sparse_product(left, right, acc, metadata, dtype: tl.constexpr):
    """`acc + left x right`, all as threads hold them; two blocks and twice two words are one product. Equivalent to
    `tl.dot` of `[16, 16]` or `[16, 32]` and 8 pixels for each warp."""
    if IS_INTERPRETED:
        for i in tl.static_range(0, len(left), 2):
            acc = _modelled_product((left[i], left[i + 1]), (right[i], right[i + 1]), acc, dtype)
        return acc
    else:
        TYPE: tl.constexpr = "bf16" if dtype == tl.bfloat16 else "f16"
        if len(left) == 4:
            # Its lanes are the warp's threads: tensors of 32 elements a warp lie so (`tests/test_sparse_products.py`).
            return tl.inline_asm_elementwise(
                "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." + TYPE + "." + TYPE + ".f32 "
                "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9, $10, $11}, {$12, $13, $14, $15}, $16, 0x0;",
                "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r",
                left + right + acc + (metadata,),
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )
        else:
            return tl.inline_asm_elementwise(
                "mma.sp::ordered_metadata.sync.aligned.m16n8k16.row.col.f32." + TYPE + "." + TYPE + ".f32 "
                "{$0, $1, $2, $3}, {$4, $5}, {$6, $7}, {$8, $9, $10, $11}, $12, 0x0;",
                "=f,=f,=f,=f,r,r,r,r,f,f,f,f,r",
                left + right + acc + (metadata,),
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )


@triton.jit
def _modelled_product(left, right, acc, dtype: tl.constexpr):
    """What `mma.sp.m16n8k16` computes of the same words under the metadata of `sparsity`, for the interpreter."""
    BLOCKS: tl.constexpr = acc[0].shape[0] // 32
    # (row, thread of four, row half, parity): rows r and r + 8, of each two entries in every four columns.
    entries = tl.reshape(pairs(tl.join(left[0], left[1]), dtype), [BLOCKS, 8, 4, 2, 2])
    # Columns are slots: (upper half, second four of the half, upper two of the four, parity).
    entries = tl.permute(tl.reshape(entries, [BLOCKS, 8, 2, 2, 2, 2]), (0, 4, 1, 3, 2, 5))
    row = tl.arange(0, 8)[None, None, :, None, None, None, None]
    second = tl.arange(0, 2)[None, None, None, None, :, None, None]
    entries = tl.reshape(entries, [BLOCKS, 2, 8, 2, 1, 2, 2])
    block = tl.where(row // 4 == second, entries, 0.0).to(dtype)
    pixels = tl.reshape(pairs(tl.join(right[0], right[1]), dtype), [BLOCKS, 8, 16])
    tile = tl.dot(tl.reshape(block, [BLOCKS, 16, 16]), tl.permute(pixels, (0, 2, 1)), accumulated(acc, False))
    return accumulators(tile, False)
