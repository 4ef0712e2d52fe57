"""Runs a unit in training: by an operator where somebody watches the call, else as a function of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..params import Branch, Gate, norms_of, tensors_of
from ..save import Save
from ..spec import SKSpec
from .norms import (
    check_batch,
    keeps_statistics,
    norm_settings,
    update_statistics,
    updates_by_kernels,
    uses_batch,
)
from .tensors import unit_tensors

if TYPE_CHECKING:
    from ..replay.calls import Recorder


def is_training(x: Tensor, branches: Sequence[Branch], gate: Gate) -> bool:
    """Whether a call needs gradients, or a norm takes the statistics of the batch."""
    if any(uses_batch(norm) for norm in norms_of(branches, gate)):
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
    from .call import is_watched
    from .function import run_function
    from .operators import run_operator

    norms = norms_of(branches, gate)
    settings = norm_settings(norms)
    check_batch(x, spec, settings)
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
        by_kernels = updates_by_kernels(norms, settings)
        if by_kernels is not None:
            return run_function(x, tensors, running, spec, settings, save, by_kernels, recorder)[0]
        results = run_function(x, tensors, running, spec, settings, save)
    v, var, gate_var, mean, gate_mean = results
    updates = [(norm, mean[i], var[i]) for i, norm in enumerate(norms[:-1]) if keeps_statistics(norm)]
    if keeps_statistics(norms[-1]):
        updates.append((norms[-1], gate_mean, gate_var))
    if updates:
        update_statistics(updates)
    return v
