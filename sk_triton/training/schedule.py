"""Schedule "train": the unit with batch statistics, and its gradient.

Forward: convolve, statistics, pool, gate, select. Backward: one reduction, the gate's gradient, then the branches'
(:func:`.gradients.branch_backward`). Derivation: `kernels/README.md`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.batch_stats import combine_moments_fwd
from ..kernels.select_bwd import select_bwd
from ..plan import Plan
from .branches import (
    BranchVectors,
    TrainingUnit,
    branch_norm,
    convolve,
    stack,
    sums_over_pixels,
)
from .distributed import gather_moments, sum_over
from .forward import FoldedBranches, StoredBranches
from .gate import (
    GateGrads,
    GateHidden,
    GateState,
    GateTensors,
    ParameterGrads,
    train_gate_bwd,
    train_gate_fwd,
)
from .gradients import Upstream, branch_backward
from .norms import NormSettings
from .tape import Tape
from .tensors import Saved, UnitTensors


def forward(x: Tensor, v: Tensor, unit: TrainingUnit, plan: Plan, *, save: str, tape: Tape) -> list[Tensor]:
    """The outputs of :func:`.operators.unit_fwd`, for x with adjacent channels; v receives the unit's."""
    vectors = stack(unit, x, tape)
    branches = (FoldedBranches if plan.folded_launches else StoredBranches)(x, unit, plan, vectors, tape)
    mean, rstd, sizes, unbiased = _statistics(branches, v, unit, tape)
    norm = branch_norm(mean, rstd, vectors, unit)
    state, gate_unbiased, sums = train_gate_fwd(
        branches.pool(norm),
        branches.affine,
        _gate_tensors(unit.tensors, unit.spec.num_branches, tape),
        _gate_hidden(unit),
        unit.running[unit.norms.running_of(-1)],
        unit.updates[-1] if unit.updates else None,
        branches=unit.spec.num_branches,
        pixels=v.shape[2] * v.shape[3],
        tape=tape,
    )
    branches.select(norm, state.attention, v)
    y = branches.y if save == "branches" else branches.y.new_empty(0)
    # Without norms the backward pass counts anew what its one reduction sees anyway.
    if save != "branches" or not unit.spec.branch_norm:
        sums = sums.new_empty(0)
    # Outputs of an operator must not share memory.
    saved = Saved(y, mean, rstd, sizes, vectors.stacked, sums, *state)
    return [v, unbiased, gate_unbiased, *saved]


def backward(
    dv: Tensor, x: Tensor, unit: TrainingUnit, plan: Plan, saved: Saved, needs: Sequence[bool], tape: Tape
) -> list[Tensor]:
    """The outputs of :func:`.operators.unit_bwd`, for x with adjacent channels and dv with equally spaced pixels. The
    gradient of x has the strides of x."""
    spec, m = unit.spec, unit.spec.num_branches
    y, sums = saved.y, saved.sums
    vectors = BranchVectors.of(saved.vectors, unit)
    norm = branch_norm(saved.mean, saved.rstd, vectors, unit)
    has_sums = bool(sums.numel())
    if not y.numel():
        y = convolve(x, unit, plan, vectors, tape).y
    count = 2 if has_sums or spec.is_linear else 4
    partial = sums_over_pixels(select_bwd, (dv, y, *norm), count, y, unit, plan, tape)
    of_branches, of_others = needs[: 1 + m], needs[1 + m :]
    outputs, targets, copies = _destinations(unit, of_others)
    gate = train_gate_bwd(
        partial,
        sums if has_sums else None,
        vectors.affine if spec.branch_norm else None,
        GateState(*saved[-len(GateState._fields) :]),
        (norm.rstd, norm.gamma),
        _gate_tensors(unit.tensors, m, tape),
        _gate_hidden(unit),
        _parameter_grads(targets, m, tape),
        batch_norms=[kind == "b" for kind in unit.norms.branch_kinds],
        pixels=y.shape[2] * y.shape[3],
        tape=tape,
    )
    terms = gate.terms
    if any(unit.norms.branch_groups):
        tape.note_operators()
        terms = _shared_terms(gate, unit.norms, saved.sizes)
    found: Sequence[Tensor] = ()
    if any(of_branches):
        upstream = Upstream(dv, saved.attention, gate.pooled, norm, *terms.unbind(0))
        found = branch_backward(x, y, upstream, unit, plan, of_branches, tape)
    if copies:
        tape.note_operators()
        torch._foreach_copy_([output for output, _ in copies], [target for _, target in copies])
    return [*found, *outputs]


def _statistics(
    branches: StoredBranches | FoldedBranches, v: Tensor, unit: TrainingUnit, tape: Tape
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and 1 / deviation ``[M, C]`` that the norms take, values behind them ``[M]`` where a group shares them, and
    the unbiased variance ``[M, C]`` where it is the batch's; each empty elsewhere."""
    n, c, h, w = v.shape
    m, pixels = unit.spec.num_branches, n * h * w
    kinds, groups, epsilons = unit.norms.branch_kinds, unit.norms.branch_groups, unit.norms.branch_epsilons

    def empty(*size: int) -> Tensor:  # one each: outputs of an operator must not share memory
        return v.new_empty(size, dtype=torch.float32)

    if not unit.spec.branch_norm:
        return empty(0), empty(0), empty(0), empty(0)
    mean, rstd, var = empty(m, c), empty(m, c), empty(m, c)
    running = unit.updates[:m] or (None,) * m
    if "b" in kinds:
        for members, moments in branches.moments():
            for part in _of_equal(epsilons, members):
                own = moments[part.start - members.start : part.stop - members.start]
                combine = combine_moments_fwd(
                    own, mean[part], rstd[part], var[part], running[part], pixels=pixels, epsilon=epsilons[part.start],
                    is_unbiased=not any(groups),
                )  # fmt: skip
                tape.run(combine)
    sizes = empty(0)
    if any(groups):
        tape.note_operators()
        var, sizes = _share(mean, rstd, var, pixels, groups, epsilons)
    for i, kind in enumerate(kinds):
        if kind == "r":
            tape.note_operators()
            mean[i], running_var = unit.running[unit.norms.running_of(i)]
            rstd[i] = (running_var.float() + epsilons[i]).rsqrt()
    return mean, rstd, sizes, var if "b" in kinds else empty(0)


def _of_equal(values: Sequence[float], members: slice) -> list[slice]:
    """`members` in parts of equal `values`."""
    starts = [
        i for i in range(members.start, members.stop) if i == members.start or values[i] != values[i - 1]
    ]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], members.stop], strict=True)]


def _share(
    mean: Tensor, rstd: Tensor, var: Tensor, pixels: int, groups: Sequence[str], epsilons: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Replaces the statistics of branches whose batch a group shares; gives the unbiased variance of all, and how many
    values are behind it, ``[M]``."""
    sizes = mean.new_full((len(groups),), pixels)
    own_mean, own_var = mean.clone(), var.clone()
    for name in sorted({*groups} - {""}):
        joined = gather_moments(own_mean, own_var, pixels, name)
        for i in [i for i, group in enumerate(groups) if group == name]:
            mean[i], var[i], sizes[i] = joined[0][i], joined[1][i], joined[2]
            rstd[i] = (var[i] + epsilons[i]).rsqrt()
    return var * (sizes / (sizes - 1))[:, None], sizes


def _shared_terms(gate: GateGrads, norms: NormSettings, sizes: Tensor) -> Tensor:
    """``GateGrads.terms`` with the gradients of branches whose batch a group shares added up over it."""
    joined = {name: sum_over(gate.affine, name) for name in sorted({*norms.branch_groups} - {""})}
    terms = gate.terms.clone()
    for i, (name, kind) in enumerate(zip(norms.branch_groups, norms.branch_kinds, strict=True)):
        if kind == "b" and name:
            terms[:, i] = joined[name][:, i] / sizes[i]
    return terms


def _destinations(
    unit: TrainingUnit, needs: Sequence[bool]
) -> tuple[list[Tensor], UnitTensors, list[tuple[Tensor, Tensor]]]:
    """Memory for the gradients of the parameters but the convolutions' weights; `needs` says which are wanted.

    Returns:
        Those that are, like the parameters. Where the kernels write: contiguous memory, also of those that are not
        wanted. What is to be copied from there.
    """
    m = unit.spec.num_branches
    outputs: list[Tensor] = []
    targets: list[Tensor | None] = [None] * m
    copies: list[tuple[Tensor, Tensor]] = []
    remaining = iter(needs)
    for parameter in unit.tensors.flat()[m:]:
        if parameter is None:
            targets.append(None)
            continue
        output = torch.empty_like(parameter) if next(remaining) else None
        if output is not None:
            outputs.append(output)
        target = output
        if target is None or not target.is_contiguous():
            target = parameter.new_empty(parameter.shape)
            if output is not None:
                copies.append((output, target))
        targets.append(target)
    return outputs, UnitTensors.from_flat(targets, m), copies


def _parameter_grads(targets: UnitTensors, m: int, tape: Tape) -> ParameterGrads:
    def of_branches(grads: Sequence[Tensor | None]) -> list[Tensor] | None:
        present = [grad for grad in grads if grad is not None]
        # A kernel writes those of all branches.
        return [torch.empty_like(present[0]) if grad is None else grad for grad in grads] if present else None

    return ParameterGrads(
        of_branches(targets.biases),
        of_branches(targets.gammas),
        of_branches(targets.betas),
        _gate_tensors(targets, m, tape),
    )


def _gate_tensors(t: UnitTensors, m: int, tape: Tape) -> GateTensors:
    reduce_weight = tape.contiguous(t.reduce_weight.flatten(1))
    select_weights = [tape.contiguous(weight.flatten(1)) for weight in t.select_weights]
    select_biases = [tape.contiguous(bias) for bias in t.select_biases if bias is not None]
    if len(select_weights) < m:  # of all branches in one
        select_weights = [*select_weights[0].view(m, -1, reduce_weight.shape[0]).unbind(0)]
        select_biases = [part for bias in select_biases for part in bias.view(m, -1).unbind(0)]
    return GateTensors(
        reduce_weight,
        tape.contiguous_or_none(t.reduce_bias),
        tape.contiguous_or_none(t.gate_gamma),
        tape.contiguous_or_none(t.gate_beta),
        tuple(select_weights),
        tuple(select_biases) or None,
    )


def _gate_hidden(unit: TrainingUnit) -> GateHidden:
    norms = unit.norms
    return GateHidden(norms.gate_statistics, norms.epsilons[-1], norms.gate_group, unit.spec.gate_has_relu)
