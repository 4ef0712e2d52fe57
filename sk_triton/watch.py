"""Tells whether a layer is still as it was, faster than a call looks at its parts again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

# What a part computes besides its tensors. Others compute the same whatever their settings: a unit with an activation
# that has some is not run by kernels.
_SETTINGS: tuple[tuple[type[nn.Module], Callable[[Any], Any]], ...] = (
    (nn.Conv2d, attrgetter("stride", "padding", "dilation", "groups", "padding_mode")),
    (nn.modules.batchnorm._BatchNorm, attrgetter("training", "eps")),
    (nn.modules.dropout._DropoutNd, attrgetter("training")),
)


class Watch:
    """A layer's state when this was made: its modules, their settings and hooks, and its parameters and buffers.

    Like the cache of packed weights it cannot see writes that PyTorch does not count.

    Attributes:
        is_possible: False where changes would go unseen: parametrized parameters, inference tensors, hooks.
    """

    def __init__(self, layer: nn.Module) -> None:
        modules = list(layer.modules())
        # The layer's own hooks run around its forward; those of its parts never would.
        self._hooks = [hooks for m in modules[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._children = [m._modules for m in modules if m._modules]
        self._expected_children = [{**children} for children in self._children]
        self._parts = [(m, get) for m in modules for kind, get in _SETTINGS if isinstance(m, kind)]
        self._expected_settings = self._list_settings()
        self._slots = [
            (own, name)
            for m in modules
            for own in (m._parameters, m._buffers)
            for name in own
            if name != "num_batches_tracked"
        ]
        tensors = self._list_tensors()
        self.is_possible = not (
            any(t.is_inference() for t in tensors) or any(self._hooks) or any(map(is_parametrized, modules))
        )
        # They keep the memory alive: an address tells tensors apart no longer than that.
        self._expected_tensors = [t.detach() for t in tensors]
        self._expected_marks = _marks(tensors) if self.is_possible else []

    def holds(self) -> bool:
        """Whether nothing has changed."""
        if any(self._hooks) or self._children != self._expected_children:
            return False
        if self._list_settings() != self._expected_settings:
            return False
        tensors = self._list_tensors()
        try:
            # Address, shape and strides in one call: a tuple of each, per tensor, takes Python longer than launching.
            return all(map(Tensor.is_set_to, tensors, self._expected_tensors)) and (
                _marks(tensors) == self._expected_marks
            )
        except RuntimeError:  # an inference tensor, or one of another device, has taken a parameter's place
            return False

    def covers(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all of them lie in the memory of watched parameters and buffers: a plain attribute does not."""
        watched = {t.untyped_storage().data_ptr() for t in self._expected_tensors}
        return all(t.untyped_storage().data_ptr() in watched for t in tensors)

    def _list_settings(self) -> list[Any]:
        return [get(m) for m, get in self._parts]

    def _list_tensors(self) -> list[Tensor]:
        return [t for own, name in self._slots if (t := own.get(name)) is not None]


def _marks(tensors: list[Tensor]) -> list[tuple[int, torch.dtype]]:
    return [(t._version, t.dtype) for t in tensors]
