"""A call as the planner sees it: all that the choice of a schedule and its configs depends on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .chips import Chip
from .spec import SKSpec


@dataclass(frozen=True)
class Workload:
    """A unit on a batch of `n` inputs of `h_in` x `w_in` pixels, in `dtype`, on `chip`.

    `allow_tf32`: fp32 products may round their operands to TF32. `is_converted`: the input's channels are not adjacent
    in memory, so that it is copied first.
    """

    spec: SKSpec
    n: int
    h_in: int
    w_in: int
    dtype: torch.dtype
    chip: Chip
    allow_tf32: bool = False
    is_converted: bool = False

    @cached_property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        return self.spec.output_size(self.h_in, self.w_in)

    @property
    def input_passes(self) -> float:
        """The input's elements in units of the output's."""
        h, w = self.output_size
        return self.spec.in_channels * self.h_in * self.w_in / (self.spec.out_channels * h * w)
