"""The gradients of the branches: by the kernels in one go where they can, else written out for the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels.branch_grad import branch_grad, reduce_weight_grad
from .kernels.gather import grad_weight_launch
from .kernels.grad_geometry import partial_shape
from .kernels.grad_terms import grad_terms
from .kernels.norm_bwd import norm_bwd
from .layout import branch_inputs
from .plan import Plan
from .steps import Tape
from .training_branches import BranchNorm, TrainingUnit


class Upstream(NamedTuple):
    """What the gradients of the branches' convolutions are made of, see "Training" in `kernels/README.md`.

    Attributes:
        dv: ``[N, C, H', W']`` with adjacent channels and equally spaced pixels.
        attention: ``[N, M, C]`` fp32.
        pooled: ``[N, C]`` fp32, every pixel's share in the gradient of the pooled features.
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
    x: Tensor,
    y: Tensor,
    upstream: Upstream,
    unit: TrainingUnit,
    plan: Plan,
    weight_grads: Sequence[Tensor | None],
    tape: Tape,
    *,
    needs_dx: bool,
) -> Tensor | None:
    """The gradient of the input, None where it is not wanted; writes those of the convolutions' weights.

    Args:
        x: ``[N, in_channels, H, W]`` with adjacent channels.
        y: ``[M, N, H', W', C]``, the branches' convolutions.
        weight_grads: M times ``[C, C_branch_in / groups, k, k]``, of any dtype, receive the weights'; None where a
            weight's is not wanted.
    """
    if plan.gradient is None:
        return _through_library(x, y, upstream, unit, plan, weight_grads, tape, needs_dx)
    dx = _through_kernels(x, y, upstream, unit, plan, weight_grads, tape)
    return dx if needs_dx else None


def _through_kernels(
    x: Tensor,
    y: Tensor,
    upstream: Upstream,
    unit: TrainingUnit,
    plan: Plan,
    weight_grads: Sequence[Tensor | None],
    tape: Tape,
) -> Tensor:
    """The branches' own gradients are rebuilt from `dv` and `y` wherever they are read, and never written."""
    config = plan.gradient
    assert config is not None
    (launch,) = plan.branch_launches
    shape, weights = launch.shape, [tape.filling_memory(weight) for weight in unit.tensors.weights]
    n, _, h, w = x.shape
    dx = torch.empty_like(x)
    partial = x.new_empty(partial_shape(shape, config, n, h, w), dtype=torch.float32)
    grads = [
        torch.empty_like(weight) if grad is None else grad
        for weight, grad in zip(weights, weight_grads, strict=True)
    ]
    dv, attention, pooled, norm, dbeta, dgamma = upstream
    has_norm = unit.spec.branch_norm
    terms = attention.new_empty((*attention.shape, 6 if has_norm else 2))
    packed, gather = grad_weight_launch(weights, shape, config, x.dtype)
    settings: dict[str, Any] = {"shape": shape, "config": config}
    for step in (
        grad_terms(attention, pooled, *norm, dbeta, dgamma, terms, has_norm=has_norm),
        gather,
        *branch_grad(x, dv, y, terms, packed, dx, partial, has_relu=plan.has_relu, **settings),
        *reduce_weight_grad(partial, grads, **settings),
    ):
        tape.run(step)
    return dx


def _through_library(
    x: Tensor,
    y: Tensor,
    upstream: Upstream,
    unit: TrainingUnit,
    plan: Plan,
    weight_grads: Sequence[Tensor | None],
    tape: Tape,
    needs_dx: bool,
) -> Tensor | None:
    spec = unit.spec
    assert plan.select is not None
    dy = torch.empty_like(y)
    dv, attention, pooled, norm, dbeta, dgamma = upstream
    settings: dict[str, Any] = {
        "has_norm": spec.branch_norm,
        "has_relu": plan.has_relu,
        "config": plan.select,
    }
    tape.run(norm_bwd(dv, y, attention, pooled, *norm, dbeta, dgamma, dy, **settings))
    tape.note_operators()
    inputs: list[Tensor] = []
    written, found = [], []
    for m, (x_m, conv) in enumerate(zip(branch_inputs(x, spec), spec.branches, strict=True)):
        grad = weight_grads[m]
        if not needs_dx and grad is None:
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
            [needs_dx, grad is not None, False],
        )
        inputs.append(dx_m)
        if grad is not None:
            written.append(grad)
            found.append(dw_m)
    if written:
        torch._foreach_copy_(written, found)
    if not needs_dx:
        return None
    if spec.split_input:
        return torch.cat(inputs, 1)
    dx = inputs[0]
    for dx_m in inputs[1:]:
        dx = dx + dx_m
    return dx
