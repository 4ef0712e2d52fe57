"""Schedule "library": the library's convolution, then ours: pool all branches, gate, select.

For wide groups and dense branches, where we do not beat the library's products. Nine passes over an activation tensor
for M = 2: each branch reads x and is written, pooled and selected from. Shifts and ReLU are applied while loading.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.geometry import cdiv
from ..kernels.pooled_sums import pooled_sums_fwd
from ..kernels.select import select_fwd
from ..layout import branch_inputs
from ..library import Convolution, without_memory
from ..packed import Packed
from ..plan import Plan
from ..spec import SKSpec
from ..steps import Step, gate_steps


def prepare(plan: Plan, x: Tensor, v: Tensor, packed: Packed, spec: SKSpec) -> list[Step]:
    """The steps that compute the unit; see :func:`..launching.prepare`."""
    assert plan.select is not None
    assert plan.reduction is not None
    n, c, h, w = v.shape
    tiles = cdiv(h * w, plan.reduction.BLOCK_P * plan.reduction.STEPS)
    partial = x.new_empty((n, tiles, c), dtype=torch.float32)
    attention = x.new_empty((n, spec.num_branches, c), dtype=torch.float32)
    (shift,) = packed.shifts
    convolutions = [
        Convolution(x_m, weight, without_memory(x, (n, h, w, c)), branch, spec.stride, plan.allow_tf32)
        for x_m, weight, branch in zip(branch_inputs(x, spec), packed.weights, spec.branches, strict=True)
    ]
    y = [convolution.y for convolution in convolutions]
    return [
        *convolutions,
        pooled_sums_fwd(y, shift, partial, has_relu=spec.branch_has_relu, config=plan.reduction),
        *gate_steps(plan, partial, packed, spec, attention, pixels=h * w),
        select_fwd(y, attention, v, shift=shift, has_relu=spec.branch_has_relu, config=plan.select),
    ]
