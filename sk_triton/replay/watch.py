"""Tells whether a layer is still as it was, faster than a call looks at its parts again."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..optimizer_steps import sharded_steps, watch_optimizers
from ..reasons import PLAIN, hooks_of

# What a part computes besides its tensors. Others compute the same whatever their settings: a unit with an activation
# that has some is not run by kernels.
_SETTINGS: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Conv2d, ("stride", "padding", "dilation", "groups", "padding_mode")),
    (nn.modules.batchnorm._BatchNorm, ("training", "eps", "momentum", "track_running_stats")),
    (nn.modules.dropout._DropoutNd, ("training",)),
)

_version, _needs_gradient = attrgetter("_version"), attrgetter("requires_grad")


class Watch:
    """A layer's state when this was made: its modules, their settings and hooks, and its parameters and buffers.

    Like the cache of packed weights it cannot see writes that PyTorch does not count. Besides, a vector, as those of
    norms are, is taken for unchanged where its address and dtype are: asking each for its size and stride takes Python
    half as long as all the rest.

    Attributes:
        is_possible: False where changes would go unseen: parametrized parameters, inference tensors, hooks, replaced
            forwards, settings that are no plain attributes.
    """

    def __init__(self, layer: nn.Module, *, has_gradients: bool) -> None:
        """`has_gradients`: a call then reads the tensors as they are, so that these may change, and counts batches; but
        which of them need gradients is a part of the state."""
        modules = list(layer.modules())
        # The layer's own hooks run around its forward; those of its parts never would.
        self._hooks = [hooks for m in modules[1:] for hooks in hooks_of(m)]
        self._attributes = [vars(m) for m in modules[1:] if type(m).forward is not nn.Module.forward]
        self._children = [m._modules for m in modules]
        self._expected_children = [{**children} for children in self._children]
        settings = [(vars(m), names) for m in modules for kind, names in _SETTINGS if isinstance(m, kind)]
        are_plain = all(name in attributes for attributes, names in settings for name in names)
        self._settings = [(attributes, itemgetter(*names)) for attributes, names in settings if are_plain]
        self._expected_settings = self._list_settings()
        slots = [(own, name) for m in modules for own in (m._parameters, m._buffers) for name in own]
        self._empty = [(own, name) for own, name in slots if own[name] is None]
        filled = [(own, name, t) for own, name in slots if (t := own[name]) is not None]
        tensors = [t for _, _, t in filled]
        self.is_possible = are_plain and not (
            any(t.is_inference() for t in tensors)
            or any(self._hooks)
            or any(map(is_parametrized, modules))
            or any("forward" in attributes for attributes in self._attributes)
        )
        # They keep the memory alive, which a tensor may leave: an address tells no longer than that.
        self._kept = [t.detach() for t in tensors]
        # A tensor may move while it stays the same object: by `.data`, or, as FSDP's, as its storage is freed and
        # allocated again.
        watch_optimizers(self._kept)
        self._steps = sharded_steps()
        self._mark = _needs_gradient if has_gradients else _version
        self._filled = [
            (own, name, t, t.data_ptr(), self._mark(t), t.dtype, t.dim() <= 1, kept)
            for (own, name, t), kept in zip(filled, self._kept, strict=True)
            if self.is_possible
        ]

    def holds(self) -> bool:
        """Whether nothing has changed."""
        if not self.is_possible or any(self._hooks) or self._children != self._expected_children:
            return False
        if self._list_settings() != self._expected_settings:
            return False
        if self._steps != sharded_steps():
            return False
        for attributes in self._attributes:
            if "forward" in attributes:
                return False
        mark = self._mark
        try:
            for own, name, tensor, address, expected_mark, dtype, is_vector, kept in self._filled:
                now = own[name]
                if now is None or (now is not tensor and not _stands_for(now, kept)):
                    return False
                if now.data_ptr() != address or mark(now) != expected_mark or now.dtype is not dtype:
                    return False
                if not (is_vector or now.is_set_to(kept)):
                    return False
            for own, name in self._empty:
                if own[name] is not None:
                    return False
        except (KeyError, RuntimeError):  # none is left, or an inference tensor has taken a parameter's place
            return False
        return True

    def covers(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all of them lie in the memory of watched parameters and buffers: a plain attribute does not."""
        watched = {t.untyped_storage().data_ptr() for t in self._kept}
        return all(t.untyped_storage().data_ptr() in watched for t in tensors)

    def _list_settings(self) -> list[Any]:
        return [get(attributes) for attributes, get in self._settings]


def _stands_for(now: Tensor, kept: Tensor) -> bool:
    """Whether the tensor in a slot may be a new view of what was there, as FSDP makes at every call: no change."""
    # Others may not know the question.
    return type(now) in PLAIN and now.is_set_to(kept)
