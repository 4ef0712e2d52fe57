"""The gradients of the branches: by the kernels in one go where they can, else written out for the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.branch_grad import branch_grad, reduce_weight_grad
from ..kernels.gather import grad_weight_launch
from ..kernels.grad_geometry import partial_shape
from ..kernels.grad_terms import grad_terms
from ..kernels.norm_bwd import norm_bwd
from ..plan import Plan
from .branches import BranchNorm, TrainingUnit
from .library import gradient_call
from .tape import Tape


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
    needs: Sequence[bool],
    tape: Tape,
) -> Sequence[Tensor]:
    """The gradients of the input and of the convolutions' weights, those that `needs` names.

    Args:
        x: ``[N, in_channels, H, W]`` with adjacent channels.
        y: ``[M, N, H', W', C]``, the branches' convolutions, behind the ReLU or not.
        needs: of x and of the M weights, one at least.
    """
    by = _through_library if plan.gradient is None else _through_kernels
    return by(x, y, upstream, unit, plan, needs, tape)


def _through_kernels(
    x: Tensor,
    y: Tensor,
    upstream: Upstream,
    unit: TrainingUnit,
    plan: Plan,
    needs: Sequence[bool],
    tape: Tape,
) -> list[Tensor]:
    """The branches' own gradients are rebuilt from `dv` and `y` wherever they are read, and never written."""
    config = plan.gradient
    assert config is not None
    (launch,) = plan.branch_launches
    shape, weights = launch.shape, [tape.filling_memory(weight) for weight in unit.tensors.weights]
    n, _, h, w = x.shape
    partial = x.new_empty(partial_shape(shape, config, n, h, w), dtype=torch.float32)
    dx, *grads = (torch.empty_like(tensor) for tensor in (x, *unit.tensors.weights))
    dv, attention, pooled, norm, dbeta, dgamma = upstream
    has_norm = unit.spec.branch_norm
    terms = attention.new_empty((*attention.shape, 6 if has_norm else 2))
    packed, gather = grad_weight_launch(weights, shape, config, x.dtype)
    settings: dict[str, Any] = {"shape": shape, "config": config}
    for step in (
        grad_terms(attention, pooled, *norm, dbeta, dgamma, terms, has_norm=has_norm),
        gather,
        *branch_grad(x, dv, y, terms, packed, dx, partial, has_relu=unit.spec.branch_has_relu, **settings),
        *reduce_weight_grad(partial, grads, **settings),
    ):
        tape.run(step)
    return [grad for grad, is_needed in zip((dx, *grads), needs, strict=True) if is_needed]


def _through_library(
    x: Tensor,
    y: Tensor,
    upstream: Upstream,
    unit: TrainingUnit,
    plan: Plan,
    needs: Sequence[bool],
    tape: Tape,
) -> Sequence[Tensor]:
    """The branches' own gradients are written out."""
    assert plan.select is not None
    dy = torch.empty_like(y)
    dv, attention, pooled, norm, dbeta, dgamma = upstream
    settings: dict[str, Any] = {
        "has_norm": unit.spec.branch_norm,
        "has_relu": unit.spec.branch_has_relu,
        "config": plan.select,
    }
    tape.run(norm_bwd(dv, y, attention, pooled, *norm, dbeta, dgamma, dy, **settings))
    return tape.call(gradient_call(x, dy, unit.spec, unit.tensors.weights, needs))
