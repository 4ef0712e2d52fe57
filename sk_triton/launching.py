"""Runs a plan of the Triton backend: pack the parameters, prepare the launches, start them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .packing import PackCache, Packed, pack
from .params import Branch, Gate
from .plan import Plan
from .schedules import merged, recompute, store
from .spec import SKSpec
from .steps import Step

_PREPARE = {"store": store.prepare, "recompute": recompute.prepare, "merged": merged.prepare}


def run(
    plan: Plan, x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec, cache: PackCache | None
) -> Tensor:
    """The unit's output; arguments and result as :func:`sk_triton.functional.sk_conv`."""
    with torch.cuda.device_of(x):
        packed = pack(plan, x.shape[2], x.shape[3], branches, gate, cache)
        steps, v = prepare(plan, x, packed, spec)
        for step in steps:
            step()
    return v


def prepare(plan: Plan, x: Tensor, packed: Packed, spec: SKSpec) -> tuple[list[Step], Tensor]:
    """The steps that compute the unit, mostly kernel launches, and the tensor that will hold its output."""
    return _PREPARE[plan.schedule](plan, x, packed, spec)
