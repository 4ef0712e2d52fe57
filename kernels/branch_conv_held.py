"""Branch convolutions of groups of 17 to 32 channels over many tiles: kernel columns of weights stay in registers.

The formulation of `branch_conv_column`, whose programs each load all weights of their group, more than they load of x.
Here a program takes one channel block of many tiles, branch after branch, and loads weights of the first kernel columns
once; programs all run at once, so that none waits for a last round.
"""

import triton
import triton.language as tl

from .branch_call import BranchCall
from .branch_conv_column import column_constexprs, column_tile, column_weights
from .config import HeldConfig
from .geometry import cdiv
from .launch import Launch
from .tiling import SIZES


@triton.jit(do_not_specialize=(*SIZES, "TILES"))
def branch_conv_held_fwd_kernel(
    x_ptr, w_ptr, shift_ptr, out_ptr, partial_ptr,
    N, H_IN, W_IN, H, W, C_IN, C_OUT, TILES, TILES_H, TILES_W, CHANNEL_PROGRAMS,
    stride_xn, stride_xh, stride_xw, stride_om, stride_on, stride_oc, stride_oh, stride_ow,
    stride_partial_n, stride_partial_t,
    TASK: tl.constexpr, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, STRIDE: tl.constexpr,
    PITCHES: tl.constexpr, STEPS_R: tl.constexpr, STEPS_K: tl.constexpr, W_OFFSETS: tl.constexpr,
    IS_EVEN_H: tl.constexpr, IS_WHOLE_H: tl.constexpr,
    CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr, BLOCKS_PER_GROUP: tl.constexpr, SPLIT_CI: tl.constexpr,
    BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN_H: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
    HELD_COLUMNS: tl.constexpr, TILES_PER_PROGRAM: tl.constexpr,
    BLOCK_POOL: tl.constexpr, POOL_BY_DOT: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """TILES_PER_PROGRAM of the TILES tiles of all samples, one channel block: `column_tile` of each branch.

    TASK "store" or "pool".
    """
    M: tl.constexpr = len(KERNELS)
    block = tl.program_id(0) % CHANNEL_PROGRAMS
    first = tl.program_id(0) // CHANNEL_PROGRAMS * TILES_PER_PROGRAM
    tiles = TILES_H * TILES_W
    for m in tl.static_range(M):
        held = ()
        for kx in tl.static_range(min(HELD_COLUMNS, KERNELS[m])):
            held = held + column_weights(
                w_ptr + block * W_OFFSETS[M] + W_OFFSETS[m], kx, KERNELS[m], BLOCK_CO, BLOCK_CI
            )
        own_out_ptr = out_ptr + m * tl.cast(stride_om, tl.int64)
        # Triton would take the loads of the other columns out of the loop, where no registers are left for them.
        for item in tl.range(first, tl.minimum(first + TILES_PER_PROGRAM, TILES), disable_licm=True):
            tile = item % tiles
            column_tile(
                x_ptr, w_ptr, held, shift_ptr, x_ptr, 0, own_out_ptr, partial_ptr,
                block, tile, tile // TILES_W, tile % TILES_W, item // tiles, N, H_IN, W_IN, H, W, C_IN, C_OUT,
                stride_xn, stride_xh, stride_xw, stride_om, stride_on, stride_oc, stride_oh, stride_ow,
                stride_partial_n, stride_partial_t,
                TASK, KERNELS, DILATIONS, STRIDE, PITCHES, STEPS_R, STEPS_K, W_OFFSETS, IS_EVEN_H, IS_WHOLE_H,
                CHANNELS_CI, CHANNELS_CO, BLOCKS_PER_GROUP, SPLIT_CI, BLOCK_CI, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W,
                RUN_H, ROWS, UNROLL, BLOCK_POOL, POOL_BY_DOT, HAS_SHIFT, HAS_RELU, HAS_CHANNEL_MASK, IS_LARGE,
                PRECISION, m, m + 1,
            )  # fmt: skip
        # The next branch's sums are added to these.
        tl.debug_barrier()


def branch_conv_held_fwd(call: BranchCall[HeldConfig]) -> Launch:
    shape, config, count = call.shape, call.config, call.all_tiles
    arguments = (
        *call.pointers, *call.out_pointers,
        *call.sizes, shape.c_in, shape.c_out, count, *call.tiles, call.channel_programs,
        *call.x_strides, *call.out_strides, *call.partial_strides,
    )  # fmt: skip
    walked = min(count, config.TILES_PER_PROGRAM)
    columns_left = [1 if config.UNROLL else max(1, k - config.HELD_COLUMNS) for k in shape.kernels]
    return Launch(
        branch_conv_held_fwd_kernel,
        (cdiv(count, config.TILES_PER_PROGRAM) * call.channel_programs,),
        arguments,
        {**column_constexprs(call), "TASK": call.task},
        call.options,
        tuple(trip for columns in columns_left for trip in (walked, columns)),
    )
