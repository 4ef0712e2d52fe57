"""Schedule "store": one launch writes the branches and their pooled sums, one computes the gate, one selects.

Six passes over an activation tensor for M = 2: x once, each branch written and read, the result written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.branch_conv import branch_conv_fwd
from ..kernels.geometry import tiles
from ..kernels.select import select_fwd
from ..packing import Packed
from ..plan import Plan
from ..spec import SKSpec
from ..steps import Step, gate_steps


def prepare(plan: Plan, x: Tensor, v: Tensor, packed: Packed, spec: SKSpec) -> list[Step]:
    """The steps that compute the unit; see :func:`.launching.prepare`."""
    assert plan.select is not None
    n, _, h_in, w_in = x.shape
    h, w = spec.output_size(h_in, w_in)
    c, m = spec.out_channels, spec.num_branches
    counts = [math.prod(tiles(launch.shape, launch.config, h, w)) for launch in plan.branch_launches]
    u = x.new_empty((m, n, h, w, c))
    partial = x.new_empty((n, sum(counts), c), dtype=torch.float32)
    attention = x.new_empty((n, m, c), dtype=torch.float32)

    steps: list[Step] = []
    first_tile = 0
    for launch, count, weight, shift in zip(
        plan.branch_launches, counts, packed.weights, packed.shifts, strict=True
    ):
        steps.append(
            branch_conv_fwd(
                x[:, launch.start * spec.branch_in_channels :] if spec.split_input else x,
                weight,
                shift,
                u[launch.start : launch.stop],
                partial[:, first_tile : first_tile + count],
                shape=launch.shape,
                has_relu=plan.has_relu,
                allow_tf32=plan.allow_tf32,
                config=launch.config,
            )
        )
        first_tile += count
    steps += gate_steps(plan, partial, packed, attention, pixels=h * w)
    steps.append(select_fwd(u, attention, v, config=plan.select))
    return steps
