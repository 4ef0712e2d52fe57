"""Steps that several schedules share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .kernels.gate import gate_fwd
from .kernels.launch import Launch
from .packing import Packed
from .plan import Plan

Step = Launch | Callable[[], object]
"""One thing to run, mostly a kernel launch."""

# The gate walks the partial sums of a channel one tile after another; past this many a reduction of its own is faster.
MAX_GATE_TILES = 64


def gate_steps(plan: Plan, partial: Tensor, packed: Packed, attention: Tensor, *, pixels: int) -> list[Step]:
    """From `partial [N, tiles, C]` fp32, sums over branches and each tile's pixels, to `attention [N, M, C]` fp32."""
    assert plan.gate is not None
    steps: list[Step] = []
    n, tiles, c = partial.shape
    if tiles > MAX_GATE_TILES:
        total = partial.new_empty((n, 1, c))
        steps.append(functools.partial(torch.sum, partial, 1, keepdim=True, out=total))
        partial = total
    steps.append(
        gate_fwd(
            partial,
            packed.reduce_weight,
            packed.gate_scale,
            packed.gate_shift,
            packed.select_weight,
            packed.select_bias,
            attention,
            pixels=pixels,
            has_relu=plan.gate_has_relu,
            config=plan.gate,
        )
    )
    return steps
