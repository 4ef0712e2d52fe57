"""The norms of a unit in training: how they act, what their batch must hold, and their running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.running import Running
from ..params import STATISTICS, Branch, Gate, norms_of
from ..spec import SKSpec
from .distributed import sync_group

# By the letter of a norm's kind, what the gate's kernels call the statistics that it takes.
_GATE_STATISTICS = {"b": "batch", "r": "given", "-": "none"}


class NormSettings(NamedTuple):
    """The norms of the M branches, then the gate's.

    Attributes:
        kinds: a letter for each: "b" for batch statistics, "r" for running ones, "-" for no norm.
        epsilons: 0 where there is no norm.
        groups: names of the process groups that share a batch, joined by commas; "" within this process.
    """

    kinds: str
    epsilons: tuple[float, ...]
    groups: str

    @property
    def branch_kinds(self) -> str:
        return self.kinds[:-1]

    @property
    def branch_epsilons(self) -> tuple[float, ...]:
        return self.epsilons[:-1]

    @property
    def branch_groups(self) -> list[str]:
        return self.groups.split(",")[:-1]

    @property
    def gate_statistics(self) -> str:
        """The kind of the gate's norm in its kernels' words: "batch", "given" or "none"."""
        return _GATE_STATISTICS[self.kinds[-1]]

    @property
    def gate_group(self) -> str:
        return self.groups.split(",")[-1]

    def running_of(self, i: int) -> slice:
        """Where, among means and variances of all norms of kind "r", those of norm `i` are."""
        first = 2 * self.kinds[:i].count("r")
        return slice(first, first + 2)


def norm_settings(norms: Sequence[Any]) -> NormSettings:
    """How the norms act now."""
    return NormSettings(
        "".join(["-" if norm is None else "b" if uses_batch(norm) else "r" for norm in norms]),
        tuple([0.0 if norm is None else norm.eps for norm in norms]),
        ",".join([sync_group(norm) for norm in norms]),
    )


def uses_batch(norm: Any) -> bool:
    """Whether a norm takes the statistics of the batch; False for what is no batch norm."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return False
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def check_batch(x: Tensor, spec: SKSpec, settings: NormSettings) -> None:
    height, width = spec.output_size(x.shape[2], x.shape[3])
    branch_size = [x.shape[0], spec.out_channels, height, width]
    gate_size = [x.shape[0], spec.gate_width, 1, 1]
    groups = settings.groups.split(",")
    for i, (kind, group) in enumerate(zip(settings.kinds, groups, strict=True)):
        size = branch_size if i < spec.num_branches else gate_size
        values = size[0] * size[2] * size[3]
        if kind == "b" and values == 1 and not group:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")


def check_empty_batch(branches: Sequence[Branch], gate: Gate) -> None:
    """Raise where an empty batch would leave the other processes of a group waiting.

    Raises:
        ValueError: a norm takes its statistics over the processes of a group.
    """
    if any(sync_group(norm) for norm in norms_of(branches, gate)):
        raise ValueError(
            "x must have N >= 1 where SyncBatchNorm takes statistics over a process group, got an empty batch"
        )


def keeps_statistics(norm: Any) -> bool:
    return uses_batch(norm) and norm.training and norm.track_running_stats and norm.running_mean is not None


def updates_by_kernels(norms: Sequence[Any], settings: NormSettings) -> tuple[Running | None, ...] | None:
    """Which running statistics the kernels update while they take those of the batch, one for each norm; None where
    some must be updated otherwise."""
    updating = [norm for norm in norms if keeps_statistics(norm)]
    is_plain = (
        not settings.groups.strip(",")
        and _are_apart(updating)
        and len({norm.momentum for norm in norms[:-1] if keeps_statistics(norm)}) <= 1
        and all(norm.momentum is not None and norm.num_batches_tracked is not None for norm in updating)
        and all(t.is_contiguous() for norm in updating for t in (norm.running_mean, norm.running_var))
        and all(norm.num_batches_tracked.device == norm.running_mean.device for norm in updating)
    )
    if not is_plain:
        return None
    return tuple(
        Running(norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum)
        if keeps_statistics(norm)
        else None
        for norm in norms
    )


def _are_apart(norms: Sequence[Any]) -> bool:
    """Whether no two norms have running statistics in common, else these take their updates one after another."""
    held = [getattr(norm, name) for norm in norms for name in STATISTICS]
    # Dynamo knows no addresses; tensors without memory, on the meta device, are all at 0.
    is_traced = torch.compiler.is_compiling()
    places = [id(t) if is_traced else t.data_ptr() or id(t) for t in held if t is not None]
    return len({*places}) == len(places)


@torch.no_grad()
def update_statistics(updates: Sequence[tuple[Any, Tensor, Tensor]]) -> None:
    """The update of ``nn.BatchNorm2d`` for each norm, from the mean and the unbiased variance ``[C]`` of a batch."""
    counters = [norm.num_batches_tracked for norm, _, _ in updates if norm.num_batches_tracked is not None]
    momenta = [norm.momentum for norm, _, _ in updates]
    kinds = {(norm.running_mean.dtype, norm.running_var.dtype) for norm, _, _ in updates}
    is_joint = _are_apart([norm for norm, _, _ in updates]) and len(counters) == len(updates)
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
