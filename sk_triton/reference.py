"""The oracle: a selective-kernel unit in plain eager PyTorch.

Equation numbers are those of Li, Wang, Hu, Yang, "Selective Kernel Networks", CVPR 2019. Runs in any floating
dtype on any device and is differentiable; every schedule of this project is judged against it. It checks
nothing: see :func:`sk_triton.functional.sk_conv`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import branch_inputs, memory_format
from .params import Branch, Gate
from .spec import SKSpec


def split(x: Tensor, branches: Sequence[Branch], spec: SKSpec) -> list[Tensor]:
    """Split (section 3.1): each branch sees the input at its own receptive field.

    Args:
        x: ``[N, in_channels, H, W]``.

    Returns:
        M tensors ``[N, C, H', W']``: the paper's U-tilde, U-hat, ...
    """
    us = []
    for x_m, branch, conv in zip(branch_inputs(x, spec), branches, spec.branches, strict=True):
        u = F.conv2d(x_m, branch.weight, branch.bias, spec.stride, conv.padding, conv.dilation, conv.groups)
        for step in (branch.norm, branch.drop, branch.act, branch.aa):
            if step is not None:
                u = step(u)
        us.append(u)
    return us


def fuse(us: Sequence[Tensor], gate: Gate) -> Tensor:
    """Fuse (Eqs. 1 to 3): the compact feature that guides the selection.

    Args:
        us: M tensors ``[N, C, H', W']``.

    Returns:
        z ``[N, d]``, where d is the number of rows of ``gate.reduce_weight`` (Eq. 4 chooses it).
    """
    u = reduce(operator.add, us)  # Eq. 1: U = U-tilde + U-hat
    s = u.mean((2, 3))  # Eq. 2: global average pooling
    z = F.linear(s, gate.reduce_weight.flatten(1), gate.reduce_bias)  # Eq. 3: z = delta(B(W s))
    z = z[:, :, None, None]  # the shape that 2-D norms and activations take
    for step in (gate.norm, gate.act):
        if step is not None:
            z = step(z)
    return z.flatten(1)


def attend(z: Tensor, gate: Gate, num_branches: int) -> Tensor:
    """Soft attention across the branches (Eq. 5).

    Args:
        z: ``[N, d]``.

    Returns:
        a ``[N, M, C]``, which sums to 1 over M.
    """
    weight = torch.cat([w.flatten(1) for w in gate.select_weight])
    bias = torch.cat(gate.select_bias) if gate.select_bias is not None else None
    logits = F.linear(z, weight, bias).unflatten(1, (num_branches, -1))
    return logits.softmax(dim=1)


def select(us: Sequence[Tensor], a: Tensor) -> Tensor:
    """Select (Eq. 6): the sum of the branches, each weighted by its attention.

    Args:
        us: M tensors ``[N, C, H', W']``.
        a: ``[N, M, C]``.

    Returns:
        v ``[N, C, H', W']``.
    """
    # Autocast computes a softmax in float32 on some devices; the product keeps the branches' dtype.
    weights = [a_m[:, :, None, None].to(u.dtype) for u, a_m in zip(us, a.unbind(1), strict=True)]
    return reduce(operator.add, map(operator.mul, weights, us))


def sk_conv(x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec) -> Tensor:
    """The whole unit; arguments and result as :func:`sk_triton.functional.sk_conv`."""
    us = split(x, branches, spec)
    a = attend(fuse(us, gate), gate, spec.num_branches)
    v = select(us, a)
    if torch._C._are_functorch_transforms_active():  # vmap has no rule for memory formats
        return v
    return v.contiguous(memory_format=memory_format(x))
