"""The launches of a training step, found by taking one: whatever schedule "train" starts is seen, run or not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sk_triton.kernels.launch import Launch
from sk_triton.layout import empty_output
from sk_triton.params import Branch, Gate
from sk_triton.plan import Plan
from sk_triton.save import Save
from sk_triton.spec import SKSpec
from sk_triton.training.norms import norm_settings, updates_by_kernels
from sk_triton.training.operators import FIRST_SAVED
from sk_triton.training.tensors import Saved, unit_tensors
from sk_triton.workload import Workload

from .planned import empty_on_meta, unit_parameters

if TYPE_CHECKING:
    from sk_triton.training.branches import TrainingUnit  # imports Triton

Start = Callable[[Launch, Callable[[], object]], object]
"""Takes a launch, and what runs it."""


@contextlib.contextmanager
def intercepted(start: Start) -> Iterator[None]:
    """Inside, `start` gets every launch, and what runs it."""
    run = Launch.__call__

    def meet(self: Launch) -> Any:
        start(self, functools.partial(run, self))

    Launch.__call__ = meet  # type: ignore[method-assign]
    try:
        yield
    finally:
        Launch.__call__ = run  # type: ignore[method-assign]


def take_step(
    workload: Workload,
    plan: Plan,
    save: Save,
    make: Callable[..., Tensor],
    start: Start,
) -> Tensor:
    """One step of a unit on channels_last input, whose launches are left to `start`; returns the output.

    Args:
        plan: of schedule "train", which it follows in both passes.
        make: makes input, parameters and the output's gradient, given their sizes.
    """
    spec = workload.spec
    unit = training_unit(spec, *unit_parameters(spec, make))
    x = make(workload.n, spec.in_channels, workload.h_in, workload.w_in)
    dv = make(workload.n, spec.out_channels, *workload.output_size)
    x, dv = (tensor.to(memory_format=torch.channels_last) for tensor in (x, dv))
    with intercepted(start):
        return step(unit, plan, save, x, dv)[0]


def meta_launches(workload: Workload, plan: Plan, save: Save) -> list[Launch]:
    """The launches of one step on tensors on "meta", none of which is run."""
    found: list[Launch] = []
    take_step(workload, plan, save, empty_on_meta(workload), lambda launch, _: found.append(launch))
    return found


def training_unit(spec: SKSpec, branches: list[Branch], gate: Gate) -> TrainingUnit:
    """A unit whose norms take the statistics of the batch."""
    from sk_triton.training.branches import TrainingUnit

    norms = [*(branch.norm for branch in branches), gate.norm]
    for norm in norms:
        if isinstance(norm, nn.Module):
            norm.train()
    settings = norm_settings(norms)
    updates = updates_by_kernels(norms, settings)
    assert updates is not None
    return TrainingUnit(spec, unit_tensors(branches, gate), (), settings, updates)


@torch.no_grad()
def step(unit: TrainingUnit, plan: Plan, save: Save, x: Tensor, dv: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A unit's output, and the gradients of x and of those of ``UnitTensors.flat()`` that it has."""
    from sk_triton.training import schedule as train
    from sk_triton.training.tape import Tape

    v = empty_output(x, unit.spec)
    outputs = train.forward(x, v, unit, plan, save=save, tape=Tape())
    needs = [True] * (1 + sum(tensor is not None for tensor in unit.tensors.flat()))
    saved = Saved(*outputs[FIRST_SAVED:])
    return outputs[0], train.backward(dv, x, unit, plan, saved, needs, Tape())
