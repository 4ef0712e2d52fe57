"""Configs of the branch convolutions from shapes alone."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch

from ..chips import Chip
from ..kernels.config import (
    BranchConfig,
    ColumnConfig,
    DepthwiseConfig,
    HeldConfig,
    StreamConfig,
    TapConfig,
    WindowConfig,
)
from ..kernels.geometry import (
    ConvShape,
    blocking,
    blocks_per_program,
    can_run,
    cdiv,
    column_run,
    column_runs,
    is_whole_height,
    next_power_of_2,
    row_run,
    tiles,
)
from .column import (
    column_candidates,
    held_candidates,
    shares_row,
    takes_columns,
)
from .window import in_warps, takes_window, window_candidates, window_cost, without_large_spills

# Chips whose compiler does not spill where a program selects two channel blocks, one after the other.
PAIRED_SELECT_CHIPS = ("sm_80", "sm_120")
# What weights that L1 still holds cost, of those that L2 does.
L1_SHARE = 0.2


@lru_cache(maxsize=4096)
def branch_config(
    shape: ConvShape,
    n: int,
    h: int,
    w: int,
    dtype: torch.dtype,
    allow_tf32: bool,
    chip: Chip,
    *,
    task: str = "store",
) -> BranchConfig:
    """Config for the branches of `shape` on a batch of `n` outputs of `h` x `w` pixels.

    `task`: "store", "train", "pool" or "select". One that stores where no kernel does the task:
    `kernels.geometry.can_run` tells.
    """
    candidates = branch_candidates(shape, h, dtype, allow_tf32, chip, task)
    candidates = candidates or tap_candidates(shape, dtype == torch.float32 and not allow_tf32, dtype)
    is_large = max(shape.c_out * h * w, shape.c_in * h * w * shape.stride**2) >= 2**31
    if is_large:
        candidates = without_large_spills(candidates, task)
    best = min(candidates, key=lambda config: branch_cost(config, shape, n, h, w, chip, task))
    if isinstance(best, WindowConfig) and not is_large:
        return in_warps(best, shape, n, h, w, dtype, task, chip)
    return best


def branch_candidates(
    shape: ConvShape, h: int, dtype: torch.dtype, allow_tf32: bool, chip: Chip, task: str
) -> list[BranchConfig]:
    """Configs that do `task` in the formulations that keep weights and rows in registers; none if those cannot."""
    is_ieee = dtype == torch.float32 and not allow_tf32
    group = shape.group_channels
    kernel = max(shape.kernels)
    candidates: list[BranchConfig] = []
    if shape.is_depthwise and dtype == torch.float32:
        candidates = _depthwise_candidates(kernel)
    elif dtype == torch.float32:
        is_narrow = group <= 8 and kernel <= 3
        candidates = stream_candidates(shape, is_ieee, dtype, chip, task) if is_narrow else []
    elif takes_window(shape, chip) and (windows := window_candidates(shape, h, dtype, task, chip)):
        candidates = [*windows]
    elif takes_columns(shape):
        candidates = [*column_candidates(shape, h, chip, task), *held_candidates(shape, h, chip)]
    elif group <= 8 and kernel <= 5:
        candidates = stream_candidates(shape, is_ieee, dtype, chip, task)
    return [config for config in candidates if can_run(task, shape, config)]


def stream_candidates(
    shape: ConvShape, is_ieee: bool, dtype: torch.dtype, chip: Chip, task: str
) -> list[BranchConfig]:
    run_w = 2 if shares_row(shape) else 1
    block = 8 if run_w == 2 else 16
    # The longest column run whose rows, weights and accumulators fit in registers.
    if is_ieee:
        longest = 1
    elif dtype == torch.float32:
        longest = 2 if run_w == 2 else 1
    elif max(shape.kernels) > 3:
        longest = 2 if task == "store" else 1
    elif run_w == 1 and shape.stride > 1:
        longest = 4
    else:
        longest = 8
    if chip.is_amd:
        longest = min(longest, 4)
    is_paired = block == 8 and dtype != torch.float32
    if task == "select":
        # The sums of two branches are alive together.
        longest = min(longest, 7)
        is_paired = is_paired and chip.name in PAIRED_SELECT_CHIPS
    elif task == "train":
        # Of each branch, three sums of every output of a run are alive.
        is_paired = False
    return [
        StreamConfig(
            BLOCK_CI=block,
            BLOCK_CO=block,
            BLOCK_N=block_n,
            BLOCK_H=16 // block_n // block_w,
            BLOCK_W=block_w,
            RUN_H=run_h,
            RUN_W=run_w,
            # Two blocks of 8 16-bit channels share the 32-byte sectors that a load brings in.
            BLOCKS_PER_PROGRAM=2 if is_paired else 1,
        )
        for run_h, block_n, block_w in product((8, 7, 4, 2, 1), (1, 2, 4), (2, 4, 8, 16))
        if run_h <= longest and block_n * block_w <= 16
    ]


def tap_candidates(shape: ConvShape, is_ieee: bool, dtype: torch.dtype) -> list[BranchConfig]:
    """Configs of the tap formulation, which stores branches of any shape."""
    group_in, group_out = shape.c_in // shape.groups, shape.c_out // shape.groups
    is_wide = min(group_in, group_out) >= 64 and not is_ieee
    if max(group_in, group_out) <= 8 and shares_row(shape) and not is_ieee:
        block_ci, block_co, run_w, pixels, num_warps, num_stages = 8, 8, 2, 64, 1, 1
    else:
        # Products in fp32 without tensor cores keep both operands in registers.
        most_ci, most_co = (16, 32) if is_ieee else (32, 64) if dtype == torch.float32 else (64, 128)
        block_ci = min(most_ci, max(16, next_power_of_2(group_in)))
        block_co = min(most_co, max(16, next_power_of_2(group_out)))
        run_w, pixels, num_warps, num_stages = (
            1,
            128 if is_wide else 64,
            8 if is_wide else 4,
            1 if is_ieee else 2,
        )
    return [
        TapConfig(
            BLOCK_CI=block_ci,
            BLOCK_CO=block_co,
            BLOCK_N=block_n,
            BLOCK_H=pixels // run_w // block_n // block_w,
            BLOCK_W=block_w,
            RUN_W=run_w,
            num_warps=num_warps,
            num_stages=num_stages,
        )
        for block_n, block_w in product((1, 2, 4), (4, 8, 16))
        if block_n * block_w <= pixels // run_w
    ]


def _depthwise_candidates(kernel: int) -> list[BranchConfig]:
    return [
        DepthwiseConfig(
            BLOCK_C=32,
            BLOCK_N=block_n,
            BLOCK_H=8 // block_n // block_w,
            BLOCK_W=block_w,
            RUN_H=run_h,
            num_warps=1,
        )
        for run_h, block_n, block_w in product((4, 2, 1), (1, 2), (1, 2, 4, 8))
        if block_n * block_w <= 8 and (kernel <= 3 or run_h == 1)
    ]


def branch_cost(
    config: BranchConfig, shape: ConvShape, n: int, h: int, w: int, chip: Chip, task: str
) -> float:
    """Relative time of a branch convolution: its work over the whole chip, or its chain of waves, the larger."""
    if isinstance(config, WindowConfig):
        return window_cost(config, shape, n, h, w, chip)
    layout = blocking(shape, config)
    is_common = task == "select"
    columns = column_runs(shape, config, is_common)
    tiles_h, tiles_w = tiles(shape, config, h, w, is_common=is_common)
    run_h, run_w = column_run(config), row_run(config)
    # Outputs per tile, rows of input loaded per row of output, and the masks that an overhanging run needs.
    area = config.BLOCK_N * config.BLOCK_H * run_h * config.BLOCK_W * run_w
    rows = max(
        (run_h - 1) * step_r + (k - 1) * step_k + 1
        for step_r, step_k, k in zip(columns.steps_r, columns.steps_k, shape.kernels, strict=True)
    )
    overlap = 1 if is_whole_height(shape, config, h) else rows / run_h
    is_even = all(h % (run_h * spacing) == 0 for spacing in columns.spacings)
    # Columns and rows of halo that a tile reads beyond its own: traffic from L2.
    reach = max(d * (k - 1) for d, k in zip(shape.dilations, shape.kernels, strict=True))
    height, width = config.BLOCK_H * run_h * shape.stride, config.BLOCK_W * run_w * shape.stride
    halo = (height + reach) * (width + reach) / (height * width)
    # Pixels of several samples are pooled by sums, masked in every row where runs may overhang, not on the tensor core.
    pooling = 1.0 if config.BLOCK_N == 1 else 1.1 if isinstance(config, ColumnConfig) else 1.3
    work = area * (6 + 3 * overlap + halo) * (1.0 if is_even else 1.15) * pooling
    blocks = blocks_per_program(config)
    walks = cdiv(n, config.BLOCK_N) * tiles_h * tiles_w
    if isinstance(config, ColumnConfig):
        work *= config.BLOCK_CO / config.BLOCK_CI
        # Every program loads all weights of its outputs, those that it does not hold anew for each tile.
        weights = 0.35 * config.BLOCK_CO * sum(k * k for k in shape.kernels)
        if isinstance(config, HeldConfig):
            walked = min(walks, config.TILES_PER_PROGRAM)
            work = walked * (work + L1_SHARE * weights)
            walks = cdiv(walks, walked)
        work += weights
    programs = walks * cdiv(layout.blocks, blocks)
    # About 8 programs of this size keep one processor busy; fewer leave it idle.
    waves = cdiv(programs, 8 * chip.processors)
    return max(programs * work / (8 * chip.processors), waves * work) * blocks
