"""Configs from shapes alone: deterministic, and good without tuning.

The figures behind the limits below are the compiled kernels' own (registers, spills, instructions per output), printed
by ``sk-triton resources``; none of them is a measured time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import product
from math import prod

import torch

from .chips import NARROW_PRODUCTS, Chip
from .environment import triton_version
from .kernels.config import (
    BorderConfig,
    BranchConfig,
    ColumnConfig,
    DepthwiseConfig,
    GateConfig,
    MergedConfig,
    ReductionConfig,
    ResidentConfig,
    SelectConfig,
    StreamConfig,
    TapConfig,
)
from .kernels.geometry import (
    ConvShape,
    blocking,
    can_run,
    cdiv,
    column_run,
    column_runs,
    next_power_of_2,
    resident_items,
    row_run,
    tiles,
)
from .kernels.merging import row_parts, strips
from .workload import Workload

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
# Chips whose compiler does not spill where a program selects two channel blocks, one after the other.
PAIRED_SELECT_CHIPS = ("sm_80", "sm_120")
# Chips whose compiler spills with longer column runs than 4 where one kernel pools and selects, by kernel.
SPILLING_RESIDENT_CHIPS = {StreamConfig: ("sm_80",), ColumnConfig: ("sm_80", "sm_120")}
# Widest descriptor of which a warp holds a block of weights.
MAX_RESIDENT_DESCRIPTOR = 128
# Share of L2 that may pass between two uses of the same data: halves of it keep copies of each other's.
L2_SHARE = 0.5
# Widest group of the merged convolution, and the registers that a sample's weights may take of a thread's 255.
MAX_MERGED_CHANNELS = 16
MAX_MERGED_REGISTERS = 120


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
    return min(candidates, key=lambda config: branch_cost(config, shape, n, h, w, chip, task))


def branch_candidates(
    shape: ConvShape, h: int, dtype: torch.dtype, allow_tf32: bool, chip: Chip, task: str
) -> list[BranchConfig]:
    """Configs that do `task` in the formulations that keep weights and rows in registers; none if those cannot."""
    is_ieee = dtype == torch.float32 and not allow_tf32
    group = max(shape.c_in, shape.c_out) // shape.groups
    kernel = max(shape.kernels)
    if shape.is_depthwise and dtype == torch.float32:
        candidates = _depthwise_candidates(kernel)
    elif dtype == torch.float32:
        is_narrow = group <= 8 and kernel <= 3
        candidates = _stream_candidates(shape, is_ieee, dtype, chip, task) if is_narrow else []
    elif group <= 8 and kernel <= 5:
        candidates = _stream_candidates(shape, is_ieee, dtype, chip, task)
    elif group <= MAX_UNROLLED_CHANNELS and kernel <= 3 and triton_version() >= NARROW_PRODUCTS:
        # Triton 3.4 does not compile the column formulation: its `min` of two constants is none.
        candidates = _column_candidates(shape, h, chip, task)
    else:
        candidates = []
    return [config for config in candidates if can_run(task, shape, config)]


def gate_config(m: int, c: int, d: int, dtype: torch.dtype) -> GateConfig:
    """Config for `m` branches, `c` channels and a descriptor of `d` entries."""
    # Products of fp32 operands run without tensor cores and hold both in registers.
    widest, columns = (64, 64) if dtype == torch.float32 else (128, 128)
    return GateConfig(
        BLOCK_N=16,
        BLOCK_S=min(32, max(16, next_power_of_2(c))),
        BLOCK_D=min(widest, max(16, next_power_of_2(d))),
        BLOCK_C=max(16, min(next_power_of_2(c), columns // next_power_of_2(m))),
        num_warps=8,
    )


def select_config(pixels: int, c: int) -> SelectConfig:
    """Config for an output of `pixels` pixels and `c` channels: about 4096 elements per program."""
    block_c = min(128, next_power_of_2(c))
    return SelectConfig(BLOCK_P=min(4096 // block_c, max(1, next_power_of_2(pixels))), BLOCK_C=block_c)


def reduction_config(pixels: int, c: int) -> ReductionConfig:
    """Config for sums over the `pixels` pixels of a sample: up to 16384 elements per program, 1024 at a time.

    One warp: what its threads share at the end are sums of four pixels, where more would go through shared memory.
    """
    block_c = min(64, next_power_of_2(c))
    block_p = min(1024 // block_c, next_power_of_2(pixels))
    return ReductionConfig(
        BLOCK_P=block_p, BLOCK_C=block_c, STEPS=min(16, cdiv(pixels, block_p)), num_warps=1
    )


def _shares_row(shape: ConvShape) -> bool:
    """Whether neighbouring outputs of a run read the same input pixels but one, so that runs along a row pay."""
    return all(step == 1 for step in blocking(shape, TapConfig(16, 16, 1, 1)).steps)


def _stream_candidates(
    shape: ConvShape, is_ieee: bool, dtype: torch.dtype, chip: Chip, task: str
) -> list[BranchConfig]:
    run_w = 2 if _shares_row(shape) else 1
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
    if chip.name.startswith("gfx"):
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


def _pixel_counts(chip: Chip) -> tuple[int, ...]:
    """Columns that a product may have."""
    is_narrow = triton_version() >= NARROW_PRODUCTS and not chip.name.startswith("gfx")
    return (8, 16) if is_narrow else (16,)


def _column_candidates(shape: ConvShape, h: int, chip: Chip, task: str) -> list[BranchConfig]:
    group = max(shape.c_in, shape.c_out) // shape.groups
    block = max(16, next_power_of_2(group))
    candidates: list[BranchConfig] = []
    # Selecting keeps two branches' outputs alive, training three sums of each.
    is_scarce = task in ("select", "train")
    for run_h, pixels, block_n, block_w in product(
        (16, 14, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1), _pixel_counts(chip), (1, 2), (8, 16)
    ):
        # Fewer than 256 elements of a row are less than a thread's 16-byte load each.
        if block * pixels < 256 or block_n * block_w > pixels:
            continue
        registers = run_h * block * pixels // 32
        is_whole = run_h == h and shape.stride == 1 and pixels == block_n * block_w
        # A long column pays where it is the whole image; elsewhere the usual lengths do.
        most = COLUMN_REGISTERS[block, is_scarce or chip.name in SPILLING_CHIPS]
        if block == 32 and is_scarce and chip.name in SPILLING_CHIPS:
            most //= 2
        if registers > most or (not is_whole and (run_h > 8 or run_h in (3, 5, 6))):
            continue
        if block == 32:
            is_unrolled = not is_scarce and chip.name not in SPILLING_UNROLLED_CHIPS
        else:
            is_unrolled = registers <= UNROLLED_REGISTERS and chip.name not in SPILLING_CHIPS
            # The rows between those of a strided output are held as well, and pooling or selecting takes registers too.
            is_unrolled = is_unrolled and (shape.stride == 1 or task == "store")
        candidates.append(
            ColumnConfig(
                BLOCK_CI=block,
                BLOCK_CO=block,
                BLOCK_N=block_n,
                BLOCK_H=pixels // block_n // block_w,
                BLOCK_W=block_w,
                RUN_H=run_h,
                ROWS=8 if not is_scarce and (is_unrolled or block == 32) else 4,
                UNROLL=is_unrolled,
            )
        )
    return candidates


def tap_candidates(shape: ConvShape, is_ieee: bool, dtype: torch.dtype) -> list[BranchConfig]:
    """Configs of the tap formulation, which stores branches of any shape."""
    group_in, group_out = shape.c_in // shape.groups, shape.c_out // shape.groups
    is_wide = min(group_in, group_out) >= 64 and not is_ieee
    if max(group_in, group_out) <= 8 and _shares_row(shape) and not is_ieee:
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
    layout = blocking(shape, config)
    is_common = task == "select"
    columns = column_runs(shape, config, is_common)
    tiles_h, tiles_w = tiles(shape, config, h, w, is_common=is_common)
    run_h, run_w = column_run(config), row_run(config)
    # Outputs per tile, rows of input loaded per row of output, and the masks that an overhanging run needs.
    area = config.BLOCK_N * config.BLOCK_H * run_h * config.BLOCK_W * run_w
    is_whole = isinstance(config, ColumnConfig) and run_h == h and config.BLOCK_H == 1 and shape.stride == 1
    rows = max(
        (run_h - 1) * step_r + (k - 1) * step_k + 1
        for step_r, step_k, k in zip(columns.steps_r, columns.steps_k, shape.kernels, strict=True)
    )
    overlap = 1 if is_whole else rows / run_h
    is_even = all(h % (run_h * spacing) == 0 for spacing in columns.spacings)
    # Columns and rows of halo that a tile reads beyond its own: traffic from L2.
    reach = max(d * (k - 1) for d, k in zip(shape.dilations, shape.kernels, strict=True))
    height, width = config.BLOCK_H * run_h * shape.stride, config.BLOCK_W * run_w * shape.stride
    halo = (height + reach) * (width + reach) / (height * width)
    # Pixels of several samples are pooled by sums, masked in every row where runs may overhang, not on the tensor core.
    pooling = 1.0 if config.BLOCK_N == 1 else 1.1 if isinstance(config, ColumnConfig) else 1.3
    work = area * (6 + 3 * overlap + halo) * (1.0 if is_even else 1.15) * pooling
    if isinstance(config, ColumnConfig):
        # Every program loads all weights of its group, 9 x BLOCK_CI for each of its channels.
        work += 6.3 * config.BLOCK_CI
    blocks = config.BLOCKS_PER_PROGRAM if isinstance(config, StreamConfig) else 1
    programs = cdiv(n, config.BLOCK_N) * tiles_h * tiles_w * cdiv(layout.blocks, blocks)
    # About 8 programs of this size keep one processor busy; fewer leave it idle.
    waves = cdiv(programs, 8 * chip.processors)
    return max(programs * work / (8 * chip.processors), waves * work) * blocks


def resident_config(workload: Workload, shape: ConvShape) -> ResidentConfig | None:
    """Config for a unit in one launch, None where no tiles of one sample serve to pool and to select."""
    chip, n, (h, w) = workload.chip, workload.n, workload.output_size
    group = max(shape.c_in, shape.c_out) // shape.groups
    kernel = max(shape.kernels)
    candidates: list[BranchConfig] = []
    # Rows of 5x5 branches take more registers: they spill where columns must be short already.
    if group <= 8 and kernel <= (3 if chip.name in SPILLING_RESIDENT_CHIPS[StreamConfig] else 5):
        candidates = _stream_candidates(shape, False, workload.dtype, chip, "select")
    elif group <= 16 and kernel <= 3:
        candidates = _column_candidates(shape, h, chip, "select")
    tiles_of_one: list[StreamConfig | ColumnConfig] = []
    for tile in candidates:
        longest = 4 if has_short_columns(tile, chip) else 7
        if tile.BLOCK_N > 1 or column_run(tile) > longest or not can_run("select", shape, tile):
            continue
        # One channel block, no loop unrolled: the kernel holds both tasks' code.
        if isinstance(tile, StreamConfig):
            tiles_of_one.append(replace(tile, BLOCKS_PER_PROGRAM=1))
        elif isinstance(tile, ColumnConfig):
            tiles_of_one.append(replace(tile, UNROLL=False))
    if not tiles_of_one:
        return None
    branch = min(tiles_of_one, key=lambda config: branch_cost(config, shape, n, h, w, chip, "select"))
    block_d = max(16, next_power_of_2(workload.spec.gate_width))
    if block_d > MAX_RESIDENT_DESCRIPTOR:
        return None
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
    )
    in_flight = cdiv(per_processor * chip.processors * per_turn, resident_items(shape, config, h, w).step)
    if n <= in_flight:
        return config  # all items run at once: a lag would only hold them up
    # Every part of a gate reads the pooled sums and the weights of z anew: a quarter of a sample's bytes at most.
    part = shape.c_out * (
        workload.spec.gate_width * workload.dtype.itemsize + 4 * prod(tiles(shape, branch, h, w))
    )
    parts = max(1, resident_sample_bytes(workload) // (4 * part))
    config = replace(config, GATE_CHANNELS=max(16, next_power_of_2(cdiv(shape.c_out, parts))))
    # When a program comes to a gate, the round before it has pooled the sample; likewise for the selection.
    return replace(config, GATE_LAG=min(n, in_flight + 1), SELECT_LAG=min(n, 2 * in_flight + 1))


def has_short_columns(config: BranchConfig, chip: Chip) -> bool:
    """Whether a kernel that pools and selects with `config` would spill on a chip if its columns were longer than 4."""
    return chip.name in SPILLING_RESIDENT_CHIPS.get(type(config), ())


def resident_bytes(workload: Workload, config: ResidentConfig) -> int:
    """Bytes that pass through L2 between a sample's pooling and its selection: inputs and results of the samples
    between, or of the whole batch where all of it runs at once."""
    return (config.SELECT_LAG or workload.n) * resident_sample_bytes(workload)


def resident_sample_bytes(workload: Workload) -> int:
    """A sample's input and result."""
    spec, (h, w) = workload.spec, workload.output_size
    elements = spec.in_channels * workload.h_in * workload.w_in + spec.out_channels * h * w
    return elements * workload.dtype.itemsize


def border_config(shape: ConvShape, n: int, h: int, w: int, chip: Chip) -> BorderConfig:
    """Config for the pooled sums of the merged `shape` over `n` inputs of `h` x `w` pixels."""
    columns = max(1, n) * cdiv(shape.c_in, 64) * cdiv(w, 64)
    # Four programs keep one processor busy; a batch that gives fewer is cut into strips of rows, down to four rows.
    programs_h = max(1, min(4 * chip.processors // columns, cdiv(h, 4)))
    is_small = columns * programs_h < 2 * chip.processors
    block_w = min(32 if is_small else 64, max(4, next_power_of_2(w)))
    rows = cdiv(h, programs_h)
    # 4096 sums a program spill in one warp; of 32 columns, two warps of 64 channels do as well before sm_90.
    return BorderConfig(
        BLOCK_C=32 if block_w == 32 else 64,
        BLOCK_W=block_w,
        ROWS=rows,
        STRIPS_PER_PROGRAM=cdiv(len(strips(shape, h, rows)), programs_h),
        num_warps=2 if block_w == 64 else 1,
    )


def merged_config(shape: ConvShape, n: int, h: int, w: int, dtype: torch.dtype, chip: Chip) -> MergedConfig:
    """Config for the merged `shape` on a batch of `n` outputs of `h` x `w` pixels."""
    candidates = merged_candidates(shape, dtype, chip)
    config = min(candidates, key=lambda candidate: branch_cost(candidate, shape, n, h, w, chip, "store"))
    # A sample's weights are built once for all tiles of a program; a small batch is split to fill the chip.
    tiles_h, tiles_w = tiles(shape, config, h, w)
    programs = max(1, n * blocking(shape, config).blocks)
    splits = max(1, min(tiles_h * tiles_w, 8 * chip.processors // programs))
    return replace(config, TILES_PER_PROGRAM=cdiv(tiles_h * tiles_w, splits))


def merged_candidates(shape: ConvShape, dtype: torch.dtype, chip: Chip) -> list[MergedConfig]:
    """Tiles of the merged `shape`, one per program."""
    block, run_w = _merged_block(shape)
    registers = merged_registers(shape, dtype)
    # What the weights leave: rows in flight, or pixels of a tile. Before sm_90 the compiler needs more for the same.
    is_crowded = registers > 72 and (dtype == torch.float32 or chip.name in ("sm_80", "sm_86", "sm_89"))
    pixels = 8 if (is_crowded or shape.stride > 1) and triton_version() >= NARROW_PRODUCTS else 16
    longest = 4 if is_crowded or registers > 100 else 7
    return [
        MergedConfig(block, block, pixels // block_w, block_w, run_h, run_w)
        for run_h, block_w in product((7, 4, 2, 1), (2, 4, 8, 16))
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
    return (8, 2) if max(shape.c_in, shape.c_out) // shape.groups <= 8 and _shares_row(shape) else (16, 1)
