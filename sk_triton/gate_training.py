"""The gate in training: forward with batch statistics, and its gradient, in fp32 on small tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import gather_moments, sum_over


class GateTensors(NamedTuple):
    """Parameters of the gate; those that it does not have are None.

    Attributes:
        reduce_weight, reduce_bias: ``[d, C]``, ``[d]``.
        gamma, beta: ``[d]``, of its norm, fp32; None without a norm alone.
        select_weight, select_bias: ``[M * C, d]``, ``[M * C]``.
    """

    reduce_weight: Tensor
    reduce_bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    select_weight: Tensor
    select_bias: Tensor | None


class GateNorm(NamedTuple):
    """How the gate's norm acts: "none", "batch" or "running" statistics, and the group that shares a batch."""

    kind: str
    epsilon: float
    group: str
    has_relu: bool


class GateState(NamedTuple):
    """What the gradient needs.

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


class GateGrads(NamedTuple):
    """Gradients of the pooled features, ``[N, C]``, and of the parameters; None for biases that the gate lacks."""

    s: Tensor
    reduce_weight: Tensor
    reduce_bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    select_weight: Tensor
    select_bias: Tensor | None


def gate_fwd(
    s: Tensor, tensors: GateTensors, norm: GateNorm, running: tuple[Tensor, Tensor] | None
) -> tuple[GateState, Tensor]:
    """The attention with what its gradient needs, and the unbiased variance ``[d]`` over the batch, empty where it is
    not taken (Eqs. 3 and 5)."""
    h = _linear(s, tensors.reduce_weight, tensors.reduce_bias)
    mean, rstd, var, size = (h.new_empty(0) for _ in range(4))  # outputs of an operator must not share memory
    if norm.kind == "none":
        z = h.clone()
    elif norm.kind == "batch" and not norm.group:
        # Running statistics of momentum 1 are the batch's, without another reduction.
        var, unused = h.new_zeros((2, h.shape[1])).unbind(0)
        z, mean, rstd = torch.native_batch_norm(
            h, tensors.gamma, tensors.beta, unused, var, True, 1.0, norm.epsilon
        )
    else:
        if norm.group:
            var, mean = torch.var_mean(h, 0, correction=0)
            mean, var, size = gather_moments(mean, var, h.shape[0], norm.group)
        else:
            assert running is not None
            mean, var = (statistic.to(torch.float32, copy=True) for statistic in running)
        rstd = (var + norm.epsilon).rsqrt()
        if norm.group:
            var = var * (size / (size - 1))
        assert tensors.gamma is not None
        assert tensors.beta is not None
        z = torch.addcmul(tensors.beta, (h - mean) * rstd, tensors.gamma)
    if norm.has_relu:
        z = z.relu_()
    logits = _linear(z, tensors.select_weight, tensors.select_bias)
    attention = logits.unflatten(1, (-1, s.shape[1])).softmax(1)
    return GateState(s, h, z, mean, rstd, size, attention), var


def gate_bwd(grad: Tensor, state: GateState, tensors: GateTensors, norm: GateNorm) -> GateGrads:
    """Gradients from that of the attention, ``[N, M, C]``."""
    aten = torch.ops.aten
    dlogits = aten._softmax_backward_data(grad, state.attention, 1, torch.float32).flatten(1)
    dz = dlogits @ tensors.select_weight.float()
    if norm.has_relu:
        dz = aten.threshold_backward(dz, state.z, 0)
    gamma: Tensor | None = None
    beta: Tensor | None = None
    if norm.kind == "none":
        dh = dz
    elif norm.kind == "batch" and not norm.group:
        dh, gamma, beta = aten.native_batch_norm_backward(
            dz, state.h, tensors.gamma, None, None, state.mean, state.rstd, True, norm.epsilon, [True] * 3
        )
    else:
        assert tensors.gamma is not None
        h_hat = (state.h - state.mean) * state.rstd
        sums = torch.stack([dz.sum(0), (dz * h_hat).sum(0)])
        beta, gamma = sums
        if norm.group:
            dbeta, dgamma = sum_over(sums, norm.group) / state.size
            dz = dz - dbeta - h_hat * dgamma
        dh = dz * (state.rstd * tensors.gamma)
    return GateGrads(
        s=dh @ tensors.reduce_weight.float(),
        reduce_weight=dh.T @ state.s,
        reduce_bias=None if tensors.reduce_bias is None else dh.sum(0),
        gamma=gamma,
        beta=beta,
        select_weight=dlogits.T @ state.z,
        select_bias=None if tensors.select_bias is None else dlogits.sum(0),
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.float(), None if bias is None else bias.float())
