"""The two passes of a training step, planned and run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..kernels.running import Running
from ..layout import empty_output, memory_format, with_adjacent_channels, with_spaced_pixels
from ..spec import SKSpec
from ..undisturbed import undisturbed
from ..workload import workload_of
from . import schedule as train
from .branches import TrainingUnit
from .norms import NormSettings
from .plan import plan_training
from .tape import Tape
from .tensors import Saved, UnitTensors


def unit_of(
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    has: Sequence[bool],
    spec: SKSpec,
    norms: NormSettings,
    updates: tuple[Running | None, ...] = (),
) -> TrainingUnit:
    """A unit from those parameters that it `has`, in the order of ``UnitTensors.flat()``."""
    remaining = iter(params)
    values = [next(remaining) if present else None for present in has]
    tensors = UnitTensors.from_flat(values, spec.num_branches)
    return TrainingUnit(spec, tensors, tuple(running), norms, updates)


def forward_pass(x: Tensor, x_in: Tensor, unit: TrainingUnit, save: str) -> tuple[list[Tensor], Tape]:
    """The outputs of :func:`.operators.unit_fwd`, and what computed them; `x_in` is x with adjacent channels."""
    tape = Tape()
    with undisturbed(x):
        v = empty_output(x, unit.spec)
        plan = plan_training(workload_of(x, unit.spec), save)
        outputs = train.forward(x_in, v, unit, plan, save=save, tape=tape)
    counters = [own.counter for own in unit.updates if own is not None]
    if counters:
        # Not of the statistics, as PyTorch's norm: a graph that saved them may still want its backward pass.
        increment_version(counters)
    return outputs, tape


def backward_pass(
    dv: Tensor, x: Tensor, unit: TrainingUnit, saved: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[list[Tensor], Tape]:
    """The outputs of :func:`.operators.unit_bwd`, and what computed them.

    Args:
        dv, x: as :func:`kernel_inputs` gives them. The gradient of x has the strides of this x.
    """
    tape = Tape()
    with undisturbed(x):
        plan = plan_training(workload_of(x, unit.spec), "branches")
        return train.backward(dv, x, unit, plan, Saved(*saved), needs, tape), tape


def kernel_inputs(dv: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """dv with equally spaced pixels, and x with adjacent channels."""
    with torch.no_grad():
        return with_spaced_pixels(dv), with_adjacent_channels(x)


def in_format_of(x: Tensor, grads: list[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """`grads`, of which the first, where it is x's, takes x's memory format."""
    if needs[0] and x.stride(1) != 1:
        grads[0] = grads[0].contiguous(memory_format=memory_format(x))
    return grads
