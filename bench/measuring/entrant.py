"""A provider's module as it enters a case: the calls that are checked and timed, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..shapes import INFERENCE, TRAINING, Case
from .forms import Call
from .providers import Provider

Outcome = dict[str, Tensor]
"""Tensors to judge by name: "v", and in training "dx" (of a unit) and "parameters.<name>"."""


class Entrant:
    """One provider of one case, built.

    Args:
        module: with the case's weights; put into the case's mode here.
        provider: whose module it is and how it runs.
    """

    def __init__(self, case: Case, provider: Provider, module: nn.Module) -> None:
        self.direction = case.direction
        # The images of a network need no gradient; the input of a unit is another layer's output.
        self.wants_dx = case.direction == TRAINING and not case.is_network
        self.provider = provider
        self.module = module.train(case.direction == TRAINING)
        self.forward = provider.form.prepare(module)
        self._leaf: Tensor | None = None
        self._inputs: list[Tensor] = []

    def runs(self, x: Tensor) -> str | None:
        """What sk_triton's units run on `x`, as `Source.runs`; None for a peer."""
        with torch.set_grad_enabled(self.direction == TRAINING):
            return self.provider.source.runs(self.module, arrange(x, self.provider.form.memory_format))

    def bind(self, x: Tensor, dv: Tensor | None) -> tuple[Call, Callable[[Tensor], Outcome]]:
        """The measured call on `x`, and what reads the tensors to judge from its result.

        Args:
            x: `[N, C, H, W]`.
            dv: in training, the gradient of the output.

        Both are brought into this provider's memory format here, outside of the call; what is in it is not copied.
        """
        x = arrange(x, self.provider.form.memory_format)
        self._inputs = [x]
        if self.direction == INFERENCE:
            return self.provider.form.bind(lambda: self._infer(x)), lambda v: {"v": v}
        assert dv is not None
        gradient = arrange(dv, self.provider.form.memory_format)
        self._inputs.append(gradient)
        leaf = self._leaf = x.detach().requires_grad_(self.wants_dx)
        call = self.provider.form.bind(lambda: self._train(leaf, gradient))
        return call, lambda v: self._gradients(v, leaf)

    @property
    def given(self) -> list[Tensor]:
        """What the last bound call does not make itself: its input, the output's gradient, parameters, statistics."""
        return [*self._inputs, *self.module.parameters(), *self.module.buffers()]

    def output(self) -> Tensor:
        """The output of the last bound training call, with what the backward pass would need."""
        assert self._leaf is not None
        return self.forward(self._leaf)

    def forget_gradients(self) -> None:
        """Frees the gradients that the last call left behind."""
        if self._leaf is not None:
            self._leaf.grad = None
        self.module.zero_grad(set_to_none=True)

    def _infer(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.forward(x)

    def _train(self, x: Tensor, dv: Tensor) -> Tensor:
        x.grad = None
        self.module.zero_grad(set_to_none=True)
        v = self.forward(x)
        v.backward(dv)
        return v.detach()

    def _gradients(self, v: Tensor, x: Tensor) -> Outcome:
        found = {"v": v}
        if x.grad is not None:
            found["dx"] = x.grad
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                found[f"parameters.{name}"] = parameter.grad
        return found


def arrange(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """`x` in a memory format; the logits of a network, which have none, as they are."""
    return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
