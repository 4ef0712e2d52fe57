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
        gamma, beta: ``[d]``, of its norm.
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
        h: ``[N, d]``, before the norm.
        mean, rstd: ``[d]``.
        size: the samples behind the statistics, a tensor of no dimensions.
        attention: ``[N, M, C]``.
    """

    s: Tensor
    h: Tensor
    mean: Tensor
    rstd: Tensor
    size: Tensor
    attention: Tensor


class GateGrads(NamedTuple):
    """Gradients of the pooled features, ``[N, C]``, and of the parameters, of any part that the gate has."""

    s: Tensor
    reduce_weight: Tensor
    reduce_bias: Tensor
    gamma: Tensor
    beta: Tensor
    select_weight: Tensor
    select_bias: Tensor


def gate_fwd(
    s: Tensor, tensors: GateTensors, norm: GateNorm, running: tuple[Tensor, Tensor] | None
) -> tuple[GateState, Tensor]:
    """The attention with what its gradient needs, and the variance ``[d]`` over the batch (Eqs. 3 and 5)."""
    h = _linear(s, tensors.reduce_weight, tensors.reduce_bias)
    n = h.shape[0]
    count = h.new_full((), n)
    if norm.kind == "batch":
        var, mean = torch.var_mean(h, 0, correction=0)
        if norm.group:
            mean, var, count = gather_moments(mean, var, n, norm.group)
    elif running is not None:
        mean, var = (statistic.to(torch.float32, copy=True) for statistic in running)
    else:
        mean, var = torch.zeros_like(h[0]), torch.ones_like(h[0])
    rstd = torch.ones_like(var) if norm.kind == "none" else (var + norm.epsilon).rsqrt()
    _, _, z = _descriptor(h, mean, rstd, tensors, norm)
    logits = _linear(z, tensors.select_weight, tensors.select_bias)
    attention = logits.unflatten(1, (-1, s.shape[1])).softmax(1)
    return GateState(s, h, mean, rstd, count, attention), var


def gate_bwd(grad: Tensor, state: GateState, tensors: GateTensors, norm: GateNorm) -> GateGrads:
    """Gradients from that of the attention, ``[N, M, C]``."""
    a = state.attention
    dlogits = (a * (grad - (a * grad).sum(1, keepdim=True))).flatten(1)
    h_hat, mask, z = _descriptor(state.h, state.mean, state.rstd, tensors, norm)
    dz = (dlogits @ tensors.select_weight.float()) * mask
    beta, gamma = dz.sum(0), (dz * h_hat).sum(0)
    dh = dz
    if norm.kind == "batch":
        sums = torch.stack([beta, gamma])
        if norm.group:
            sums = sum_over(sums, norm.group)
        dbeta, dgamma = sums / state.size
        dh = dz - dbeta - h_hat * dgamma
    if norm.kind != "none":
        dh = dh * (state.rstd if tensors.gamma is None else state.rstd * tensors.gamma.float())
    return GateGrads(
        s=dh @ tensors.reduce_weight.float(),
        reduce_weight=dh.T @ state.s,
        reduce_bias=dh.sum(0),
        gamma=gamma,
        beta=beta,
        select_weight=dlogits.T @ z,
        select_bias=dlogits.sum(0),
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.float(), None if bias is None else bias.float())


def _descriptor(
    h: Tensor, mean: Tensor, rstd: Tensor, tensors: GateTensors, norm: GateNorm
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized h, where the activation hands gradients on, and z, ``[N, d]`` each."""
    h_hat = h if norm.kind == "none" else (h - mean) * rstd
    z = h_hat
    if tensors.gamma is not None:
        z = z * tensors.gamma.float()
    if tensors.beta is not None:
        z = z + tensors.beta.float()
    if not norm.has_relu:
        return h_hat, torch.ones_like(z), z
    return h_hat, (~(z <= 0)).to(z.dtype), z.relu()
