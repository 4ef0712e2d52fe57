"""The launches of a schedule on tensors without values, for whatever looks at kernels without running them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sk_triton import planning
from sk_triton.backend import Schedule
from sk_triton.layout import empty_output
from sk_triton.params import Branch, Gate
from sk_triton.plan import Plan
from sk_triton.spec import SKSpec
from sk_triton.workload import Workload

if TYPE_CHECKING:
    from sk_triton.steps import Step  # imports Triton


def planned_steps(schedule: Schedule, workload: Workload) -> tuple[Plan, list[Step], Tensor]:
    """The plan, the steps and the output of a schedule on channels_last inputs, all on "meta".

    Raises:
        RuntimeError: the schedule cannot run the unit.
    """
    plan = planning.plan_schedule(schedule, workload)
    return plan, *meta_steps(plan, workload)


def meta_steps(plan: Plan, workload: Workload) -> tuple[list[Step], Tensor]:
    """The steps of a plan and its output, on channels_last inputs, all on "meta"."""
    spec, empty = workload.spec, empty_on_meta(workload)
    x = empty(workload.n, spec.in_channels, workload.h_in, workload.w_in)
    x = x.to(memory_format=torch.channels_last)
    return prepared_steps(plan, x, *unit_parameters(spec, empty), spec)


def empty_on_meta(workload: Workload) -> Callable[..., Tensor]:
    """Makes tensors of a workload's dtype on "meta", given their sizes."""
    return functools.partial(torch.empty, dtype=workload.dtype, device="meta")


def prepared_steps(
    plan: Plan, x: Tensor, branches: list[Branch], gate: Gate, spec: SKSpec
) -> tuple[list[Step], Tensor]:
    """The steps of a plan for `x`, whose channels are adjacent in memory, and its output. But on "meta", parameters are
    packed by then."""
    from sk_triton.launching import prepare
    from sk_triton.packing import pack, prepare_packed

    v = empty_output(x, spec)
    arguments = (plan, x.shape[2], x.shape[3], branches, gate)
    packed = prepare_packed(*arguments)[0] if x.is_meta else pack(*arguments, None)
    return prepare(plan, x, v, packed, spec), v


def unit_parameters(spec: SKSpec, empty: Callable[..., Tensor]) -> tuple[list[Branch], Gate]:
    """A unit's parameters as :class:`SKSpec` describes them, in tensors that `empty(*shape)` makes."""

    def norm(width: int, has_norm: bool) -> nn.Module | None:
        like = empty(width)
        return nn.BatchNorm2d(width, device=like.device, dtype=like.dtype).eval() if has_norm else None

    c, d = spec.out_channels, spec.gate_width
    branches = [
        Branch(
            empty(*shape),
            empty(c) if spec.branch_bias else None,
            norm(c, spec.branch_norm),
            None,
            F.relu if spec.branch_act == "relu" else None,
        )
        for shape in spec.weight_shapes
    ]
    gate = Gate(
        empty(d, c),
        empty(d) if spec.gate_bias else None,
        norm(d, spec.gate_norm),
        F.relu if spec.gate_act == "relu" else None,
        (empty(spec.num_branches * c, d),),
        (empty(spec.num_branches * c),) if spec.select_bias else None,
    )
    return branches, gate
