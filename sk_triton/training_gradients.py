"""The gradients of the branches: by the kernels in one go where they can, else written out for the library."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.branch_grad import branch_grad, reduce_weight_grad
from .kernels.grad_geometry import pack_grad_weights, partial_shape
from .kernels.grad_terms import grad_terms
from .kernels.norm_bwd import norm_bwd
from .library import inputs_of
from .plan import Plan
from .training_branches import BranchNorm, TrainingUnit

Gradients = tuple["Tensor | None", list["Tensor | None"]]


class Upstream(NamedTuple):
    """What the gradients of the branches' convolutions are made of, see "Training" in `kernels/README.md`.

    Attributes:
        dv: ``[N, C, H', W']`` with adjacent channels and equally spaced pixels.
        attention: ``[N, M, C]`` fp32.
        pooled: ``[N, C]`` fp32, the gradient of every pixel's share in the pooled features.
        norm: mean, rstd, gamma, beta: ``[M, C]`` fp32 each.
        dbeta, dgamma: ``[M, C]`` fp32, the norms' gradients over the number of values; 0 for running statistics.
    """

    dv: Tensor
    attention: Tensor
    pooled: Tensor
    norm: BranchNorm
    dbeta: Tensor
    dgamma: Tensor


def branch_backward(
    x: Tensor, y: Tensor, upstream: Upstream, unit: TrainingUnit, plan: Plan, needs: list[bool]
) -> Gradients:
    """Gradients of the input and of the convolutions' weights.

    Args:
        x: ``[N, in_channels, H, W]`` with adjacent channels.
        y: ``[M, N, H', W', C]``, the branches' convolutions.
        needs: whether the input's, and each weight's, gradient is wanted.

    Returns:
        ``[N, in_channels, H, W]``, and M times ``[C, C_branch_in / groups, k, k]``; None where not wanted.
    """
    through = _through_library if plan.gradient is None else _through_kernels
    return through(x, y, upstream, unit, plan, needs)


def _through_kernels(
    x: Tensor, y: Tensor, upstream: Upstream, unit: TrainingUnit, plan: Plan, needs: list[bool]
) -> Gradients:
    """The branches' own gradients are rebuilt from `dv` and `y` wherever they are read, and never written."""
    config = plan.gradient
    assert config is not None
    (launch,) = plan.branch_launches
    shape, weights = launch.shape, unit.tensors.weights
    n, _, h, w = x.shape
    dx = torch.empty_like(x)
    partial = x.new_empty(partial_shape(shape, config, n, h, w), dtype=torch.float32)
    grads = [x.new_empty(weight.shape, dtype=torch.float32) for weight in weights]
    dv, attention, pooled, norm, dbeta, dgamma = upstream
    has_norm = unit.spec.branch_norm
    terms = attention.new_empty((*attention.shape, 6 if has_norm else 2))
    for step in (
        grad_terms(attention, pooled, *norm.operands, dbeta, dgamma, terms, has_norm=has_norm),
        *branch_grad(
            x,
            dv,
            y,
            terms,
            pack_grad_weights(weights, shape, config, x.dtype),
            dx,
            partial,
            shape=shape,
            has_relu=plan.has_relu,
            config=config,
        ),
        *reduce_weight_grad(partial, grads, shape=shape, config=config),
    ):
        step()
    wanted = [grad if need else None for grad, need in zip(grads, needs[1:], strict=True)]
    return dx if needs[0] else None, wanted


def _through_library(
    x: Tensor, y: Tensor, upstream: Upstream, unit: TrainingUnit, plan: Plan, needs: list[bool]
) -> Gradients:
    spec = unit.spec
    assert plan.select is not None
    dy = torch.empty_like(y)
    norm_bwd(
        upstream.dv,
        y,
        upstream.attention,
        upstream.pooled,
        *upstream.norm.operands,
        upstream.dbeta,
        upstream.dgamma,
        dy,
        has_norm=spec.branch_norm,
        has_relu=plan.has_relu,
        config=plan.select,
    )()
    inputs: list[Tensor] = []
    weights: list[Tensor | None] = []
    for m, (x_m, conv) in enumerate(zip(inputs_of(x, spec), spec.branches, strict=True)):
        if not (needs[0] or needs[1 + m]):
            weights.append(None)
            continue
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
