"""Gradients of branches that `branch_grad_stream` does not take: wide groups, large kernels, other dilations. Two
kernels, of which each rebuilds the gradients of the branches' convolutions in its prologue.

A tile is 16 pixels of some rows, channels come in blocks of 16; blocks of narrow groups are block-diagonal. As in
`branch_grad_stream`, products with 0/1 matrices move data between threads.
"""

import triton
import triton.language as tl

from .grad_tiling import (
    equal_to,
    first_tile_of,
    load_terms,
    memory_rows,
    moved,
    replaced,
    row_gradient,
    tile_after,
    transposed,
)
from .prefetch import prefetch_pixels
from .tiling import load_weight_operand, part_elements, right_operand, widen


@triton.jit(do_not_specialize=("H", "W", "TILES", "TILES_H", "TILES_W"))
def branch_grad_data_kernel(
    dv_ptr, y_ptr, w_ptr, terms_ptr, dx_ptr,
    H, W, C_IN, C_OUT, TILES, TILES_H, TILES_W,
    stride_dvn, stride_dvh, stride_dvw, stride_ym, stride_yn, stride_yh, stride_yw,
    stride_dxn, stride_dxc, stride_dxh, stride_dxw,
    KERNELS: tl.constexpr, DILATIONS: tl.constexpr, W_OFFSETS: tl.constexpr, HALO: tl.constexpr,
    RUN_H: tl.constexpr, IS_WHOLE_H: tl.constexpr, CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr,
    CHUNKS_CI: tl.constexpr, CHUNKS_CO: tl.constexpr, TILES_X: tl.constexpr,
    HAS_RELU: tl.constexpr, HAS_NORM: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """`dx` of 16 input channels of a tile: RUN_H rows x (16 - 2 * HALO) columns, read with HALO columns on either side.

    A channel block is CHANNELS_CI inputs and CHANNELS_CO outputs (whole groups), in CHUNKS_CI and CHUNKS_CO pieces.
    IS_WHOLE_H: a tile has all rows of the image. TILES_X tiles lie along the grid's first axis, beside the pieces.
    """
    M: tl.constexpr = len(KERNELS)
    dtype: tl.constexpr = dv_ptr.dtype.element_ty
    stride_dvn, stride_dvh, stride_dvw = widen(stride_dvn, stride_dvh, stride_dvw, IS_LARGE)
    stride_yn, stride_yh, stride_yw = widen(stride_yn, stride_yh, stride_yw, IS_LARGE)
    stride_dxc, stride_dxh, stride_dxw = widen(stride_dxc, stride_dxh, stride_dxw, IS_LARGE)
    piece, tile = tl.program_id(0), tl.program_id(1)
    if TILES_X > 1:  # programs beyond the last tile compute it again
        pieces = tl.num_programs(0) // TILES_X
        tile = tl.minimum(tile * TILES_X + piece // pieces, TILES - 1)
        piece %= pieces
    block = piece // CHUNKS_CI
    n = (tile // (TILES_H * TILES_W)).to(tl.int64)
    y_first = tile // TILES_W % TILES_H * RUN_H
    x_start = tile % TILES_W * (16 - 2 * HALO)
    x_first = x_start - HALO
    y_end = tl.minimum(y_first + RUN_H, H)
    entry = tl.arange(0, 16)
    x_dy = x_first + entry
    in_image = tl.broadcast_to(((x_dy >= 0) & (x_dy < W))[None, :], [16, 16])
    _, channel = part_elements(16, 16, True)
    source = memory_rows(16)
    to_accumulator = equal_to(entry, source // 8 * 4 + source // 4 % 2 * 8 + source % 4, dtype)
    dx = ()
    for _ in tl.static_range(RUN_H):
        dx = dx + (tl.zeros([16, 16], tl.float32),)
    for m in tl.static_range(M):
        for chunk in range(CHUNKS_CO):
            co0 = block * CHANNELS_CO + chunk * 16
            co_end = tl.minimum(CHANNELS_CO - chunk * 16, C_OUT - co0)
            mask_read = ((x_dy >= 0) & (x_dy < W))[:, None] & (channel < co_end)[None, :]
            offs_dv = (x_dy * stride_dvw)[:, None] + channel[None, :]
            offs_y = (x_dy * stride_yw)[:, None] + channel[None, :]
            terms = load_terms(
                terms_ptr + ((n * M + m) * C_OUT + co0) * (6 if HAS_NORM else 2), entry[:, None],
                (entry < co_end)[:, None], in_image, HAS_RELU, HAS_NORM,
            )  # fmt: skip
            w_chunk_ptr = (
                w_ptr + piece * W_OFFSETS[M] + W_OFFSETS[m] + chunk * (KERNELS[m] * KERNELS[m] * 256)
            )
            # All rows first: then a weight is loaded once for the whole tile.
            columns = ()
            for i in tl.static_range(
                0 if IS_WHOLE_H else -(KERNELS[m] // 2) * DILATIONS[m],
                RUN_H if IS_WHOLE_H else RUN_H + KERNELS[m] // 2 * DILATIONS[m],
            ):
                y_row = y_first + i
                # So many rows are loaded at a time: ptxas would lift the loads of all to the first, and spill.
                if i % (2 if HAS_RELU or HAS_NORM or KERNELS[m] > 5 else 4) == 0:
                    tl.debug_barrier()
                rows = tl.full([1, 1], y_row, tl.int32)
                is_row = (rows >= 0) & (rows < H)
                dy = row_gradient(
                    dv_ptr + n * stride_dvn + co0 + y_row * stride_dvh + offs_dv,
                    y_ptr + m * tl.cast(stride_ym, tl.int64) + n * stride_yn + co0 + y_row * stride_yh + offs_y,
                    mask_read & is_row, to_accumulator, terms, HAS_RELU, HAS_NORM,
                )  # fmt: skip
                columns = columns + (transposed((dy * is_row.to(tl.float32)).to(dtype)),)
            # Triton 3.6 hands out a tuple's members as plain numbers, over which no static range goes.
            for kx in tl.static_range(tl.constexpr(KERNELS[m])):
                shift = equal_to(entry, entry - (kx - KERNELS[m] // 2) * DILATIONS[m], dtype)
                weights = ()
                for ky in tl.static_range(tl.constexpr(KERNELS[m])):
                    weight = load_weight_operand(w_chunk_ptr + (ky * KERNELS[m] + kx) * 256, 16, 16)
                    weights = weights + (weight,)
                for i in tl.static_range(
                    0 if IS_WHOLE_H else -(KERNELS[m] // 2) * DILATIONS[m],
                    RUN_H if IS_WHOLE_H else RUN_H + KERNELS[m] // 2 * DILATIONS[m],
                ):
                    own = columns[i + (0 if IS_WHOLE_H else KERNELS[m] // 2 * DILATIONS[m])]
                    pixels = transposed(moved(shift, own))
                    for ky in tl.static_range(tl.constexpr(KERNELS[m])):
                        # Only expressions stay constants: a name for the row would not.
                        if (
                            i - (ky - KERNELS[m] // 2) * DILATIONS[m] >= 0
                            and i - (ky - KERNELS[m] // 2) * DILATIONS[m] < RUN_H
                        ):
                            acc = tl.dot(weights[ky], pixels, dx[i - (ky - KERNELS[m] // 2) * DILATIONS[m]])
                            dx = replaced(dx, i - (ky - KERNELS[m] // 2) * DILATIONS[m], acc)
    ci0 = block * CHANNELS_CI + piece % CHUNKS_CI * 16
    ci_end = tl.minimum(CHANNELS_CI - piece % CHUNKS_CI * 16, C_IN - ci0)
    own = (x_dy >= x_start) & (x_dy < tl.minimum(x_start + 16 - 2 * HALO, W))
    mask_dx = own[None, :] & (entry < ci_end)[:, None]
    offs_dx = (x_dy * stride_dxw)[None, :] + (entry * stride_dxc)[:, None]
    dx_ptr += n * stride_dxn + ci0 * stride_dxc + y_first * stride_dxh
    for r in tl.static_range(RUN_H):
        mask = mask_dx & (tl.full([1, 1], y_first + r, tl.int32) < y_end)
        tl.store(dx_ptr + r * stride_dxh + offs_dx, dx[r].to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("H", "W", "TILES", "TILES_H", "TILES_W", "TILES_PER_PROGRAM"))
def branch_grad_weight_kernel(
    x_ptr, dv_ptr, y_ptr, terms_ptr, partial_ptr,
    H, W, C_IN, C_OUT, TILES, TILES_H, TILES_W, TILES_PER_PROGRAM,
    stride_xn, stride_xh, stride_xw, stride_dvn, stride_dvh, stride_dvw, stride_yn, stride_yh, stride_yw,
    stride_terms, stride_strip, stride_block,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, KY: tl.constexpr, ROWS_KY: tl.constexpr, HALO: tl.constexpr,
    RUN_H: tl.constexpr,
    CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr, GROUP_CI: tl.constexpr, GROUP_CO: tl.constexpr,
    CHUNKS_CI: tl.constexpr, CHUNKS_CO: tl.constexpr,
    HAS_RELU: tl.constexpr, HAS_NORM: tl.constexpr, IS_LARGE: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """What TILES_PER_PROGRAM tiles of RUN_H rows x (16 - 2 * HALO) columns of x add to the gradient of one branch's
    weights, of 16 input and 16 output channels, in kernel rows KY to KY + ROWS_KY - 1.

    dy is read with HALO columns on either side and shifted for each kernel column, so that x and dy are loaded once.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    stride_xn, stride_xh, stride_xw = widen(stride_xn, stride_xh, stride_xw, IS_LARGE)
    stride_dvn, stride_dvh, stride_dvw = widen(stride_dvn, stride_dvh, stride_dvw, IS_LARGE)
    stride_yn, stride_yh, stride_yw = widen(stride_yn, stride_yh, stride_yw, IS_LARGE)
    chunk_co = tl.program_id(0) % CHUNKS_CO
    chunk_ci = tl.program_id(0) // CHUNKS_CO % CHUNKS_CI
    block = tl.program_id(0) // CHUNKS_CO // CHUNKS_CI
    ci0 = block * CHANNELS_CI + chunk_ci * 16
    co0 = block * CHANNELS_CO + chunk_co * 16
    ci_end = tl.minimum(CHANNELS_CI - chunk_ci * 16, C_IN - ci0)
    co_end = tl.minimum(CHANNELS_CO - chunk_co * 16, C_OUT - co0)
    entry = tl.arange(0, 16)
    _, channel = part_elements(16, 16, True)
    source = memory_rows(16)
    to_accumulator = equal_to(entry, source // 8 * 4 + source // 4 % 2 * 8 + source % 4, dtype)
    dw = ()
    for _ in tl.static_range(ROWS_KY * KERNEL):
        dw = dw + (tl.zeros([16, 16], tl.float32),)
    first_tile = tl.program_id(1) * TILES_PER_PROGRAM
    n, x_start, y_first = first_tile_of(first_tile, TILES_H, TILES_W, RUN_H, 16 - 2 * HALO)
    for _ in range(tl.minimum(TILES_PER_PROGRAM, TILES - first_tile)):
        if PREFETCH:
            # A row of each image of the next tile of this image column, for the programs of all channel blocks.
            row = tl.program_id(0)
            x, y = x_start - HALO, y_first + RUN_H + row
            prefetch_pixels(dv_ptr + n * stride_dvn, y, x, H, W, stride_dvh, stride_dvw, row < RUN_H, 16)
            if HAS_RELU or HAS_NORM:
                prefetch_pixels(y_ptr + n * stride_yn, y, x, H, W, stride_yh, stride_yw, row < RUN_H, 16)
            y += (KY + ROWS_KY - 1 - KERNEL // 2) * DILATION
            prefetch_pixels(x_ptr + n * stride_xn, y, x, H, W, stride_xh, stride_xw, row < RUN_H, 16)
        x_dy = x_start - HALO + entry
        in_row = (x_dy >= 0) & (x_dy < W)
        in_image = tl.broadcast_to(in_row[None, :], [16, 16])
        mask_read = in_row[:, None] & (channel < co_end)[None, :]
        offs_dv = (x_dy * stride_dvw)[:, None] + channel[None, :]
        offs_y = (x_dy * stride_yw)[:, None] + channel[None, :]
        terms = load_terms(
            terms_ptr + n * stride_terms + co0 * (6 if HAS_NORM else 2), entry[:, None], (entry < co_end)[:, None],
            in_image, HAS_RELU, HAS_NORM,
        )  # fmt: skip
        dys = ()
        for i in tl.static_range(RUN_H):
            rows = tl.full([1, 1], y_first + i, tl.int32)
            dy = row_gradient(
                dv_ptr + n * stride_dvn + co0 + (y_first + i) * stride_dvh + offs_dv,
                y_ptr + n * stride_yn + co0 + (y_first + i) * stride_yh + offs_y,
                mask_read & (rows < H), to_accumulator, terms, HAS_RELU, HAS_NORM,
            )  # fmt: skip
            dys = dys + ((dy * (rows < H).to(tl.float32)).to(dtype),)
        # Own pixels only: each pair of an input and an output pixel is counted in one tile.
        own = (x_dy >= x_start) & (x_dy < tl.minimum(x_start + 16 - 2 * HALO, W))
        mask_own = own[:, None] & (channel < ci_end)[None, :]
        offs_x = (x_dy * stride_xw)[:, None] + channel[None, :]
        xs = ()
        for i in tl.static_range(
            (KY - KERNEL // 2) * DILATION, RUN_H + (KY + ROWS_KY - 1 - KERNEL // 2) * DILATION
        ):
            y_in = y_first + i
            rows = tl.full([1, 1], y_in, tl.int32)
            row = tl.load(
                x_ptr + n * stride_xn + ci0 + y_in * stride_xh + offs_x,
                mask=mask_own & (rows >= 0) & (rows < H),
                other=0.0,
            )
            xs = xs + (moved(to_accumulator, right_operand(row, True)),)
        for kx in tl.static_range(KERNEL):
            for r in tl.static_range(RUN_H):
                if kx == KERNEL // 2:
                    dy = transposed(dys[r])
                else:
                    shift = equal_to(entry, entry - (kx - KERNEL // 2) * DILATION, dtype)
                    dy = transposed(moved(dys[r], shift))
                for ky in tl.static_range(ROWS_KY):
                    acc = tl.dot(xs[r + ky * DILATION], dy, dw[ky * KERNEL + kx])
                    dw = replaced(dw, ky * KERNEL + kx, acc)
        n, x_start, y_first = tile_after(n, x_start, y_first, H, W, RUN_H, 16 - 2 * HALO)

    ci = chunk_ci * 16 + entry
    co = chunk_co * 16 + entry
    mask = (
        (entry < ci_end)[:, None]
        & (entry < co_end)[None, :]
        & ((ci // GROUP_CI)[:, None] == (co // GROUP_CO)[None, :])
    )
    partial_ptr += (
        tl.program_id(1).to(tl.int64) * stride_strip + (block * CHUNKS_CO + chunk_co) * stride_block
    )
    offs = entry[None, :] * GROUP_CI + (ci % GROUP_CI)[:, None]
    for tap in tl.static_range(ROWS_KY * KERNEL):
        tl.store(partial_ptr + (KY * KERNEL + tap) * (16 * GROUP_CI) + offs, dw[tap], mask=mask)
