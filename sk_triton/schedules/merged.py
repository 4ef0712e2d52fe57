"""Schedule "merged", for linear branches: pool by sums of x, then convolve once, with weights of each sample's own.

Three passes over an activation tensor: x twice, the result once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.border_sums import border_sums_fwd
from ..kernels.geometry import cdiv
from ..kernels.merged_conv import merged_conv_fwd
from ..packed import MergedPacked
from ..plan import Plan
from ..section_tables import column_table, strip_table
from ..spec import SKSpec
from ..steps import Step, gate_steps


def prepare(plan: Plan, x: Tensor, v: Tensor, packed: MergedPacked, spec: SKSpec) -> list[Step]:
    """The steps that compute the unit; see :func:`..launching.prepare`."""
    assert plan.merged_launch is not None
    n, _, h_in, w_in = x.shape
    h, w = spec.output_size(h_in, w_in)
    c, m = spec.out_channels, spec.num_branches
    shape, border = plan.merged_launch.shape, plan.merged_launch.border
    strips = strip_table(shape, h_in, border.ROWS, x.device)
    tiles = cdiv(len(strips), border.STRIPS_PER_PROGRAM) * cdiv(w_in, border.BLOCK_W)
    partial = x.new_empty((n, tiles, c), dtype=torch.float32)
    attention = x.new_empty((n, m, c), dtype=torch.float32)
    steps: list[Step] = [
        border_sums_fwd(
            x,
            packed.section_weights,
            packed.pooled_shift,
            strips,
            column_table(shape, w_in, x.device),
            partial,
            shape=shape,
            pixels=h * w,
            config=border,
        ),
        *gate_steps(plan, partial, packed, spec, attention, pixels=h * w),
        merged_conv_fwd(
            x,
            packed.weights[0],
            packed.scale,
            packed.shifts[0],
            attention,
            v,
            branches=plan.merged_launch.branches,
            allow_tf32=plan.allow_tf32,
            config=plan.merged_launch.conv,
        ),
    ]
    return steps
