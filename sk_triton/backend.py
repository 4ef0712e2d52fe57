"""Which implementation runs: a choice scoped to a block of code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import Literal, get_args

from .scoped import Scope, Scoped

Backend = Literal["auto", "triton", "reference", "torch"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

Schedule = Literal["store", "gated", "recompute", "merged", "resident", "library"]
"""Schedules of the Triton backend."""
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

_backend: Scoped[Backend] = Scoped("backend", "auto")
# Not Scoped: compiled code asks for it in its operators alone, which Dynamo does not trace.
_schedule: ContextVar[Schedule | None] = ContextVar("sk_triton_schedule", default=None)


def current_backend() -> Backend:
    """The backend of the innermost :func:`use_backend` in this thread or task; "auto" outside of any."""
    return _backend.get()


def current_schedule() -> Schedule | None:
    """The schedule that the innermost :func:`use_backend` asks for, None if it leaves the choice open."""
    return _schedule.get()


def inference_schedule_reason() -> str:
    """Why a call that trains cannot run the schedule that is asked for; "" if none is."""
    schedule = current_schedule()
    if schedule is None:
        return ""
    return (
        f"schedule {schedule!r} is for inference, but gradients are enabled or a norm uses batch statistics "
        "(layer.eval() with torch.no_grad())"
    )


def cannot_run(backend: Backend, reason: str) -> RuntimeError:
    """What is raised where a backend that was asked for cannot run a call."""
    return RuntimeError(f'use_backend("{backend}") cannot run here: {reason}')


def use_backend(name: Backend, *, schedule: Schedule | None = None) -> Scope:
    """Choose the backend in a ``with`` block, or in a function when used as a decorator.

    It holds in this thread or task; code of ``torch.compile`` takes the latest choice of the process.

    Args:
        name: "auto" takes Triton on a GPU and PyTorch's operators, reordered for inference, on a CPU, where they
            can run, and else the reference; "triton", "torch" and "reference" take just that: where it cannot
            run, the layer raises ``RuntimeError`` with the reason and never falls back.
        schedule: with "triton", the one schedule to run; None takes the one that is expected to be fastest.

    Raises:
        ValueError: an unknown name, or a schedule that the backend does not have.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if schedule is not None and (name != "triton" or schedule not in SCHEDULES):
        allowed = f"one of {', '.join(map(repr, SCHEDULES))} with backend 'triton'"
        raise ValueError(f"schedule must be {allowed}, got {schedule!r} with {name!r}")
    return Scope("use_backend", partial(_scope, name, schedule))


@contextlib.contextmanager
def _scope(name: Backend, schedule: Schedule | None) -> Iterator[None]:
    token = _schedule.set(schedule)
    try:
        with _backend.scope(name):
            yield
    finally:
        _schedule.reset(token)
