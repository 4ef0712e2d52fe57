"""The launches of a schedule on tensors without values, for whatever looks at kernels without running them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sk_triton import plans
from sk_triton.backend import Schedule
from sk_triton.packing import pack
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
    from sk_triton.launching import empty_output, prepare

    plan = plans.plan_schedule(schedule, workload)
    spec, h, w = workload.spec, workload.h_in, workload.w_in
    x = torch.empty((workload.n, spec.in_channels, h, w), dtype=workload.dtype, device="meta")
    x = x.to(memory_format=torch.channels_last)
    branches, gate = _unit(spec, workload.dtype)
    v = empty_output(x, spec)
    steps = prepare(plan, x, v, pack(plan, h, w, branches, gate, None), spec)
    return plan, steps, v


def _unit(spec: SKSpec, dtype: torch.dtype) -> tuple[list[Branch], Gate]:
    """A unit's parameters on "meta", as :class:`SKSpec` describes them."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def norm(width: int, has_norm: bool) -> nn.Module | None:
        return nn.BatchNorm2d(width, device="meta", dtype=dtype).eval() if has_norm else None

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
