"""The gradients of a gate without norms, for the CPU's training schedules."""

from __future__ import annotations

import torch
from torch import Tensor

from ..folding import FoldedGate, attend


def attend_bwd(s: Tensor, gate: FoldedGate, has_relu: bool, da: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of :func:`..folding.attend`, which runs once more: its tensors are small, autograd differentiates it.

    Args:
        s, gate, has_relu: as there.
        da: gradient of the attention, ``[N, M, C]``.

    Returns:
        ds as s, and the gradients of the gate's four tensors.
    """
    s = s.detach().requires_grad_()
    leaves = [None if t is None else t.detach().requires_grad_() for t in gate]
    with torch.enable_grad():
        a = attend(s, FoldedGate(*leaves), has_relu)  # type: ignore[arg-type]
    ds, *found = torch.autograd.grad(a, [s, *(t for t in leaves if t is not None)], da)
    grads = iter(found)
    return ds, [None if t is None else next(grads) for t in leaves]
