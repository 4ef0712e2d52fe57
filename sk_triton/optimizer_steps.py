"""Makes steps of optimizers seen that change parameters behind PyTorch's version counters.

PyTorch's own with ``fused=True``, and those of other packages, which may write through raw pointers, count no versions:
of memory that is watched they are counted here. Optimizers of sharded parameters (FSDP) change other tensors, from
which the layer's are filled again in the same memory: for these there is one count of all steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

# Threads may end steps at once: `next` is atomic, which `_taken += 1` is not; two steps would count as one.
_steps = itertools.count(1)
_taken = 0
_watched: dict[int, StorageWeakRef] = {}
_room = 256
_with_gradients: WeakKeyDictionary[Optimizer, list[Tensor]] = WeakKeyDictionary()
"""What had gradients when a step began that has not ended yet."""


def sharded_steps() -> int:
    """How many steps optimizers of sharded parameters have taken since they are watched."""
    return _taken


def watch_optimizers(tensors: Iterable[Tensor]) -> None:
    """From now on count the steps of all optimizers that change the memory of these tensors, as long as it lives."""
    global _room
    _register()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in _watched:
            _watched[storage._cdata] = StorageWeakRef(storage)  # no other storage gets the number meanwhile
    if len(_watched) > _room:
        for number, reference in list(_watched.items()):
            if reference.expired():
                _watched.pop(number, None)
        _room = 2 * max(len(_watched), 128)


@cache
def _register() -> None:
    register_optimizer_step_pre_hook(_begin)
    register_optimizer_step_post_hook(_end)


def _begin(optimizer: Optimizer, *_: Any) -> None:
    # The step, or a hook after it, may drop gradients.
    _with_gradients[optimizer] = _uncounted(optimizer)


def _end(optimizer: Optimizer, *_: Any) -> None:
    global _taken
    # A closure may have made gradients.
    changed = {id(p): p for p in (*_with_gradients.pop(optimizer, ()), *_uncounted(optimizer))}
    increment_version(changed.values())
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_distributed and any(_is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
        _taken = next(_steps)


def _uncounted(optimizer: Optimizer) -> list[Tensor]:
    """Watched parameters with gradients, of which a step counts no versions."""
    counts_versions = type(optimizer).__module__.startswith("torch.optim.")
    return [
        parameter
        for group in optimizer.param_groups
        if not counts_versions or group.get("fused")
        for parameter in group["params"]
        if parameter.grad is not None and _is_watched(parameter)
    ]


def _is_watched(parameter: Tensor) -> bool:
    try:
        return parameter.untyped_storage()._cdata in _watched
    except (NotImplementedError, RuntimeError):  # a class that wraps other tensors
        return False


def _is_sharded(parameter: Tensor) -> bool:
    """Whether it is of a class of its own, as FSDP's are, or one of several in a storage."""
    if type(parameter) not in (Tensor, nn.Parameter):
        return True
    return parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size()
