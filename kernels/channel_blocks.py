"""Device helpers of programs whose warps take a channel block each: tensors have a first axis of BLOCKS.

Eight channels of a pixel are half of a sector of 32 bytes. The blocks of a program lie side by side in memory, so that
what one warp has fetched serves the next from L1. A product of rank 3 gives each warp of its program one entry of the
first axis; tiles are read as `[2, BLOCKS, columns / 2, elements]` (or with the outer axes exchanged: `LAST_FIRST`), so
that Triton hands warps to that axis alone, and nothing moves between them.
"""

import triton
import triton.language as tl

from .versions import TRITON

# Up to 3.7, Triton gives a thread four adjacent elements along K of an operand that was joined; from 3.8 on, two.
JOINED_FOURS = tl.constexpr(TRITON < (3, 8))

# Where no axis but one has neighbours in memory, Triton hands threads and warps to the others from the last one on, and
# from the first one on before 3.8 (3.6 does; 3.7 was not tried).
LAST_FIRST = tl.constexpr(TRITON >= (3, 8))


@triton.jit
def split_columns(COLUMNS: tl.constexpr):
    """Columns 0, 1, … of a tile in the order of reading, as sums of two: the first of a half, that within it. Together
    [2, 1, COLUMNS / 2, 1]"""
    half, column = tl.arange(0, 2) * (COLUMNS // 2), tl.arange(0, COLUMNS // 2)
    if LAST_FIRST:
        return half[:, None, None, None], column[None, None, :, None]
    else:
        return half[None, None, :, None], column[:, None, None, None]


@triton.jit
def joined_columns(tile):
    """A tile with its columns in order. [BLOCKS, columns, elements]"""
    tile = tl.permute(tile, (1, 0, 2, 3)) if LAST_FIRST else tl.permute(tile, (1, 2, 0, 3))
    return tl.reshape(tile, [tile.shape[0], tile.shape[1] * tile.shape[2], tile.shape[3]])


@triton.jit
def right_operands(tile):
    """`tile [2, BLOCKS, columns / 2, 16]` as right operands, as `tiling.right_operand`. [BLOCKS, 16, columns]"""
    tile = joined_columns(tile)
    BLOCKS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    tile = tl.permute(tl.reshape(tile, [BLOCKS, COLUMNS, 4, 2, 2]), (0, 3, 2, 4, 1))
    return tl.reshape(tile, [BLOCKS, 16, COLUMNS])


@triton.jit
def load_weight_operands(w_ptr, first):
    """A weight block `[16, 16]` for each entry of `first [BLOCKS]`, which says where it begins: as
    `tiling.load_weight_operand`. [BLOCKS, 16, 16]
    """
    BLOCKS: tl.constexpr = first.shape[0]
    flat = tl.load(w_ptr + first[:, None] + tl.arange(0, 256)[None, :])
    flat = tl.reshape(flat, [BLOCKS, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(flat, (0, 4, 1, 3, 2, 5)), [BLOCKS, 16, 16])


@triton.jit
def in_image_order(values, SPACING: tl.constexpr):
    """As `tiling.in_image_order`, for runs of two outputs of eight channels. [BLOCKS, 16, runs]"""
    BLOCKS: tl.constexpr = values.shape[0]
    RUNS: tl.constexpr = values.shape[2]
    values = tl.reshape(values, [BLOCKS, 2, 8, RUNS // SPACING, SPACING])
    values = tl.reshape(tl.permute(values, (0, 2, 3, 1, 4)), [BLOCKS, 8, RUNS, 2])
    return tl.reshape(tl.permute(values, (0, 3, 1, 2)), [BLOCKS, 16, RUNS])
