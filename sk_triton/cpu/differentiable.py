"""Gradients of a unit of linear branches that can be differentiated again, or batched, by PyTorch's own operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..folding import FoldedGate, attend, sum_dtype
from ..layout import branch_inputs, with_own_strides
from ..reasons import is_batched
from ..spec import SKSpec


def are_asked(dv: Tensor) -> bool:
    """Whether a backward pass is to give such gradients: under ``create_graph=True``, and of a batch of gradients."""
    return torch.is_grad_enabled() or is_batched(dv)


def convolutions(x: Tensor, parameters: Sequence[Tensor | None], spec: SKSpec) -> list[Tensor]:
    """The branches of x; `parameters` begin with M weights and M biases."""
    m = spec.num_branches
    return [
        F.conv2d(x_m, weight, bias, spec.stride, branch.padding, branch.dilation, branch.groups)  # type: ignore[arg-type]
        for x_m, weight, bias, branch in zip(
            branch_inputs(with_own_strides(x), spec),
            parameters[:m],
            parameters[m : 2 * m],
            spec.branches,
            strict=True,
        )
    ]


def unit_grads(
    x: Tensor, parameters: Sequence[Tensor | None], dv: Tensor, needs: Sequence[bool], spec: SKSpec
) -> list[Any]:
    """The gradients of x and of the parameters, M weights, M biases and the four tensors of
    :class:`..folding.FoldedGate`, that `needs` says; None for the others."""
    is_again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that a tensor which was computed from another is not differentiated by way of that.
        own = [None if t is None else t.view_as(t) for t in (x, *parameters)]
        asked = [t for t, is_needed in zip(own, needs, strict=True) if t is not None and is_needed]
        v = _unit(own, spec)
        found = iter(torch.autograd.grad(v, asked, dv, create_graph=is_again, allow_unused=True))
    return [
        next(found) if is_needed and t is not None else None for t, is_needed in zip(own, needs, strict=True)
    ]


def _unit(tensors: Sequence[Tensor | None], spec: SKSpec) -> Tensor:
    m, (x, *parameters) = spec.num_branches, tensors
    assert x is not None
    us = convolutions(x, parameters, spec)
    s = sum(u.mean((2, 3), dtype=sum_dtype(x.dtype)) for u in us)
    attention = attend(s, FoldedGate(*parameters[2 * m :]), spec.gate_has_relu)  # type: ignore[arg-type]
    a = attention.to(x.dtype)[..., None, None]
    return sum((u * a[:, i] for i, u in enumerate(us)), torch.zeros((), dtype=x.dtype))
