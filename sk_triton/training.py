"""A unit in training: which calls need it, its parameters as one list of tensors, and the norms' running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .distributed import sync_group
from .params import Branch, Gate, norms_of
from .reasons import tensors_of
from .save import Save
from .spec import SKSpec

if TYPE_CHECKING:
    from .kernels.running import Running
    from .replay import Recorder


class UnitTensors(NamedTuple):
    """The parameters of a unit with M branches, in their own shapes, each None where the unit has none.

    Attributes:
        weights, biases, gammas, betas: M each: of the convolutions and of their norms.
        reduce_weight, reduce_bias, gate_gamma, gate_beta: as of :class:`.params.Gate` and its norm.
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


class NormSettings(NamedTuple):
    """The norms of the M branches, then the gate's.

    Attributes:
        kinds: a letter for each: "b" for batch statistics, "r" for running ones, "-" for no norm.
        epsilons: 0 where there is no norm.
        groups: names of the process groups that share a batch, joined by commas; "" within this process.
    """

    kinds: str
    epsilons: list[float]
    groups: str


def is_training(x: Tensor, branches: Sequence[Branch], gate: Gate) -> bool:
    """Whether a call needs gradients, or a norm takes the statistics of the batch."""
    if any(_uses_batch(norm) for norm in norms_of(branches, gate)):
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors_of(branches, gate)))


def run(
    x: Tensor,
    branches: Sequence[Branch],
    gate: Gate,
    spec: SKSpec,
    save: Save,
    recorder: Recorder | None = None,
) -> Tensor:
    """The unit's output, differentiable; updates the running statistics of norms in training mode. `recorder` takes
    note of a call that can be started again.

    Raises:
        ValueError: batch statistics of a single value per channel, as ``nn.BatchNorm2d``.
    """
    from .training_ops import is_watched, run_operator, run_unit

    norms = norms_of(branches, gate)
    settings = norm_settings(norms)
    _check_batch(x, spec, settings)
    running = [
        statistic
        for norm, kind in zip(norms, settings.kinds, strict=True)
        if kind == "r"
        for statistic in (norm.running_mean, norm.running_var)
    ]
    tensors = unit_tensors(branches, gate)
    if is_watched(x):
        results = run_operator(x, tensors, running, spec, settings, save)
    else:
        by_kernels = kernel_updates(norms, settings)
        if by_kernels is not None:
            return run_unit(x, tensors, running, spec, settings, save, by_kernels, recorder)[0]
        results = run_unit(x, tensors, running, spec, settings, save)
    v, var, gate_var, mean, gate_mean = results
    dtypes = {norm.running_mean.dtype for norm in norms if _updates_running(norm)}
    if len(dtypes) == 1:
        (dtype,) = dtypes
        mean, var, gate_mean, gate_var = (t.to(dtype) for t in (mean, var, gate_mean, gate_var))
    updates = [(norm, mean[i], var[i]) for i, norm in enumerate(norms[:-1]) if _updates_running(norm)]
    if _updates_running(norms[-1]):
        updates.append((norms[-1], gate_mean, gate_var))
    if updates:
        _update_running(updates)
    return v


def check_empty_batch(branches: Sequence[Branch], gate: Gate) -> None:
    """Raise where an empty batch would leave the other processes of a group waiting.

    Raises:
        ValueError: a norm takes its statistics over the processes of a group.
    """
    if any(sync_group(norm) for norm in norms_of(branches, gate)):
        raise ValueError(
            "x must have N >= 1 where SyncBatchNorm takes statistics over a process group, got an empty batch"
        )


def unit_tensors(branches: Sequence[Branch], gate: Gate) -> UnitTensors:
    """The parameters as they are now."""

    def parameters(name: str) -> tuple[Tensor | None, ...]:
        return tuple([getattr(branch.norm, name, None) for branch in branches])

    select_weights = gate.select_weight
    select_biases: tuple[Tensor | None, ...] = gate.select_bias or (None,) * len(select_weights)
    if len(select_weights) not in (1, len(branches)):
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


def norm_settings(norms: Sequence[Any]) -> NormSettings:
    """How the norms act now."""
    return NormSettings(
        "".join(["-" if norm is None else "b" if _uses_batch(norm) else "r" for norm in norms]),
        [0.0 if norm is None else norm.eps for norm in norms],
        ",".join([sync_group(norm) for norm in norms]),
    )


def _uses_batch(norm: Any) -> bool:
    """Whether a norm takes the statistics of the batch; False for what is no batch norm."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return False
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def _check_batch(x: Tensor, spec: SKSpec, settings: NormSettings) -> None:
    height, width = spec.output_size(x.shape[2], x.shape[3])
    branch_size = [x.shape[0], spec.out_channels, height, width]
    gate_size = [x.shape[0], spec.gate_width, 1, 1]
    groups = settings.groups.split(",")
    for i, (kind, group) in enumerate(zip(settings.kinds, groups, strict=True)):
        size = branch_size if i < spec.num_branches else gate_size
        values = size[0] * size[2] * size[3]
        if kind == "b" and values == 1 and not group:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")


def _updates_running(norm: Any) -> bool:
    return _uses_batch(norm) and norm.training and norm.track_running_stats and norm.running_mean is not None


def kernel_updates(norms: Sequence[Any], settings: NormSettings) -> tuple[Running | None, ...] | None:
    """Which running statistics the kernels update while they take those of the batch, one for each norm; None where
    some must be updated otherwise."""
    from .kernels.running import Running

    updating = [norm for norm in norms if _updates_running(norm)]
    is_plain = (
        not settings.groups.strip(",")
        and len({*map(id, updating)}) == len(updating)  # else one takes its updates one after another
        and len({norm.momentum for norm in norms[:-1] if _updates_running(norm)}) <= 1
        and all(norm.momentum is not None and norm.num_batches_tracked is not None for norm in updating)
        and all(t.is_contiguous() for norm in updating for t in (norm.running_mean, norm.running_var))
    )
    if not is_plain:
        return None
    return tuple(
        Running(norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum)
        if _updates_running(norm)
        else None
        for norm in norms
    )


@torch.no_grad()
def _update_running(updates: Sequence[tuple[Any, Tensor, Tensor]]) -> None:
    """The update of ``nn.BatchNorm2d`` for each norm, from the mean and the unbiased variance ``[C]`` of a batch."""
    counters = [norm.num_batches_tracked for norm, _, _ in updates if norm.num_batches_tracked is not None]
    momenta = [norm.momentum for norm, _, _ in updates]
    kinds = {(norm.running_mean.dtype, norm.running_var.dtype) for norm, _, _ in updates}
    # One norm of several branches takes its updates one after another.
    is_joint = len({id(norm) for norm, _, _ in updates}) == len(updates) == len(counters)
    if len(updates) > 1 and is_joint and len({*momenta}) == 1 and momenta[0] is not None and len(kinds) == 1:
        running = [s for norm, _, _ in updates for s in (norm.running_mean, norm.running_var)]
        batch = [s.to(running[0].dtype) for _, mean, var in updates for s in (mean, var)]
        torch._foreach_add_(counters, 1)
        torch._foreach_lerp_(running, batch, momenta[0])
        return
    for norm, mean, var in updates:
        momentum: Any = norm.momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:  # the average over all batches; on the device, where the count is
                momentum = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
        if momentum is None:
            momentum = 0.0
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_(var.to(norm.running_var.dtype), momentum)
