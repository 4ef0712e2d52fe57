"""Config of schedule "resident" from shapes alone."""

from __future__ import annotations

from dataclasses import replace

from ..chips import Chip
from ..kernels.config import BranchConfig, ColumnConfig, ResidentConfig, StreamConfig
from ..kernels.geometry import (
    ConvShape,
    blocking,
    can_run,
    cdiv,
    column_run,
    is_full,
    is_whole_height,
    next_power_of_2,
    resident_items,
    tile_count,
)
from ..workload import Workload
from .branch import branch_cost, stream_candidates
from .column import column_candidates, takes_columns

# Chips whose compiler spills with longer column runs than 4 where one kernel pools and selects.
SPILLING_RESIDENT_CHIPS = ("sm_80",)
# Chips whose compiler spills for the sake of more programs than run, unless it is told the registers that there are;
# that of the others, told, hoists loads until it spills.
UNCAPPED_CHIPS = ("sm_90", "sm_100", "sm_120")
MAX_REGISTERS = 255
# Chips whose compiler does not spill where the loop over kernel columns is unrolled, for columns as high as the image
# and two branches; with a third it does.
UNROLLED_CHIPS = ("sm_90", "sm_120")
# Widest descriptor of which a warp holds a block of weights.
MAX_RESIDENT_DESCRIPTOR = 128
# Share of L2 that may pass between two uses of the same data: halves of it keep copies of each other's.
L2_SHARE = 0.5


def resident_config(workload: Workload, shape: ConvShape) -> ResidentConfig | None:
    """Config for a unit whose gate is no wider than MAX_RESIDENT_DESCRIPTOR, in one launch; None where no tiles of one
    sample serve to pool and to select."""
    chip, n, (h, w) = workload.chip, workload.n, workload.output_size
    group = shape.group_channels
    kernel = max(shape.kernels)
    candidates: list[BranchConfig] = []
    if takes_columns(shape):
        candidates = column_candidates(shape, h, chip, "select") if group <= 16 else []
    # Rows of 5x5 branches take more registers: they spill where columns must be short already.
    elif group <= 8 and kernel <= (3 if chip.name in SPILLING_RESIDENT_CHIPS else 5):
        candidates = stream_candidates(shape, False, workload.dtype, chip, "select")
    tiles_of_one: list[StreamConfig | ColumnConfig] = []
    for tile in candidates:
        is_short = has_short_columns(tile, shape, chip)
        is_whole = is_whole_height(shape, tile, h)
        longest = 4 if is_short else h if is_whole else 7
        if tile.BLOCK_N > 1 or column_run(tile) > longest or not can_run("select", shape, tile):
            continue
        # Of columns of two outputs ptxas spills some to need no more than 128 registers.
        if is_short and isinstance(tile, ColumnConfig) and column_run(tile) < 4 <= h:
            continue
        # One channel block, few rows at a time: the kernel holds both tasks' code.
        if isinstance(tile, StreamConfig):
            tiles_of_one.append(replace(tile, BLOCKS_PER_PROGRAM=1))
        elif isinstance(tile, ColumnConfig):
            is_unrolled = is_whole and is_full(shape, tile) and len(shape.kernels) <= 2
            is_unrolled = is_unrolled and chip.name in UNROLLED_CHIPS
            tiles_of_one.append(replace(tile, UNROLL=is_unrolled, ROWS=min(tile.ROWS, 2)))
    if not tiles_of_one:
        return None
    branch = min(tiles_of_one, key=lambda config: branch_cost(config, shape, n, h, w, chip, "select"))
    block_d = max(16, next_power_of_2(workload.spec.gate_width))
    # Programs of 255 registers a thread, the most that there are: they fit whatever the compiler makes of the kernel.
    per_processor = 8 // branch.num_warps
    # Two blocks of 8 16-bit channels share the 32-byte sectors that a load brings in.
    per_turn = 2 if branch.BLOCK_CI == 8 and blocking(shape, branch).blocks % 2 == 0 else 1
    config = ResidentConfig(
        branch=branch,
        GATE_LAG=0,
        SELECT_LAG=0,
        GATE_CHANNELS=16,
        BLOCK_C=16,
        BLOCK_T=8,
        BLOCK_S=max(16, 1024 // block_d),
        BLOCK_D=block_d,
        ITEMS_PER_TURN=per_turn,
        programs_per_processor=per_processor,
        processors=chip.processors,
        maxnreg=MAX_REGISTERS if chip.name in UNCAPPED_CHIPS else None,
    )
    in_flight = cdiv(per_processor * chip.processors * per_turn, resident_items(shape, config, h, w).step)
    if n <= in_flight:
        return config  # all items run at once: a lag would only hold them up
    # Every part of a gate reads the pooled sums and the weights of z anew: a quarter of a sample's bytes at most.
    part = shape.c_out * (
        workload.spec.gate_width * workload.dtype.itemsize + 4 * tile_count(shape, branch, h, w)
    )
    parts = max(1, resident_sample_bytes(workload) // (4 * part))
    config = replace(config, GATE_CHANNELS=max(16, next_power_of_2(cdiv(shape.c_out, parts))))
    # When a program comes to a gate, the round before it has pooled the sample; likewise for the selection.
    return replace(config, GATE_LAG=min(n, in_flight + 1), SELECT_LAG=min(n, 2 * in_flight + 1))


def has_short_columns(config: BranchConfig, shape: ConvShape, chip: Chip) -> bool:
    """Whether a kernel that pools and selects with `config` would spill on a chip if its columns were longer than 4."""
    is_full_column = isinstance(config, ColumnConfig) and is_full(shape, config)
    return chip.name in SPILLING_RESIDENT_CHIPS and not is_full_column


def resident_bytes(workload: Workload, config: ResidentConfig) -> int:
    """Bytes that pass through L2 between a sample's pooling and its selection: inputs and results of the samples
    between, or of the whole batch where all of it runs at once."""
    return (config.SELECT_LAG or workload.n) * resident_sample_bytes(workload)


def resident_sample_bytes(workload: Workload) -> int:
    """A sample's input and result."""
    spec, (h, w) = workload.spec, workload.output_size
    elements = spec.in_channels * workload.h_in * workload.w_in + spec.out_channels * h * w
    return elements * workload.dtype.itemsize
