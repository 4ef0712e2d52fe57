"""The search space of each kind of launch: every config worth trying, whatever the batch.

An entry outside of its launch's space is never used, so that what a file says cannot reach a kernel unchecked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import torch

from ..analytic import branch, gate, gated, merged, pixelwise
from ..analytic.grad import MIN_STRIP
from ..analytic.window import in_usual_warps, merged_window_candidates, takes_window, window_candidates
from ..chips import PREFETCHING, Chip
from ..kernels.config import (
    BorderConfig,
    BranchConfig,
    ColumnConfig,
    GateConfig,
    GatedSelectConfig,
    GradConfig,
    GradStreamConfig,
    GradWideConfig,
    HeldConfig,
    MergedConfig,
    ReductionConfig,
    SelectConfig,
    StreamConfig,
    TapConfig,
    WindowConfig,
)
from ..kernels.geometry import ConvShape, blocking, can_run, cdiv, is_sparse, next_power_of_2, tile_count
from ..kernels.grad_geometry import grad_refusal
from ..kernels.merging import strips

# Past this many programs along the height a strip is a few rows of a very tall image.
MAX_STRIP_PROGRAMS = 64
# Tiles that a program of a gradient walks at most: 128 images of stage 1 are 28 per program in the analytic choice.
MAX_GRAD_TILES = 256


def branch_configs(
    shape: ConvShape, h: int, dtype: torch.dtype, allow_tf32: bool, chip: Chip, *, task: str
) -> list[BranchConfig]:
    """Of branch convolutions: the analytic candidates, sparse products, variants of both, and the tap formulation where
    it can run."""
    tiled = branch.branch_candidates(shape, h, dtype, allow_tf32, chip, task)
    if dtype.itemsize == 2 and takes_window(shape, chip) and is_sparse(shape):
        sparse = window_candidates(shape, h, dtype, task, chip, sparse=True)
        tiled += [in_usual_warps(config, shape, task, chip) for config in sparse]
    taps = branch.tap_candidates(shape, dtype == torch.float32 and not allow_tf32, dtype)
    variants = [variant for config in tiled for variant in _variants(shape, config, chip)]
    return [config for config in dict.fromkeys((*tiled, *variants, *taps)) if can_run(task, shape, config)]


def _variants(shape: ConvShape, config: BranchConfig, chip: Chip) -> list[BranchConfig]:
    if isinstance(config, WindowConfig):
        return list(_window_variants(shape, config, chip))
    if type(config) is StreamConfig and config.BLOCK_CO == 8:
        return [replace(config, BLOCKS_PER_PROGRAM=count) for count in (1, 2)]
    if isinstance(config, HeldConfig):
        return [replace(config, ROWS=rows, HELD_COLUMNS=held) for rows, held in product((2, 4), (1, 2))]
    if isinstance(config, ColumnConfig):
        return [replace(config, ROWS=rows, UNROLL=unroll) for rows, unroll in product((4, 8), (False, True))]
    if isinstance(config, TapConfig) and config.num_warps > 1:
        return [replace(config, num_warps=w, num_stages=s) for w, s in product((4, 8), (1, 2, 3))]
    return []


def _window_variants(
    shape: ConvShape, config: WindowConfig, chip: Chip, *, is_merged: bool = False
) -> Iterable[WindowConfig]:
    """With and without prefetch, with one warp and with one for each of as many channel blocks, side by side, as fill
    whole programs; sparse weights held and not."""
    blocks = blocking(shape, config).blocks
    prefetches = (True, False) if chip.name in PREFETCHING else (False,)
    # A merged convolution holds its weights whatever the config says.
    holds = (True, False) if config.SPARSE and not is_merged else (config.HOLD_WEIGHTS,)
    for num_warps, prefetch, hold in product((1, 2, 4), prefetches, holds):
        variant = replace(config, num_warps=num_warps, PREFETCH=prefetch, HOLD_WEIGHTS=hold)
        if variant != config and blocks % num_warps == 0:
            yield variant


def gate_configs(m: int, c: int, d: int, dtype: torch.dtype) -> list[GateConfig]:
    """Of the gate, for `m` branches, `c` channels and a descriptor of `d` entries."""
    widest = 64 if dtype == torch.float32 else 128
    columns = widest // next_power_of_2(m)

    def powers(most: int, least: int = 16) -> list[int]:
        return [1 << i for i in range(least.bit_length() - 1, max(least, most).bit_length())]

    return [
        GateConfig(block_n, block_s, block_d, block_c, block_t, 8)
        for block_n, block_s, block_d, block_c in product(
            powers(16, 1),
            powers(min(64 if dtype == torch.float32 else 512, next_power_of_2(c))),
            powers(min(widest, next_power_of_2(d))),
            powers(min(next_power_of_2(c), columns)),
        )
        if block_s * block_d <= gate.MAX_GATE_WEIGHTS
        for block_t in dict.fromkeys(gate.gate_tiles(block_n, block_s, sums) for sums in gate.GATE_SUMS)
    ]


def select_configs(pixels: int, c: int) -> list[SelectConfig]:
    """Of the selection from stored branches, for an output of `pixels` pixels and `c` channels."""
    most_p, most_c = next_power_of_2(pixels), next_power_of_2(c)
    found = [
        SelectConfig(max(1, min(elements // block_c, most_p)), block_c, num_warps)
        for elements, block_c, num_warps in product((1024, 2048, 4096, 8192), (32, 64, 128, 256), (2, 4, 8))
        if block_c <= max(32, most_c)
    ]
    return list(dict.fromkeys(found))


def gated_select_configs(pixels: int, expected: GatedSelectConfig) -> list[GatedSelectConfig]:
    """Of the selection that computes its gate, for outputs of `pixels` pixels: `expected` and other tiles."""
    found = [
        replace(expected, BLOCK_P=min(block_p, next_power_of_2(pixels)), BLOCK_C=block_c)
        for block_p, block_c in product((16, 32, 64, 128, 256), (16, 32, 64, 128))
        if block_c <= expected.BLOCK_C and block_p * block_c <= 2 * gated.TILE_ELEMENTS
    ]
    return list(dict.fromkeys([expected, *found]))


def pooled_sums_configs(pixels: int, c: int) -> list[ReductionConfig]:
    """Of the pooled sums of stored convolutions, for outputs of `pixels` pixels and `c` channels."""
    block_c = min(64, next_power_of_2(c))
    base = min(1024 // block_c, next_power_of_2(pixels))
    found = []
    for block_p, num_warps in product((base, 2 * base, 4 * base), (1, 2, 4)):
        steps = cdiv(pixels, block_p)
        halves = [cdiv(min(16, steps), 1 << i) for i in range(5)]
        found += [ReductionConfig(block_p, block_c, s, num_warps) for s in halves]
    return list(dict.fromkeys(found))


def reduction_configs(m: int, pixels: int, c: int, chip: Chip) -> list[ReductionConfig]:
    """Of the sums over the `pixels` pixels of a sample, for `m` branches of `c` channels."""
    most_p, most_c = next_power_of_2(pixels), next_power_of_2(c)
    found = [pixelwise.reduction_config(m, pixels, c, chip)]
    for elements, block_c, most_steps, num_warps in product(
        (512, 1024, 2048, 4096), (32, 64, 128), (4, 8, 16, 32), (1, 2, 4)
    ):
        if block_c <= max(32, most_c):
            block_p = max(1, min(elements // block_c, most_p))
            found.append(ReductionConfig(block_p, block_c, min(most_steps, cdiv(pixels, block_p)), num_warps))
    return list(dict.fromkeys(found))


def grad_configs(
    shape: ConvShape, h: int, w: int, dtype: torch.dtype, analytic_choice: GradConfig, chip: Chip
) -> list[GradConfig]:
    """Of the gradients of `shape` on images of `h` x `w` pixels; the analytic choice depends on the batch as well."""
    walks = [1 << i for i in range(MAX_GRAD_TILES.bit_length())]
    prefetches = (True, False) if chip.name in PREFETCHING else (False,)
    found: list[GradConfig] = [
        GradStreamConfig(cdiv(h, strips), walk, warps)
        for warps in (2, 4, 1)
        for strips in (1, 2, 3, 4, 8)
        if strips <= max(1, h // MIN_STRIP)
        for walk in walks
    ]
    found += [
        GradWideConfig(rows, walk, data_rows, PREFETCH=prefetch)
        for prefetch, rows, walk, data_rows in product(prefetches, (2, 4, 7, 8), walks, (2, 4))
    ]
    runnable = [config for config in found if not grad_refusal(shape, dtype, config, w)]
    return list(dict.fromkeys((analytic_choice, *runnable)))


def border_configs(shape: ConvShape, h: int, w: int) -> list[BorderConfig]:
    """Of the pooled sums of the merged `shape`, over inputs of `h` x `w` pixels."""
    widest = max(4, next_power_of_2(w))
    found = []
    for programs_h in range(1, min(cdiv(h, 4), MAX_STRIP_PROGRAMS) + 1):
        rows = cdiv(h, programs_h)
        per_program = cdiv(len(strips(shape, h, rows)), programs_h)
        for block_c, block_w, num_warps in product((32, 64), (16, 32, 64), (1, 2, 4)):
            found.append(BorderConfig(block_c, min(block_w, widest), rows, per_program, num_warps))
    return list(dict.fromkeys(found))


def merged_configs(
    branches: ConvShape, shape: ConvShape, h: int, w: int, dtype: torch.dtype, chip: Chip
) -> list[MergedConfig | WindowConfig]:
    """Of the merged convolution, on outputs of `h` x `w` pixels."""
    found: list[MergedConfig | WindowConfig] = []
    if dtype.itemsize == 2 and takes_window(branches, chip):
        windows = merged_window_candidates(branches, h, chip)
        if is_sparse(branches):
            windows += merged_window_candidates(branches, h, chip, sparse=True)
        found += [
            variant
            for config in windows
            for variant in (config, *_window_variants(branches, config, chip, is_merged=True))
        ]
    for config in merged.merged_candidates(shape, h, dtype, chip):
        count = tile_count(shape, config, h, w)
        walks = (*(1 << i for i in range(count.bit_length())), count)
        found += [replace(config, TILES_PER_PROGRAM=walk) for walk in dict.fromkeys(walks)]
    return found
