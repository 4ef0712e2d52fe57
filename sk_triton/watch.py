"""Tells whether a layer is still as it was, faster than a call looks at its parts again."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

# What a part computes besides its tensors. Others compute the same whatever their settings: a unit with an activation
# that has some is not run by kernels.
_SETTINGS: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Conv2d, ("stride", "padding", "dilation", "groups", "padding_mode")),
    (nn.modules.batchnorm._BatchNorm, ("training", "eps", "momentum", "track_running_stats")),
    (nn.modules.dropout._DropoutNd, ("training",)),
)

_version, _dtype = attrgetter("_version"), attrgetter("dtype")
_needs_gradient, _shape = attrgetter("requires_grad"), attrgetter("shape")


class Watch:
    """A layer's state when this was made: its modules, their settings and hooks, and its parameters and buffers.

    Like the cache of packed weights it cannot see writes that PyTorch does not count. Besides, a vector, as those of
    norms are, is taken for unchanged where its address and dtype are: other data that begin there go unseen. Asking
    each vector for its size and stride takes Python half as long as all the rest.

    Attributes:
        is_possible: False where changes would go unseen: parametrized parameters, inference tensors, hooks, settings
            that are no plain attributes.
    """

    def __init__(self, layer: nn.Module, *, is_training: bool) -> None:
        """`is_training`: a call then reads the tensors as they are, so that these may change, and counts batches; but
        which of them need gradients is a part of the state."""
        self._is_training = is_training
        modules = list(layer.modules())
        # The layer's own hooks run around its forward; those of its parts never would.
        self._hooks = [hooks for m in modules[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._children = [m._modules for m in modules if m._modules]
        self._expected_children = [{**children} for children in self._children]
        settings = [(vars(m), names) for m in modules for kind, names in _SETTINGS if isinstance(m, kind)]
        are_plain = all(name in attributes for attributes, names in settings for name in names)
        self._settings = [(attributes, itemgetter(*names)) for attributes, names in settings if are_plain]
        self._expected_settings = self._list_settings()
        self._slots = [
            (own, name)
            for m in modules
            for own in (m._parameters, m._buffers)
            for name in own
            if is_training or name != "num_batches_tracked"
        ]
        self._expected_slots = [own[name] for own, name in self._slots]
        self._expected_absent = [t is None for t in self._expected_slots]
        self._tensors, self._arrays = _split(self._expected_slots)
        self.is_possible = are_plain and not (
            any(t.is_inference() for t in self._tensors)
            or any(self._hooks)
            or any(map(is_parametrized, modules))
        )
        # They keep the memory alive, which a tensor may leave: an address tells no longer than that.
        self._kept = [t.detach() for t in self._tensors]
        self._expected_marks = self._marks(self._tensors, self._arrays) if self.is_possible else ()

    def holds(self) -> bool:
        """Whether nothing has changed."""
        if not self.is_possible or any(self._hooks) or self._children != self._expected_children:
            return False
        if self._list_settings() != self._expected_settings:
            return False
        try:
            slots = [own[name] for own, name in self._slots]
        except KeyError:
            return False
        # Not `==`, which compares values where the tensors differ.
        if all(map(is_, slots, self._expected_slots)):
            tensors, arrays = self._tensors, self._arrays
        elif [t is None for t in slots] == self._expected_absent:
            # Others stand for them: new views of the same memory, as FSDP makes at every call, are no change.
            tensors, arrays = _split(slots)
        else:
            return False
        try:
            return self._marks(tensors, arrays) == self._expected_marks
        except RuntimeError:  # an inference tensor has taken a parameter's place
            return False

    def covers(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all of them lie in the memory of watched parameters and buffers: a plain attribute does not."""
        watched = {t.untyped_storage().data_ptr() for t in self._kept}
        return all(t.untyped_storage().data_ptr() in watched for t in tensors)

    def _list_settings(self) -> list[Any]:
        return [get(attributes) for attributes, get in self._settings]

    def _marks(self, tensors: list[Tensor], arrays: list[Tensor]) -> tuple[list[Any], ...]:
        # A tensor may move while it stays the same object: by `.data`, or, as FSDP's, as its storage is freed and
        # allocated again.
        changing = _needs_gradient if self._is_training else _version
        return (
            [*map(Tensor.data_ptr, tensors)],
            [*map(changing, tensors)],
            [*map(_dtype, tensors)],
            [*map(_shape, arrays)],
            [*map(Tensor.stride, arrays)],
        )


def _split(slots: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of slots, and those that are no vectors."""
    tensors = [t for t in slots if t is not None]
    return tensors, [t for t in tensors if t.dim() != 1]
