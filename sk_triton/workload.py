"""A call as the planner sees it: all that the choice of a schedule and its configs depends on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .chips import Chip, chip_of
from .precision import allows_tf32
from .spec import SKSpec
from .tuning.ranks import pinning_reason


@dataclass(frozen=True)
class Workload:
    """A unit on a batch of `n` inputs of `h_in` x `w_in` pixels, in `dtype`, on `chip`.

    `allow_tf32`: fp32 products may round their operands to TF32. `is_converted`: the input's channels are not adjacent
    in memory, so that it is copied first. `is_pinned`: only what the package itself ships may be looked up for it,
    nothing that a user tuned.
    """

    spec: SKSpec
    n: int
    h_in: int
    w_in: int
    dtype: torch.dtype
    chip: Chip
    allow_tf32: bool = False
    is_converted: bool = False
    is_pinned: bool = False

    @cached_property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        return self.spec.output_size(self.h_in, self.w_in)

    @property
    def input_passes(self) -> float:
        """The input's elements in units of the output's."""
        h, w = self.output_size
        return self.spec.in_channels * self.h_in * self.w_in / (self.spec.out_channels * h * w)


def workload_of(x: Tensor, spec: SKSpec) -> Workload:
    """What a call with `x`, on a device that the kernels support, has to compute."""
    n, _, h_in, w_in = x.shape
    chip = chip_of(x.device)
    assert chip is not None
    allow_tf32 = x.dtype == torch.float32 and allows_tf32()
    is_pinned = bool(chip.gpu and pinning_reason())
    return Workload(spec, n, h_in, w_in, x.dtype, chip, allow_tf32, x.stride(1) != 1, is_pinned)
