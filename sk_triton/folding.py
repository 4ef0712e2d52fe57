"""Norms folded into the weights before them, and the gate as two affine maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .params import Branch, Gate


class FoldedGate(NamedTuple):
    """A gate of two affine maps, in float32 for 16-bit units: its tensors are small, its roundings reach every output.

    Attributes:
        reduce_weight, reduce_bias: ``[d, C]``, and ``[d]`` or None.
        select_weight, select_bias: ``[M * C, d]``, and ``[M * C]`` or None.
    """

    reduce_weight: Tensor
    reduce_bias: Tensor | None
    select_weight: Tensor
    select_bias: Tensor | None


class FoldedUnit(NamedTuple):
    """A unit whose branches and gate have no norms.

    Attributes:
        weights: M branches' ``[C, C_branch_in / groups, k, k]``, in one memory format.
        biases: M branches' ``[C]`` or None.
        gate: the gate.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    gate: FoldedGate


def fold_norm(norm: Any, bias: Tensor | None, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """`(scale, shift)` with `norm(y + bias) = y * scale + shift`, for an eval-mode batch norm or None.

    In float64 where `like` is, else in float32, rounded once.
    """
    dtype = sum_dtype(like.dtype)
    if norm is None:
        ones = torch.ones(width, dtype=dtype, device=like.device)
        return ones, torch.zeros_like(ones) if bias is None else bias.to(dtype)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
    return scale.to(dtype), shift.to(dtype)


def fold(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of an affine layer that equals one with `weight` and `bias` followed by an eval-mode batch norm.

    Args:
        weight: ``[C, ...]``.
        bias: ``[C]`` or None.
        norm: a norm that passes :func:`.reasons.norm_reason`, or None, which gives weight and bias themselves.
    """
    if norm is None:
        return weight, bias
    scale, shift = fold_norm(norm, bias, weight.shape[0], weight)
    scaled = weight.to(scale.dtype) * scale.view(-1, *(1,) * (weight.dim() - 1))
    return scaled.to(weight.dtype), shift.to(weight.dtype)


@torch.no_grad()
def fold_unit(
    branches: Sequence[Branch], gate: Gate, dtype: torch.dtype, memory_format: torch.memory_format
) -> FoldedUnit:
    """The unit in `dtype` without norms, weights in `memory_format`.

    Tensors that come out as they were are shared with the parameters, not copied.
    """
    weights, biases = [], []
    for branch in branches:
        weight, bias = _fold_in(dtype, branch.weight, branch.bias, branch.norm)
        # PyTorch's convolution converts weights to the format of its input at every call.
        weights.append(weight.contiguous(memory_format=memory_format))
        biases.append(bias)
    sums = sum_dtype(dtype)
    reduce_weight, reduce_bias = _fold_in(sums, gate.reduce_weight.flatten(1), gate.reduce_bias, gate.norm)
    folded = gate._replace(reduce_weight=reduce_weight, reduce_bias=reduce_bias)
    return FoldedUnit(tuple(weights), tuple(biases), affine_gate(folded, sums))


def _fold_in(
    dtype: torch.dtype, weight: Tensor, bias: Tensor | None, norm: Any
) -> tuple[Tensor, Tensor | None]:
    """:func:`fold` with results in `dtype`, rounded once."""
    wide = torch.promote_types(weight.dtype, dtype)
    weight, bias = fold(weight.detach().to(wide), None if bias is None else bias.detach().to(wide), norm)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def affine_gate(gate: Gate, dtype: torch.dtype) -> FoldedGate:
    """The gate's two maps in `dtype`, as autograd's functions of its parameters; its norm is left out."""
    return FoldedGate(
        gate.reduce_weight.flatten(1).to(dtype),
        None if gate.reduce_bias is None else gate.reduce_bias.to(dtype),
        torch.cat([w.flatten(1) for w in gate.select_weight]).to(dtype),
        None if gate.select_bias is None else torch.cat(gate.select_bias).to(dtype),
    )


def attend(s: Tensor, gate: FoldedGate, has_relu: bool) -> Tensor:
    """Attention of each branch, from the pooled features (Li et al., CVPR 2019, Eqs. 3 and 5).

    Args:
        s: ``[N, C]`` in the gate's dtype.
        has_relu: whether a ReLU stands between the gate's maps.

    Returns:
        a ``[N, M, C]``, which sums to 1 over M.
    """
    z = F.linear(s, gate.reduce_weight, gate.reduce_bias)
    if has_relu:
        z.relu_()
    logits = F.linear(z, gate.select_weight, gate.select_bias)
    return logits.view(s.shape[0], -1, s.shape[1]).softmax(dim=1)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a unit in `dtype` sums and computes its gate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
