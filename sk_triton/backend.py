"""Which implementation runs: a choice scoped to a block of code."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, get_args

import torch

Backend = Literal["auto", "triton", "reference", "torch"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_scoped: ContextVar[Backend] = ContextVar("sk_triton_backend", default="auto")
# The latest scope of the whole process, for Dynamo alone: that of torch 2.8 cannot trace ContextVar.get, and
# it guards a global, so a changed backend recompiles.
_latest: Backend = "auto"
_live: list[list[Backend]] = []
_lock = threading.Lock()


def current_backend() -> Backend:
    """The backend of the innermost :func:`use_backend` in this thread or task; "auto" outside of any."""
    return _latest if torch.compiler.is_compiling() else _scoped.get()


def use_backend(name: Backend) -> contextlib._GeneratorContextManager[None]:
    """Choose the backend in a ``with`` block, or in a function when used as a decorator.

    Args:
        name: "auto" takes Triton on a GPU and PyTorch's operators, reordered for inference, on a CPU, where they
            can run, and else the reference; "triton", "torch" and "reference" take just that: where it cannot
            run, the layer raises ``RuntimeError`` with the reason and never falls back.

    Raises:
        ValueError: an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return _scope(name)


@contextlib.contextmanager
def _scope(name: Backend) -> Iterator[None]:
    global _latest
    token = _scoped.set(name)
    scope = [name]
    with _lock:
        _live.append(scope)
        _latest = name
    try:
        yield
    finally:
        # By identity: scopes of other threads may have opened and closed in between.
        with _lock:
            _live[:] = [other for other in _live if other is not scope]
            _latest = _live[-1][0] if _live else "auto"
        _scoped.reset(token)
