"""Data and weight gradients of narrow branches in one launch; the branches' own gradients exist in registers only.

Formulation. The tensor core does every move of data between threads. A product with a permutation matrix brings a row
from the order of memory (a thread holds channels of one pixel) into the order of an accumulator (a thread holds pixels
of one channel), and widens it to fp32 on the way. There the branch's gradient is built, once per pixel. A program walks
down the image: a row is read once, for all branches, and rows that kernels reach are held in registers. Each warp of a
program does so for a channel block of its own (`channel_blocks`). Derivation and counts: `kernels/README.md`.
"""

import triton
import triton.language as tl

from .channel_blocks import (
    JOINED_FOURS,
    in_image_order,
    load_weight_operands,
    right_operands,
    split_columns,
)
from .grad_tiling import branch_gradient, first_tile_of, load_terms, moved, replaced, transposed
from .tiling import pairs, part_elements, widen

# Columns of a product: runs of a tile, of two outputs each, the halo included.
RUNS: tl.constexpr = tl.constexpr(16)
BLOCK: tl.constexpr = tl.constexpr(8)
# Of a packed matrix, 16 x 16.
ENTRIES: tl.constexpr = tl.constexpr(256)


@triton.jit
def by_dilation(values, DILATION: tl.constexpr):
    """Accumulators of runs of adjacent pixels as those of runs whose pixels are DILATION apart, or back: for 2 the two
    are one renaming of registers."""
    if DILATION > 1:
        return in_image_order(values, DILATION)
    else:
        return values


@triton.jit
def entries_of(values, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT entries of the tuple `values` from FIRST on."""
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (values[FIRST + i],)
    return out


@triton.jit
def positions(values):
    """`values [BLOCKS, 16, RUNS]` by position of a run: two of `[BLOCKS, 8, RUNS]`."""
    return tl.split(tl.permute(tl.reshape(values, [values.shape[0], 2, BLOCK, RUNS]), (0, 2, 3, 1)))


@triton.jit
def row_words(values, dtype: tl.constexpr, DILATION: tl.constexpr):
    """`values [BLOCKS, 16, RUNS]` of runs of adjacent pixels, rounded to 16 bits, as words `[BLOCKS * 16, RUNS / 2]` of
    runs whose pixels are DILATION apart (LLVM takes apart what a loop carries as 16 bits)."""
    BLOCKS: tl.constexpr = values.shape[0]
    if DILATION > 1:
        low, high = positions(values)
    else:
        low, high = tl.split(tl.reshape(values, [BLOCKS, 16, RUNS // 2, 2]))
    low = low.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    words = high.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16 | low
    if DILATION > 1:
        words = tl.permute(tl.reshape(words, [BLOCKS, BLOCK, RUNS // 2, 2]), (0, 3, 1, 2))
    return tl.reshape(words, [BLOCKS * 16, RUNS // 2])


@triton.jit
def inside_words(x_first, W, BLOCKS: tl.constexpr, DILATION: tl.constexpr):
    """Ones for what of `row_words` is a pixel of the image."""
    position = tl.arange(0, BLOCKS * 16) // BLOCK % 2
    x = x_first + 4 * tl.arange(0, RUNS // 2)[None, :] + (position * DILATION)[:, None]
    x_high = x + (1 if DILATION > 1 else 2)
    low = tl.where((x >= 0) & (x < W), 0xFFFF, 0)
    return tl.where((x_high >= 0) & (x_high < W), -0x10000, 0) | low


@triton.jit
def of_words(words, dtype: tl.constexpr):
    """What `row_words` made words of."""
    return tl.reshape(pairs(words, dtype), [words.shape[0] // 16, 16, RUNS])


@triton.jit
def stacked(first, second):
    """Two of `[BLOCKS, 8, RUNS]` as one of `[BLOCKS, 16, RUNS]`."""
    return tl.reshape(tl.permute(tl.join(first, second), (0, 3, 1, 2)), [first.shape[0], 16, RUNS])


@triton.jit
def joined_columns_order(values):
    """Columns of a left operand `[BLOCKS, rows, RUNS]` in the order in which threads hold those of one that was joined
    (`of_words`), as its rows are by `joined_rows_order`: no register moves."""
    if JOINED_FOURS:
        shape: tl.constexpr = [values.shape[0], values.shape[1], 2, 4, 2]
        return tl.reshape(tl.permute(tl.reshape(values, shape), (0, 1, 3, 2, 4)), values.shape)
    else:
        return values


@triton.jit
def joined_rows_order(values):
    """Rows of a right operand `[BLOCKS, RUNS, columns]`, as `joined_columns_order`."""
    if JOINED_FOURS:
        shape: tl.constexpr = [values.shape[0], 2, 4, 2, values.shape[2]]
        return tl.reshape(tl.permute(tl.reshape(values, shape), (0, 2, 1, 3, 4)), values.shape)
    else:
        return values


@triton.jit
def load_run_moves(moves_ptr, no_offset, DILATION: tl.constexpr):
    """The matrices that bring every run the one to its right, and the one to its left (`grad_geometry`)."""
    right_ptr = moves_ptr + 2 * DILATION * ENTRIES
    return load_weight_operands(right_ptr, no_offset), load_weight_operands(right_ptr + ENTRIES, no_offset)


@triton.jit
def points_around(points, right_runs, left_runs):
    """Of x at the two points of every run, `[BLOCKS, 16, RUNS]`, x at the points after and before them."""
    after = positions(tl.dot(points, tl.permute(right_runs, (0, 2, 1))))[0]
    before = positions(tl.dot(points, tl.permute(left_runs, (0, 2, 1))))[1]
    # Not selected by row: of an operand's masks Triton 3.6 takes the width for that of what is multiplied.
    return stacked(after.to(points.dtype), before.to(points.dtype))


@triton.jit
def by_position(values):
    """`values [BLOCKS, 16, RUNS]`, transposed, by position: two right operands `[BLOCKS, RUNS, 8]`."""
    first, second = positions(values)
    return (
        joined_rows_order(tl.permute(first, (0, 2, 1))),
        joined_rows_order(tl.permute(second, (0, 2, 1))),
    )


@triton.jit
def weight_products(points, around, dy, columns_12, column_0):
    """What one row of x and one of a branch's gradient add to the weight gradients of a kernel row.

    `points` and `around [BLOCKS, 16, RUNS]`: x at the two points of a run, and at those after and before them, rows
    (point, input channel); `dy` likewise, rows (position, output channel). Accumulators `[BLOCKS, 16, BLOCK]`:
    `columns_12` holds kernel columns 1 and 2, rows (column, input channel), `column_0` column 0 in its upper half; the
    lower means nothing.
    """
    first, second = positions(points)
    after, _ = positions(around)
    dy_first, dy_second = by_position(dy)
    columns_12 = tl.dot(joined_columns_order(points), dy_first, columns_12)
    columns_12 = tl.dot(joined_columns_order(stacked(second, after)), dy_second, columns_12)
    column_0 = tl.dot(joined_columns_order(around), dy_first, column_0)
    column_0 = tl.dot(joined_columns_order(stacked(second, first)), dy_second, column_0)
    return columns_12, column_0


@triton.jit(do_not_specialize=("H", "W", "TILES", "TILES_H", "TILES_W", "TILES_PER_PROGRAM"))
def branch_grad_stream_kernel(
    x_ptr, dv_ptr, y_ptr, w_ptr, terms_ptr, dx_ptr, partial_ptr,
    H, W, C_IN, C_OUT, TILES, TILES_H, TILES_W, TILES_PER_PROGRAM,
    stride_xn, stride_xh, stride_xw, stride_dvn, stride_dvh, stride_dvw, stride_ym, stride_yn, stride_yh, stride_yw,
    stride_dxn, stride_dxc, stride_dxh, stride_dxw,
    M: tl.constexpr, DILATIONS: tl.constexpr, WINDOWS: tl.constexpr, REACH: tl.constexpr, HALO: tl.constexpr,
    STRIDE_XW: tl.constexpr, STRIDE_DVW: tl.constexpr, STRIDE_YW: tl.constexpr,
    RUN_H: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr,
    GROUP_CI: tl.constexpr, GROUP_CO: tl.constexpr,
    HAS_RELU: tl.constexpr, HAS_NORM: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """`dx` of BLOCKS channel blocks, a warp each, in TILES_PER_PROGRAM tiles, and what they add to the weight
    gradients. Programs: channel blocks / BLOCKS x walks over tiles.

    A tile is RUN_H rows x (2 * RUNS - 2 * HALO) columns of one sample, read with HALO columns on either side, and REACH
    rows above and below, the largest dilation. Of branch m's gradients REACH + DILATIONS[m] rows are held, in `dys`
    from WINDOWS[m] on. A channel block is CHANNELS_CI inputs and CHANNELS_CO outputs (whole groups), padded to BLOCK.
    STRIDE_XW, STRIDE_DVW and STRIDE_YW: the strides of that name, or 0 where a compilation is for any.
    """
    OWN: tl.constexpr = 2 * RUNS - 2 * HALO
    TERMS: tl.constexpr = 6 if HAS_NORM else 2
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    stride_xn, stride_xh, stride_xw = widen(stride_xn, stride_xh, stride_xw, IS_LARGE)
    stride_dvn, stride_dvh, stride_dvw = widen(stride_dvn, stride_dvh, stride_dvw, IS_LARGE)
    stride_yn, stride_yh, stride_yw = widen(stride_yn, stride_yh, stride_yw, IS_LARGE)
    stride_dxc, stride_dxh, stride_dxw = widen(stride_dxc, stride_dxh, stride_dxw, IS_LARGE)
    # What the compiler knows, loads and stores add to an address without an instruction.
    stride_xw = STRIDE_XW if STRIDE_XW > 0 else stride_xw
    stride_dvw = STRIDE_DVW if STRIDE_DVW > 0 else stride_dvw
    stride_yw = STRIDE_YW if STRIDE_YW > 0 else stride_yw
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    blocks = tl.num_programs(0) * BLOCKS
    first_tile = tl.program_id(1) * TILES_PER_PROGRAM

    # As read: a thread has four adjacent channels of a pixel.
    point, channel = part_elements(BLOCK, 16, True)
    half, column = split_columns(RUNS)
    half, column = 2 * half, 2 * column + point[None, None, None, :]
    shape: tl.constexpr = [(half + column).shape[0], BLOCKS, (half + column).shape[2], 16]
    co_read = (block * CHANNELS_CO)[None, :, None, None] + channel[None, None, None, :]
    ci_read = (block * CHANNELS_CI)[None, :, None, None] + channel[None, None, None, :]
    # As computed: a thread has pixels of a channel. Rows are (position in a run, channel).
    entry = tl.arange(0, 16)
    position = (entry // BLOCK)[None, :, None]
    run = tl.arange(0, RUNS)[None, None, :]
    ci = (block * CHANNELS_CI)[:, None, None] + (entry % BLOCK)[None, :, None]
    co = (block * CHANNELS_CO)[:, None, None] + (entry % BLOCK)[None, :, None]
    mask_co = (entry % BLOCK < CHANNELS_CO)[None, :, None] & (co < C_OUT)

    moves_ptr = w_ptr + blocks * (M * 6 * ENTRIES)
    no_offset = tl.zeros([BLOCKS], tl.int32)
    to_accumulator = load_weight_operands(moves_ptr, no_offset)
    identity = load_weight_operands(moves_ptr + ENTRIES, no_offset)

    dw = ()
    for _ in tl.static_range(6 * M):
        dw = dw + (tl.zeros([BLOCKS, 16, BLOCK], tl.float32),)
    for tile in tl.range(first_tile, tl.minimum(first_tile + TILES_PER_PROGRAM, TILES)):
        n, x_start, y_first = first_tile_of(tile, TILES_H, TILES_W, RUN_H, OWN)
        x_first = x_start - HALO
        x_end = tl.minimum(x_start + OWN, W)
        y_end = tl.minimum(y_first + RUN_H, H)
        x_read = x_first + (half + column)
        in_image = tl.broadcast_to((x_read >= 0) & (x_read < W), shape)
        # Inputs of the tile's own pixels only: each pair of an input and an output pixel is counted in one tile.
        is_own = tl.broadcast_to((x_read >= x_start) & (x_read < x_end), shape)
        if HAS_CHANNEL_MASK:
            in_image &= (channel < CHANNELS_CO)[None, None, None, :] & (co_read < C_OUT)
            is_own &= (channel < CHANNELS_CI)[None, None, None, :] & (ci_read < C_IN)
        # The second half of a tile is as far from the first for all threads.
        offs_dv = ((x_first + column) * stride_dvw + co_read) + (half * stride_dvw).to(tl.int64)
        offs_y = ((x_first + column) * stride_yw + co_read) + (half * stride_yw).to(tl.int64)
        offs_x = ((x_first + column) * stride_xw + ci_read) + (half * stride_xw).to(tl.int64)
        terms = ()
        inside = ()
        for m in tl.static_range(M):
            terms_m_ptr = terms_ptr + (n * M + m) * C_OUT * TERMS
            terms = terms + (load_terms(terms_m_ptr, co, mask_co, mask_co, HAS_RELU, HAS_NORM),)
            inside = inside + (inside_words(x_first, W, BLOCKS, DILATIONS[m]),)
        x_out = x_first + 2 * run + position  # [1, 16, RUNS]
        offs_dx = x_out * stride_dxw + ci * stride_dxc
        mask_dx = (x_out >= x_start) & (x_out < x_end)
        if HAS_CHANNEL_MASK:
            mask_dx &= (entry % BLOCK < CHANNELS_CI)[None, :, None] & (ci < C_IN)
        mask_dx = tl.broadcast_to(mask_dx, offs_dx.shape)

        # Of row y: gradients of each branch, as words, from row y - REACH - DILATIONS[m] to y - 1; accumulators of dx
        # from y - REACH to y + REACH - 1.
        dys = ()
        for m in tl.static_range(M):
            for _ in tl.static_range(REACH + DILATIONS[m]):
                dys = dys + (tl.zeros([BLOCKS * 16, RUNS // 2], tl.int32),)
        dx = ()
        for _ in tl.static_range(2 * REACH):
            dx = dx + (tl.zeros([BLOCKS, 16, RUNS], tl.float32),)
        for y in tl.range(tl.maximum(y_first - REACH, 0), y_end + REACH):
            # As a tensor: of a scalar's comparison Triton's interpreter makes no mask.
            is_row = tl.full([1, 1, 1, 1], y, tl.int32) < H
            dv_row = tl.load(
                dv_ptr + (n * stride_dvn + y * stride_dvh) + offs_dv, mask=in_image & is_row, other=0.0
            )
            gradient = tl.dot(to_accumulator, right_operands(dv_row))
            dx = dx + (tl.zeros([BLOCKS, 16, RUNS], tl.float32),)
            row_mask = (y - H) >> 31
            kept = ()
            windows = ()
            for m in tl.static_range(M):
                conv = gradient
                if HAS_RELU or HAS_NORM:
                    y_row = tl.load(
                        y_ptr + (m * stride_ym + n * stride_yn + y * stride_yh) + offs_y,
                        mask=in_image & is_row,
                        other=0.0,
                    )
                    conv = tl.dot(to_accumulator, right_operands(y_row))
                dy = branch_gradient(gradient, conv, terms[m], HAS_RELU, HAS_NORM)
                words = row_words(dy, dtype, DILATIONS[m]) & inside[m] & row_mask
                columns = joined_rows_order(transposed(of_words(words, dtype)))
                # What the data gradient reads: a run's own two points, and the two beyond it.
                right_runs, left_runs = load_run_moves(moves_ptr, no_offset, DILATIONS[m])
                points = transposed(moved(joined_columns_order(identity), columns))
                around = tl.where(
                    tl.permute(position, (0, 2, 1)) == 0,
                    tl.dot(joined_columns_order(right_runs), columns),
                    tl.dot(joined_columns_order(left_runs), columns),
                )
                around = transposed(around.to(dtype))
                for tap in tl.static_range(3):
                    tap_ptr = w_ptr + (m * 6 + 2 * tap) * ENTRIES
                    w_points = load_weight_operands(tap_ptr, block * (M * 6 * ENTRIES))
                    w_around = load_weight_operands(tap_ptr + ENTRIES, block * (M * 6 * ENTRIES))
                    acc = by_dilation(dx[REACH + (1 - tap) * DILATIONS[m]], DILATIONS[m])
                    acc = tl.dot(w_points, points, acc)
                    acc = tl.dot(w_around, around, acc)
                    dx = replaced(dx, REACH + (1 - tap) * DILATIONS[m], by_dilation(acc, DILATIONS[m]))
                window = entries_of(dys, WINDOWS[m], REACH + DILATIONS[m]) + (words,)
                windows = windows + (window,)
                kept = kept + entries_of(window, 1, REACH + DILATIONS[m])
            dys = kept

            row = y - REACH
            own_row = tl.full([1, 1, 1, 1], row, tl.int32) >= y_first
            x_row = tl.load(
                x_ptr + (n * stride_xn + row * stride_xh) + offs_x, mask=is_own & own_row, other=0.0
            )
            pixels = tl.dot(to_accumulator, right_operands(x_row))
            added = ()
            for m in tl.static_range(M):
                right_runs, left_runs = load_run_moves(moves_ptr, no_offset, DILATIONS[m])
                points = by_dilation(pixels, DILATIONS[m]).to(dtype)
                around = points_around(points, right_runs, left_runs)
                for ky in tl.static_range(3):
                    added = added + weight_products(
                        points,
                        around,
                        of_words(windows[m][(2 - ky) * DILATIONS[m]], dtype),
                        dw[6 * m + 2 * ky],
                        dw[6 * m + 2 * ky + 1],
                    )
            dw = added
            tl.store(
                dx_ptr + (n * stride_dxn + row * stride_dxh) + offs_dx,
                dx[0].to(dx_ptr.dtype.element_ty),
                mask=mask_dx & (tl.full([1, 1, 1], row, tl.int32) >= y_first),
            )
            dx = entries_of(dx, 1, 2 * REACH)

    co_column = tl.arange(0, BLOCK)
    ci_row = entry % BLOCK
    place = tl.program_id(1).to(tl.int64) * blocks + block
    partial_ptr += place[:, None, None] * (M * 9 * BLOCK * GROUP_CI)
    mask = (ci_row < CHANNELS_CI)[:, None] & (co_column < CHANNELS_CO)[None, :]
    mask &= (ci_row // GROUP_CI)[:, None] == (co_column // GROUP_CO)[None, :]
    for m in tl.static_range(M):
        for ky in tl.static_range(3):
            for is_first in tl.static_range(2):
                # Column 0 stands in the upper half, the lower one means nothing; columns 1 and 2 stand in both.
                kx = (entry // BLOCK - 1 if is_first else entry // BLOCK + 1)[:, None]
                mask_kx = mask & (kx >= 0)
                tap = (m * 3 + ky) * 3 + kx
                offs = (tap * BLOCK + co_column[None, :]) * GROUP_CI + (ci_row % GROUP_CI)[:, None]
                tl.store(
                    partial_ptr + offs[None, :, :],
                    dw[m * 6 + ky * 2 + is_first],
                    mask=tl.broadcast_to(mask_kx[None, :, :], [BLOCKS, 16, BLOCK]),
                )
