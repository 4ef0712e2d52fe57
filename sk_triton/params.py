"""The tensors and modules of a selective-kernel unit, as plain tuples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .save import Save
from .spec import SKSpec

Map = Callable[[Tensor], Tensor]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""The buffers of a batch norm."""


class FrozenNorm(NamedTuple):
    """An eval-mode batch norm as its tensors ``[C]``, for operators, which take no modules: folded, never called.

    Attributes:
        num_batches_tracked: tells of updates that PyTorch does not count of the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    num_batches_tracked: Tensor | None
    eps: float


class Branch(NamedTuple):
    """One branch: a convolution, then what follows it, applied in the order of the fields.

    Attributes:
        weight: ``[C_out, C_branch_in / groups, k, k]``.
        bias: ``[C_out]`` or None.
        norm, drop, act, aa: maps of ``[N, C_out, H', W']``; ``aa`` may change H' and W'.
    """

    weight: Tensor
    bias: Tensor | None = None
    norm: Map | None = None
    drop: Map | None = None
    act: Map | None = None
    aa: Map | None = None


class Gate(NamedTuple):
    """The gate: from the pooled features ``[N, C]`` to the branches' logits ``[N, M, C]``.

    Attributes:
        reduce_weight: ``[d, C]``, or ``[d, C, 1, 1]`` as of a 1x1 convolution.
        reduce_bias: ``[d]`` or None.
        norm, act: maps of ``[N, d, 1, 1]``.
        select_weight: tensors whose concatenation on axis 0, viewed 2-D, is ``[M * C, d]``: row m * C + c.
        select_bias: tensors whose concatenation is ``[M * C]``, or None.
    """

    reduce_weight: Tensor
    reduce_bias: Tensor | None
    norm: Map | None
    act: Map | None
    select_weight: tuple[Tensor, ...]
    select_bias: tuple[Tensor, ...] | None = None


def norms_of(branches: Sequence[Branch], gate: Gate) -> list[Any]:
    """The norms, or None, of the M branches and then of the gate."""
    return [*[branch.norm for branch in branches], gate.norm]


def are_kept(branches: Sequence[Branch], gate: Gate) -> bool:
    """Whether all tensors of a unit are parameters, or statistics of its norms, which stay from call to call: others,
    as of parametrized modules, may be computed anew for each."""
    norms = [norm for norm in norms_of(branches, gate) if norm is not None]
    statistics = {id(getattr(norm, name, None)) for norm in norms for name in STATISTICS}
    return all(
        isinstance(t, nn.Parameter) or t is None or id(t) in statistics for t in slots_of(branches, gate)
    )


def tensors_of(branches: Sequence[Branch], gate: Gate) -> list[Tensor]:
    """Every parameter and buffer of a unit."""
    return [tensor for tensor in slots_of(branches, gate) if tensor is not None]


def slots_of(branches: Sequence[Branch], gate: Gate) -> list[Tensor | None]:
    """Every parameter and buffer of a unit, None for one that it lacks, always in one order.

    The norms' counters of batches among them: PyTorch's batch norm updates running statistics without counting
    versions.
    """
    found: list[Tensor | None] = [
        gate.reduce_weight,
        gate.reduce_bias,
        *gate.select_weight,
        *(gate.select_bias or ()),
    ]
    for branch in branches:
        found += (branch.weight, branch.bias)
    for norm in norms_of(branches, gate):
        if isinstance(norm, FrozenNorm):
            found += norm[:-1]
        elif isinstance(norm, nn.Module):
            # By the dictionaries: nn.Module's attribute access shows at batch 1. Replicas of DataParallel have their
            # parameters as plain attributes.
            if "weight" in norm._parameters:
                found += norm._parameters.values()
            else:
                found += (getattr(norm, "weight", None), getattr(norm, "bias", None))
            found += norm._buffers.values()
    return found


class UnitModule(nn.Module):
    """A module that owns a unit's parameters.

    Attributes:
        save: "branches" or "input", what this layer saves for the backward pass where the kernels train it; None, the
            default, is "branches". See :func:`sk_triton.save_for_backward`, which goes before it.
    """

    spec: SKSpec
    save: Save | None = None

    def branches(self) -> tuple[Branch, ...]:
        """The M branches' parameters, as they are now."""
        raise NotImplementedError

    def gate(self) -> Gate:
        """The gate's parameters, as they are now."""
        raise NotImplementedError
