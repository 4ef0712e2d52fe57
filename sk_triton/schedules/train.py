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
        mean, rstd: ``[M, C]`` fp32, of the norms; 0 and 1 without them.
        sizes: ``[M]`` fp32, values behind each branch's statistics.
        active, pooled: ``[N, M, C]`` fp32, of `pooled_moments_fwd`. They and y are empty where they will be computed
            again.
        s, h, gate_mean, gate_rstd, gate_size, attention: :class:`.gate_training.GateState`.
    """

    y: Tensor
    mean: Tensor
    rstd: Tensor
    sizes: Tensor
    active: Tensor
    pooled: Tensor
    s: Tensor
    h: Tensor
    gate_mean: Tensor
    gate_rstd: Tensor
    gate_size: Tensor
    attention: Tensor


def forward(x: Tensor, unit: TrainingUnit, plan: Plan, *, save: str) -> list[Tensor]:
    """The outputs of the operator ``sk_triton::unit_fwd``."""
    v = empty_output(x, unit.spec)
    x = with_adjacent_channels(x)
    branches = (FoldedBranches if plan.folded_launches else StoredBranches)(x, unit, plan)
    mean, var, count, unbiased = _statistics(branches, v, unit)
    rstd = _rstd(var, unit)
    norm = _norm(mean, rstd, unit)
    s = branches.pool(norm)
    state, gate_var = gate_fwd(s, _gate_tensors(unit), _gate_norm(unit), _gate_running(unit))
    branches.select(norm, state.attention, v)
    kept = (branches.y, branches.active, branches.pooled)
    y, active, pooled = kept if save == "branches" else (t.new_empty(0) for t in kept)
    saved = Saved(y, mean, rstd, count, active, pooled, *state)
    # Outputs of an operator must not share memory.
    return [v, mean.clone(), unbiased, state.mean.clone(), _unbiased(gate_var, state.size), *saved]


def backward(
    dv: Tensor, x: Tensor, unit: TrainingUnit, plan: Plan, saved: Saved, needs: list[bool]
) -> list[Tensor]:
    """The outputs of the operator ``sk_triton::unit_bwd``."""
    in_format = memory_format(x)
    x = with_adjacent_channels(x)
    dv = with_spaced_pixels(dv)
    y, active, pooled = saved.y, saved.active, saved.pooled
    norm = _norm(saved.mean, saved.rstd, unit)
    if y.numel():
        grad, scaled = sums_over_pixels(select_bwd, (dv, y, *norm), 2, y, unit, plan)
    else:
        y, _ = convolve(x, unit, plan)
        grad, scaled, active, pooled = sums_over_pixels(select_bwd, (dv, y, *norm), 4, y, unit, plan)
    m, _, h, w, _ = y.shape
    state = GateState(*saved[6:])
    d_attention = torch.addcmul(norm.gamma * scaled, norm.beta, grad)
    gate = gate_bwd(d_attention, state, _gate_tensors(unit), _gate_norm(unit))
    g = gate.s / (h * w)
    a = state.attention
    dbeta = torch.addcmul(a * grad, g[:, None], active).sum(0)
    dgamma = torch.addcmul(a * scaled, g[:, None], pooled).sum(0)

    parts = [needs[0], *_spread(needs[1:], unit)[:m]]
    dx: Tensor | None = None
    weights: list[Any] = [None] * m
    if any(parts):
        dx, weights = branch_backward(
            x,
            y,
            Upstream(dv, a, g, norm, *_batch_terms(dbeta, dgamma, saved.sizes, unit)),
            unit,
            plan,
            parts,
        )
    grads = UnitTensors(
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
    found = [] if dx is None else [dx.contiguous(memory_format=in_format)]
    present = [
        (p, value) for p, value in zip(unit.tensors.flat(), grads.flat(), strict=True) if p is not None
    ]
    for (parameter, value), is_needed in zip(present, needs[1:], strict=True):
        if is_needed:
            assert value is not None
            found.append(torch.empty_like(parameter).copy_(value))
    return found


def _statistics(
    branches: StoredBranches | FoldedBranches, v: Tensor, unit: TrainingUnit
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance ``[M, C]`` that the norms take, values behind them ``[M]``, and the unbiased variance."""
    n, c, h, w = v.shape
    m, pixels = unit.spec.num_branches, n * h * w
    kinds = unit.norms.kinds[:m]
    mean = v.new_zeros((m, c), dtype=torch.float32)
    var = torch.ones_like(mean)
    count = mean.new_full((m,), pixels)
    if "b" in kinds:
        for members, moments in branches.moments():
            combine_moments_fwd(moments, mean[members], var[members], pixels=pixels)()
        own_mean, own_var = mean.clone(), var.clone()
        for name in sorted({*unit.norms.groups.split(",")[:m]} - {""}):
            sharing = [i for i, group in enumerate(unit.norms.groups.split(",")[:m]) if group == name]
            joined = gather_moments(own_mean, own_var, pixels, name)
            for i in sharing:
                mean[i], var[i], count[i] = joined[0][i], joined[1][i], joined[2]
    for i, kind in enumerate(kinds):
        if kind == "r":
            first = 2 * kinds[:i].count("r")
            mean[i], var[i] = unit.running[first], unit.running[first + 1]
    return mean, var, count, _unbiased(var, count[:, None])


def _unbiased(var: Tensor, count: Tensor) -> Tensor:
    return var * (count / (count - 1))


def _rstd(var: Tensor, unit: TrainingUnit) -> Tensor:
    if not unit.spec.branch_norm:
        return torch.ones_like(var)
    epsilons = unit.norms.epsilons[: unit.spec.num_branches]
    if len({*epsilons}) == 1:
        return (var + epsilons[0]).rsqrt()
    return torch.stack([(var_m + epsilon).rsqrt() for var_m, epsilon in zip(var, epsilons, strict=True)])


def _norm(mean: Tensor, rstd: Tensor, unit: TrainingUnit) -> BranchNorm:
    def stack(parts: tuple[Tensor | None, ...], default: float) -> Tensor:
        rows = [torch.full_like(mean[0], default) if part is None else part.float() for part in parts]
        return torch.stack(rows)

    return BranchNorm(mean, rstd, stack(unit.tensors.gammas, 1.0), stack(unit.tensors.betas, 0.0))


def _batch_terms(dbeta: Tensor, dgamma: Tensor, count: Tensor, unit: TrainingUnit) -> tuple[Tensor, Tensor]:
    """What the statistics' own gradients take from every pixel: the norms' gradients over the number of values."""
    m = unit.spec.num_branches
    sums = torch.stack([dbeta, dgamma])
    groups, kinds = unit.norms.groups.split(",")[:m], unit.norms.kinds[:m]
    joined = {name: sum_over(sums, name) for name in sorted({*groups} - {""})}
    for i, (name, kind) in enumerate(zip(groups, kinds, strict=True)):
        if kind != "b":
            sums[:, i] = 0
        elif name:
            sums[:, i] = joined[name][:, i]
    sums /= count[:, None]
    return sums[0], sums[1]


def _bias_grads(dbeta: Tensor, norm: BranchNorm, unit: TrainingUnit) -> list[Tensor]:
    """Gradients of the convolutions' biases: none pass a norm that subtracts the batch's mean."""
    kinds = unit.norms.kinds[: unit.spec.num_branches]
    grads = dbeta * norm.gamma * norm.rstd
    return [torch.zeros_like(grads[m]) if kind == "b" else grads[m] for m, kind in enumerate(kinds)]


def _gate_tensors(unit: TrainingUnit) -> GateTensors:
    t = unit.tensors
    return GateTensors(
        t.reduce_weight, t.reduce_bias, t.gate_gamma, t.gate_beta, t.select_weight, t.select_bias
    )


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
