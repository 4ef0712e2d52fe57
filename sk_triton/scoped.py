"""A choice that holds in a ``with`` block, in this thread or task, and under ``torch.compile``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch

Value = TypeVar("Value")


class Scoped(Generic[Value]):
    """The value of the innermost :meth:`scope`, `default` outside of any."""

    def __init__(self, name: str, default: Value) -> None:
        self._default = default
        self._value: ContextVar[Value] = ContextVar(f"sk_triton_{name}", default=default)
        # The latest scope of the whole process, for Dynamo alone: that of torch 2.8 cannot trace ContextVar.get, and
        # it guards an attribute, so a changed value recompiles.
        self._latest = default
        self._live: list[list[Value]] = []
        self._lock = threading.Lock()

    def get(self) -> Value:
        """The value that holds here."""
        return self._latest if torch.compiler.is_compiling() else self._value.get()

    @contextlib.contextmanager
    def scope(self, value: Value) -> Iterator[None]:
        """Let `value` hold in a ``with`` block, or in a function when used as a decorator."""
        token = self._value.set(value)
        scope = [value]
        with self._lock:
            self._live.append(scope)
            self._latest = value
        try:
            yield
        finally:
            # By identity: scopes of other threads may have opened and closed in between.
            with self._lock:
                self._live[:] = [other for other in self._live if other is not scope]
                self._latest = self._live[-1][0] if self._live else self._default
            self._value.reset(token)
