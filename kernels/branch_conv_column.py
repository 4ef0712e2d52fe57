"""Branch convolutions for groups of 9 to 32 channels: one kernel column at a time, over columns of outputs.

The formulation of `branch_conv_stream` without runs along a row: a group fills the tensor core by itself, and what
counts is how often an input row is loaded. For each kernel column the rows of a tile are loaded once and feed all
accumulators that need them, a few rows at a time, so that a whole column's accumulators fit in registers. Where a tile
is as high as the image, the rows beyond it, their masks and their products fall away.
"""

from typing import Any

import triton
import triton.language as tl

from .branch_call import BranchCall, block_constexprs, run_constexprs
from .config import ColumnConfig
from .geometry import is_whole_height
from .launch import Launch
from .norm import lane_moments, store_moments
from .tiling import (
    SIZES,
    branch_attention,
    fold_pool,
    load_weight_operand,
    locate_tile,
    part_elements,
    relu,
    right_operand,
    widen,
)


@triton.jit
def column_weights(w_ptr, kx, KERNEL: tl.constexpr, BLOCK_CO: tl.constexpr, BLOCK_CI: tl.constexpr):
    """Weights of kernel column `kx` of one branch: KERNEL left operands `[BLOCK_CO, BLOCK_CI]`."""
    weights = ()
    for ky in tl.static_range(KERNEL):
        tap_ptr = w_ptr + (ky * KERNEL + kx) * (BLOCK_CO * BLOCK_CI)
        if BLOCK_CI <= 32 and w_ptr.dtype.element_ty.primitive_bitwidth == 16:
            weights = weights + (load_weight_operand(tap_ptr, BLOCK_CO, BLOCK_CI),)
        else:
            offs_w = tl.arange(0, BLOCK_CO)[:, None] * BLOCK_CI + tl.arange(0, BLOCK_CI)[None, :]
            weights = weights + (tl.load(tap_ptr + offs_w),)
    return weights


@triton.jit
def add_column(
    outputs, weights, own_ptrs, kx, y, x, ci, mask_p, H_IN, W_IN, CI_END, stride_xh, stride_xw,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr,
    PITCH: tl.constexpr, STEP_R: tl.constexpr, STEP_K: tl.constexpr,
    IS_EVEN_H: tl.constexpr, IS_WHOLE_H: tl.constexpr,
    RUN_H: tl.constexpr, ROWS: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`outputs` with the products of kernel column `kx`, whose weights are `weights`, added."""
    HALF: tl.constexpr = KERNEL // 2
    FIRST_OWN: tl.constexpr = HALF * STEP_K
    LAST_OWN: tl.constexpr = FIRST_OWN + (RUN_H - 1) * STEP_R
    START: tl.constexpr = FIRST_OWN if IS_WHOLE_H else 0
    STOP: tl.constexpr = LAST_OWN + 1 if IS_WHOLE_H else LAST_OWN + FIRST_OWN + 1
    BLOCK_CI: tl.constexpr = own_ptrs.shape[1]
    IS_DIRECT: tl.constexpr = BLOCK_CI <= 32 and own_ptrs.dtype.element_ty.primitive_bitwidth == 16
    dx = (kx - HALF) * DILATION
    x_in = x * STRIDE + dx
    column_ptrs = own_ptrs + dx * stride_xw
    # Outputs beyond the image see no input at all, so that they stay finite.
    mask_x = mask_p & (x_in >= 0) & (x_in < W_IN)
    for first in tl.static_range(START, STOP, ROWS):
        rows = ()
        for i in tl.static_range(first, min(first + ROWS, STOP)):
            mask = mask_x
            if not (IS_EVEN_H and i >= FIRST_OWN and i <= LAST_OWN):
                y_in = y * STRIDE + i * PITCH - HALF * DILATION
                mask = mask_x & (y_in >= 0) & (y_in < H_IN)
            mask = mask[:, None]
            if HAS_CHANNEL_MASK:
                mask = mask & (ci < CI_END)[None, :]
            row = (i * PITCH - HALF * DILATION) * tl.cast(stride_xh, tl.int64)
            taps = tl.load(column_ptrs + row, mask=mask, other=0.0)
            rows = rows + (right_operand(taps, BLOCK_CI == 16) if IS_DIRECT else tl.trans(taps),)
        added = ()
        for r in tl.static_range(RUN_H):
            acc = outputs[r]
            for ky in tl.static_range(KERNEL):
                if r * STEP_R + ky * STEP_K >= first and r * STEP_R + ky * STEP_K < min(first + ROWS, STOP):
                    row = rows[r * STEP_R + ky * STEP_K - first]
                    acc = tl.dot(weights[ky], row, acc, input_precision=PRECISION)
            added = added + (acc,)
        outputs = added
    return outputs


@triton.jit
def column_outputs(
    x_ptr, w_ptr, held, shift_ptr, sample, y, x, mask_p, H_IN, W_IN, CI_END, CO_END, stride_xn, stride_xh, stride_xw,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr,
    PITCH: tl.constexpr, STEP_R: tl.constexpr, STEP_K: tl.constexpr,
    IS_EVEN_H: tl.constexpr, IS_WHOLE_H: tl.constexpr,
    RUN_H: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_P: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One branch of one tile before its activation: RUN_H tensors `[BLOCK_CO, BLOCK_P]`.

    Row i is `i * PITCH` input pixels below the topmost. Output r needs, for kernel row ky, row
    `r * STEP_R + ky * STEP_K`. `held`: weights of the first kernel columns, one after another, if they are in registers
    already.
    """
    IS_SHORT: tl.constexpr = BLOCK_CI == 16 and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    HELD_COLUMNS: tl.constexpr = len(held) // KERNEL
    _, ci = part_elements(BLOCK_CI, BLOCK_CI, IS_SHORT)
    co = tl.arange(0, BLOCK_CO)
    # Where each lane reads, once; a row of a kernel column is an offset that all lanes add.
    own_ptrs = x_ptr + (
        (sample * stride_xn + y * STRIDE * stride_xh + x * STRIDE * stride_xw)[:, None] + ci[None, :]
    )
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + co, mask=co < CO_END, other=0.0)
        start = tl.broadcast_to(shift[:, None], [BLOCK_CO, BLOCK_P])
    else:
        start = tl.zeros([BLOCK_CO, BLOCK_P], tl.float32)
    outputs = ()
    for _ in tl.static_range(RUN_H):
        outputs = outputs + (start,)
    for kx in tl.static_range(HELD_COLUMNS):
        weights = ()
        for ky in tl.static_range(KERNEL):
            weights = weights + (held[kx * KERNEL + ky],)
        outputs = add_column(
            outputs, weights, own_ptrs, kx, y, x, ci, mask_p, H_IN, W_IN, CI_END, stride_xh, stride_xw,
            KERNEL, DILATION, STRIDE, PITCH, STEP_R, STEP_K, IS_EVEN_H, IS_WHOLE_H, RUN_H, ROWS,
            HAS_CHANNEL_MASK, PRECISION,
        )  # fmt: skip
    for kx in tl.range(HELD_COLUMNS, KERNEL, loop_unroll_factor=KERNEL - HELD_COLUMNS if UNROLL else 1):
        weights = column_weights(w_ptr, kx, KERNEL, BLOCK_CO, BLOCK_CI)
        outputs = add_column(
            outputs, weights, own_ptrs, kx, y, x, ci, mask_p, H_IN, W_IN, CI_END, stride_xh, stride_xw,
            KERNEL, DILATION, STRIDE, PITCH, STEP_R, STEP_K, IS_EVEN_H, IS_WHOLE_H, RUN_H, ROWS,
            HAS_CHANNEL_MASK, PRECISION,
        )  # fmt: skip
    return outputs


@triton.jit
def pool_rows(
    pool, values, mask_p, RUN_H: tl.constexpr, BLOCK_CO: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_POOL: tl.constexpr
):  # fmt: skip
    """`pool` with the outputs of every row added, by products with the pixel mask; rows of 8 pixels go in pairs."""
    dtype = values[0].dtype
    if BLOCK_P >= 16:
        ones = tl.broadcast_to(mask_p[:, None], [BLOCK_P, BLOCK_POOL]).to(dtype)
        for r in tl.static_range(RUN_H):
            pool = tl.dot(values[r], ones, pool)
    else:
        both = tl.reshape(tl.broadcast_to(mask_p[None, :], [2, BLOCK_P]), [2 * BLOCK_P])
        ones = tl.broadcast_to(both[:, None], [2 * BLOCK_P, BLOCK_POOL]).to(dtype)
        for r in tl.static_range(0, RUN_H, 2):
            pair = tl.join(values[r], values[r + 1] if r + 1 < RUN_H else tl.zeros_like(values[r]))
            pair = tl.reshape(tl.permute(pair, (0, 2, 1)), [BLOCK_CO, 2 * BLOCK_P])
            pool = tl.dot(pair, ones, pool)
    return pool


@triton.jit
def column_tile(
    x_ptr, w_ptr, held, shift_ptr, attention_ptr, tag, out_ptr, partial_ptr,
    block, tile, tile_h, tile_w, block_n, N, H_IN, W_IN, H, W, C_IN, C_OUT,
    stride_xn, stride_xh, stride_xw, stride_om, stride_on, stride_oc, stride_oh, stride_ow,
    stride_partial_n, stride_partial_t,
    TASK: tl.constexpr, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, STRIDE: tl.constexpr,
    PITCHES: tl.constexpr, STEPS_R: tl.constexpr, STEPS_K: tl.constexpr, W_OFFSETS: tl.constexpr,
    IS_EVEN_H: tl.constexpr, IS_WHOLE_H: tl.constexpr,
    CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr, BLOCKS_PER_GROUP: tl.constexpr, SPLIT_CI: tl.constexpr,
    BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN_H: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_POOL: tl.constexpr, POOL_BY_DOT: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
    PRECISION: tl.constexpr, FIRST: tl.constexpr, STOP: tl.constexpr,
):  # fmt: skip
    """Branches FIRST to STOP of one tile and channel block; TASK, `tile` and `tag` as in `stream_tile`, `held` as in
    `column_outputs`.

    A tile is BLOCK_N samples x BLOCK_H columns of RUN_H outputs x BLOCK_W pixels. A channel block is whole groups,
    CHANNELS_CI inputs and CHANNELS_CO outputs, padded to BLOCK_CI and BLOCK_CO, or BLOCK_CO of the CHANNELS_CO outputs
    of one group, which has BLOCKS_PER_GROUP blocks. Pooled sums are added to what those before FIRST
    have left.
    """
    M: tl.constexpr = len(KERNELS)
    BLOCK_P: tl.constexpr = BLOCK_N * BLOCK_H * BLOCK_W
    IS_STORED: tl.constexpr = TASK == "store" or TASK == "train"
    IS_MEASURED: tl.constexpr = TASK == "train" or TASK == "measure"
    dtype = x_ptr.dtype.element_ty
    stride_xn, stride_xh, stride_xw = widen(stride_xn, stride_xh, stride_xw, IS_LARGE)
    stride_on, stride_oh, stride_ow = widen(stride_on, stride_oh, stride_ow, IS_LARGE)
    n0 = block_n.to(tl.int64) * BLOCK_N
    n_left = tl.minimum(N - n0, BLOCK_N).to(tl.int32)
    offs_p = tl.arange(0, BLOCK_P)
    sample = offs_p // (BLOCK_H * BLOCK_W)
    y = (tile_h * BLOCK_H + offs_p // BLOCK_W % BLOCK_H) * RUN_H
    x = tile_w * BLOCK_W + offs_p % BLOCK_W
    mask_p = (y < H) & (x < W) & (sample < n_left)
    co = tl.arange(0, BLOCK_CO)
    group = block // BLOCKS_PER_GROUP
    part = block % BLOCKS_PER_GROUP * BLOCK_CO
    ci0 = group * CHANNELS_CI
    co0 = group * CHANNELS_CO + part
    ci_end = tl.minimum(CHANNELS_CI, C_IN - ci0)
    co_end = tl.minimum(CHANNELS_CO - part, C_OUT - co0)
    x_ptr += n0 * stride_xn + ci0
    out_ptr += n0 * stride_on + co0 * stride_oc
    offs_out = (sample * stride_on + y * stride_oh + x * stride_ow)[None, :] + co[:, None] * stride_oc
    mask_out = mask_p[None, :]  # [BLOCK_CO, BLOCK_P]
    if HAS_CHANNEL_MASK:
        mask_out &= (co < co_end)[:, None]
    pool = tl.zeros([BLOCK_CO, BLOCK_POOL if POOL_BY_DOT else BLOCK_P], tl.float32)
    selection = ()
    # Where it must be waited for, all branches' attention comes first, while nothing else takes registers.
    IS_TAGGED: tl.constexpr = attention_ptr.dtype.element_ty == tl.int64
    attention = ()
    if TASK == "select" and IS_TAGGED:
        for m in tl.static_range(M):
            a = branch_attention(
                attention_ptr, n0, sample, n_left, m, co0, co, co_end, C_OUT, tag, M, BLOCK_N
            )
            attention = attention + (a,)
    for m in tl.static_range(FIRST, STOP):
        outputs = column_outputs(
            x_ptr + m * SPLIT_CI,
            w_ptr + block * W_OFFSETS[M] + W_OFFSETS[m],
            held,
            shift_ptr + m * C_OUT + co0,
            sample, y, x, mask_p, H_IN, W_IN, ci_end, co_end, stride_xn, stride_xh, stride_xw,
            KERNELS[m], DILATIONS[m], STRIDE, PITCHES[m], STEPS_R[m], STEPS_K[m], IS_EVEN_H, IS_WHOLE_H,
            RUN_H, ROWS, UNROLL, BLOCK_CI, BLOCK_CO, BLOCK_P, HAS_SHIFT, HAS_CHANNEL_MASK, PRECISION,
        )  # fmt: skip
        if TASK == "select":
            if IS_TAGGED:
                a = attention[m]
            else:
                a = branch_attention(
                    attention_ptr, n0, sample, n_left, m, co0, co, co_end, C_OUT, tag, M, BLOCK_N
                )
        values = ()
        total = tl.zeros([BLOCK_CO, BLOCK_P], tl.float32)
        squares = tl.zeros([BLOCK_CO, BLOCK_P], tl.float32)
        count = tl.zeros([BLOCK_CO, BLOCK_P], tl.float32)
        pivot = count
        for r in tl.static_range(RUN_H):
            acc = outputs[r]
            if HAS_RELU:
                acc = relu(acc)
            mask_r = mask_out
            if not IS_EVEN_H:
                mask_r = mask_out & (y + r < H)[None, :]
            if TASK == "select":
                acc *= a
                if m > 0:
                    acc += selection[r].to(tl.float32)
                # In 16 bits between branches, as eager adds them: half the registers.
                values = values + (acc.to(dtype),)
            else:
                u = acc.to(dtype)
                if IS_STORED:
                    tl.store(out_ptr + r * stride_oh + offs_out, u, mask=mask_r)
                if IS_MEASURED:
                    value = u.to(tl.float32)
                    if r == 0:
                        pivot = value
                    else:
                        away = value - pivot
                        if not IS_EVEN_H:
                            away = tl.where(mask_r, away, 0.0)
                        total += away
                        squares += away * away
                    if not IS_EVEN_H:
                        count += tl.where(mask_r, 1.0, 0.0)
                elif POOL_BY_DOT:
                    # An output below the image sees part of it; one that overflows must not meet the product as
                    # infinity.
                    if not IS_EVEN_H:
                        u = tl.where(mask_r, u, 0.0)
                    values = values + (u,)
                elif IS_EVEN_H:
                    pool += acc
                else:
                    pool += tl.where(mask_r, acc, 0.0)
        if TASK == "select":
            selection = values
        elif IS_MEASURED:
            if IS_EVEN_H:
                count += tl.where(mask_out, RUN_H * 1.0, 0.0)
            mean, m2 = lane_moments(pivot, total, squares, count)
            store_moments(
                partial_ptr + m * 3 * stride_partial_n + co0, mean, m2, count, co, co < co_end,
                stride_partial_n, 1, BLOCK_CO,
            )  # fmt: skip
        elif POOL_BY_DOT:
            pool = pool_rows(pool, values, mask_p, RUN_H, BLOCK_CO, BLOCK_P, BLOCK_POOL)
        if IS_STORED:
            out_ptr += stride_om
    if TASK == "select":
        for r in tl.static_range(RUN_H):
            mask_r = mask_out
            if not IS_EVEN_H:
                mask_r = mask_out & (y + r < H)[None, :]
            tl.store(out_ptr + r * stride_oh + offs_out, selection[r], mask=mask_r)
    elif not IS_MEASURED:
        if not POOL_BY_DOT:
            pool = tl.where(mask_p[None, :], pool, 0.0)
        sums = fold_pool(pool, 1, BLOCK_CO, BLOCK_N, POOL_BY_DOT)
        offs_n = tl.arange(0, BLOCK_N)
        offs_partial = (n0 + offs_n)[:, None] * stride_partial_n + tile.to(tl.int64) * stride_partial_t
        mask = (offs_n < n_left)[:, None] & (co < co_end)[None, :]
        ptrs = partial_ptr + offs_partial + co0 + co[None, :]
        if FIRST > 0:
            sums += tl.load(ptrs, mask=mask, other=0.0)
        tl.store(ptrs, sums, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def branch_conv_column_fwd_kernel(
    x_ptr, w_ptr, shift_ptr, attention_ptr, out_ptr, partial_ptr,
    N, H_IN, W_IN, H, W, C_IN, C_OUT, TILES_H, TILES_W, CHANNEL_PROGRAMS,
    stride_xn, stride_xh, stride_xw, stride_om, stride_on, stride_oc, stride_oh, stride_ow,
    stride_partial_n, stride_partial_t,
    TASK: tl.constexpr, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, STRIDE: tl.constexpr,
    PITCHES: tl.constexpr, STEPS_R: tl.constexpr, STEPS_K: tl.constexpr, W_OFFSETS: tl.constexpr,
    IS_EVEN_H: tl.constexpr, IS_WHOLE_H: tl.constexpr,
    CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr, BLOCKS_PER_GROUP: tl.constexpr, SPLIT_CI: tl.constexpr,
    BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN_H: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_POOL: tl.constexpr, POOL_BY_DOT: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one channel block: `column_tile`."""
    block, tile, tile_h, tile_w, block_n = locate_tile(tl.program_id(0), CHANNEL_PROGRAMS, TILES_H, TILES_W)
    if TASK == "train" or TASK == "measure":  # moments of tiles of all samples
        partial_ptr += tl.program_id(0).to(tl.int64) // CHANNEL_PROGRAMS * stride_partial_t
    column_tile(
        x_ptr, w_ptr, (), shift_ptr, attention_ptr, 0, out_ptr, partial_ptr,
        block, tile, tile_h, tile_w, block_n, N, H_IN, W_IN, H, W, C_IN, C_OUT,
        stride_xn, stride_xh, stride_xw, stride_om, stride_on, stride_oc, stride_oh, stride_ow,
        stride_partial_n, stride_partial_t,
        TASK, KERNELS, DILATIONS, STRIDE, PITCHES, STEPS_R, STEPS_K, W_OFFSETS, IS_EVEN_H, IS_WHOLE_H,
        CHANNELS_CI, CHANNELS_CO, BLOCKS_PER_GROUP, SPLIT_CI, BLOCK_CI, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W,
        RUN_H, ROWS, UNROLL, BLOCK_POOL, POOL_BY_DOT, HAS_SHIFT, HAS_RELU, HAS_CHANNEL_MASK, IS_LARGE, PRECISION,
        0, len(KERNELS),
    )  # fmt: skip


def column_constexprs(call: BranchCall[ColumnConfig]) -> dict[str, Any]:
    """Constexprs of `column_tile`, but for its task and its columns of weights."""
    config, (h, _) = call.config, call.output_size
    return {
        **block_constexprs(call),
        **run_constexprs(call),
        "IS_EVEN_H": h % config.RUN_H == 0,
        "IS_WHOLE_H": is_whole_height(call.shape, config, h),
        "BLOCKS_PER_GROUP": call.layout.blocks_per_group,
    }


def branch_conv_column_fwd(call: BranchCall[ColumnConfig]) -> Launch:
    constexprs = {**column_constexprs(call), "TASK": call.task}
    trips = () if call.config.UNROLL else call.shape.kernels
    return Launch(
        branch_conv_column_fwd_kernel, call.grid, call.selecting_arguments, constexprs, call.options, trips
    )
