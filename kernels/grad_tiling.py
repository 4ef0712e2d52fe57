"""Device helpers of the backward kernels: the gradient of a branch's convolution, built in registers a row at a time.

Rows are read with adjacent channels and brought into the layout of an accumulator, in which a thread holds pixels of
one or two channels, by products with 0/1 matrices: exact, and conversions to fp32 come with them.
"""

import triton
import triton.language as tl

from .tiling import right_operand


@triton.jit
def first_tile_of(tile, TILES_H, TILES_W, RUN_H: tl.constexpr, OWN: tl.constexpr):
    """(sample, first own column, first row) of a tile: RUN_H rows x OWN columns. Those of an image column follow each
    other, so rows that two of them read are still in the cache."""
    n = (tile // (TILES_H * TILES_W)).to(tl.int64)
    return n, tile // TILES_H % TILES_W * OWN, tile % TILES_H * RUN_H


@triton.jit
def tile_after(n, x_start, y_first, H, W, RUN_H: tl.constexpr, OWN: tl.constexpr):
    """As `first_tile_of`, of the tile after that, without divisions."""
    y_first += RUN_H
    x_start = tl.where(y_first < H, x_start, x_start + OWN)
    y_first = tl.where(y_first < H, y_first, 0)
    n += (x_start >= W).to(tl.int64)
    return n, tl.where(x_start < W, x_start, 0), y_first


@triton.jit
def equal_to(rows, columns, dtype: tl.constexpr):
    """The 0/1 matrix whose entry is 1 where `rows[i] == columns[j]`."""
    # Not converted from a mask: Triton would take the product for one of bytes and order its operands otherwise.
    return tl.where(rows[:, None] == columns[None, :], 1.0, 0.0).to(dtype)


@triton.jit
def replaced(values, INDEX: tl.constexpr, value):
    """The tuple `values` with another entry at INDEX."""
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (value if i == INDEX else values[i],)
    return out


@triton.jit
def transposed(values):
    """The last two axes of `values` transposed, in two steps: Triton would send the plain transposition of an
    accumulator through shared memory, though it already is a right operand.
    """
    ROWS: tl.constexpr = values.shape[-2]
    COLUMNS: tl.constexpr = values.shape[-1]
    if len(values.shape) == 3:
        BLOCKS: tl.constexpr = values.shape[0]
        values = tl.permute(tl.reshape(values, [BLOCKS, ROWS, COLUMNS // 2, 2]), (0, 2, 3, 1))
        return tl.reshape(values, [BLOCKS, COLUMNS, ROWS])
    else:
        values = tl.permute(tl.reshape(values, [ROWS, COLUMNS // 2, 2]), (1, 2, 0))
        return tl.reshape(values, [COLUMNS, ROWS])


@triton.jit
def moved(matrix, values):
    """`matrix @ values` for a 0/1 matrix of which a row has at most one 1: exact."""
    return tl.dot(matrix, values).to(values.dtype)


@triton.jit
def memory_rows(SIZE: tl.constexpr):
    """Which of a thread quad's 16 elements, in the order of reading, stands in row r of a right operand that was loaded
    with `right_operand(tile, True)`. [SIZE]
    """
    row = tl.arange(0, SIZE)
    return row // 2 % 4 * 4 + row // 8 * 2 + row % 2


@triton.jit
def load_terms(terms_ptr, co, mask_co, in_image, HAS_RELU: tl.constexpr, HAS_NORM: tl.constexpr):
    """What `branch_gradient` needs of the channels `co` of one sample and branch: see `branch_grad.branch_grad`.

    Beyond the image the gradient is zero: `in_image` can be broadcast with a row's gradient, as can `co` and `mask_co`.
    """
    TERMS: tl.constexpr = 6 if HAS_NORM else 2
    gain = tl.load(terms_ptr + co * TERMS, mask=mask_co, other=0.0)
    lift = tl.load(terms_ptr + co * TERMS + 1, mask=mask_co, other=0.0)
    if HAS_NORM:
        scale = tl.load(terms_ptr + co * TERMS + 2, mask=mask_co, other=0.0)
        shift = tl.load(terms_ptr + co * TERMS + 3, mask=mask_co, other=0.0)
        slope = tl.load(terms_ptr + co * TERMS + 4, mask=mask_co, other=0.0)
        level = tl.load(terms_ptr + co * TERMS + 5, mask=mask_co, other=0.0)
        lift += level
        if HAS_RELU:
            # dv and y are read as zero there.
            return (
                gain,
                lift,
                scale,
                tl.where(in_image, shift, float("-inf")),
                slope,
                tl.where(in_image, level, 0.0),
            )
        else:
            return gain, tl.where(in_image, lift, 0.0), slope
    else:
        if HAS_RELU:
            return gain, lift
        else:
            return gain, tl.where(in_image, lift, 0.0)


@triton.jit
def branch_gradient(dv, y, terms, HAS_RELU: tl.constexpr, HAS_NORM: tl.constexpr):
    """The gradient of a branch's convolution from accumulators of dv and of its output y (not read without norm and
    ReLU), in fp32."""
    dy = terms[0] * dv + terms[1]
    if HAS_RELU and HAS_NORM:
        dy = tl.where(terms[2] * y + terms[3] > 0.0, dy, terms[5]) + terms[4] * y
    elif HAS_NORM:
        dy += terms[2] * y
    elif HAS_RELU:
        # Not `y > 0`: a NaN passes, as it does in `torch.relu`.
        dy = tl.where(y <= 0.0, 0.0, dy)
    return dy


@triton.jit
def row_gradient(
    dv_ptrs, y_ptrs, mask, to_accumulator, terms, HAS_RELU: tl.constexpr, HAS_NORM: tl.constexpr
):
    """`branch_gradient` of one row of pixels. [16, pixels]"""
    dv = tl.dot(to_accumulator, right_operand(tl.load(dv_ptrs, mask=mask, other=0.0), True))
    y = dv
    if HAS_RELU or HAS_NORM:
        y = tl.dot(to_accumulator, right_operand(tl.load(y_ptrs, mask=mask, other=0.0), True))
    return branch_gradient(dv, y, terms, HAS_RELU, HAS_NORM)
