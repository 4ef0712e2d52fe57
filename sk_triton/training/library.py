"""The branches' convolutions and their gradients by the library, as steps of a training pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import branch_inputs
from ..library import LibraryCall, convolution_grads
from ..spec import BranchSpec, SKSpec
from .tensors import UnitTensors


def convolution_calls(x: Tensor, y: Tensor, spec: SKSpec, tensors: UnitTensors) -> list[LibraryCall]:
    """Write the branches' convolutions with their biases to y ``[M, N, H', W', C]``, of an x with adjacent channels."""
    operands = zip(branch_inputs(x, spec), tensors.weights, tensors.biases, y.unbind(0), strict=True)
    return [
        LibraryCall(partial(_convolve, branch=branch, stride=spec.stride), own)
        for branch, own in zip(spec.branches, operands, strict=True)
    ]


def gradient_call(
    x: Tensor, dy: Tensor, spec: SKSpec, weights: Sequence[Tensor], needs: Sequence[bool]
) -> LibraryCall:
    """Gives the gradients of x and of the weights, those that `needs` names: of x with adjacent channels, and of dy
    ``[M, N, H', W', C]``. Those of the weights are like the weights in dtype and layout."""
    gradients = [own.permute(0, 3, 1, 2) for own in dy.unbind(0)]
    return LibraryCall(
        partial(_gradients, spec=spec, needs=tuple(needs)),
        (*gradients, *branch_inputs(x, spec), *weights),
    )


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *, branch: BranchSpec, stride: int
) -> tuple[()]:
    if bias is not None:
        bias = bias.to(x.dtype)
    found = F.conv2d(x, weight.to(x.dtype), bias, stride, branch.padding, branch.dilation, branch.groups)
    y.copy_(found.permute(0, 2, 3, 1))
    return ()


def _gradients(*tensors: Tensor, spec: SKSpec, needs: tuple[bool, ...]) -> list[Tensor]:
    """Of the gradient of each branch's convolution, then its input, then its weight."""
    m, needs_dx = spec.num_branches, needs[0]
    inputs: list[Tensor] = []
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    for dy, x, weight, branch, needs_weight in zip(
        tensors[:m], tensors[m : 2 * m], tensors[2 * m :], spec.branches, needs[1:], strict=True
    ):
        if not needs_dx and not needs_weight:
            continue
        needed = needs_dx, needs_weight
        dx, dw = convolution_grads(dy, x, weight.to(x.dtype), branch, spec.stride, needed)
        if dx is not None:
            inputs.append(dx)
        if dw is not None:
            found.append(dw)
            wanted.append(weight)
    _lay_out(found, wanted)
    if not needs_dx:
        return found
    if spec.split_input:
        return [torch.cat(inputs, 1), *found]
    dx = inputs[0]
    for own in inputs[1:]:
        dx += own
    return [dx, *found]


def _lay_out(found: list[Tensor], likes: Sequence[Tensor]) -> None:
    """Copies what differs in dtype or strides from what it is to be like."""
    differing = [
        i
        for i, (own, like) in enumerate(zip(found, likes, strict=True))
        if own.dtype != like.dtype or own.stride() != like.stride()
    ]
    if differing:
        copies = [torch.empty_like(likes[i]) for i in differing]
        torch._foreach_copy_(copies, [found[i] for i in differing])
        for i, copy in zip(differing, copies, strict=True):
            found[i] = copy
