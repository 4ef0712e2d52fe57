"""The whole unit in one cooperative launch: pool, gate and select of a few samples in flight at a time.

Persistent programs walk one list of work items in order. What an item waits for stands before it in the list, and all
programs run at once, so the list always advances (`kernels/README.md`, "One launch"). A sample's input is read from
memory to pool and, a few samples later, from L2 to select.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from .branch_call import BranchCall
from .branch_conv_column import column_constexprs, column_tile
from .branch_conv_stream import stream_constexprs, stream_tile
from .config import ColumnConfig, ResidentConfig
from .gate import gate_sample
from .geometry import (
    MAX_ITEMS,
    ConvShape,
    branch_refusal,
    cdiv,
    next_power_of_2,
    resident_items,
)
from .launch import Launch
from .tiling import SIZES, locate_tile

# What `state` holds before the samples' counters: finished launches, and programs of this one that have finished.
STATE_HEADER = tl.constexpr(2)


@triton.jit(
    do_not_specialize=(
        *SIZES,
        "POOL_TILES_H",
        "POOL_TILES_W",
        "GATE_ITEMS",
        "GATE_LAG",
        "SELECT_LAG",
        "TURNS",
    )
)
def unit_resident_fwd_kernel(
    x_ptr, w_ptr, shift_ptr, reduce_ptr, scale_ptr, gate_shift_ptr, select_ptr, select_bias_ptr,
    partial_ptr, attention_ptr, v_ptr, state_ptr,
    N, H_IN, W_IN, H, W, C_IN, C_OUT, D, POOL_TILES_H, POOL_TILES_W, TILES_H, TILES_W, CHANNEL_PROGRAMS,
    GATE_ITEMS, GATE_LAG, SELECT_LAG, TURNS,
    stride_xn, stride_xh, stride_xw, stride_vn, stride_vc, stride_vh, stride_vw, stride_partial_n, stride_partial_t,
    PHASE: tl.constexpr, IS_COLUMN: tl.constexpr, ITEMS_PER_TURN: tl.constexpr, GATE_CHANNELS: tl.constexpr,
    KERNELS: tl.constexpr, DILATIONS: tl.constexpr, STRIDE: tl.constexpr,
    SPACINGS_H: tl.constexpr, PITCHES: tl.constexpr, STEPS_R: tl.constexpr, STEPS_K: tl.constexpr,
    IS_EVEN_H: tl.constexpr,
    SELECT_SPACINGS_H: tl.constexpr, SELECT_PITCHES: tl.constexpr, SELECT_STEPS_R: tl.constexpr,
    SELECT_STEPS_K: tl.constexpr, SELECT_IS_EVEN_H: tl.constexpr,
    SPACINGS_W: tl.constexpr, SPANS: tl.constexpr, IS_EVEN_W: tl.constexpr, IS_WHOLE_H: tl.constexpr,
    W_OFFSETS: tl.constexpr, CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr, BLOCKS_PER_GROUP: tl.constexpr,
    SPLIT_CI: tl.constexpr,
    BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN_H: tl.constexpr, RUN_W: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr, BLOCK_POOL: tl.constexpr, POOL_BY_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RELU: tl.constexpr, HAS_GATE_RELU: tl.constexpr, HAS_SELECT_BIAS: tl.constexpr,
    HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`v` of a whole batch. A program takes ITEMS_PER_TURN adjacent items of the list at a time, round after round.

    Step t of the list holds the tiles of sample t to pool, the gate of sample `t - GATE_LAG` in GATE_ITEMS parts of
    GATE_CHANNELS channels, and the tiles of sample `t - SELECT_LAG` to select. `state[STATE_HEADER + n]` counts the
    pooled tiles of sample n; attention is handed over in tagged words (`tiling.load_attention`). PHASE "all" is the
    kernel; "pool", "gate", "select" and "none" leave the others out, to count the instructions of one.
    """
    M: tl.constexpr = len(KERNELS)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tag = tl.load(state_ptr) + 1
    pool_items = POOL_TILES_H * POOL_TILES_W * CHANNEL_PROGRAMS
    step_items = pool_items + GATE_ITEMS + TILES_H * TILES_W * CHANNEL_PROGRAMS

    for turn in tl.range(0, TURNS, disable_licm=True):
        item = (turn // ITEMS_PER_TURN * programs + program) * ITEMS_PER_TURN + turn % ITEMS_PER_TURN
        step = item // step_items
        place = item % step_items
        if place < pool_items:
            n = step
            if n < N and (PHASE == "all" or PHASE == "pool"):
                channel_program, tile, tile_h, tile_w, _ = locate_tile(
                    place, CHANNEL_PROGRAMS, POOL_TILES_H, POOL_TILES_W
                )
                if IS_COLUMN:
                    column_tile(
                        x_ptr, w_ptr, (), shift_ptr, attention_ptr, tag, v_ptr, partial_ptr,
                        channel_program, tile, tile_h, tile_w, n, N, H_IN, W_IN, H, W, C_IN, C_OUT,
                        stride_xn, stride_xh, stride_xw, 0, stride_vn, stride_vc, stride_vh, stride_vw,
                        stride_partial_n, stride_partial_t,
                        "pool", KERNELS, DILATIONS, STRIDE, PITCHES, STEPS_R, STEPS_K, W_OFFSETS, IS_EVEN_H, IS_WHOLE_H,
                        CHANNELS_CI, CHANNELS_CO, BLOCKS_PER_GROUP, SPLIT_CI, BLOCK_CI, BLOCK_CO,
                        BLOCK_N, BLOCK_H, BLOCK_W, RUN_H, ROWS, UNROLL, BLOCK_POOL, POOL_BY_DOT,
                        HAS_SHIFT, HAS_RELU, HAS_CHANNEL_MASK, IS_LARGE, PRECISION,
                        0, M,
                    )  # fmt: skip
                else:
                    stream_tile(
                        x_ptr, w_ptr, shift_ptr, attention_ptr, tag, v_ptr, partial_ptr,
                        channel_program, tile, tile_h, tile_w, n, N, H_IN, W_IN, H, W, C_IN, C_OUT,
                        stride_xn, stride_xh, stride_xw, 0, stride_vn, stride_vc, stride_vh, stride_vw,
                        stride_partial_n, stride_partial_t,
                        "pool", KERNELS, DILATIONS, STRIDE, SPACINGS_H, SPACINGS_W, PITCHES, STEPS_R, STEPS_K, SPANS,
                        W_OFFSETS, IS_EVEN_H, IS_EVEN_W, CHANNELS_CI, CHANNELS_CO, SPLIT_CI, BLOCK_CI, BLOCK_CO,
                        BLOCK_N, BLOCK_H, BLOCK_W, RUN_H, RUN_W, BLOCKS_PER_PROGRAM, BLOCK_POOL, POOL_BY_DOT,
                        HAS_SHIFT, HAS_RELU, HAS_CHANNEL_MASK, IS_LARGE, PRECISION,
                    )  # fmt: skip
                # The release covers what all threads wrote, since a barrier orders them before the one that counts.
                tl.debug_barrier()
                tl.atomic_add(state_ptr + STATE_HEADER + n, 1, sem="release", scope="gpu")
        elif place < pool_items + GATE_ITEMS:
            n = step - GATE_LAG
            c0 = (place - pool_items) * GATE_CHANNELS
            if n >= 0 and n < N and c0 < C_OUT and (PHASE == "all" or PHASE == "gate"):
                if PHASE == "all":
                    while (
                        tl.atomic_add(state_ptr + STATE_HEADER + n, 0, sem="acquire", scope="gpu")
                        < pool_items
                    ):
                        pass
                gate_sample(
                    partial_ptr + n.to(tl.int64) * stride_partial_n, reduce_ptr, scale_ptr, gate_shift_ptr,
                    select_ptr, select_bias_ptr, attention_ptr + n.to(tl.int64) * (M * C_OUT), tag,
                    c0, tl.minimum(c0 + GATE_CHANNELS, C_OUT),
                    POOL_TILES_H * POOL_TILES_W, C_OUT, D, H * W, stride_partial_t,
                    M, BLOCK_M, BLOCK_T, BLOCK_S, BLOCK_D, BLOCK_C, HAS_GATE_RELU, HAS_SELECT_BIAS,
                )  # fmt: skip
        else:
            n = step - SELECT_LAG
            if n >= 0 and n < N and (PHASE == "all" or PHASE == "select"):
                channel_program, tile, tile_h, tile_w, _ = locate_tile(
                    place - pool_items - GATE_ITEMS, CHANNEL_PROGRAMS, TILES_H, TILES_W
                )
                if IS_COLUMN:
                    column_tile(
                        x_ptr, w_ptr, (), shift_ptr, attention_ptr, tag, v_ptr, partial_ptr,
                        channel_program, tile, tile_h, tile_w, n, N, H_IN, W_IN, H, W, C_IN, C_OUT,
                        stride_xn, stride_xh, stride_xw, 0, stride_vn, stride_vc, stride_vh, stride_vw,
                        stride_partial_n, stride_partial_t,
                        "select", KERNELS, DILATIONS, STRIDE, SELECT_PITCHES, SELECT_STEPS_R, SELECT_STEPS_K, W_OFFSETS,
                        SELECT_IS_EVEN_H, IS_WHOLE_H, CHANNELS_CI, CHANNELS_CO, BLOCKS_PER_GROUP, SPLIT_CI,
                        BLOCK_CI, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, RUN_H, ROWS, UNROLL, BLOCK_POOL, POOL_BY_DOT,
                        HAS_SHIFT, HAS_RELU, HAS_CHANNEL_MASK, IS_LARGE, PRECISION,
                        0, M,
                    )  # fmt: skip
                else:
                    stream_tile(
                        x_ptr, w_ptr, shift_ptr, attention_ptr, tag, v_ptr, partial_ptr,
                        channel_program, tile, tile_h, tile_w, n, N, H_IN, W_IN, H, W, C_IN, C_OUT,
                        stride_xn, stride_xh, stride_xw, 0, stride_vn, stride_vc, stride_vh, stride_vw,
                        stride_partial_n, stride_partial_t,
                        "select", KERNELS, DILATIONS, STRIDE, SELECT_SPACINGS_H, SPACINGS_W, SELECT_PITCHES,
                        SELECT_STEPS_R, SELECT_STEPS_K, SPANS, W_OFFSETS, SELECT_IS_EVEN_H, IS_EVEN_W,
                        CHANNELS_CI, CHANNELS_CO, SPLIT_CI, BLOCK_CI, BLOCK_CO,
                        BLOCK_N, BLOCK_H, BLOCK_W, RUN_H, RUN_W, BLOCKS_PER_PROGRAM, BLOCK_POOL, POOL_BY_DOT,
                        HAS_SHIFT, HAS_RELU, HAS_CHANNEL_MASK, IS_LARGE, PRECISION,
                    )  # fmt: skip

    # The last program to finish knows that no other waits, and leaves `state` as the next launch needs it.
    finished = tl.atomic_add(state_ptr + 1, 1, sem="acq_rel", scope="gpu")
    if finished == programs - 1:
        for n0 in range(0, N, 1024):
            n_reset = n0 + tl.arange(0, 1024)
            tl.store(state_ptr + STATE_HEADER + n_reset, 0, mask=n_reset < N)
        tl.store(state_ptr + 1, 0)
        tl.store(state_ptr, tag)


def unit_resident_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    shift: torch.Tensor | None,
    reduce_weight: torch.Tensor,
    gate_scale: torch.Tensor,
    gate_shift: torch.Tensor,
    select_weight: torch.Tensor,
    select_bias: torch.Tensor | None,
    partial: torch.Tensor,
    attention: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    *,
    shape: ConvShape,
    has_relu: bool,
    gate_has_relu: bool,
    allow_tf32: bool,
    config: ResidentConfig,
    programs: int,
) -> Launch:
    """The unit in one launch: `v [N, C_out, H, W]` of any strides, from `x` and `w` as `branch_conv_fwd` takes them.

    Gate parameters as `gate_fwd`. Workspaces: `partial [N, tiles, C_out]` fp32, uninitialised; `attention`, int64, at
    least `N * M * C_out` words, and `state`, int32, at least `N + STATE_HEADER`: both zero before their first launch,
    kept from one launch to the next, and used by one launch at a time. `programs` must all fit on the device at once;
    1 where programs run one after another, in the interpreter.

    Raises:
        ValueError: a config whose kernel cannot pool and select with the same tiles of one sample.
    """
    branch = config.branch
    reason = branch_refusal("select", shape, branch, x.element_size())
    if not reason and branch.BLOCK_N > 1:
        reason = f"a tile must be of one sample, got {branch}"
    if reason:
        raise ValueError(f"config: {reason}")
    if not 0 <= config.GATE_LAG <= config.SELECT_LAG:
        raise ValueError(
            f"config: a sample is selected after its gate, got GATE_LAG {config.GATE_LAG} and SELECT_LAG "
            f"{config.SELECT_LAG}"
        )
    n, (h, w_out) = x.shape[0], v.shape[2:]
    m, _, d = select_weight.shape
    if d > config.BLOCK_D:
        raise ValueError(f"config: BLOCK_D must hold the descriptor of {d} entries, got {config.BLOCK_D}")
    items = resident_items(shape, config, h, w_out)
    if n * items.step >= MAX_ITEMS:
        raise ValueError(f"x must have fewer than {MAX_ITEMS} tiles, got {n * items.step} in {n} samples")
    is_column = isinstance(branch, ColumnConfig)
    pool = BranchCall("pool", x, w, shift, shape, branch, has_relu, allow_tf32, partial=partial)
    select = replace(pool, task="select", out=v, partial=None)
    constexprs_of: Callable[[BranchCall[Any]], dict[str, Any]] = (
        column_constexprs if is_column else stream_constexprs
    )
    of_pool, of_select = constexprs_of(pool), constexprs_of(select)
    columns = {
        "RUN_W": 1,
        "SPANS": (),
        "SPACINGS_W": (),
        "IS_EVEN_W": (),
        "SPACINGS_H": (),
        "BLOCKS_PER_PROGRAM": 1,
    }
    rows = {"ROWS": 1, "UNROLL": False, "IS_WHOLE_H": False, "BLOCKS_PER_GROUP": 1}
    constexprs = {
        **(columns if is_column else rows),
        **of_pool,
        "IS_LARGE": of_select["IS_LARGE"],  # of x and v
        "PHASE": "all",
        "IS_COLUMN": is_column,
        "ITEMS_PER_TURN": config.ITEMS_PER_TURN,
        "GATE_CHANNELS": config.GATE_CHANNELS,
        "BLOCK_M": next_power_of_2(m),
        "BLOCK_T": config.BLOCK_T,
        "BLOCK_S": config.BLOCK_S,
        "BLOCK_D": config.BLOCK_D,
        "BLOCK_C": config.BLOCK_C,
        "HAS_GATE_RELU": gate_has_relu,
        "HAS_SELECT_BIAS": select_bias is not None,
    }
    for name in ("SPACINGS_H", "PITCHES", "STEPS_R", "STEPS_K", "IS_EVEN_H"):
        constexprs[f"SELECT_{name}"] = of_select.get(name, ())
    programs = min(programs, cdiv(n * items.step, config.ITEMS_PER_TURN))
    turns = (
        cdiv((n + config.SELECT_LAG) * items.step, programs * config.ITEMS_PER_TURN) * config.ITEMS_PER_TURN
    )
    unused = x  # stands for a pointer that is not followed
    arguments = (
        *pool.pointers, reduce_weight, gate_scale, gate_shift, select_weight,
        unused if select_bias is None else select_bias, partial, attention, v, state,
        *pool.sizes, shape.c_in, shape.c_out, d, *items.pool_tiles, *items.select_tiles, pool.channel_programs,
        items.gate, config.GATE_LAG, config.SELECT_LAG, turns,
        *pool.x_strides, *v.stride(), *pool.partial_strides,
    )  # fmt: skip
    return Launch(
        unit_resident_fwd_kernel,
        (programs,),
        arguments,
        constexprs,
        {
            **pool.options,
            "launch_cooperative_grid": True,
            "maxnreg": config.maxnreg,
        },
        kept=(attention, state),
    )
