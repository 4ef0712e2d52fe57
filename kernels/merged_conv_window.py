"""The merged convolution by a window of rows, as `branch_conv_window`: 16 bits, groups to 16 channels, stride 1.

A warp builds one sample's weights of a channel block, tap by tap of the branches' common lattice, and holds them.
"""

import torch
import triton
import triton.language as tl

from .config import WindowConfig
from .geometry import (
    ConvShape,
    blocking,
    branch_refusal,
    is_crossed,
    is_full,
    known_stride,
    needs_64_bits,
    reach,
    tiles,
)
from .launch import Launch
from .merging import lattice_points
from .prefetch import can_prefetch
from .sparse_product import (
    SPARSE_ENTRIES,
    accumulators,
    load_sparse_left,
    row_entries,
    row_word,
    sparse_right,
    sparsity,
)
from .tiling import locate_tile, widen
from .window import (
    block_channels,
    by_lane,
    empty_window,
    load_row,
    load_taps,
    output_channels,
    prefetch_row,
    rows_ahead,
    store_row,
    unpacked,
    without_first,
)
from .window_geometry import partners, places
from .window_products import sparse_outputs, window_outputs


@triton.jit
def branch_gains(
    scale_ptr, shift_ptr, attention_ptr, co, mask_co, C_OUT,
    M: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """Of one sample's output channels `co`: what multiplies each branch's weights, M tensors; the largest of these in
    magnitude, or 1 where it is 0 or no norm scales them; the shift of the merged convolution. Each like `co`."""
    gains = ()
    shift = tl.zeros([co.shape[0]], tl.float32)
    largest = tl.zeros([co.shape[0]], tl.float32)
    for m in tl.static_range(M):
        a = tl.load(attention_ptr + m * C_OUT + co, mask=mask_co, other=0.0)
        if HAS_SHIFT:
            shift += a * tl.load(shift_ptr + m * C_OUT + co, mask=mask_co, other=0.0)
        if HAS_SCALE:
            a *= tl.load(scale_ptr + m * C_OUT + co, mask=mask_co, other=0.0)
            largest = tl.maximum(largest, tl.abs(a), propagate_nan=tl.PropagateNan.ALL)
        gains = gains + (a,)
    factor = tl.where(largest == 0.0, 1.0, largest)
    return gains, factor, shift


@triton.jit
def merged_taps(
    w_ptr, first, scale_ptr, shift_ptr, attention_ptr, co, mask_co, C_OUT,
    M: tl.constexpr, TAPS: tl.constexpr, W_OFFSETS: tl.constexpr, BLOCK_CO: tl.constexpr, BLOCK_CI: tl.constexpr,
    SPARSE: tl.constexpr, IS_CROSSED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """A sample's weights of the blocks that begin at `first [BLOCKS]`, output channels `co`: `[BLOCKS, BLOCK_CO,
    BLOCK_CI]` for each lattice point of TAPS in x's dtype, or the words of `load_sparse_left`; what they are relative
    to, 1 unless they meet a norm's scale, and the outputs' shift, `[BLOCKS, BLOCK_CO, 1]`. `TAPS[point * M + m]` is
    branch m's tap there, or -1.
    """
    BLOCKS: tl.constexpr = first.shape[0]
    dtype = w_ptr.dtype.element_ty
    gains, factor, shift = branch_gains(
        scale_ptr, shift_ptr, attention_ptr, co, mask_co, C_OUT, M, HAS_SCALE, HAS_SHIFT
    )
    relative = ()
    for m in tl.static_range(M):
        # In 16 bits a norm's scale might overflow or lose its digits: gains are taken relative to the largest.
        gain = gains[m] / factor if HAS_SCALE else gains[m]
        relative = relative + (tl.reshape(gain, [BLOCKS, BLOCK_CO, 1]),)
    weights = ()
    for point in tl.static_range(len(TAPS) // M):
        if SPARSE:
            upper = tl.zeros([BLOCKS * 32, 2], tl.float32)
            lower = tl.zeros([BLOCKS * 32, 2], tl.float32)
            for m in tl.static_range(M):
                if TAPS[point * M + m] >= 0:
                    words = load_sparse_left(
                        w_ptr + W_OFFSETS[m] + TAPS[point * M + m] * SPARSE_ENTRIES, first
                    )
                    rows = accumulators(
                        tl.broadcast_to(relative[m], [BLOCKS, BLOCK_CO, 8]), IS_CROSSED
                    )  # of its output channels, the gains
                    upper += rows[0][:, None] * row_entries(words[0], dtype)
                    lower += rows[2][:, None] * row_entries(words[1], dtype)
            weights = weights + ((row_word(upper.to(dtype)), row_word(lower.to(dtype))),)
        else:
            merged = tl.zeros([BLOCKS, BLOCK_CO, BLOCK_CI], tl.float32)
            for m in tl.static_range(M):
                if TAPS[point * M + m] >= 0:
                    tap_ptr = w_ptr + W_OFFSETS[m] + TAPS[point * M + m] * (BLOCK_CO * BLOCK_CI)
                    merged += relative[m] * load_taps(tap_ptr, first).to(tl.float32)
            weights = weights + (merged.to(dtype),)
    shape: tl.constexpr = (BLOCKS, BLOCK_CO, 1)
    return weights, tl.reshape(factor, shape), tl.reshape(shift, shape)


@triton.jit(do_not_specialize=("H_IN", "W_IN", "H", "W", "TILES_H", "TILES_W", "CHANNEL_PROGRAMS"))
def merged_conv_window_fwd_kernel(
    x_ptr, w_ptr, scale_ptr, shift_ptr, attention_ptr, v_ptr,
    H_IN, W_IN, H, W, C_IN, C_OUT, TILES_H, TILES_W, CHANNEL_PROGRAMS,
    stride_xn, stride_xh, stride_xw, stride_vn, stride_vc, stride_vh, stride_vw,
    M: tl.constexpr, TAPS: tl.constexpr, PLACES: tl.constexpr, PARTNERS: tl.constexpr, REACH: tl.constexpr,
    W_OFFSETS: tl.constexpr,
    IS_EVEN_H: tl.constexpr, IS_EVEN_W: tl.constexpr, STRIDE_XW: tl.constexpr, STRIDE_VW: tl.constexpr,
    BLOCKS: tl.constexpr, CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, RUN_H: tl.constexpr, RUN_W: tl.constexpr,
    PREFETCH: tl.constexpr, SPARSE: tl.constexpr, IS_CROSSED: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCKS channel blocks of one sample; tiles and channel blocks as in
    `branch_conv_window_fwd_kernel`.

    PLACES and PARTNERS, of the points of TAPS, are as in `window_products`; SPARSE, IS_CROSSED, STRIDE_XW and STRIDE_VW
    as there.
    """
    BLOCK_P: tl.constexpr = BLOCK_H * BLOCK_W
    WIDTH: tl.constexpr = RUN_W + 2 * REACH
    ROWS: tl.constexpr = 2 * REACH + 1
    AHEAD: tl.constexpr = 1 if SPARSE else 0
    dtype = x_ptr.dtype.element_ty
    stride_xn, stride_xh, stride_xw = widen(stride_xn, stride_xh, stride_xw, IS_LARGE)
    stride_vc, stride_vh, stride_vw = widen(stride_vc, stride_vh, stride_vw, IS_LARGE)
    stride_xw = STRIDE_XW if STRIDE_XW > 0 else stride_xw
    stride_vw = STRIDE_VW if STRIDE_VW > 0 else stride_vw
    program, _tile, tile_h, tile_w, n = locate_tile(tl.program_id(0), CHANNEL_PROGRAMS, TILES_H, TILES_W)
    n = n.to(tl.int64)
    lane = tl.arange(0, BLOCK_P)
    y0 = (tile_h * BLOCK_H + lane // BLOCK_W) * RUN_H
    x0 = (tile_w * BLOCK_W + lane % BLOCK_W) * RUN_W
    mask_p = (y0 < H) & (x0 < W)
    block = program * BLOCKS + tl.arange(0, BLOCKS)
    co, mask_co = output_channels(program * BLOCKS, BLOCKS, CHANNELS_CO, BLOCK_CO)
    mask_co &= co < C_OUT
    ci, mask_ci = block_channels(block, CHANNELS_CI, BLOCK_CI, IS_CROSSED)
    x_ptr += n * stride_xn
    x_ptrs = x_ptr + (by_lane(y0 * stride_xh + x0 * stride_xw) + ci)
    mask_x = by_lane(mask_p)
    mask_out = mask_p[None, :]  # [OUTPUTS, BLOCK_P]
    if HAS_CHANNEL_MASK:
        mask_x = mask_x & mask_ci & (ci < C_IN)
        mask_out &= mask_co[:, None]
    offs_v = (y0 * stride_vh + x0 * stride_vw)[None, :] + co[:, None] * stride_vc
    v_ptrs = v_ptr + n * stride_vn + offs_v
    row_stride = tl.cast(stride_xh, tl.int64)
    if PREFETCH:
        ahead = rows_ahead(
            x_ptr, program, tile_h, tile_w, 1, H_IN, W, W_IN, C_IN, stride_xn, stride_xh, stride_xw,
            REACH, BLOCKS, 1, BLOCK_H, BLOCK_W, RUN_H, RUN_W, CHANNELS_CI,
        )  # fmt: skip

    weights, factor, shift = merged_taps(
        w_ptr, block * W_OFFSETS[M], scale_ptr, shift_ptr, attention_ptr + n * (M * C_OUT), co, mask_co,
        C_OUT, M, TAPS, W_OFFSETS, BLOCK_CO, BLOCK_CI, SPARSE, IS_CROSSED, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    factor = tl.broadcast_to(factor, [BLOCKS, BLOCK_CO, BLOCK_P])
    shift = tl.broadcast_to(shift, [BLOCKS, BLOCK_CO, BLOCK_P])
    start = tl.zeros_like(shift) if HAS_SCALE else shift
    if SPARSE:
        metadata = sparsity(BLOCKS)
        start = accumulators(start, IS_CROSSED)

    window = empty_window((2 * REACH + AHEAD) * WIDTH, BLOCKS * BLOCK_P, BLOCK_CI)
    for r in range(-2 * REACH - AHEAD, RUN_H):
        if PREFETCH:
            prefetch_row(ahead, r + AHEAD, row_stride, H_IN, REACH, BLOCKS, 1, RUN_H)
        loaded = r + AHEAD + REACH
        mask_row = mask_x
        if SPARSE:
            mask_row = mask_x & (r + AHEAD < RUN_H)
        window = window + load_row(
            x_ptrs, loaded * row_stride, stride_xw, by_lane(y0) + loaded, by_lane(x0), mask_row, H_IN, W_IN,
            REACH, RUN_W, IS_EVEN_W,
        )  # fmt: skip
        if r >= 0:
            operands = ()
            for i in tl.static_range(ROWS * WIDTH):
                operand = sparse_right(window[i]) if SPARSE else unpacked(window[i], dtype, BLOCKS)
                operands = operands + (operand,)
            if SPARSE:
                outputs = sparse_outputs(
                    operands, weights, start, metadata, dtype, IS_CROSSED, PLACES, PARTNERS, 0, RUN_W
                )
            else:
                outputs = window_outputs(operands, weights, start, PLACES, 0, RUN_W)
            row = ()
            for s in tl.static_range(RUN_W):
                acc = outputs[s]
                if HAS_SCALE:
                    acc = acc * factor + shift
                row = row + (acc.to(dtype),)
            mask_r = mask_out
            if not IS_EVEN_H:
                mask_r = mask_out & (y0 + r < H)[None, :]
            store_row(v_ptrs + r * tl.cast(stride_vh, tl.int64), row, mask_r, x0, W, stride_vw, IS_EVEN_W, 2)
        window = without_first(window, WIDTH)


def merged_conv_window_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    attention: torch.Tensor,
    v: torch.Tensor,
    branches: ConvShape,
    config: WindowConfig,
) -> Launch:
    """As `merged_conv.merged_conv_fwd`, by a window of rows.

    Raises:
        ValueError: other than 16 bits, a stride, groups or tiles that windows do not take.
    """
    reason = branch_refusal("select", branches, config, x.element_size())
    if not reason and config.BLOCK_N > 1:
        reason = f"a window of rows merges branches for a sample a program, got {config}"
    if reason:
        raise ValueError(f"config: {reason}")
    n, _, h_in, w_in = x.shape
    _, _, h, w_out = v.shape
    layout = blocking(branches, config)
    programs = layout.blocks // config.num_warps
    tiles_h, tiles_w = tiles(branches, config, h, w_out)
    points = lattice_points(branches)
    is_large = needs_64_bits(x, v)
    arguments = (
        x, w, w if scale is None else scale, w if shift is None else shift, attention, v,
        h_in, w_in, h, w_out, branches.c_in, branches.c_out, tiles_h, tiles_w, programs,
        x.stride(0), x.stride(2), x.stride(3), v.stride(0), v.stride(1), v.stride(2), v.stride(3),
    )  # fmt: skip
    constexprs = {
        "M": len(branches.kernels),
        "TAPS": tuple(tap for _, taps in points for tap in taps),
        "PLACES": places([point for point, _ in points], branches, config.RUN_W),
        "PARTNERS": partners([point for point, _ in points], branches),
        "REACH": reach(branches),
        "W_OFFSETS": layout.offsets,
        "IS_EVEN_H": h % config.RUN_H == 0,
        "IS_EVEN_W": w_out % config.RUN_W == 0,
        "STRIDE_XW": known_stride(x.stride(3), branches.c_in, is_large),
        "STRIDE_VW": known_stride(v.stride(3), branches.c_out, is_large),
        "PREFETCH": config.PREFETCH and can_prefetch(x),
        "SPARSE": config.SPARSE,
        "IS_CROSSED": is_crossed(branches, config),
        "BLOCKS": config.num_warps,
        "CHANNELS_CI": layout.channels_ci,
        "CHANNELS_CO": layout.channels_co,
        "BLOCK_CI": config.BLOCK_CI,
        "BLOCK_CO": config.BLOCK_CO,
        "BLOCK_H": config.BLOCK_H,
        "BLOCK_W": config.BLOCK_W,
        "RUN_H": config.RUN_H,
        "RUN_W": config.RUN_W,
        "HAS_SCALE": scale is not None,
        "HAS_SHIFT": shift is not None,
        "HAS_CHANNEL_MASK": not is_full(branches, config),
        "IS_LARGE": is_large,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    grid = (n * tiles_h * tiles_w * programs,)
    return Launch(merged_conv_window_fwd_kernel, grid, arguments, constexprs, options, (config.RUN_H,))
