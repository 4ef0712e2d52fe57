"""Parameters in the form that a schedule of the kernels reads, as `packing` makes it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor


class PackedGate(NamedTuple):
    """The gate's parameters, in the order in which kernels take them: ``z = act((W1 s) * scale + shift)``, then ``W2 z
    + select_bias``.

    Attributes:
        reduce_weight: W1 ``[d, C]``.
        scale, shift: ``[d]`` fp32.
        select_weight: W2 ``[M, C, d]``.
        select_bias: ``[M, C]`` fp32 or None.
    """

    reduce_weight: Tensor
    scale: Tensor
    shift: Tensor
    select_weight: Tensor
    select_bias: Tensor | None


@dataclass(frozen=True)
class Packed:
    """A unit's parameters, packed for one plan. Some may be the parameters themselves.

    Attributes:
        weights: one flat tensor for each branch launch of the plan, norms folded in; for schedule "library" one for
            each branch, ``[C, C_branch_in / groups, k, k]`` in channels_last.
        shifts: ``[M, C]`` fp32 for each branch launch, or None where nothing is added; for "library" one for all.
        gate: the gate's.
        calls: what starts the kernels of operators' calls on these parameters again, by kind of call.
    """

    weights: tuple[Tensor, ...]
    shifts: tuple[Tensor | None, ...]
    gate: PackedGate
    calls: dict[Hashable, Callable[[Tensor], Tensor]] = field(
        init=False, default_factory=dict, compare=False, repr=False
    )

    def without_parameters(self) -> Packed:
        """The same in memory of its own, which stays as it is when parameters change."""
        gate = self.gate
        own = gate._replace(
            reduce_weight=gate.reduce_weight.clone(), select_weight=gate.select_weight.clone()
        )
        return replace(self, gate=own)

    def tensors(self) -> list[Tensor]:
        """All of them, without the absent ones."""
        return [t for t in (*self.weights, *self.shifts, *self.gate) if t is not None]


@dataclass(frozen=True)
class MergedPacked(Packed):
    """A unit's parameters, packed for a plan of schedule "merged" on inputs whose sections meet the same taps.

    Attributes:
        weights, shifts: one tensor of all branches, norms left out, and their shifts.
        scale: ``[M, C]`` fp32, the norms' scales, or None without norms.
        section_weights, pooled_shift: what a pixel of x, and a pixel of the output, add to the pooled sums.
    """

    scale: Tensor | None
    section_weights: Tensor
    pooled_shift: Tensor | None

    def tensors(self) -> list[Tensor]:
        own = (self.scale, self.section_weights, self.pooled_shift)
        return [*super().tensors(), *(t for t in own if t is not None)]
