"""Configs of schedule "merged" from shapes alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from ..chips import Chip
from ..kernels.config import BorderConfig, MergedConfig, WindowConfig
from ..kernels.geometry import ConvShape, blocking, cdiv, next_power_of_2, tiles
from ..kernels.merging import row_parts, strips
from .branch import branch_cost
from .column import pixel_counts, shares_row
from .window import merged_window_candidates, merged_window_cost, takes_window

# Widest group of the merged convolution, and the registers that a sample's weights may take of a thread's 255.
MAX_MERGED_CHANNELS = 16
MAX_MERGED_REGISTERS = 120
# Chips whose compiler spills border sums of 64 channels, or of half as many in one warp.
SPILLING_BORDER_CHIPS = ("sm_80", "sm_100")
# Chips whose compiler spills with longer columns than 4 beside the weights of a 7x7 lattice.
SPILLING_MERGED_CHIPS = ("sm_80", "sm_90")


def border_config(shape: ConvShape, n: int, h: int, w: int, chip: Chip) -> BorderConfig:
    """Config for the pooled sums of the merged `shape` over `n` inputs of `h` x `w` pixels."""
    block_w = min(32, max(4, next_power_of_2(w)))
    spills = chip.name in SPILLING_BORDER_CHIPS
    block_c = 32 if spills else 64
    columns = max(1, n) * cdiv(shape.c_in, block_c) * cdiv(w, block_w)
    # Eight programs a processor; a batch that gives fewer is cut into strips of rows, down to four rows. On an H100,
    # two strips in stages 1 and 2 and one in stage 3 were the fastest of eight.
    programs_h = max(1, min(8 * chip.processors // columns, cdiv(h, 4)))
    is_small = columns * programs_h < 2 * chip.processors
    rows = cdiv(h, programs_h)
    return BorderConfig(
        BLOCK_C=32 if is_small and block_w == 32 else block_c,
        BLOCK_W=block_w,
        ROWS=rows,
        STRIPS_PER_PROGRAM=cdiv(len(strips(shape, h, rows)), programs_h),
        num_warps=(2 if block_w == 32 else 1) * (2 if spills else 1),
    )


def merged_config(
    branches: ConvShape, shape: ConvShape, n: int, h: int, w: int, dtype: torch.dtype, chip: Chip
) -> MergedConfig | WindowConfig:
    """Config for the merged convolution of `branches`, `shape` on their common lattice, on a batch of `n` outputs of
    `h` x `w` pixels."""
    candidates = merged_candidates(shape, h, dtype, chip)
    config = min(candidates, key=lambda candidate: branch_cost(candidate, shape, n, h, w, chip, "store"))
    # Columns as high as the image read no row twice, and blocks of wider groups fill sectors without a window: at 512 @
    # 14² 45.5 µs on an H100, by a window of later sources 46.6 to 48.9 (batch 128, bench/results/h100/launches.csv).
    is_column = max(shape.c_in, shape.c_out) > 8 * shape.groups and h <= config.RUN_H
    if dtype.itemsize == 2 and takes_window(branches, chip) and not is_column:
        windows = merged_window_candidates(branches, h, chip)
        if windows:
            return min(windows, key=lambda window: merged_cost(window, branches, shape, n, h, w, chip))
    # A sample's weights are built once for all tiles of a program; a small batch is split to fill the chip.
    tiles_h, tiles_w = tiles(shape, config, h, w)
    programs = max(1, n * blocking(shape, config).blocks)
    splits = max(1, min(tiles_h * tiles_w, 8 * chip.processors // programs))
    return replace(config, TILES_PER_PROGRAM=cdiv(tiles_h * tiles_w, splits))


def merged_cost(
    config: MergedConfig | WindowConfig,
    branches: ConvShape,
    shape: ConvShape,
    n: int,
    h: int,
    w: int,
    chip: Chip,
) -> float:
    """Relative time of the merged convolution, of use among configs of one type."""
    if isinstance(config, WindowConfig):
        return merged_window_cost(config, branches, n, h, w, chip)
    return branch_cost(config, shape, n, h, w, chip, "store")


def merged_candidates(shape: ConvShape, h: int, dtype: torch.dtype, chip: Chip) -> list[MergedConfig]:
    """Tiles of the merged `shape` for outputs of `h` rows, one per program."""
    block, run_w = _merged_block(shape)
    registers = merged_registers(shape, dtype)
    # (pixels of a tile, longest column of outputs) that the weights leave registers for.
    if 8 not in pixel_counts(chip):
        sizes = [(16, 4 if registers > 72 else 7)]
    elif dtype == torch.float32:
        sizes = [(8, 7)]
    elif registers > 100 and run_w == 2:
        sizes = [(8, 4 if chip.name in SPILLING_MERGED_CHIPS else 14)]
    elif run_w == 1:
        sizes = [(8, 14 if shape.stride == 1 else 7)]
    else:
        sizes = [(16, 7), (8, 14)]
    return [
        MergedConfig(block, block, pixels // block_w, block_w, run_h, run_w)
        for pixels, longest in sizes
        for run_h, block_w in product(sorted({14, 7, 4, 2, 1, min(h, longest)}, reverse=True), (2, 4, 8, 16))
        if run_h <= longest and block_w <= pixels
    ]


def merged_registers(shape: ConvShape, dtype: torch.dtype) -> int:
    """Registers per thread of a warp that holds the weights of a channel block of the merged `shape`."""
    block, run_w = _merged_block(shape)
    config = MergedConfig(block, block, 1, 1, 1, run_w)
    points = row_parts(shape, config, dtype)[-1]
    return shape.kernels[0] * points * run_w * block * block * dtype.itemsize // 128


def _merged_block(shape: ConvShape) -> tuple[int, int]:
    """Channels of a block and outputs of a row run."""
    return (8, 2) if shape.group_channels <= 8 and shares_row(shape) else (16, 1)
