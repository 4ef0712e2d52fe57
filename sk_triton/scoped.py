"""A choice that holds in a ``with`` block, in this thread or task, and under ``torch.compile``."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

Value = TypeVar("Value")
Function = TypeVar("Function", bound=Callable[..., Any])


class Scope(contextlib.ContextDecorator):
    """A choice to hold in a ``with`` block, or in a function when used as a decorator. It may be entered again, and
    within itself, but not by two threads or tasks at a time."""

    def __init__(self, name: str, enter: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._name = name
        self._enter = enter
        self._entered: list[contextlib.AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        scope = self._enter()
        scope.__enter__()
        self._entered.append(scope)

    def __exit__(self, *exception: Any) -> None:
        self._entered.pop().__exit__(*exception)

    def __call__(self, func: Function) -> Function:
        """`func` within the scope.

        Raises:
            TypeError: what `func` returns runs later, outside of the scope.
        """
        for is_later in (
            inspect.iscoroutinefunction,
            inspect.isgeneratorfunction,
            inspect.isasyncgenfunction,
        ):
            if is_later(func):
                raise TypeError(
                    f"{self._name} cannot decorate {func.__qualname__}, a coroutine or generator function, which runs "
                    f"when the call has returned: write `with {self._name}(…):` inside of it"
                )
        return super().__call__(func)

    def _recreate_cm(self) -> Scope:
        # For each call of a decorated function, which several threads may make at a time.
        return Scope(self._name, self._enter)


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
        """Let `value` hold in a ``with`` block."""
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
