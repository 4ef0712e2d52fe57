"""Configs of the backward kernels from shapes alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..chips import PREFETCHING, Chip
from ..kernels.config import GradConfig, GradStreamConfig, GradWideConfig
from ..kernels.geometry import ConvShape, cdiv
from ..kernels.grad_geometry import grad_blocks, grad_refusal, grad_tiles

# Warps that a processor holds at 255 registers a thread.
RESIDENT_WARPS = 8
# Warps that a launch has per processor: as few as keep it busy, since each leaves its partial weight gradients in
# memory.
STREAM_RESIDENT, WIDE_RESIDENT = 16, 8
# Warps of a program, each with 8 channels: two of them share sectors.
STREAM_WARPS = 2
# Rows of a strip of the image that a program walks down, at the least: it reads up to four more.
MIN_STRIP = 7
SEVEN_ROWS_CHIPS = ("sm_90",)


def grad_config(
    shape: ConvShape, n: int, h: int, w: int, dtype: torch.dtype, chip: Chip
) -> GradConfig | None:
    """Config for the gradients of `shape` on `n` images of `h` x `w` pixels; None where kernels refuse."""
    candidates: tuple[GradConfig, ...] = (
        *(GradStreamConfig(h, 1, warps) for warps in (STREAM_WARPS, 1)),
        GradWideConfig(_weight_rows(h, chip), 1, _data_rows(shape), PREFETCH=chip.name in PREFETCHING),
    )
    for config in candidates:
        if not grad_refusal(shape, dtype, config, w):
            blocks = grad_blocks(shape, config)
            per_processor = WIDE_RESIDENT
            if isinstance(config, GradStreamConfig):
                per_processor = STREAM_RESIDENT
                columns = grad_tiles(shape, config, h, w)[1]
                config = replace(config, RUN_H=_strip_rows(n * columns * blocks.count, h, chip))
            tiles_h, tiles_w = grad_tiles(shape, config, h, w)
            pieces = blocks.count * blocks.chunks_ci * blocks.chunks_co
            programs = max(1, per_processor * chip.processors // pieces)
            return replace(config, TILES_PER_PROGRAM=cdiv(n * tiles_h * tiles_w, programs))
    return None


def _strip_rows(warps: int, h: int, chip: Chip) -> int:
    """Rows of a strip, of which images of `h` rows make `warps`: as few as leave no warp without a place."""
    strips = min(RESIDENT_WARPS * chip.processors // max(1, warps), h // MIN_STRIP)
    return cdiv(h, max(1, strips))


def _weight_rows(h: int, chip: Chip) -> int:
    """Rows of a tile of the wide weight gradients of images of `h` rows. Where seven divide them and four do not,
    seven on the chip where that was measured: on an H100 at 512@14² all gradient kernels took 1 and 5 % less (the
    paper's, the classic unit). On sm_80 and sm_100 a few values would spill."""
    return 7 if h % 4 and h % 7 == 0 and chip.name in SEVEN_ROWS_CHIPS else 4


def _data_rows(shape: ConvShape) -> int:
    """Rows of a tile of the wide data gradients: as many as no chip spills at."""
    is_large = max(shape.kernels) > 5 or grad_blocks(shape, GradWideConfig(4, 1)).chunks_co > 1
    return 2 if is_large else 4
