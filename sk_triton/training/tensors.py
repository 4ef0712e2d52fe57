"""A unit's parameters as one list of tensors, as operators and functions of autograd take them, and what these save."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..params import Branch, Gate


class UnitTensors(NamedTuple):
    """The parameters of a unit with M branches, in their own shapes, each None where the unit has none.

    Attributes:
        weights, biases, gammas, betas: M each: of the convolutions and of their norms.
        reduce_weight, reduce_bias, gate_gamma, gate_beta: as of :class:`..params.Gate` and its norm.
        select_weights, select_biases: M each, of the branches, or one of all of them, one after another.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    gammas: tuple[Tensor | None, ...]
    betas: tuple[Tensor | None, ...]
    reduce_weight: Tensor
    reduce_bias: Tensor | None
    gate_gamma: Tensor | None
    gate_beta: Tensor | None
    select_weights: tuple[Tensor, ...]
    select_biases: tuple[Tensor | None, ...]

    def flat(self) -> list[Tensor | None]:
        """All in the order of the fields."""
        # Not `self[4:]`: Dynamo of torch 2.8 cannot trace slices of named tuples.
        gate = (self.reduce_weight, self.reduce_bias, self.gate_gamma, self.gate_beta)
        select = (*self.select_weights, *self.select_biases)
        return [*self.weights, *self.biases, *self.gammas, *self.betas, *gate, *select]

    @classmethod
    def from_flat(cls, values: Sequence[Any], m: int) -> UnitTensors:
        """The inverse of :meth:`flat`, of a unit with `m` branches."""
        weights, biases, gammas, betas = (tuple(values[i * m : (i + 1) * m]) for i in range(4))
        reduce_weight, reduce_bias, gamma, beta, *select = values[4 * m :]
        half = len(select) // 2
        gate = reduce_weight, reduce_bias, gamma, beta, tuple(select[:half]), tuple(select[half:])
        return cls(weights, biases, gammas, betas, *gate)


class Saved(NamedTuple):
    """What the gradient needs besides the input and the parameters.

    Attributes:
        y: ``[M, N, H', W', C]``, the branches' convolutions, behind the ReLU where the plan pools while it stores.
        mean, rstd: ``[M, C]`` fp32, of the norms; empty without them.
        sizes: ``[M]`` fp32, values behind each branch's statistics; empty where no group shares them.
        vectors: ``branches.BranchVectors.stacked``.
        sums: ``[2, N, M, C]``, active and pooled of `pooled_moments_fwd`; empty without norms. Like y, empty where it
            will be computed in the backward pass.
        s, h, z, gate_mean, gate_rstd, gate_size, attention: :class:`.gate.GateState`.
    """

    y: Tensor
    mean: Tensor
    rstd: Tensor
    sizes: Tensor
    vectors: Tensor
    sums: Tensor
    s: Tensor
    h: Tensor
    z: Tensor
    gate_mean: Tensor
    gate_rstd: Tensor
    gate_size: Tensor
    attention: Tensor


def where_needed(found: Iterable[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that were `found`, each where one of `needs` asks for it; None elsewhere."""
    rest = iter(found)
    return [next(rest) if is_needed else None for is_needed in needs]


def unit_tensors(branches: Sequence[Branch], gate: Gate) -> UnitTensors:
    """The parameters as they are now."""

    def parameters(name: str) -> tuple[Tensor | None, ...]:
        return tuple([getattr(branch.norm, name, None) for branch in branches])

    select_weights = gate.select_weight
    select_biases: tuple[Tensor | None, ...] = gate.select_bias or (None,) * len(select_weights)
    if not _are_by_branch(select_weights, select_biases, len(branches)):
        select_weights = (torch.cat([weight.flatten(1) for weight in select_weights]),)
        select_biases = (None if gate.select_bias is None else torch.cat(gate.select_bias),)
    return UnitTensors(
        tuple([branch.weight for branch in branches]),
        tuple([branch.bias for branch in branches]),
        parameters("weight"),
        parameters("bias"),
        gate.reduce_weight,
        gate.reduce_bias,
        getattr(gate.norm, "weight", None),
        getattr(gate.norm, "bias", None),
        select_weights,
        select_biases,
    )


def _are_by_branch(weights: Sequence[Tensor], biases: Sequence[Tensor | None], m: int) -> bool:
    """Whether the gate's stacks are one tensor each, or one of equal rows for each of `m` branches."""
    rows = {part.shape[0] for part in (*weights, *biases) if part is not None}
    return len(weights) == len(biases) and (len(weights) == 1 or (len(weights) == m and len(rows) == 1))
