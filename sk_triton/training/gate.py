"""The gate in training: forward with batch statistics, and its gradient, by kernels; but for a norm whose batch several
processes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.gate_params_bwd import gate_params_bwd
from ..kernels.gate_train import (
    gate_norm_fwd,
    gate_reduce_fwd,
    gate_select_fwd,
    summand_shape,
)
from ..kernels.gate_train_bwd import gate_norm_bwd, gate_reduce_bwd, gate_select_bwd
from ..kernels.running import Running
from .distributed import gather_moments, sum_over
from .tape import Tape


class GateTensors(NamedTuple):
    """Parameters of the gate, contiguous; those that it does not have are None.

    Attributes:
        reduce_weight, reduce_bias: ``[d, C]``, ``[d]``.
        gamma, beta: ``[d]``, of its norm.
        select_weights, select_biases: ``[C, d]`` and ``[C]`` of each branch.
    """

    reduce_weight: Tensor
    reduce_bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    select_weights: tuple[Tensor, ...]
    select_biases: tuple[Tensor, ...] | None


class GateHidden(NamedTuple):
    """What stands between the gate's maps: a norm, and whether a ReLU follows it.

    Attributes:
        statistics: of the norm, "batch", "given" or "none".
        epsilon, group: of the norm, as in :class:`.norms.NormSettings`.
    """

    statistics: str
    epsilon: float
    group: str
    has_relu: bool


class GateState(NamedTuple):
    """What the gradient needs, fp32.

    Attributes:
        s: ``[N, C]``, the pooled features.
        h, z: ``[N, d]``, before the norm and after the activation.
        mean, rstd: ``[d]``; empty without a norm.
        size: the samples behind the statistics, a tensor of no dimensions; empty outside of a group.
        attention: ``[N, M, C]``.
    """

    s: Tensor
    h: Tensor
    z: Tensor
    mean: Tensor
    rstd: Tensor
    size: Tensor
    attention: Tensor


class ParameterGrads(NamedTuple):
    """Where gradients are written, contiguous, of any dtype; those of parameters that a unit does not have are None.

    Attributes:
        biases, gammas, betas: ``[C]`` of each branch.
        gate: of the gate's parameters.
    """

    biases: Sequence[Tensor] | None
    gammas: Sequence[Tensor] | None
    betas: Sequence[Tensor] | None
    gate: GateTensors


class GateGrads(NamedTuple):
    """What the branches' gradients take from the gate's, fp32.

    Attributes:
        pooled: ``[N, C]``, every pixel's share in the gradient of the pooled features.
        affine: ``[2, M, C]``, the norms' gradients, of beta and then of gamma.
        terms: the same over the number of values for norms that take the batch's statistics, else 0.
    """

    pooled: Tensor
    affine: Tensor
    terms: Tensor


def train_gate_fwd(
    partial: Tensor,
    affine: Tensor | None,
    tensors: GateTensors,
    hidden: GateHidden,
    given: tuple[Tensor, ...],
    running: Running | None,
    *,
    branches: int,
    pixels: int,
    tape: Tape,
) -> tuple[GateState, Tensor, Tensor]:
    """The attention with what its gradient needs (Eqs. 3 and 5).

    Args:
        partial: sums over the pixels of tiles, ``[2, tiles, N, M, C]``, `active` and `pooled` of `pooled_moments_fwd`,
            or ``[1, tiles, N, 1, C]`` of all branches.
        affine: what multiplies them, ``[2, M, C]``; None if nothing does.
        given: the norm's mean and variance, where these are given.
        running: statistics that the batch's update, where kernels take these.
        branches: M.
        pixels: of an output.

    Returns:
        The state; the unbiased variance ``[d]`` over the batch, empty where there is no norm; the sums ``[2, N, M, C]``
        over all tiles, where `affine` multiplies them, else those of the first.
    """
    _, tiles, n, m, c = partial.shape
    d = tensors.reduce_weight.shape[0]

    def empty(*size: int) -> Tensor:
        return partial.new_empty(size)

    s, h, z, attention = empty(n, c), empty(n, d), empty(n, d), empty(n, branches, c)
    summands = empty(*summand_shape(n, c, d))
    total = empty(2, n, m, c) if affine is not None and tiles > 1 else None
    tape.run(
        gate_reduce_fwd(
            partial[0], partial[-1], partial if affine is None else affine, tensors.reduce_weight,
            total, s, summands, pixels=pixels, has_norm=affine is not None,
        )
    )  # fmt: skip
    # Statistics of a group are taken apart from the kernels, and so is what follows from them.
    statistics = "none" if hidden.group else hidden.statistics
    mean, rstd, var = (empty(d if statistics != "none" else 0) for _ in range(3))
    tape.run(
        gate_norm_fwd(
            summands, tensors.reduce_bias, tensors.gamma, tensors.beta, given, h, z, mean, rstd, var, running,
            statistics=statistics, epsilon=hidden.epsilon, has_relu=hidden.has_relu and not hidden.group,
        )
    )  # fmt: skip
    size = empty(0)
    if hidden.group:
        tape.note_operators()
        z, mean, rstd, var, size = _norm_over_group(h, tensors, hidden)
    tape.run(gate_select_fwd(z, tensors.select_weights, tensors.select_biases, attention))
    return GateState(s, h, z, mean, rstd, size, attention), var, partial[:, 0] if total is None else total


def train_gate_bwd(
    partial: Tensor,
    sums: Tensor | None,
    affine: Tensor | None,
    state: GateState,
    branch_norm: tuple[Tensor, Tensor],
    tensors: GateTensors,
    hidden: GateHidden,
    grads: ParameterGrads,
    *,
    batch_norms: Sequence[bool],
    pixels: int,
    tape: Tape,
) -> GateGrads:
    """Writes the gradients of all parameters but the convolutions' weights.

    Args:
        partial: sums over the pixels of tiles, ``[2, tiles, N, M, C]``, `grad` and `scaled` of `select_bwd`, and where
            `sums` is None `active` and `pooled` besides, ``[4, …]``, but for linear branches without norms.
        sums, affine: as :func:`train_gate_fwd` gave and took them.
        branch_norm: rstd and gamma of the branches' norms, ``[M, C]``.
        grads: receives them.
        batch_norms: whether each branch's norm takes the batch's statistics.
        pixels: of an output.
    """
    count, tiles, n, m, c = partial.shape
    d = tensors.reduce_weight.shape[0]

    def empty(*size: int) -> Tensor:
        return partial.new_empty(size)

    totals = empty(count, n, m, c) if tiles > 1 else None
    dlogits, summands = empty(n, m, c), empty(*summand_shape(n, c, d))
    tape.run(
        gate_select_bwd(
            partial, partial if affine is None else affine, state.attention, tensors.select_weights, totals, dlogits,
            summands, has_norm=affine is not None,
        )
    )  # fmt: skip
    found = partial[:, 0] if totals is None else totals

    dh, unused = empty(n, d), empty(d)
    dbias, dgamma, dbeta = (
        unused if grad is None else grad
        for grad in (grads.gate.reduce_bias, grads.gate.gamma, grads.gate.beta)
    )
    statistics = "none" if hidden.group else hidden.statistics
    tape.run(
        gate_norm_bwd(
            summands, state.h, state.z, state.mean, state.rstd, tensors.gamma, dh, dgamma, dbeta, dbias,
            statistics=statistics, has_relu=hidden.has_relu,
        )
    )  # fmt: skip
    if hidden.group:
        tape.note_operators()
        dh = _norm_over_group_bwd(dh, state, tensors, hidden, grads.gate)
    g, affine_grad, terms = empty(n, c), empty(2, m, c), empty(2, m, c)
    tape.run(gate_reduce_bwd(dh, tensors.reduce_weight, g, pixels=pixels))
    tape.run(
        gate_params_bwd(
            dh, state.s, state.z, dlogits, state.attention, g, found[:2], found[2:] if count > 2 else sums,
            *branch_norm, affine_grad, terms, grads.betas, grads.gammas, grads.biases, grads.gate.reduce_weight,
            grads.gate.select_weights, grads.gate.select_biases,
            batch_norms=batch_norms, values=n * pixels, has_norm=affine is not None,
        )
    )  # fmt: skip
    return GateGrads(g, affine_grad, terms)


def _norm_over_group(
    h: Tensor, tensors: GateTensors, hidden: GateHidden
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z, mean, rstd, unbiased variance and number of samples, with the statistics of a group's batch."""
    var, mean = torch.var_mean(h, 0, correction=0)
    mean, var, size = gather_moments(mean, var, h.shape[0], hidden.group)
    rstd = (var + hidden.epsilon).rsqrt()
    z = (h - mean) * rstd
    if tensors.gamma is not None:
        z *= tensors.gamma
    if tensors.beta is not None:
        z += tensors.beta
    if hidden.has_relu:
        z = z.relu_()
    return z, mean, rstd, var * (size / (size - 1)), size


def _norm_over_group_bwd(
    dz: Tensor, state: GateState, tensors: GateTensors, hidden: GateHidden, grads: GateTensors
) -> Tensor:
    """The gradient of h from that before the activation; writes those of the norm and of the bias before it."""
    h_hat = (state.h - state.mean) * state.rstd
    sums = torch.stack([dz.sum(0), (dz * h_hat).sum(0)])
    dbeta, dgamma = sum_over(sums, hidden.group) / state.size
    dh = (dz - dbeta - h_hat * dgamma) * state.rstd
    if tensors.gamma is not None:
        dh *= tensors.gamma
    for grad, value in ((grads.beta, sums[0]), (grads.gamma, sums[1]), (grads.reduce_bias, dh.sum(0))):
        if grad is not None:
            grad.copy_(value)
    return dh
