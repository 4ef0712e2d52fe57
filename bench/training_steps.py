"""The launches of a training step, found by taking one: whatever schedule "train" starts is seen, run or not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sk_triton.kernels.launch import Launch
from sk_triton.ops import FIRST_SAVED
from sk_triton.plan import Plan
from sk_triton.save import Save
from sk_triton.training import norm_settings, unit_tensors
from sk_triton.workload import Workload

from .planned import unit_parameters

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
    from sk_triton.schedules import train
    from sk_triton.training_branches import TrainingUnit

    spec = workload.spec
    branches, gate = unit_parameters(spec, make)
    norms = [*(branch.norm for branch in branches), gate.norm]
    for norm in norms:
        if isinstance(norm, nn.Module):
            norm.train()
    unit = TrainingUnit(spec, unit_tensors(branches, gate), (), norm_settings(norms))
    x = make(workload.n, spec.in_channels, workload.h_in, workload.w_in)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad(), intercepted(start):
        outputs = train.forward(x, unit, plan, save=save)
        v, saved = outputs[0], train.Saved(*outputs[FIRST_SAVED:])
        dv = make(*v.shape).to(memory_format=torch.channels_last)
        needs = [True] * (1 + sum(tensor is not None for tensor in unit.tensors.flat()))
        train.backward(dv, x, unit, plan, saved, needs)
    return v
