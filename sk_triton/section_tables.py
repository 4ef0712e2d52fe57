"""The sections of an image's rows and columns (:mod:`.kernels.merging`) on a device, int32.

Kept for good: CUDA graphs go on reading them. A table of one axis serves every size of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .kernels.geometry import ConvShape
from .kernels.lasting import lasting
from .kernels.merging import column_sections, strips


@cache
def strip_table(shape: ConvShape, h: int, rows: int, device: torch.device) -> Tensor:
    """Which of `h` rows are whose, `rows` at most at a time, see ``border_sums_fwd``."""
    return _table(strips(shape, h, rows), device)


@cache
def column_table(shape: ConvShape, w: int, device: torch.device) -> Tensor:
    """Which of `w` columns are whose, see ``border_sums_fwd``."""
    return _table(column_sections(shape, w), device)


@cache
def tap_table(met: tuple[int, ...], device: torch.device) -> Tensor:
    """Which taps meet each section, from ``met_taps``, see ``section_weights``."""
    return _table(met, device)


def _table(entries: Sequence[object], device: torch.device) -> Tensor:
    return lasting(lambda: torch.tensor(entries, dtype=torch.int32, device=device), device)
