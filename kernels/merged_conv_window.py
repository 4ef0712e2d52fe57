"""The merged convolution by a window of rows, as `branch_conv_window`: 16 bits, groups to 16 channels, stride 1.

A program builds one sample's weights of a channel block, tap by tap of the branches' common lattice, and holds them.
"""

import triton
import triton.language as tl

from .branch_conv_window import (
    empty_window,
    lead_strip,
    load_row,
    load_taps,
    prefetch_first_rows,
    prefetch_row,
    unpacked,
    without_first,
)
from .tiling import locate_tile, widen


@triton.jit
def merged_taps(
    w_ptr, scale_ptr, shift_ptr, attention_ptr, mask_co, C_OUT,
    M: tl.constexpr, TAPS: tl.constexpr, W_OFFSETS: tl.constexpr, BLOCK_CO: tl.constexpr, BLOCK_CI: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """A sample's weights, `[BLOCK_CO, BLOCK_CI]` for each lattice point of TAPS in x's dtype; what they are relative
    to, 1 unless they meet a norm's scale, and the outputs' shift. `TAPS[point * M + m]` is branch m's tap there, or -1.
    """
    dtype = w_ptr.dtype.element_ty
    co = tl.arange(0, BLOCK_CO)
    gains = ()
    shift = tl.zeros([BLOCK_CO], tl.float32)
    largest = tl.zeros([BLOCK_CO], tl.float32)
    for m in tl.static_range(M):
        a = tl.load(attention_ptr + m * C_OUT + co, mask=mask_co, other=0.0)
        if HAS_SHIFT:
            shift += a * tl.load(shift_ptr + m * C_OUT + co, mask=mask_co, other=0.0)
        if HAS_SCALE:
            a *= tl.load(scale_ptr + m * C_OUT + co, mask=mask_co, other=0.0)
            largest = tl.maximum(largest, tl.abs(a), propagate_nan=tl.PropagateNan.ALL)
        gains = gains + (a,)
    factor = tl.where(largest == 0.0, 1.0, largest)
    relative = ()
    for m in tl.static_range(M):
        # In 16 bits a norm's scale might overflow or lose its digits: gains are taken relative to the largest.
        relative = relative + ((gains[m] / factor if HAS_SCALE else gains[m])[:, None],)
    weights = ()
    for point in tl.static_range(len(TAPS) // M):
        merged = tl.zeros([BLOCK_CO, BLOCK_CI], tl.float32)
        for m in tl.static_range(M):
            if TAPS[point * M + m] >= 0:
                taps = load_taps(w_ptr + W_OFFSETS[m] + TAPS[point * M + m] * (BLOCK_CO * BLOCK_CI))
                merged += relative[m] * taps.to(tl.float32)
        weights = weights + (merged.to(dtype),)
    return weights, factor, shift


@triton.jit(do_not_specialize=("H_IN", "W_IN", "H", "W", "TILES_H", "TILES_W", "BLOCKS"))
def merged_conv_window_fwd_kernel(
    x_ptr, w_ptr, scale_ptr, shift_ptr, attention_ptr, v_ptr,
    H_IN, W_IN, H, W, C_IN, C_OUT, TILES_H, TILES_W, BLOCKS,
    stride_xn, stride_xh, stride_xw, stride_vn, stride_vc, stride_vh, stride_vw,
    M: tl.constexpr, TAPS: tl.constexpr, POINTS: tl.constexpr, REACH: tl.constexpr, W_OFFSETS: tl.constexpr,
    IS_EVEN_H: tl.constexpr, IS_EVEN_W: tl.constexpr, STRIDE_XW: tl.constexpr, STRIDE_VW: tl.constexpr,
    CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, RUN_H: tl.constexpr, RUN_W: tl.constexpr,
    PREFETCH: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """One tile of one sample's channel block; tiles and channel blocks as in `window_tile`, of one sample.

    `POINTS[2 * i]` and `POINTS[2 * i + 1]` are the rows and pixels from an output to the input that the i-th of the
    weights multiplies. STRIDE_XW and STRIDE_VW as in `window_tile`.
    """
    BLOCK_P: tl.constexpr = BLOCK_H * BLOCK_W
    WIDTH: tl.constexpr = RUN_W + 2 * REACH
    ROWS: tl.constexpr = 2 * REACH + 1
    dtype = x_ptr.dtype.element_ty
    stride_xn, stride_xh, stride_xw = widen(stride_xn, stride_xh, stride_xw, IS_LARGE)
    stride_vc, stride_vh, stride_vw = widen(stride_vc, stride_vh, stride_vw, IS_LARGE)
    stride_xw = STRIDE_XW if STRIDE_XW > 0 else stride_xw
    stride_vw = STRIDE_VW if STRIDE_VW > 0 else stride_vw
    block, _tile, tile_h, tile_w, n = locate_tile(tl.program_id(0), BLOCKS, TILES_H, TILES_W)
    n = n.to(tl.int64)
    lane = tl.arange(0, BLOCK_P)
    y0 = (tile_h * BLOCK_H + lane // BLOCK_W) * RUN_H
    x0 = (tile_w * BLOCK_W + lane % BLOCK_W) * RUN_W
    mask_p = (y0 < H) & (x0 < W)
    ci = tl.arange(0, BLOCK_CI)
    co = tl.arange(0, BLOCK_CO)
    ci0 = block * CHANNELS_CI
    co0 = block * CHANNELS_CO
    ci_end = tl.minimum(CHANNELS_CI, C_IN - ci0)
    mask_co = co < tl.minimum(CHANNELS_CO, C_OUT - co0)
    own = y0 * stride_xh + x0 * stride_xw
    ptrs = x_ptr + n * stride_xn + ci0 + (own[:, None] + ci[None, :])
    v_ptrs = v_ptr + n * stride_vn + co0 * stride_vc + (y0 * stride_vh + x0 * stride_vw)[None, :]
    v_ptrs += co[:, None] * stride_vc
    mask_out = mask_p[None, :]  # [BLOCK_CO, BLOCK_P]
    if HAS_CHANNEL_MASK:
        mask_out &= mask_co[:, None]
    row_stride = tl.cast(stride_xh, tl.int64)
    if PREFETCH:
        strip = lead_strip(
            x_ptr + n * stride_xn, block, tile_h, tile_w, 1, H, W, stride_xn, stride_xh, stride_xw,
            1, BLOCK_H, BLOCK_W, RUN_H, RUN_W,
        )  # fmt: skip
        prefetch_first_rows(strip, row_stride, H_IN, RUN_H, REACH)

    weights, factor, shift = merged_taps(
        w_ptr + block * W_OFFSETS[M], scale_ptr + co0, shift_ptr + co0, attention_ptr + n * (M * C_OUT) + co0,
        mask_co, C_OUT, M, TAPS, W_OFFSETS, BLOCK_CO, BLOCK_CI, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    factor = tl.broadcast_to(factor[:, None], [BLOCK_CO, BLOCK_P])
    shift = tl.broadcast_to(shift[:, None], [BLOCK_CO, BLOCK_P])

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
            outputs = ()
            for _s in tl.static_range(RUN_W):
                outputs = outputs + (tl.zeros([BLOCK_CO, BLOCK_P], tl.float32) if HAS_SCALE else shift,)
            for i in tl.static_range(len(weights)):
                added = ()
                for s in tl.static_range(RUN_W):
                    operand = operands[(REACH + POINTS[2 * i]) * WIDTH + REACH + POINTS[2 * i + 1] + s]
                    added = added + (tl.dot(weights[i], operand, outputs[s]),)
                outputs = added
            mask_r = mask_out
            if not IS_EVEN_H:
                mask_r = mask_out & (y0 + r < H)[None, :]
            for s in tl.static_range(RUN_W):
                acc = outputs[s]
                if HAS_SCALE:
                    acc = acc * factor + shift
                mask = mask_r
                if not IS_EVEN_W:
                    mask = mask_r & (x0 + s < W)[None, :]
                tl.store(v_ptrs + tl.cast(r * stride_vh + s * stride_vw, tl.int64), acc.to(dtype), mask=mask)
        window = without_first(window, WIDTH)
