"""Which tensors the forward pass saves for the backward pass: a choice scoped to a block of code."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, get_args

import torch

Save = Literal["branches", "input"]
SAVES: tuple[Save, ...] = get_args(Save)

_scoped: ContextVar[Save | None] = ContextVar("sk_triton_save", default=None)
# For Dynamo alone, as in `backend`.
_latest: Save | None = None
_live: list[list[Save]] = []
_lock = threading.Lock()


def save_for_backward(save: Save) -> contextlib._GeneratorContextManager[None]:
    """Choose what units in training save, in a ``with`` block, or in a function when used as a decorator.

    It goes before a layer's own choice (its attribute ``save``) and holds for the forward pass: the backward pass may
    run outside of the block.

    Args:
        save: "branches" saves the branches' convolutions, the input and small tensors; "input" the input and small
            tensors alone, and convolves again in the backward pass. Results are the same bit for bit. On a CPU the
            branches are always saved.

    Raises:
        ValueError: an unknown name.
    """
    return _scope(check_save(save))


def check_save(save: Save) -> Save:
    """`save` itself.

    Raises:
        ValueError: an unknown name.
    """
    if save not in SAVES:
        raise ValueError(f"save must be one of {', '.join(map(repr, SAVES))}, got {save!r}")
    return save


def scoped_save() -> Save | None:
    """The choice of the innermost :func:`save_for_backward` in this thread or task; None outside of any."""
    return _latest if torch.compiler.is_compiling() else _scoped.get()


@contextlib.contextmanager
def _scope(save: Save) -> Iterator[None]:
    global _latest
    token = _scoped.set(save)
    scope = [save]
    with _lock:
        _live.append(scope)
        _latest = save
    try:
        yield
    finally:
        # By identity: scopes of other threads may have opened and closed in between.
        with _lock:
            _live[:] = [other for other in _live if other is not scope]
            _latest = _live[-1][0] if _live else None
        _scoped.reset(token)
