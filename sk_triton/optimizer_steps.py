"""Counts the steps of optimizers, of which many change parameters unseen.

PyTorch's own with ``fused=True``, and those that write through raw pointers, leave the version counters alone; those of
sharded parameters (FSDP) change other tensors, from which the layer's are filled again, in the same memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_taken = 0


def steps_of(tensors: Iterable[Tensor]) -> int | None:
    """How many steps all optimizers of this process have taken since the first call; None where no tensor needs a
    gradient, so that none of them changes it."""
    return steps_taken() if any(tensor.requires_grad for tensor in tensors) else None


def steps_taken() -> int:
    """See :func:`steps_of`."""
    _start_counting()
    return _taken


@cache
def _start_counting() -> None:
    register_optimizer_step_post_hook(_count)


def _count(*_: Any) -> None:
    global _taken
    _taken += 1
