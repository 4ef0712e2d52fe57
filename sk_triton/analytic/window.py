"""Configs of the convolutions that hold a window of rows (`kernels/branch_conv_window.py`), from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product

import torch

from ..chips import NARROW_PRODUCTS, PREFETCHING, Chip
from ..environment import triton_version
from ..kernels.config import BranchConfig, WindowConfig
from ..kernels.geometry import ConvShape, blocking, cdiv, is_full, reach, tile_count
from ..kernels.merging import lattice_points
from ..kernels.window_geometry import Point, branch_points, partners

# Channels of a block: widest group, and what one product of 16-bit operands takes.
BLOCK = 16
LANES = 8
# Registers of a thread, and what of them a program needs besides rows, accumulators and weights.
REGISTERS, OTHER_REGISTERS = 255, 40
# Sums of one branch in training: four tensors of a lane's four outputs.
MOMENT_REGISTERS = 16
# What addresses of stored branches take beside the weights of more than one.
STORE_REGISTERS = 16
# Longest run whose selection from several branches does not spill in bf16, by whether weights are held; in fp16 none
# does.
MAX_BF16_SELECTED = {True: 6, False: 4}
# Longest run that is stored with 64-bit offsets, or after sparse products, without spills, no weights held.
MAX_UNHELD_STORED = 5
# Chip whose compiler spills runs of this length that are stored, no weights held.
SPILLING_STORE = ("sm_120", 4)
# Cost of reading a tile's sums once more: an eighth of the shortest program.
TILE_COST = 40
# Cost of building a sample's merged weights.
BUILD_COST = 400
# Rows of a strip from which on a merged convolution fetches them into L2: in shorter ones the weights take longer than
# the loads.
MIN_PREFETCHED_ROWS = 8
# Most rows of a strip: taller ones repeat fewer rows, and leave fewer programs.
MAX_ROWS = 56
# Warps of a program that fetches rows ahead, by task: the fastest of 1, 2 and 4 on an H100 in stages 1 to 3 of
# SKNet-50, or within 3 % of it; to store, which was not measured, as in training, which takes moments besides. Other
# batches and images by analogy.
WARPS = {"pool": 2, "select": 2, "train": 4, "store": 4}
# Chips that were measured. On sm_100 selecting spills with two warps and with four.
SEVERAL_WARPS_CHIPS = ("sm_90",)
# Runs below which several warps pool and select no faster than one.
LONG_RUN = 7
# What a sparse product of two taps takes, of one of one tap, sparse or dense: as sm_90's compiler places them.
PAIR_CLOCKS = 8 / 6
# Triton from which on prefetch spills beside bf16 moments of more than two samples.
SPILLING_MOMENTS = (3, 9)


def takes_window(shape: ConvShape, chip: Chip) -> bool:
    """Whether 16-bit branches may go by a window of rows: products of 8 columns, groups of 16 channels, stride 1."""
    is_narrow = triton_version() >= NARROW_PRODUCTS and not chip.is_amd
    return is_narrow and shape.group_channels <= BLOCK and shape.stride == 1 and not shape.is_split


def window_candidates(
    shape: ConvShape, h: int, dtype: torch.dtype, task: str, chip: Chip, *, sparse: bool = False
) -> list[WindowConfig]:
    """Configs that do `task` on outputs of `h` rows, as far as registers last.

    `sparse`: by sparse products. Those have never run on a GPU, so they are for tuning alone, which measures them.
    """
    is_measured, is_sparse_store = task == "train", task == "store" and sparse
    # Sums of a branch take the registers of the other's weights.
    is_crowded = (is_measured and not sparse) or is_sparse_store or len(shape.kernels) > 2
    holds = (False,) if is_crowded else (True, False)
    found = []
    is_kept = task == "select" and dtype == torch.bfloat16 and len(shape.kernels) > 1
    for run_w in (7, 6, 5, 4, 3, 2):
        hold = next(
            (hold for hold in holds if _registers(shape, run_w, hold, task, sparse) <= REGISTERS), None
        )
        if hold is None or (is_kept and not sparse and run_w > MAX_BF16_SELECTED[hold]):
            continue
        if is_sparse_store and run_w > MAX_UNHELD_STORED:
            continue
        if task == "store" and not hold and (chip.name, run_w) == SPILLING_STORE:
            continue
        found += [
            WindowConfig(
                BLOCK_CI=BLOCK,
                BLOCK_CO=BLOCK,
                BLOCK_N=block_n,
                BLOCK_H=LANES // block_n // block_w,
                BLOCK_W=block_w,
                RUN_H=run_h,
                RUN_W=run_w,
                HOLD_WEIGHTS=hold,
                # Beside moments one warp alone gained nothing by it at 128@56² on an H100, 3 and 4 % in smaller images.
                PREFETCH=chip.name in PREFETCHING and not is_measured,
                SPARSE=sparse,
            )
            for run_h, block_n, block_w in product(_heights(h), (1, 2, 4, 8), (1, 2, 4, 8))
            if block_n * block_w <= LANES
        ]
    return found


def in_warps(
    config: WindowConfig, shape: ConvShape, n: int, h: int, w: int, dtype: torch.dtype, task: str, chip: Chip
) -> WindowConfig:
    """`config` with the warps a program that do `task` fastest, if full channel blocks fill such programs and there is
    one for every processor."""
    is_short = task in ("pool", "select") and config.RUN_W < LONG_RUN
    if chip.name not in SEVERAL_WARPS_CHIPS or is_short or not is_full(shape, config):
        return config
    blocks = blocking(shape, config).blocks
    most = _tiles(config, shape, n, h, w) * blocks // chip.processors
    warps = next((count for count in (WARPS[task], 2) if blocks % count == 0 and count <= most), 1)
    if warps == 1:
        return config
    is_spilling = task == "train" and dtype == torch.bfloat16 and triton_version() >= SPILLING_MOMENTS
    return replace(config, num_warps=warps, PREFETCH=not is_spilling or config.BLOCK_N <= 2)


def in_usual_warps(config: WindowConfig, shape: ConvShape, task: str, chip: Chip) -> WindowConfig:
    """`config` with the warps a program that :func:`in_warps` takes for large batches."""
    is_taken = chip.name in SEVERAL_WARPS_CHIPS and is_full(shape, config)
    if not is_taken or blocking(shape, config).blocks % WARPS[task]:
        return config
    return replace(config, num_warps=WARPS[task], PREFETCH=chip.name in PREFETCHING)


def without_large_spills(configs: list[BranchConfig], task: str) -> list[BranchConfig]:
    """Those of `configs` that do not spill where offsets into a sample are 64-bit."""
    if task not in ("store", "train"):
        return configs
    return [
        replace(config, HOLD_WEIGHTS=False) if isinstance(config, WindowConfig) else config
        for config in configs
        if not isinstance(config, WindowConfig) or config.RUN_W <= MAX_UNHELD_STORED
    ]


def _heights(h: int) -> list[int]:
    """Rows of a strip of an image of `h` rows."""
    return sorted({height for height in (28, 16, 14, 8, 7, 4, 2, 1) if height < h} | {min(h, MAX_ROWS)})


def _registers(shape: ConvShape, run_w: int, hold: bool, task: str, sparse: bool) -> int:
    """An estimate: two registers a pixel of the window, four a pixel of an output row, four a tap of the weights; by
    sparse products two a tap, and one more row."""
    far = reach(shape)
    window = 2 * (2 * far + 1 + sparse) * (run_w + 2 * far)
    taps = [kernel * kernel for kernel in shape.kernels]
    weights = (2 if sparse else 4) * (sum(taps) if hold else max(taps))
    sums = MOMENT_REGISTERS * len(taps) if task == "train" else 0
    stored = STORE_REGISTERS if task == "store" and hold and len(taps) > 1 else 0
    return window + 4 * run_w + weights + sums + stored + OTHER_REGISTERS


def window_cost(config: WindowConfig, shape: ConvShape, n: int, h: int, w: int, chip: Chip) -> float:
    """Relative time: products and loads of a program's rows, in waves of 8 programs a processor."""
    products = _branch_products(shape, config.SPARSE)
    return _cost(config, shape, n, h, w, chip, products, 0)


@lru_cache
def _branch_products(shape: ConvShape, is_sparse: bool) -> float:
    return sum(_products(points, shape, is_sparse) for points in branch_points(shape))


def _products(points: Sequence[Point], shape: ConvShape, is_sparse: bool) -> float:
    """How many dense products take as long as those of an output pixel with the taps that meet `points`."""
    if not is_sparse:
        return len(points)
    shared = partners(points, shape)
    pairs = sum(partner == i for i, partner in enumerate(shared))
    return pairs * PAIR_CLOCKS + shared.count(-1)


def _cost(
    config: WindowConfig, shape: ConvShape, n: int, h: int, w: int, chip: Chip, products: float, start: int
) -> float:
    far = reach(shape)
    loads = 4 * (config.RUN_W + 2 * far)
    row = products * config.RUN_W + loads + 24
    work = config.RUN_H * row + 2 * far * loads + 150 + start
    programs = _tiles(config, shape, n, h, w) * blocking(shape, config).blocks
    at_once = 8 * chip.processors
    # A sample's tiles are summed one after the other.
    own_tiles = _tiles(config, shape, 1, h, w)
    return max(programs / at_once, cdiv(programs, at_once) * 0.9) * work + TILE_COST * own_tiles


def _tiles(config: WindowConfig, shape: ConvShape, n: int, h: int, w: int) -> int:
    return cdiv(n, config.BLOCK_N) * tile_count(shape, config, h, w)


def merged_window_candidates(
    branches: ConvShape, h: int, chip: Chip, *, sparse: bool = False
) -> list[WindowConfig]:
    """Configs of the merged convolution of `branches` on outputs of `h` rows, as far as registers last; `sparse` is as
    in `window_candidates`."""
    points = len(lattice_points(branches))
    far = reach(branches)
    found = []
    for run_w in (7, 6, 5, 4, 3, 2):
        window = 2 * (2 * far + 1 + sparse) * (run_w + 2 * far)
        weights = (2 if sparse else 4) * points
        if window + 4 * run_w + weights + OTHER_REGISTERS > REGISTERS:
            continue
        found += [
            WindowConfig(
                BLOCK_CI=BLOCK,
                BLOCK_CO=BLOCK,
                BLOCK_H=LANES // block_w,
                BLOCK_W=block_w,
                RUN_H=run_h,
                RUN_W=run_w,
                PREFETCH=chip.name in PREFETCHING and run_h >= MIN_PREFETCHED_ROWS,
                SPARSE=sparse,
            )
            for run_h, block_w in product(_heights(h), (1, 2, 4, 8))
        ]
    return found


def merged_window_cost(
    config: WindowConfig, branches: ConvShape, n: int, h: int, w: int, chip: Chip
) -> float:
    """As `window_cost`, of the merged convolution; a program builds its weights first."""
    points = [point for point, _ in lattice_points(branches)]
    return _cost(config, branches, n, h, w, chip, _products(points, branches, config.SPARSE), BUILD_COST)
