"""Schedule "gated": as "store", the gate computed by every program that selects. Two launches, for few samples.

However many tiles there are, each program sums them all: large images are no business of this schedule.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels.gated_select import gated_select_fwd
from ..packed import Packed
from ..plan import Plan
from ..spec import SKSpec
from ..steps import Step, store_steps


def prepare(plan: Plan, x: Tensor, v: Tensor, packed: Packed, spec: SKSpec) -> list[Step]:
    """The steps that compute the unit; see :func:`..launching.prepare`."""
    assert plan.gated_select is not None
    steps, u, partial = store_steps(plan, x, packed, spec)
    steps.append(
        gated_select_fwd(
            u,
            partial,
            *packed.gate,
            v,
            has_relu=spec.gate_has_relu,
            config=plan.gated_select,
        )
    )
    return steps
