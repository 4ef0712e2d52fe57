"""Parameters put into the form that a schedule of the kernels reads: norms folded, weights in the order of a launch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels.gather import branch_weight_launch
from .kernels.merging import met_taps
from .kernels.norm_params import Affine, fold_norms
from .kernels.section_weights import section_weights
from .kernels.weight_orders import weight_order
from .pack_cache import PackCache, remember
from .packed import MergedPacked, Packed, PackedGate
from .params import Branch, Gate
from .plan import BranchLaunch, MergedLaunch, Plan
from .section_tables import tap_table
from .steps import Step


def pack(
    plan: Plan, h: int, w: int, branches: Sequence[Branch], gate: Gate, cache: PackCache | None
) -> Packed:
    """Parameters packed for `plan` on inputs of `h` x `w` pixels, from `cache` where they are unchanged."""

    @torch.no_grad()
    def build() -> Packed:
        packed, steps = prepare_packed(plan, h, w, branches, gate)
        for step in steps:
            step()
        return packed if cache is None else packed.without_parameters()

    return remember(cache, _key(plan, h, w), branches, gate, build)


def _key(plan: Plan, h: int, w: int) -> Hashable:
    """What packed parameters depend on besides the parameters."""
    merged = plan.merged_launch
    if merged is not None:
        met = met_taps(merged.shape, h), met_taps(merged.shape, w)
        return plan.dtype, weight_order(merged.branches, merged.conv), met
    if plan.schedule == "library":
        return plan.dtype, plan.schedule
    return plan.dtype, tuple([_layout(launch) for launch in plan.branch_launches])


def _layout(launch: BranchLaunch) -> Hashable:
    return launch.start, launch.stop, weight_order(launch.shape, launch.config)


@torch.no_grad()
def prepare_packed(
    plan: Plan, h: int, w: int, branches: Sequence[Branch], gate: Gate
) -> tuple[Packed, list[Step]]:
    """Parameters for `plan` on inputs of `h` x `w` pixels, and the steps that fill in what is not there yet: few, since
    CUDA graphs of compiled code run them at every replay."""
    folded, fold = _fold(branches, gate)
    packed: Packed
    if plan.merged_launch is not None:
        packed, steps = _merged(plan, plan.merged_launch, h, w, branches, gate, folded)
    elif plan.schedule == "library":
        packed, steps = _library(plan, branches, gate, folded)
    else:
        packed, steps = _by_launches(plan, branches, gate, folded)
    return packed, [fold, *steps]


class _Folded(NamedTuple):
    """Biases and norms as affine maps, fp32.

    Attributes:
        scale, shift: the branches' ``[M, C]``; None where they have no norms, and nothing to add.
        gate_scale, gate_shift: ``[d]``, of the gate's first layer.
        select_bias: ``[M, C]``, of its second, or None.
    """

    scale: Tensor | None
    shift: Tensor | None
    gate_scale: Tensor
    gate_shift: Tensor
    select_bias: Tensor | None


def _fold(branches: Sequence[Branch], gate: Gate) -> tuple[_Folded, Step]:
    m, c, width = len(branches), branches[0].weight.shape[0], gate.reduce_weight.shape[0]
    maps = [_affine(c, branch.bias, branch.norm) for branch in branches]
    maps.append(_affine(width, gate.reduce_bias, gate.norm))
    maps += [_affine(bias.shape[0], bias, None) for bias in gate.select_bias or ()]
    first_gate = _aligned(m * c)
    first_select = _aligned(first_gate + width)
    starts = [*range(0, m * c, c), first_gate]
    end = first_select
    for own in maps[m + 1 :]:
        starts.append(end)
        end += own.width
    scale, shift = branches[0].weight.new_empty((2, _aligned(end)), dtype=torch.float32).unbind(0)
    has_norm = any(branch.norm is not None for branch in branches)
    has_shift = has_norm or any(branch.bias is not None for branch in branches)
    of_branches, of_gate = slice(0, m * c), slice(first_gate, first_gate + width)
    folded = _Folded(
        scale=scale[of_branches].view(m, c) if has_norm else None,
        shift=shift[of_branches].view(m, c) if has_shift else None,
        gate_scale=scale[of_gate],
        gate_shift=shift[of_gate],
        select_bias=None if gate.select_bias is None else shift[first_select:end].view(m, c),
    )
    return folded, fold_norms(maps, starts, scale, shift)


def _aligned(entries: int) -> int:
    """So many fp32 entries, or up to three more, that what follows begins at a multiple of 16 bytes."""
    return (entries + 3) // 4 * 4


def _affine(width: int, bias: Tensor | None, norm: Any) -> Affine:
    if norm is None:
        return Affine(width, _contiguous(bias))
    parts = (bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    bias, mean, var, gamma, beta = map(_contiguous, parts)
    return Affine(width, bias, mean, var, gamma, beta, norm.eps)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.detach().contiguous()


def _filling_memory(branch: Branch) -> Tensor:
    """A branch's weight, copied where it is neither contiguous nor channels_last."""
    weight = branch.weight.detach()
    return weight if weight.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()


def _packed_gate(plan: Plan, gate: Gate, folded: _Folded) -> PackedGate:
    select_weights = [weight.detach().flatten(1) for weight in gate.select_weight]
    select_weight = select_weights[0] if len(select_weights) == 1 else torch.cat(select_weights)
    width, c = gate.reduce_weight.shape[:2]
    return PackedGate(
        gate.reduce_weight.detach().flatten(1).to(plan.dtype).contiguous(),
        folded.gate_scale,
        folded.gate_shift,
        select_weight.to(plan.dtype).contiguous().view(-1, c, width),
        folded.select_bias,
    )


def _by_launches(
    plan: Plan, branches: Sequence[Branch], gate: Gate, folded: _Folded
) -> tuple[Packed, list[Step]]:
    weights: list[Tensor] = []
    shifts: list[Tensor | None] = []
    steps: list[Step] = []
    by_layout: dict[Hashable, int] = {}
    for launch in plan.branch_launches:
        index = by_layout.setdefault(_layout(launch), len(weights))
        if index < len(weights):
            weights.append(weights[index])
            shifts.append(shifts[index])
            continue
        members = slice(launch.start, launch.stop)
        packed, gather = branch_weight_launch(
            [_filling_memory(branch) for branch in branches[members]],
            launch.shape,
            launch.config,
            plan.dtype,
            None if folded.scale is None else folded.scale[members],
        )
        weights.append(packed)
        shifts.append(None if folded.shift is None else folded.shift[members])
        steps.append(gather)
    return Packed(tuple(weights), tuple(shifts), _packed_gate(plan, gate, folded)), steps


def _library(
    plan: Plan, branches: Sequence[Branch], gate: Gate, folded: _Folded
) -> tuple[Packed, list[Step]]:
    weights: list[Tensor] = []
    steps: list[Step] = []
    for m, branch in enumerate(branches):
        weight = branch.weight.detach()
        packed = torch.empty_like(weight, dtype=plan.dtype, memory_format=torch.channels_last)
        if folded.scale is None:
            steps.append(partial(packed.copy_, weight))
        else:
            steps.append(partial(torch.mul, weight, folded.scale[m].view(-1, 1, 1, 1), out=packed))
        weights.append(packed)
    return Packed(tuple(weights), (folded.shift,), _packed_gate(plan, gate, folded)), steps


def _merged(
    plan: Plan,
    launch: MergedLaunch,
    h: int,
    w: int,
    branches: Sequence[Branch],
    gate: Gate,
    folded: _Folded,
) -> tuple[MergedPacked, list[Step]]:
    shape, c = launch.branches, launch.branches.c_out
    weights = [_filling_memory(branch).to(plan.dtype) for branch in branches]
    packed, gather = branch_weight_launch(weights, shape, launch.conv, plan.dtype)
    met_h, met_w = (tap_table(met_taps(launch.shape, pixels), packed.device) for pixels in (h, w))
    size = (len(met_h), len(met_w), c // shape.groups, shape.c_in)
    of_sections = packed.new_empty(size, dtype=torch.float32)
    steps: list[Step] = [
        gather,
        section_weights(weights, folded.scale, met_h, met_w, of_sections, branches=shape),
    ]
    pooled_shift = None
    if folded.shift is not None:
        pooled_shift = torch.empty_like(folded.shift[0])
        steps.append(partial(torch.sum, folded.shift, 0, out=pooled_shift))
    return MergedPacked(
        (packed,),
        (folded.shift,),
        _packed_gate(plan, gate, folded),
        scale=folded.scale,
        section_weights=of_sections,
        pooled_shift=pooled_shift,
    ), steps
