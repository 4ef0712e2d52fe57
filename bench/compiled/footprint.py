"""The memory that a planned step is handed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from sk_triton.kernels.launch import Launch, flat
from sk_triton.library import Convolution

PlannedStep = Launch | Convolution | Callable[[], object]
"""A kernel launch, the library's convolution, or a `functools.partial` of another operator on its tensors."""


def footprint(step: PlannedStep) -> dict[int, int]:
    """Bytes of each storage that a step is handed; every tensor is taken to be touched as a whole."""
    views: dict[int, dict[Any, int]] = {}
    limits: dict[int, int] = {}
    for tensor in _tensors(step):
        storage = tensor.untyped_storage()
        views.setdefault(storage._cdata, {})[tensor.storage_offset(), tensor.shape] = tensor_bytes(tensor)
        limits[storage._cdata] = storage.nbytes()
    return {key: min(sum(found.values()), limits[key]) for key, found in views.items()}


def _tensors(step: PlannedStep) -> Iterable[Tensor]:
    if isinstance(step, Launch):
        handed: Iterable[Any] = flat(step.arguments)
    elif isinstance(step, Convolution):
        handed = (step.x, step.weight, step.y)
    elif isinstance(step, functools.partial):
        handed = (*step.args, *step.keywords.values())
    else:
        raise TypeError(
            f"a step must be a Launch, a Convolution or a functools.partial of an operator, got {step!r}"
        )
    return [value for value in handed if isinstance(value, Tensor)]


def tensor_bytes(tensor: Tensor) -> int:
    """Of a tensor's elements, gaps between them left out."""
    return tensor.numel() * tensor.element_size()
