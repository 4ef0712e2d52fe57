"""Steps that several schedules share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .kernels.branch_conv import branch_conv_fwd
from .kernels.gate import gate_fwd
from .kernels.geometry import tile_count
from .kernels.launch import Launch
from .packed import Packed
from .plan import MAX_GATE_TILES, Plan
from .spec import SKSpec

Step = Launch | Callable[[], object]
"""One thing to run, mostly a kernel launch."""


def store_steps(plan: Plan, x: Tensor, packed: Packed, spec: SKSpec) -> tuple[list[Step], Tensor, Tensor]:
    """The steps that write the branches and their sums, then `u [M, N, H, W, C]` and `partial [N, tiles, C]` fp32.

    Neither tensor has values yet.
    """
    n, _, h_in, w_in = x.shape
    h, w = spec.output_size(h_in, w_in)
    c, m = spec.out_channels, spec.num_branches
    counts = [tile_count(launch.shape, launch.config, h, w) for launch in plan.branch_launches]
    u = x.new_empty((m, n, h, w, c))
    partial = x.new_empty((n, sum(counts), c), dtype=torch.float32)

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
                has_relu=spec.branch_has_relu,
                allow_tf32=plan.allow_tf32,
                config=launch.config,
            )
        )
        first_tile += count
    return steps, u, partial


def gate_steps(
    plan: Plan, partial: Tensor, packed: Packed, spec: SKSpec, attention: Tensor, *, pixels: int
) -> list[Step]:
    """From `partial [N, tiles, C]` fp32, sums over branches and each tile's pixels, to `attention [N, M, C]` fp32."""
    assert plan.gate is not None
    steps: list[Step] = []
    n, count, c = partial.shape
    if count > MAX_GATE_TILES:
        total = partial.new_empty((n, 1, c))
        steps.append(functools.partial(torch.sum, partial, 1, keepdim=True, out=total))
        partial = total
    steps.append(
        gate_fwd(
            partial,
            *packed.gate,
            attention,
            pixels=pixels,
            has_relu=spec.gate_has_relu,
            config=plan.gate,
        )
    )
    return steps
