"""The gate of a unit without norms, differentiable, for the CPU's training schedules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .folding import FoldedGate, attend
from .params import Gate


def affine_gate(gate: Gate, dtype: torch.dtype) -> FoldedGate:
    """The gate's two maps in `dtype`, as autograd's functions of its parameters; the gate has no norm."""
    return FoldedGate(
        gate.reduce_weight.flatten(1).to(dtype),
        None if gate.reduce_bias is None else gate.reduce_bias.to(dtype),
        torch.cat([w.flatten(1) for w in gate.select_weight]).to(dtype),
        None if gate.select_bias is None else torch.cat(gate.select_bias).to(dtype),
    )


class RecordedGate:
    """A gate that has run and can be differentiated: its tensors are small, autograd does it.

    Args:
        s: pooled features ``[N, C]``, without a graph.
        gate: its maps, without a graph.
        has_relu: whether a ReLU stands between them.

    Attributes:
        a: attention ``[N, M, C]``.
    """

    def __init__(self, s: Tensor, gate: Sequence[Tensor | None], has_relu: bool) -> None:
        with torch.enable_grad():
            self._inputs = [_leaf(t) for t in (s, *gate)]
            self._attention = attend(self._inputs[0], FoldedGate(*self._inputs[1:]), has_relu)
        self.a = self._attention.detach()

    def backward(self, da: Tensor) -> list[Tensor | None]:
        """Gradients of s and of the four tensors of the gate, from that of the attention."""
        sources = [t for t in self._inputs if t is not None]
        found = iter(torch.autograd.grad(self._attention, sources, da, retain_graph=True))
        return [None if t is None else next(found) for t in self._inputs]


def _leaf(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_()
