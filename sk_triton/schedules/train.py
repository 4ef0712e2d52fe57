"""Schedule "train": the unit with batch statistics, and its gradient.

Forward: convolve, statistics, pool, gate, select. Backward: one reduction, the gate's gradient, then the branches'
(:func:`branch_backward`). Derivation: `kernels/README.md`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import workload_of
from ..distributed import gather_moments, sum_over
from ..gate_training import GateNorm, GateState, GateTensors, gate_bwd, gate_fwd
from ..kernels.batch_stats import combine_moments_fwd, moment_tiles, tile_moments_fwd
from ..kernels.branch_conv import branch_conv_fwd, branch_train_fwd
from ..kernels.geometry import cdiv, tiles
from ..kernels.norm_bwd import norm_bwd
from ..kernels.packing import pack_branch_weights
from ..kernels.pooled_moments import pooled_moments_fwd
from ..kernels.select import select_fwd
from ..kernels.select_bwd import select_bwd
from ..layout import memory_format, with_adjacent_channels, with_spaced_pixels
from ..plan import Plan
from ..spec import SKSpec
from ..training import NormSettings, UnitTensors
from ..training_plan import plan_training


class TrainingUnit(NamedTuple):
    """What a call computes with: `running` holds mean and variance of each norm of kind "r"."""

    spec: SKSpec
    tensors: UnitTensors
    running: tuple[Tensor, ...]
    norms: NormSettings


class Saved(NamedTuple):
    """What the gradient needs besides the input and the parameters.

    Attributes:
        y: ``[M, N, H', W', C]``, the branches' convolutions; empty where they will be computed again.
        mean, rstd: ``[M, C]`` fp32, of the norms; 0 and 1 without them.
        count: ``[M]`` fp32, values behind each branch's statistics.
        active, pooled: ``[N, M, C]`` fp32, of `pooled_moments_fwd`.
        s, h, gate_mean, gate_rstd, gate_count, attention: :class:`.gate_training.GateState`.
    """

    y: Tensor
    mean: Tensor
    rstd: Tensor
    count: Tensor
    active: Tensor
    pooled: Tensor
    s: Tensor
    h: Tensor
    gate_mean: Tensor
    gate_rstd: Tensor
    gate_count: Tensor
    attention: Tensor


class _Norm(NamedTuple):
    """The branches' norms as the kernels read them: ``[M, C]`` fp32 each."""

    mean: Tensor
    rstd: Tensor
    gamma: Tensor
    beta: Tensor


def forward(x: Tensor, unit: TrainingUnit, *, save: str) -> list[Tensor]:
    """The outputs of the operator ``sk_triton::unit_fwd``."""
    spec, plan = unit.spec, plan_training(workload_of(x, unit.spec))
    out_format = memory_format(x)
    x = with_adjacent_channels(x)
    y, moments = convolve(x, unit, plan)
    m, n, h, w, c = y.shape
    mean, var, count, unbiased = _statistics(y, moments, unit, plan)
    rstd = _rstd(var, unit)
    norm = _norm(mean, rstd, unit)
    active, pooled = _reduce(pooled_moments_fwd, (y, *norm), unit, plan, (n, m, c), h * w)
    s = torch.addcmul(norm.gamma * pooled, norm.beta, active).sum(1) / (h * w)
    state, gate_var = gate_fwd(s, _gate_tensors(unit), _gate_norm(unit), _gate_running(unit))
    v = torch.empty((n, c, h, w), dtype=x.dtype, device=x.device, memory_format=out_format)
    assert plan.select is not None
    select_fwd(
        y,
        state.attention,
        v,
        norm=norm if spec.branch_norm else None,
        has_relu=plan.has_relu,
        config=plan.select,
    )()
    if save == "input":
        y = y.new_empty(0)
    saved = Saved(y, mean, rstd, count, active, pooled, *state)
    # Outputs of an operator must not share memory.
    return [v, mean.clone(), unbiased, state.mean.clone(), _unbiased(gate_var, state.count), *saved]


def backward(dv: Tensor, x: Tensor, unit: TrainingUnit, saved: Saved, needs: list[bool]) -> list[Tensor]:
    """The outputs of the operator ``sk_triton::unit_bwd``."""
    plan = plan_training(workload_of(x, unit.spec))
    in_format = memory_format(x)
    x = with_adjacent_channels(x)
    dv = with_spaced_pixels(dv)
    y = saved.y if saved.y.numel() else convolve(x, unit, plan)[0]
    m, n, h, w, c = y.shape
    norm = _norm(saved.mean, saved.rstd, unit)
    grad, scaled = _reduce(select_bwd, (dv, y, *norm), unit, plan, (n, m, c), h * w)
    state = GateState(*saved[6:])
    d_attention = torch.addcmul(norm.gamma * scaled, norm.beta, grad)
    gate = gate_bwd(d_attention, state, _gate_tensors(unit), _gate_norm(unit))
    g = gate.s / (h * w)
    a = state.attention
    dbeta = torch.addcmul(a * grad, g[:, None], saved.active).sum(0)
    dgamma = torch.addcmul(a * scaled, g[:, None], saved.pooled).sum(0)

    parts = [needs[0], *UnitTensors.from_flat(_spread(needs[1:], unit)).weights]
    dx, weights = None, [None] * m
    if any(parts):
        dx, weights = branch_backward(
            x, dv, y, a, g, norm, *_batch_terms(dbeta, dgamma, saved.count, unit), unit, plan, parts
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
    present = [(p, grad) for p, grad in zip(unit.tensors.flat(), grads.flat(), strict=True) if p is not None]
    for (parameter, grad), is_needed in zip(present, needs[1:], strict=True):
        if is_needed:
            found.append(torch.empty_like(parameter).copy_(grad))
    return found


def convolve(x: Tensor, unit: TrainingUnit, plan: Plan) -> tuple[Tensor, list[tuple[slice, Tensor]]]:
    """The branches' convolutions with their biases, of an input with adjacent channels.

    Returns:
        y ``[M, N, H', W', C]``, and for each launch that takes them its branches and their moments by tiles.
    """
    spec, tensors = unit.spec, unit.tensors
    n, _, h_in, w_in = x.shape
    h, w = spec.output_size(h_in, w_in)
    y = x.new_empty((spec.num_branches, n, h, w, spec.out_channels))
    if not plan.branch_launches:
        _convolve_by_library(x, unit, y)
    found = []
    for launch in plan.branch_launches:
        members = slice(launch.start, launch.stop)
        weights = [weight.float() for weight in tensors.weights[members]]
        biases = [bias.float() for bias in tensors.biases[members] if bias is not None]
        tile_count = math.prod(tiles(launch.shape, launch.config, h, w))
        x_in = x[:, launch.start * spec.branch_in_channels :] if spec.split_input else x
        packed = pack_branch_weights(weights, launch.shape, launch.config, x.dtype)
        shift = torch.stack(biases) if biases else None
        settings: dict[str, Any] = {
            "shape": launch.shape,
            "allow_tf32": plan.allow_tf32,
            "config": launch.config,
        }
        if launch.task == "train":
            sample_tiles = cdiv(n, launch.config.BLOCK_N) * tile_count
            size = (launch.stop - launch.start, 3, sample_tiles, spec.out_channels)
            moments = x.new_empty(size, dtype=torch.float32)
            branch_train_fwd(x_in, packed, shift, y[members], moments, **settings)()
            found.append((members, moments))
        else:
            partial = x.new_empty((n, tile_count, spec.out_channels), dtype=torch.float32)
            branch_conv_fwd(x_in, packed, shift, y[members], partial, has_relu=False, **settings)()
    return y, found


def _convolve_by_library(x: Tensor, unit: TrainingUnit, y: Tensor) -> None:
    for m, (x_m, conv) in enumerate(zip(_inputs(x, unit.spec), unit.spec.branches, strict=True)):
        weight, bias = unit.tensors.weights[m].to(x.dtype), unit.tensors.biases[m]
        if bias is not None:
            bias = bias.to(x.dtype)
        y_m = F.conv2d(x_m, weight, bias, unit.spec.stride, conv.padding, conv.dilation, conv.groups)
        y[m].copy_(y_m.permute(0, 2, 3, 1))


def branch_backward(
    x: Tensor,
    dv: Tensor,
    y: Tensor,
    attention: Tensor,
    pooled_grad: Tensor,
    norm: _Norm,
    dbeta: Tensor,
    dgamma: Tensor,
    unit: TrainingUnit,
    plan: Plan,
    needs: list[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the input and of the convolutions' weights.

    Args:
        x: ``[N, in_channels, H, W]`` with adjacent channels.
        dv: ``[N, C, H', W']`` with adjacent channels and equally spaced pixels.
        y: ``[M, N, H', W', C]``, the branches' convolutions.
        attention: ``[N, M, C]`` fp32.
        pooled_grad: ``[N, C]`` fp32, the gradient of every pixel's share in the pooled features.
        norm: mean, rstd, gamma, beta: ``[M, C]`` fp32 each.
        dbeta, dgamma: ``[M, C]`` fp32, the norms' gradients over the number of values; 0 for running statistics.
        needs: whether the input's, and each weight's, gradient is wanted.

    Returns:
        ``[N, in_channels, H, W]``, and M times ``[C, C_branch_in / groups, k, k]``, in the dtype of x; None where not
        wanted.
    """
    spec = unit.spec
    assert plan.select is not None
    dy = torch.empty_like(y)
    norm_bwd(
        dv,
        y,
        attention,
        pooled_grad,
        *norm,
        dbeta,
        dgamma,
        dy,
        has_norm=spec.branch_norm,
        has_relu=plan.has_relu,
        config=plan.select,
    )()
    inputs, weights = [], []
    for m, (x_m, conv) in enumerate(zip(_inputs(x, spec), spec.branches, strict=True)):
        dx_m, dw_m, _ = torch.ops.aten.convolution_backward(
            dy[m].permute(0, 3, 1, 2),
            x_m,
            unit.tensors.weights[m].to(x.dtype),
            None,
            [spec.stride] * 2,
            [conv.padding] * 2,
            [conv.dilation] * 2,
            False,
            [0, 0],
            conv.groups,
            [needs[0], needs[1 + m], False],
        )
        inputs.append(dx_m)
        weights.append(dw_m)
    if not needs[0]:
        return None, weights
    if spec.split_input:
        return torch.cat(inputs, 1), weights
    dx = inputs[0]
    for dx_m in inputs[1:]:
        dx = dx + dx_m
    return dx, weights


def _inputs(x: Tensor, spec: SKSpec) -> list[Tensor]:
    """What each branch reads."""
    if spec.split_input:
        return list(x.split(spec.branch_in_channels, 1))
    return [x] * spec.num_branches


def _statistics(
    y: Tensor, found: list[tuple[slice, Tensor]], unit: TrainingUnit, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance ``[M, C]`` that the norms take, values behind them ``[M]``, and the unbiased variance."""
    m, n, h, w, c = y.shape
    pixels = n * h * w
    kinds = unit.norms.kinds[:m]
    mean = y.new_zeros((m, c), dtype=torch.float32)
    var = torch.ones_like(mean)
    count = mean.new_full((m,), pixels)
    if "b" in kinds:
        assert plan.reduction is not None
        measured = {i for members, _ in found for i in range(members.start, members.stop)}
        for i in {*range(m)} - measured:
            moments = mean.new_empty((1, 3, moment_tiles(pixels, plan.reduction), c))
            tile_moments_fwd(y[i : i + 1], moments, config=plan.reduction)()
            found = [*found, (slice(i, i + 1), moments)]
        for members, moments in found:
            combine_moments_fwd(moments, mean[members], var[members], pixels=pixels)()
        own_mean, own_var = mean.clone(), var.clone()
        for name in sorted({*unit.norms.groups.split(",")[:m]} - {""}):
            members = [i for i, group in enumerate(unit.norms.groups.split(",")[:m]) if group == name]
            joined = gather_moments(own_mean, own_var, pixels, name)
            for i in members:
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


def _norm(mean: Tensor, rstd: Tensor, unit: TrainingUnit) -> _Norm:
    def stack(parts: tuple[Tensor | None, ...], default: float) -> Tensor:
        rows = [torch.full_like(mean[0], default) if part is None else part.float() for part in parts]
        return torch.stack(rows)

    return _Norm(mean, rstd, stack(unit.tensors.gammas, 1.0), stack(unit.tensors.betas, 0.0))


def _reduce(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    unit: TrainingUnit,
    plan: Plan,
    size: tuple[int, int, int],
    pixels: int,
) -> tuple[Tensor, Tensor]:
    """The two sums over pixels, ``[N, M, C]`` fp32, of a kernel that takes them by tiles."""
    config = plan.reduction
    assert config is not None
    tile_count = cdiv(pixels, config.BLOCK_P * config.STEPS)
    first = tensors[0].new_empty((tile_count, *size), dtype=torch.float32)
    second = torch.empty_like(first)
    kernel(*tensors, first, second, has_norm=unit.spec.branch_norm, has_relu=plan.has_relu, config=config)()
    return (first[0], second[0]) if tile_count == 1 else (first.sum(0), second.sum(0))


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


def _bias_grads(dbeta: Tensor, norm: _Norm, unit: TrainingUnit) -> list[Tensor]:
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
