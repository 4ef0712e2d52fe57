"""Batch statistics over the processes of a group, as ``nn.SyncBatchNorm`` takes them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def sync_group(norm: Any) -> str:
    """The name of the process group whose samples a training norm shares; "" where it stays in this process."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return ""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    group = norm.process_group if norm.process_group is not None else dist.group.WORLD
    assert group is not None
    return group.group_name if dist.get_world_size(group) > 1 else ""


def _group(name: Any) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)


def gather_moments(mean: Tensor, var: Tensor, count: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance (of any one shape) and number of values over the processes, in their ranks' order.

    `count` is a tensor of no dimensions then: processes may hold batches of different sizes.
    """
    group = _group(name)
    own = torch.cat([mean.flatten(), var.flatten(), mean.new_full((1,), count)])
    every = own.new_empty(dist.get_world_size(group), own.numel())
    dist.all_gather(list(every.unbind(0)), own, group=group)
    counts = every[:, -1:]
    means, variances = every[:, :-1].unflatten(1, (2, -1)).unbind(1)
    total = counts.sum()
    share = counts / total
    # From the first process's mean on: a large mean costs no digits.
    joined = means[0] + ((means - means[0]) * share).sum(0)
    spread = ((variances + (means - joined).square()) * share).sum(0)
    return joined.view_as(mean), spread.view_as(var), total


def sum_over(tensor: Tensor, name: str) -> Tensor:
    """The sum of a contiguous tensor over the processes of a group."""
    tensor = tensor.clone()
    dist.all_reduce(tensor, group=_group(name))
    return tensor
