"""Schedule "recompute": one launch pools the branches, one computes the gate, one convolves again and selects.

Three passes over an activation tensor, whatever the number of branches: x twice, the result once. No branch is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.branch_conv import branch_pool_fwd, branch_select_fwd
from ..kernels.geometry import tile_count
from ..packed import Packed
from ..plan import Plan
from ..spec import SKSpec
from ..steps import Step, gate_steps


def prepare(plan: Plan, x: Tensor, v: Tensor, packed: Packed, spec: SKSpec) -> list[Step]:
    """The steps that compute the unit; see :func:`..launching.prepare`."""
    pool, select = plan.branch_launches
    n, _, h_in, w_in = x.shape
    h, w = spec.output_size(h_in, w_in)
    c = spec.out_channels
    partial = x.new_empty((n, tile_count(pool.shape, pool.config, h, w), c), dtype=torch.float32)
    attention = x.new_empty((n, spec.num_branches, c), dtype=torch.float32)
    pool_weights, select_weights = packed.weights
    pool_shift, select_shift = packed.shifts
    steps: list[Step] = [
        branch_pool_fwd(
            x,
            pool_weights,
            pool_shift,
            partial,
            shape=pool.shape,
            has_relu=spec.branch_has_relu,
            allow_tf32=plan.allow_tf32,
            config=pool.config,
        ),
        *gate_steps(plan, partial, packed, spec, attention, pixels=h * w),
        branch_select_fwd(
            x,
            select_weights,
            select_shift,
            attention,
            v,
            shape=select.shape,
            has_relu=spec.branch_has_relu,
            allow_tf32=plan.allow_tf32,
            config=select.config,
        ),
    ]
    return steps
