"""Configs of the backward kernels from shapes alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..chips import PREFETCHING, Chip
from ..kernels.config import GradConfig, GradStreamConfig, GradWideConfig
from ..kernels.geometry import ConvShape, cdiv
from ..kernels.grad_geometry import can_run_grad, grad_blocks, grad_tiles

# Warps that a launch has per processor: as few as keep it busy, since each leaves its partial weight gradients in
# memory. A processor holds 8 at 255 registers a thread.
STREAM_RESIDENT, WIDE_RESIDENT = 16, 8
# Warps of a program, each with 8 channels: two of them share sectors.
STREAM_WARPS = 2
# Chip whose compiler spills more than two rows of groups of fewer than 8 channels, and more than one warp.
SPILLING_STREAM_CHIP = "sm_120"
SEVEN_ROWS_CHIPS = ("sm_90",)


def grad_config(
    shape: ConvShape, n: int, h: int, w: int, dtype: torch.dtype, chip: Chip
) -> GradConfig | None:
    """Config for the gradients of `shape` on `n` images of `h` x `w` pixels; None where `can_run_grad` refuses all."""
    candidates: tuple[GradConfig, ...] = (
        *_stream_configs(shape, chip),
        GradWideConfig(_weight_rows(h, chip), 1, _data_rows(shape), PREFETCH=chip.name in PREFETCHING),
    )
    for config in candidates:
        if can_run_grad(shape, dtype, config, w) is None:
            blocks = grad_blocks(shape, config)
            tiles_h, tiles_w = grad_tiles(shape, config, h, w)
            pieces = blocks.count * blocks.chunks_ci * blocks.chunks_co
            per_processor = STREAM_RESIDENT if isinstance(config, GradStreamConfig) else WIDE_RESIDENT
            programs = max(1, per_processor * chip.processors // pieces)
            return replace(config, TILES_PER_PROGRAM=cdiv(n * tiles_h * tiles_w, programs))
    return None


def _stream_configs(shape: ConvShape, chip: Chip) -> tuple[GradStreamConfig, ...]:
    """Of narrow groups, the better first."""
    if chip.name == SPILLING_STREAM_CHIP and shape.c_out // shape.groups < 8:
        return (GradStreamConfig(2, 1),)
    return GradStreamConfig(4, 1, STREAM_WARPS), GradStreamConfig(4, 1)


def _weight_rows(h: int, chip: Chip) -> int:
    """Rows of a tile of the wide weight gradients of images of `h` rows. Where seven divide them and four do not,
    seven on the chip where that was measured: on an H100 at 512@14² all gradient kernels took 1 and 5 % less (the
    paper's, the classic unit). On sm_80 and sm_100 a few values would spill."""
    return 7 if h % 4 and h % 7 == 0 and chip.name in SEVEN_ROWS_CHIPS else 4


def _data_rows(shape: ConvShape) -> int:
    """Rows of a tile of the wide data gradients: as many as no chip spills at."""
    is_large = max(shape.kernels) > 5 or grad_blocks(shape, GradWideConfig(4, 1)).chunks_co > 1
    return 2 if is_large else 4
