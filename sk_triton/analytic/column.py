"""Configs of the convolutions that go by kernel columns (`kernels/branch_conv_column.py`, `branch_conv_held.py`), from
shapes alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from ..chips import NARROW_PRODUCTS, Chip
from ..environment import triton_version
from ..kernels.config import BranchConfig, ColumnConfig, HeldConfig, TapConfig
from ..kernels.geometry import ConvShape, blocking, is_full, next_power_of_2

# Widest group, in channels, whose accumulators and rows the unrolled formulations keep in registers without spilling.
MAX_UNROLLED_CHANNELS = 32
# Registers of a thread that the accumulators of a column may take, by channels of a block and whether they are scarce:
# to select, where two branches' are alive at a time, and on chips whose compiler spills.
COLUMN_REGISTERS = {(16, False): 112, (16, True): 56, (32, False): 56, (32, True): 56}
# Most of them where the loop over kernel columns is unrolled, which keeps more rows and weights alive.
UNROLLED_REGISTERS = 56
# Chips whose compiler spills with columns as high as the image, and with the unrolled weights of the widest groups.
SPILLING_CHIPS = ("sm_80", "sm_86", "sm_89", "gfx942")
SPILLING_UNROLLED_CHIPS = ("sm_80", "gfx942")
# Chips whose compiler spills where a program holds weights for all 32 outputs of a group.
SPILLING_HELD_CHIPS = ("sm_100", "sm_120")
# Height of an image whose columns leave registers for weights: in those of 6 rows and in parts of 14 ptxas spills.
HELD_ROWS = 7
# Tiles that a program with weights in registers walks.
WALKS = (2, 3, 4, 5, 6, 8, 10, 12, 16)


def shares_row(shape: ConvShape) -> bool:
    """Whether neighbouring outputs of a run read the same input pixels but one, so that runs along a row pay."""
    return all(step == 1 for step in blocking(shape, TapConfig(16, 16, 1, 1)).steps)


def takes_columns(shape: ConvShape) -> bool:
    """Whether branches of 16-bit activations go one kernel column at a time: those of wider groups, and those of narrow
    ones without runs along a row, where streaming holds every kernel column's rows and spills."""
    group, kernel = shape.group_channels, max(shape.kernels)
    # Before, Triton does not compile the column formulation: its `min` of two constants is none.
    if triton_version() < NARROW_PRODUCTS or group > MAX_UNROLLED_CHANNELS:
        return False
    if kernel > 3:
        return kernel <= 5 and group > 16
    return not (group <= 8 and shares_row(shape))


def pixel_counts(chip: Chip) -> tuple[int, ...]:
    """Columns that a product may have."""
    is_narrow = triton_version() >= NARROW_PRODUCTS and not chip.is_amd
    return (8, 16) if is_narrow else (16,)


def column_candidates(shape: ConvShape, h: int, chip: Chip, task: str) -> list[BranchConfig]:
    group = shape.group_channels
    block = max(16, next_power_of_2(group))
    # Weights of a column of five taps, for half of a group's outputs: so two samples share them.
    has_large_kernels = max(shape.kernels) > 3
    block_co = 16 if has_large_kernels else block
    candidates: list[BranchConfig] = []
    # Selecting keeps two branches' outputs alive, training three sums of each.
    is_scarce = task in ("select", "train")
    for run_h, pixels, block_n, block_w in product(
        (16, 14, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1), pixel_counts(chip), (1, 2), (8, 16)
    ):
        if block_n * block_w > pixels:
            continue
        registers = run_h * block_co * pixels // 32
        is_whole = run_h == h and shape.stride == 1 and pixels == block_n * block_w
        # Fewer than 256 elements of a row are less than a thread's 16-byte load each: worth it only to select columns
        # as high as the image, where no row is loaded twice and none is masked.
        is_whole_selection = is_whole and task == "select" and chip.name not in SPILLING_CHIPS
        if block * pixels < (128 if is_whole_selection else 256):
            continue
        # A long column pays where it is the whole image; elsewhere the usual lengths do.
        most = COLUMN_REGISTERS[block, is_scarce or chip.name in SPILLING_CHIPS]
        if block == 32 and chip.name in SPILLING_CHIPS and (is_scarce or has_large_kernels):
            most //= 2
        if registers > most or (not is_whole and (run_h > 8 or run_h in (3, 5, 6))):
            continue
        if has_large_kernels:
            is_unrolled = False
        elif block == 32:
            is_unrolled = not is_scarce and chip.name not in SPILLING_UNROLLED_CHIPS
        else:
            is_unrolled = registers <= UNROLLED_REGISTERS and chip.name not in SPILLING_CHIPS
            # The rows between those of a strided output are held as well, and pooling or selecting takes registers too.
            is_unrolled = is_unrolled and (shape.stride == 1 or task == "store")
        config = ColumnConfig(
            BLOCK_CI=block,
            BLOCK_CO=block_co,
            BLOCK_N=block_n,
            BLOCK_H=pixels // block_n // block_w,
            BLOCK_W=block_w,
            RUN_H=run_h,
            ROWS=8 if not (is_scarce or has_large_kernels) and (is_unrolled or block == 32) else 4,
            UNROLL=is_unrolled,
        )
        if not is_full(shape, config):
            # Channel masks take the registers of other rows, of large kernels those of outputs.
            if has_large_kernels and registers > UNROLLED_REGISTERS // 2:
                continue
            if task == "select" and is_unrolled:
                config = replace(config, ROWS=2)
        candidates.append(config)
    return candidates


def held_candidates(shape: ConvShape, h: int, chip: Chip) -> list[BranchConfig]:
    """Configs that hold weights while they walk over tiles: for two 3x3 branches of 17 to 32 channels, in images of
    HELD_ROWS rows. Masks, other rows or another branch's code would take the registers of weights."""
    group = shape.group_channels
    is_fitting = 16 < group <= 32 and shape.kernels == (3, 3) and shape.stride == 1 and h == HELD_ROWS
    if not is_fitting or 8 not in pixel_counts(chip):
        return []
    is_half = chip.name in SPILLING_HELD_CHIPS
    config = HeldConfig(
        BLOCK_CI=32,
        BLOCK_CO=16 if is_half else 32,
        BLOCK_H=1,
        BLOCK_W=8,
        RUN_H=h,
        ROWS=4 if is_half else 2,
        UNROLL=True,
        HELD_COLUMNS=3 if is_half else 1,
    )
    return [replace(config, TILES_PER_PROGRAM=tiles) for tiles in WALKS] if is_full(shape, config) else []
