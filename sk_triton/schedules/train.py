"""Schedule "train": the unit with batch statistics, and its gradient.

Forward: convolve, statistics, pool, gate, select. Backward: one reduction, the gate's gradient, then the branches'
(:func:`.training_gradients.branch_backward`). Derivation: `kernels/README.md`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import gather_moments, sum_over
from ..gate_training import GateNorm, GateState, GateTensors, gate_bwd, gate_fwd
from ..kernels.batch_stats import combine_moments_fwd
from ..kernels.select_bwd import select_bwd
from ..layout import empty_output, memory_format, with_adjacent_channels, with_spaced_pixels
from ..plan import Plan
from ..training import UnitTensors
from ..training_branches import BranchNorm, TrainingUnit, convolve, sums_over_pixels
from ..training_forward import FoldedBranches, StoredBranches
from ..training_gradients import Upstream, branch_backward


class Saved(NamedTuple):
    """What the gradient needs besides the input and the parameters.

    Attributes:
        y: ``[M, N, H', W', C]``, the branches' convolutions.
        mean, rstd: ``[M, C]`` fp32, of the norms; empty without them.
        sizes: ``[M]`` fp32, values behind each branch's statistics; empty where no group shares them.
        affine: fp32, beta then gamma of every branch's norm, and of the gate's; nothing of norms that are not there.
        sums: ``[2, N, M, C]``, active and pooled of `pooled_moments_fwd`. They and y are empty where they will be
            computed again.
        s, h, z, gate_mean, gate_rstd, gate_size, attention: :class:`.gate_training.GateState`.
    """

    y: Tensor
    mean: Tensor
    rstd: Tensor
    sizes: Tensor
    affine: Tensor
    sums: Tensor
    s: Tensor
    h: Tensor
    z: Tensor
    gate_mean: Tensor
    gate_rstd: Tensor
    gate_size: Tensor
    attention: Tensor


def forward(x: Tensor, unit: TrainingUnit, plan: Plan, *, save: str) -> list[Tensor]:
    """The outputs of :func:`.training_ops.unit_fwd`."""
    v = empty_output(x, unit.spec)
    x = with_adjacent_channels(x)
    branches = (FoldedBranches if plan.folded_launches else StoredBranches)(x, unit, plan)
    mean, rstd, sizes, unbiased = _statistics(branches, v, unit)
    affine = _affine(unit, v)
    norm = _norm(mean, rstd, affine, unit)
    s = branches.pool(norm)
    state, gate_unbiased = gate_fwd(s, _gate_tensors(affine, unit), _gate_norm(unit), _gate_running(unit))
    branches.select(norm, state.attention, v)
    kept = (branches.y, branches.sums)
    y, sums = kept if save == "branches" else (t.new_empty(0) for t in kept)
    # Outputs of an operator must not share memory.
    return [v, unbiased, gate_unbiased, *Saved(y, mean, rstd, sizes, affine, sums, *state)]


def backward(
    dv: Tensor, x: Tensor, unit: TrainingUnit, plan: Plan, saved: Saved, needs: list[bool]
) -> list[Tensor]:
    """The outputs of :func:`.training_ops.unit_bwd`."""
    in_format = memory_format(x)
    x = with_adjacent_channels(x)
    dv = with_spaced_pixels(dv)
    y, sums = saved.y, saved.sums
    norm = _norm(saved.mean, saved.rstd, saved.affine, unit)
    if y.numel():
        grads = sums_over_pixels(select_bwd, (dv, y, *norm.operands), 2, y, unit, plan)
    else:
        y, _ = convolve(x, unit, plan)
        both = sums_over_pixels(select_bwd, (dv, y, *norm.operands), 4, y, unit, plan)
        grads, sums = both[:2], both[2:]
    m, n, h, w, _ = y.shape
    state = GateState(*saved[6:])
    # Of beta, then of gamma: what multiplies them, summed over pixels, is in `grads` and in `sums`.
    d_attention = (grads * norm.affine[:, None]).sum(0) if unit.spec.branch_norm else grads[1]
    gate = gate_bwd(d_attention, state, _gate_tensors(saved.affine, unit), _gate_norm(unit))
    g = gate.s / (h * w)
    a = state.attention
    d_affine = torch.addcmul(a * grads, g[:, None], sums).sum(1)
    dbeta, dgamma = d_affine.unbind(0)

    parts = [needs[0], *_spread(needs[1:], unit)[:m]]
    dx: Tensor | None = None
    weights: list[Any] = [None] * m
    if any(parts):
        terms = _batch_terms(d_affine, n * h * w, saved.sizes, unit)
        dx, weights = branch_backward(x, y, Upstream(dv, a, g, norm, *terms.unbind(0)), unit, plan, parts)
    found = UnitTensors(
        weights=tuple(weights),
        biases=tuple(_bias_grads(dbeta, norm, unit)),
        gammas=dgamma.unbind(0),
        betas=dbeta.unbind(0),
        reduce_weight=gate.reduce_weight,
        reduce_bias=gate.reduce_bias,
        gate_gamma=gate.gamma,
        gate_beta=gate.beta,
        select_weight=gate.select_weight,
        select_bias=gate.select_bias,
    )
    present = [
        (p, value) for p, value in zip(unit.tensors.flat(), found.flat(), strict=True) if p is not None
    ]
    outputs, values = [], []
    for (parameter, value), is_needed in zip(present, needs[1:], strict=True):
        if is_needed:
            assert value is not None
            outputs.append(torch.empty_like(parameter))
            values.append(value)
    if outputs:
        torch._foreach_copy_(outputs, values)
    return outputs if dx is None else [dx.contiguous(memory_format=in_format), *outputs]


def _statistics(
    branches: StoredBranches | FoldedBranches, v: Tensor, unit: TrainingUnit
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and 1 / deviation ``[M, C]`` that the norms take, values behind them ``[M]`` where a group shares them, and
    the unbiased variance ``[M, C]`` where it is the batch's; each empty elsewhere."""
    n, c, h, w = v.shape
    m, pixels = unit.spec.num_branches, n * h * w
    kinds, groups = unit.norms.kinds[:m], unit.norms.groups.split(",")[:m]
    names = sorted({*groups} - {""})

    def absent() -> Tensor:
        return v.new_empty(0, dtype=torch.float32)  # one each: outputs of an operator must not share memory

    if not unit.spec.branch_norm:
        return absent(), absent(), absent(), absent()
    mean, var = (v.new_empty((m, c), dtype=torch.float32) for _ in range(2))
    sizes = mean.new_full((m,), pixels) if names else absent()
    if "b" in kinds:
        for members, moments in branches.moments():
            combine_moments_fwd(moments, mean[members], var[members], pixels=pixels)()
    if names:
        own_mean, own_var = mean.clone(), var.clone()
        for name in names:
            sharing = [i for i, group in enumerate(groups) if group == name]
            joined = gather_moments(own_mean, own_var, pixels, name)
            for i in sharing:
                mean[i], var[i], sizes[i] = joined[0][i], joined[1][i], joined[2]
    for i, kind in enumerate(kinds):
        if kind == "r":
            first = 2 * kinds[:i].count("r")
            mean[i], var[i] = unit.running[first], unit.running[first + 1]
    if names:
        unbiased = var * (sizes / (sizes - 1))[:, None]
    elif "b" in kinds:
        unbiased = var * (pixels / (pixels - 1))
    else:
        unbiased = absent()
    return mean, _rstd(var, unit), sizes, unbiased


def _rstd(var: Tensor, unit: TrainingUnit) -> Tensor:
    epsilons = unit.norms.epsilons[: unit.spec.num_branches]
    if len({*epsilons}) == 1:
        return (var + epsilons[0]).rsqrt_()
    return torch.stack([(var_m + epsilon).rsqrt() for var_m, epsilon in zip(var, epsilons, strict=True)])


def _affine(unit: TrainingUnit, v: Tensor) -> Tensor:
    """``Saved.affine``, from the parameters; 0 and 1 stand for those that a norm lacks."""
    t = unit.tensors

    def present(values: tuple[Tensor | None, ...], size: int, default: float) -> list[Tensor]:
        return [
            v.new_full((size,), default, dtype=torch.float32) if value is None else value for value in values
        ]

    c, d = unit.spec.out_channels, unit.spec.gate_width
    parts = [*present(t.betas, c, 0.0), *present(t.gammas, c, 1.0)] if unit.spec.branch_norm else []
    if unit.spec.gate_norm:
        parts += [*present((t.gate_beta,), d, 0.0), *present((t.gate_gamma,), d, 1.0)]
    return torch.cat(parts).float() if parts else v.new_empty(0, dtype=torch.float32)


def _norm(mean: Tensor, rstd: Tensor, affine: Tensor, unit: TrainingUnit) -> BranchNorm:
    if not unit.spec.branch_norm:
        return BranchNorm(mean, rstd, mean, mean, mean)
    branches = affine[: 2 * mean.numel()].view(2, *mean.shape)
    beta, gamma = branches.unbind(0)
    return BranchNorm(mean, rstd, gamma, beta, branches)


def _batch_terms(d_affine: Tensor, pixels: int, sizes: Tensor, unit: TrainingUnit) -> Tensor:
    """What the statistics' own gradients take from every pixel, of beta then of gamma: the norms' gradients over the
    number of values."""
    m = unit.spec.num_branches
    groups, kinds = unit.norms.groups.split(",")[:m], unit.norms.kinds[:m]
    names = sorted({*groups} - {""})
    if not names and "r" not in kinds:
        return d_affine / pixels
    joined = {name: sum_over(d_affine, name) for name in names}
    terms = d_affine.clone()
    for i, (name, kind) in enumerate(zip(groups, kinds, strict=True)):
        if kind != "b":
            terms[:, i] = 0
        elif name:
            terms[:, i] = joined[name][:, i]
    return terms / (sizes[:, None] if names else pixels)


def _bias_grads(dbeta: Tensor, norm: BranchNorm, unit: TrainingUnit) -> list[Tensor | None]:
    """Gradients of the convolutions' biases: none pass a norm that subtracts the batch's mean."""
    kinds, biases = unit.norms.kinds[: unit.spec.num_branches], unit.tensors.biases
    if all(bias is None for bias in biases):
        return [*biases]
    grads = dbeta * norm.gamma * norm.rstd if unit.spec.branch_norm else dbeta
    return [torch.zeros_like(grad) if kind == "b" else grad for grad, kind in zip(grads, kinds, strict=True)]


def _gate_tensors(affine: Tensor, unit: TrainingUnit) -> GateTensors:
    t, d = unit.tensors, unit.spec.gate_width
    beta, gamma = affine[-2 * d :].view(2, d).unbind(0) if unit.spec.gate_norm else (None, None)
    return GateTensors(t.reduce_weight, t.reduce_bias, gamma, beta, t.select_weight, t.select_bias)


def _gate_norm(unit: TrainingUnit) -> GateNorm:
    kinds = {"-": "none", "b": "batch", "r": "running"}
    return GateNorm(
        kinds[unit.norms.kinds[-1]],
        unit.norms.epsilons[-1],
        unit.norms.groups.split(",")[-1],
        unit.spec.gate_act == "relu",
    )


def _gate_running(unit: TrainingUnit) -> tuple[Tensor, Tensor] | None:
    return (unit.running[-2], unit.running[-1]) if unit.norms.kinds[-1] == "r" else None


def _spread(needs: list[bool], unit: TrainingUnit) -> list[bool]:
    """`needs` of the present parameters, over all that a unit may have."""
    remaining = iter(needs)
    return [next(remaining) if tensor is not None else False for tensor in unit.tensors.flat()]
