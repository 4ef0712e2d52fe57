"""Schedule "store": one launch writes the branches and their pooled sums, one computes the gate, one selects.

Six passes over an activation tensor for M = 2: x once, each branch written and read, the result written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.select import select_fwd
from ..packed import Packed
from ..plan import Plan
from ..spec import SKSpec
from ..steps import Step, gate_steps, store_steps


def prepare(plan: Plan, x: Tensor, v: Tensor, packed: Packed, spec: SKSpec) -> list[Step]:
    """The steps that compute the unit; see :func:`..launching.prepare`."""
    assert plan.select is not None
    steps, u, partial = store_steps(plan, x, packed, spec)
    m, n, h, w, c = u.shape
    attention = x.new_empty((n, m, c), dtype=torch.float32)
    steps += gate_steps(plan, partial, packed, spec, attention, pixels=h * w)
    steps.append(select_fwd(u, attention, v, config=plan.select))
    return steps
