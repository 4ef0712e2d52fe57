"""Data and weight gradients of narrow branches in one launch; the branches' own gradients exist in registers only.

Formulation. The tensor core does every move of data between threads. A product with a permutation matrix brings a row
from the order of memory (a thread holds channels of one pixel) into the order of an accumulator (a thread holds pixels
of one channel), and widens it to fp32 on the way. There the branch's gradient is built, once per pixel. Rounded, it is
the left operand of the weight gradient; a second product, with a matrix that shifts runs, hands it to neighbouring runs
and into the order that the data gradient wants. Each warp of a program does so for a channel block of its own
(`channel_blocks`). Derivation and counts: `kernels/README.md`.
"""

import triton
import triton.language as tl

from .channel_blocks import in_image_order, joined_columns, load_weight_operands, split_columns
from .grad_tiling import first_tile_of, load_terms, moved, replaced, row_gradient, tile_after, transposed
from .tiling import part_elements, widen

# Columns of a product: runs of a tile, of two outputs each, the halo included.
RUNS: tl.constexpr = tl.constexpr(16)
BLOCK: tl.constexpr = tl.constexpr(8)


@triton.jit
def input_points(x_ptr, offs, mask):
    """The four points of every run, of channels 0 to 3 and 4 to 7: right operands `[BLOCKS, 16, RUNS]`.

    `offs` and `mask [2, BLOCKS, RUNS / 2, 32]`: columns (point, channel). Row r of an operand holds point `r // 2 % 4`
    of channel `r // 8 * 2 + r % 2`.
    """
    # A thread's 8 adjacent elements are (half of the channels, pair, parity): each half is a right operand.
    BLOCKS: tl.constexpr = offs.shape[1]
    tile = joined_columns(tl.load(x_ptr + offs, mask=mask, other=0.0))
    tile = tl.permute(tl.reshape(tile, [BLOCKS, RUNS, 4, 2, 2, 2]), (0, 4, 2, 5, 1, 3))
    return tl.split(tl.reshape(tile, [BLOCKS, 16, RUNS, 2]))


@triton.jit
def halves(values):
    """`values [BLOCKS, 2 * n, RUNS]`, transposed, as two right operands `[BLOCKS, RUNS, n]`."""
    BLOCKS: tl.constexpr = values.shape[0]
    ROWS: tl.constexpr = values.shape[1]
    first, second = tl.split(tl.permute(tl.reshape(values, [BLOCKS, 2, ROWS // 2, RUNS]), (0, 2, 3, 1)))
    return tl.permute(first, (0, 2, 1)), tl.permute(second, (0, 2, 1))


@triton.jit
def branch_gradients(
    x_ptr, dv_ptr, y_ptr, w_ptr, moves_ptr, terms_ptr, dx, dw, block, x_first, y_first, x_start, x_end, y_end,
    H, W, C_IN, C_OUT, stride_xh, stride_xw, stride_dvh, stride_dvw, stride_yh, stride_yw,
    M: tl.constexpr, DILATION: tl.constexpr, RUN_H: tl.constexpr, CHANNELS_CI: tl.constexpr,
    CHANNELS_CO: tl.constexpr, IS_EVEN_H: tl.constexpr, IS_PAIRED: tl.constexpr, HAS_RELU: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, ROWS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One branch's share of a tile, for the channel blocks `block [BLOCKS]`: `dx`, a tuple of RUN_H accumulators
    `[BLOCKS, 16, RUNS]`, rows (position, input channel), and `dw`, a tuple of accumulators `[BLOCKS, 16, BLOCK]`, one
    per kernel row and half of the input channels: rows as `input_points`, columns (position, channel) of the same half
    of the output channels where IS_PAIRED (no group has both halves), else output channels. ROWS_AT_ONCE rows of the
    gradient are in flight.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    BLOCKS: tl.constexpr = block.shape[0]
    moves = tl.zeros([BLOCKS], tl.int32)

    # As read: a thread has four adjacent channels of a pixel.
    run = split_columns(RUNS)
    x_run = x_first + run // DILATION * (2 * DILATION) + run % DILATION
    point, channel = part_elements(BLOCK, 16, True)
    co0 = (block * CHANNELS_CO)[None, :, None, None]
    x_read = x_run + point[None, None, None, :] * DILATION  # [2, 1, RUNS / 2, 16]
    co_read = co0 + channel[None, None, None, :]
    offs_dv = x_read * stride_dvw + co_read
    offs_y = x_read * stride_yw + co_read
    mask_read = (x_read >= 0) & (x_read < W)
    if HAS_CHANNEL_MASK:
        mask_read &= (channel < CHANNELS_CO)[None, None, None, :] & (co_read < C_OUT)
    mask_read = tl.broadcast_to(mask_read, offs_y.shape)
    # As computed: a thread has pixels of two channels. Rows are (half of the channels, position, channel) where the
    # halves of a block have weight gradients of their own, else (position, channel).
    entry = tl.arange(0, 16)
    co = entry // 8 * 4 + entry % 4 if IS_PAIRED else entry % BLOCK
    position = entry // 4 % 2 if IS_PAIRED else entry // BLOCK
    co_dy = (block * CHANNELS_CO)[:, None, None] + co[None, :, None]
    mask_co = co < CHANNELS_CO if HAS_CHANNEL_MASK else co < BLOCK
    mask_co = tl.broadcast_to(mask_co[None, :, None], co_dy.shape)
    if HAS_CHANNEL_MASK:
        mask_co &= co_dy < C_OUT
    run = tl.arange(0, RUNS)
    x_dy = (x_first + run // DILATION * (2 * DILATION) + run % DILATION)[None, None, :]
    x_dy = x_dy + (position * DILATION)[None, :, None]  # [1, 16, RUNS]
    in_image = (x_dy >= 0) & (x_dy < W)
    terms = load_terms(terms_ptr, co_dy, mask_co, in_image, HAS_RELU, HAS_NORM)

    # Inputs of the tile's own pixels only: each pair of an input and an output pixel is counted in one tile.
    quarter = tl.arange(0, 32)
    x_in = x_run + (quarter // BLOCK - 1)[None, None, None, :] * DILATION  # [2, 1, RUNS / 2, 32]
    ci = (block * CHANNELS_CI)[None, :, None, None] + (quarter % BLOCK)[None, None, None, :]
    offs_x = x_in * stride_xw + ci
    mask_in = (x_in >= x_start) & (x_in < x_end)
    if HAS_CHANNEL_MASK:
        mask_in &= (quarter % BLOCK < CHANNELS_CI)[None, None, None, :] & (ci < C_IN)
    mask_in = tl.broadcast_to(mask_in, offs_x.shape)

    for first in tl.static_range(min(DILATION, RUN_H)):
        # Every DILATION-th row: the gradient's row k is DILATION above the tile's own row k of them.
        dys = ()
        for _ in tl.static_range((RUN_H - 1 - first) // DILATION + 3):
            dys = dys + (tl.zeros([BLOCKS, 16, RUNS], dtype),)
        for start in tl.static_range(0, (RUN_H - 1 - first) // DILATION + 3, ROWS_AT_ONCE):
            # A loop of one trip, or none where the tile's rows lie beyond the image: ptxas would lift the loads of all
            # rows to the first of them, and spill. (Triton sends what an `if` returns through shared memory.) Before
            # Triton 3.9 LLVM lifts them all the same, but for addresses that depend on the trip, which is 0; so aligned
            # a step keeps the loads wide.
            trips = tl.minimum(y_end - (y_first + first + max(0, start - 2) * DILATION), 1)
            for trip in tl.range(trips, disable_licm=True):
                moves_trip_ptr, w_trip_ptr = moves_ptr + trip * 1024, w_ptr + trip * 1024
                x_trip_ptr, dv_trip_ptr, y_trip_ptr = (
                    x_ptr + trip * 1024,
                    dv_ptr + trip * 1024,
                    y_ptr + trip * 1024,
                )
                to_accumulator = load_weight_operands(moves_trip_ptr, moves)
                own_runs = load_weight_operands(moves_trip_ptr + 256, moves)
                left_runs = load_weight_operands(moves_trip_ptr + DILATION * 512, moves)
                right_runs = load_weight_operands(moves_trip_ptr + DILATION * 512 + 256, moves)
                for k in tl.static_range(
                    start, min(start + ROWS_AT_ONCE, (RUN_H - 1 - first) // DILATION + 3)
                ):
                    rows = tl.full([1, 1, 1, 1], y_first + first + (k - 1) * DILATION, tl.int32)
                    is_row = (rows >= 0) & (rows < H)
                    mask = mask_read
                    if not (IS_EVEN_H and k > 0 and first + (k - 1) * DILATION < RUN_H):
                        mask = mask_read & is_row
                    dy = row_gradient(
                        dv_trip_ptr + (first + (k - 1) * DILATION) * stride_dvh + offs_dv,
                        y_trip_ptr + (first + (k - 1) * DILATION) * stride_yh + offs_y,
                        mask, to_accumulator, terms, HAS_RELU, HAS_NORM,
                    )  # fmt: skip
                    if not (IS_EVEN_H and k > 0 and first + (k - 1) * DILATION < RUN_H):
                        dy *= tl.reshape(is_row, [1, 1, 1]).to(tl.float32)
                    dy = dy.to(dtype)
                    dys = replaced(dys, k, dy)
                    columns = transposed(dy)
                    # What the data gradient reads: a run's own two points, and the two beyond it.
                    own = moved(own_runs, columns)
                    beyond = tl.where(
                        (position == 0)[None, None, :],
                        tl.dot(right_runs, columns),
                        tl.dot(left_runs, columns),
                    )
                    own, beyond = transposed(own), transposed(beyond.to(dtype))
                    for tap in tl.static_range(3):
                        if k - tap >= 0 and k - tap < (RUN_H - 1 - first) // DILATION + 1:
                            acc = dx[first + (k - tap) * DILATION]
                            acc = tl.dot(
                                load_weight_operands(w_trip_ptr + 2 * tap * 256, block * (M * 6 * 256)),
                                own,
                                acc,
                            )
                            acc = tl.dot(
                                load_weight_operands(w_trip_ptr + (2 * tap + 1) * 256, block * (M * 6 * 256)),
                                beyond,
                                acc,
                            )
                            dx = replaced(dx, first + (k - tap) * DILATION, acc)
                    if k >= 2:
                        row = tl.full([1, 1, 1, 1], y_first + first + (k - 2) * DILATION, tl.int32)
                        low, high = input_points(
                            x_trip_ptr + (first + (k - 2) * DILATION) * stride_xh,
                            offs_x,
                            mask_in if IS_EVEN_H else mask_in & (row < y_end),
                        )
                        # An accumulator holds every tap of a kernel row once per position; unpaired, points are shifted
                        # so that both positions add to one.
                        if not IS_PAIRED:
                            next_point = load_weight_operands(moves_trip_ptr + 6 * 256, moves)
                            low_next, high_next = moved(next_point, low), moved(next_point, high)
                        low, high = moved(own_runs, low), moved(own_runs, high)
                        for ky in tl.static_range(3):
                            dy_low, dy_high = halves(dys[k - ky])
                            if IS_PAIRED:
                                dw = replaced(dw, 2 * ky, tl.dot(low, dy_low, dw[2 * ky]))
                                dw = replaced(dw, 2 * ky + 1, tl.dot(high, dy_high, dw[2 * ky + 1]))
                            else:
                                acc = tl.dot(low, dy_low, dw[2 * ky])
                                dw = replaced(dw, 2 * ky, tl.dot(low_next, dy_high, acc))
                                acc = tl.dot(high, dy_low, dw[2 * ky + 1])
                                dw = replaced(dw, 2 * ky + 1, tl.dot(high_next, dy_high, acc))
    return dx, dw


@triton.jit
def reordered(dx, DILATION: tl.constexpr):
    """Accumulators of runs whose pixels are DILATION apart in image order, or back: for 2 the two are one."""
    if DILATION > 1:
        out = ()
        for r in tl.static_range(len(dx)):
            out = out + (in_image_order(dx[r], DILATION),)
        return out
    else:
        return dx


@triton.jit(do_not_specialize=("H", "W", "TILES", "TILES_H", "TILES_W", "TILES_PER_PROGRAM"))
def branch_grad_stream_kernel(
    x_ptr, dv_ptr, y_ptr, w_ptr, terms_ptr, dx_ptr, partial_ptr,
    H, W, C_IN, C_OUT, TILES, TILES_H, TILES_W, TILES_PER_PROGRAM,
    stride_xn, stride_xh, stride_xw, stride_dvn, stride_dvh, stride_dvw, stride_ym, stride_yn, stride_yh, stride_yw,
    stride_dxn, stride_dxc, stride_dxh, stride_dxw,
    M: tl.constexpr, DILATIONS: tl.constexpr, HALO: tl.constexpr, RUN_H: tl.constexpr, BLOCKS: tl.constexpr,
    CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr, GROUP_CI: tl.constexpr, GROUP_CO: tl.constexpr,
    IS_EVEN_H: tl.constexpr, IS_PAIRED: tl.constexpr, HAS_RELU: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """`dx` of BLOCKS channel blocks, a warp each, in TILES_PER_PROGRAM tiles, and what they add to the weight
    gradients. Programs: channel blocks / BLOCKS x strips of tiles.

    A tile is RUN_H rows x (2 * RUNS - 2 * HALO) columns of one sample, read with HALO columns on either side. A channel
    block is CHANNELS_CI inputs and CHANNELS_CO outputs (whole groups), padded to BLOCK.
    """
    OWN: tl.constexpr = 2 * RUNS - 2 * HALO
    stride_xn, stride_xh, stride_xw = widen(stride_xn, stride_xh, stride_xw, IS_LARGE)
    stride_dvn, stride_dvh, stride_dvw = widen(stride_dvn, stride_dvh, stride_dvw, IS_LARGE)
    stride_yn, stride_yh, stride_yw = widen(stride_yn, stride_yh, stride_yw, IS_LARGE)
    stride_dxc, stride_dxh, stride_dxw = widen(stride_dxc, stride_dxh, stride_dxw, IS_LARGE)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    blocks = tl.num_programs(0) * BLOCKS
    first_tile = tl.program_id(1) * TILES_PER_PROGRAM
    moves_ptr = w_ptr + blocks * (M * 6 * 256)
    entry = tl.arange(0, 16)
    x_out_first = 2 * tl.arange(0, RUNS)[None, None, :] + (entry // BLOCK)[None, :, None]  # [1, 16, RUNS]

    dw = ()
    for _ in tl.static_range(6 * M):
        dw = dw + (tl.zeros([BLOCKS, 16, BLOCK], tl.float32),)
    n, x_start, y_first = first_tile_of(first_tile, TILES_H, TILES_W, RUN_H, OWN)
    for _ in tl.range(tl.minimum(TILES_PER_PROGRAM, TILES - first_tile), disable_licm=True):
        x_first = x_start - HALO
        x_end = tl.minimum(x_start + OWN, W)
        y_end = tl.minimum(y_first + RUN_H, H)
        dx = ()
        for _ in tl.static_range(RUN_H):
            dx = dx + (tl.zeros([BLOCKS, 16, RUNS], tl.float32),)
        added = ()
        for m in tl.static_range(M):
            mine = ()
            for i in tl.static_range(6):
                mine = mine + (dw[6 * m + i],)
            dx, mine = branch_gradients(
                x_ptr + n * stride_xn + y_first * stride_xh,
                dv_ptr + n * stride_dvn + y_first * stride_dvh,
                y_ptr + m * stride_ym + n * stride_yn + y_first * stride_yh,
                w_ptr + m * (6 * 256),
                moves_ptr,
                terms_ptr + (n * M + m) * C_OUT * (6 if HAS_NORM else 2),
                reordered(dx, DILATIONS[m]), mine, block, x_first, y_first, x_start, x_end, y_end,
                H, W, C_IN, C_OUT, stride_xh, stride_xw, stride_dvh, stride_dvw, stride_yh, stride_yw,
                M, DILATIONS[m], RUN_H, CHANNELS_CI, CHANNELS_CO,
                IS_EVEN_H, IS_PAIRED, HAS_RELU, HAS_NORM, HAS_CHANNEL_MASK,
                2 if M > 1 else RUN_H + 2,  # one branch leaves registers enough for all
            )  # fmt: skip
            dx = reordered(dx, DILATIONS[m])
            added = added + mine
        dw = added

        x_out = x_out_first + x_first
        ci_out = (block * CHANNELS_CI)[:, None, None] + (entry % BLOCK)[None, :, None]
        offs_dx = x_out * stride_dxw + ci_out * stride_dxc
        mask_dx = (x_out >= x_start) & (x_out < x_end)
        if HAS_CHANNEL_MASK:
            mask_dx &= (entry % BLOCK < CHANNELS_CI)[None, :, None] & (ci_out < C_IN)
        mask_dx = tl.broadcast_to(mask_dx, offs_dx.shape)
        dx_tile_ptr = dx_ptr + n * stride_dxn + y_first * stride_dxh
        for r in tl.static_range(RUN_H):
            value = dx[r].to(dx_ptr.dtype.element_ty)
            tl.store(
                dx_tile_ptr + r * stride_dxh + offs_dx,
                value,
                mask=mask_dx if IS_EVEN_H else mask_dx & (tl.full([1, 1, 1], y_first + r, tl.int32) < y_end),
            )

        n, x_start, y_first = tile_after(n, x_start, y_first, H, W, RUN_H, OWN)

    column = tl.arange(0, BLOCK)
    point = (entry // 2 % 4)[:, None]
    if IS_PAIRED:
        # Every tap of a kernel row stands in its accumulators once per position: two summands, added in the second
        # launch.
        position = column // 4
        kx = point - position[None, :]  # [16, BLOCK]
        summand = tl.program_id(1) * 2 + position
    else:
        kx = tl.broadcast_to(point, [16, BLOCK])
        summand = tl.program_id(1) + tl.zeros([BLOCK], tl.int32)
    place = summand.to(tl.int64)[None, None, :] * blocks + block[:, None, None]
    partial_ptr += place * (M * 9 * BLOCK * GROUP_CI)  # [BLOCKS, 1, BLOCK]
    for m in tl.static_range(M):
        for ky in tl.static_range(3):
            for half in tl.static_range(2):
                ci = half * 4 + entry // 8 * 2 + entry % 2
                co = half * 4 + column % 4 if IS_PAIRED else column
                mask = (kx >= 0) & (kx < 3) & (ci < CHANNELS_CI)[:, None] & (co < CHANNELS_CO)[None, :]
                mask &= (ci // GROUP_CI)[:, None] == (co // GROUP_CO)[None, :]
                offs = (((m * 3 + ky) * 3 + kx) * BLOCK + co[None, :]) * GROUP_CI + (ci % GROUP_CI)[:, None]
                mask = tl.broadcast_to(mask[None, :, :], [BLOCKS, 16, BLOCK])
                tl.store(partial_ptr + offs[None, :, :], dw[m * 6 + ky * 2 + half], mask=mask)
