"""Makes steps of optimizers seen that change parameters behind PyTorch's version counters.

PyTorch's own with ``fused=True``, and those of other packages, which may write through raw pointers, count no versions:
they are counted here. Optimizers of sharded parameters (FSDP) change other tensors, from which the layer's are filled
again in the same memory: for these there is one count of all steps.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = itertools.count(1)
_taken = 0


def sharded_steps() -> int:
    """How many steps optimizers of sharded parameters have taken since they are watched."""
    return _taken


@cache
def watch_optimizers() -> None:
    """Watch all optimizers of this process from now on."""
    register_optimizer_step_post_hook(_note)


def _note(optimizer: Optimizer, *_: Any) -> None:
    global _taken
    counts_versions = type(optimizer).__module__.startswith("torch.optim.")
    changed = [
        parameter
        for group in optimizer.param_groups
        if not counts_versions or group.get("fused")
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    increment_version(changed)
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_distributed and any(_is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
        _taken = next(_steps)


def _is_sharded(parameter: Tensor) -> bool:
    """Whether it is of a class of its own, as FSDP's are, or one of several in a storage."""
    if type(parameter) not in (Tensor, nn.Parameter):
        return True
    return parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size()
