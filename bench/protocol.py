"""How a provider is judged and timed. Correctness comes first: what is wrong is never timed.

Error rule: the largest absolute error against float64 is at most twice that of plain eager PyTorch in the
same dtype on the same input. Timing: providers take turns, so that a slow minute of the machine falls on
all of them; the result is the median with its 20 % and 80 % quantiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from . import results

Call = Callable[[], object]

ERROR_FACTOR = 2.0
CHUNK = 8
"""Samples compared in float64 at a time, which bounds the memory that a check takes."""


def largest_error(y: Tensor, reference: Tensor) -> float:
    """Largest absolute difference, in float64; infinite if shapes differ or a value is not finite."""
    if y.shape != reference.shape:
        return float("inf")
    worst = 0.0
    for got, expected in zip(y.split(CHUNK), reference.split(CHUNK), strict=True):
        error = (got.double() - expected).abs().max().item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def allowed_error(eager_error: float, reference: Tensor, dtype: torch.dtype) -> float:
    """Twice eager's own error; at least one rounding step of the largest output, should eager be exact."""
    step = torch.finfo(dtype).eps * reference.abs().max().item()
    return max(ERROR_FACTOR * eager_error, step)


def check(kind: str, y: Tensor, reference: Tensor, eager_error: float, dtype: torch.dtype) -> results.Check:
    """Judges one output `y` of the input named `kind` by the error rule."""
    error = largest_error(y, reference)
    allowed = allowed_error(eager_error, reference, dtype)
    passed = error <= allowed
    return results.Check(kind, error if error < float("inf") else None, eager_error, allowed, passed)


class Timer(Protocol):
    """Times single calls. `now` is in seconds, `sample` in milliseconds."""

    def now(self) -> float: ...

    def sample(self, call: Call) -> float: ...


class CpuTimer:
    """Wall clock around one call."""

    def now(self) -> float:
        return time.perf_counter()

    def sample(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3


class CudaTimer:
    """CUDA (or HIP) events around one call, with the L2 cache overwritten before it.

    The overwrite also keeps the device busy while the host queues the call, so a call of many small
    launches is charged for its gaps only as far as they outlast it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self.scratch = torch.empty(max(4 * l2_bytes, 256 << 20), dtype=torch.uint8, device=device)
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def now(self) -> float:
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def sample(self, call: Call) -> float:
        stream = torch.cuda.current_stream(self.device)
        self.scratch.zero_()
        self.start.record(stream)
        call()
        self.end.record(stream)
        self.end.synchronize()
        return self.start.elapsed_time(self.end)


def timer_for(device: torch.device) -> Timer:
    """The clock that fits a device."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


@dataclass(frozen=True)
class Budget:
    """How long one case is measured, all its providers together. Seconds, and rounds of one call each."""

    warmup_seconds: float = 0.3
    seconds: float = 2.0
    min_rounds: int = 7
    max_rounds: int = 100


@dataclass
class Measurement:
    """Samples in milliseconds and failures `(status, message)` by provider, filled while measuring.

    The caller owns it, so that what was measured survives an exception on the way.
    """

    samples: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)

    def timing(self, key: str) -> results.Timing | None:
        """Median and quantiles of a provider; None if it has no sample."""
        samples = self.samples.get(key)
        return summarise(samples) if samples else None


def measure(
    calls: Mapping[str, Call],
    timer: Timer,
    budget: Budget,
    into: Measurement,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Warms each call up, then times them in rounds of one call each, rotating who goes first.

    A call that raises is dropped from the rounds and recorded in `into.failures`; the others go on.
    `on_progress` receives the finished share of the budget, 0 to 1.
    """
    live = dict(calls)
    for key, call in calls.items():
        _attempt(key, partial(_warm_up, call, timer, budget, len(calls)), into, live)
    start = timer.now()
    for round_index in range(budget.max_rounds):
        keys = list(live)
        if not keys:
            break
        first = round_index % len(keys)
        for key in keys[first:] + keys[:first]:
            _attempt(key, partial(_take, key, live[key], timer, into), into, live)
        done, elapsed = round_index + 1, timer.now() - start
        on_progress(_progress(done, elapsed, budget))
        if done >= budget.min_rounds and elapsed >= budget.seconds:
            break
    on_progress(1.0)


def summarise(samples: list[float]) -> results.Timing:
    """Median with 20 % and 80 % quantiles (interpolated, ends included) of at least one sample."""
    ordered = sorted(samples)
    return results.Timing(
        statistics.median(ordered), _quantile(ordered, 0.2), _quantile(ordered, 0.8), len(ordered)
    )


def failure(error: Exception) -> tuple[str, str]:
    """Status and one-line message of what a provider raised: out of memory is told from other failures."""
    lines = str(error).strip().splitlines()
    message = f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
    exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(
        error
    )
    return (results.OUT_OF_MEMORY if exhausted else results.FAILED), message


def _progress(done: int, elapsed: float, budget: Budget) -> float:
    by_time = elapsed / budget.seconds if budget.seconds else 1.0
    return min(1.0, max(min(by_time, done / budget.min_rounds), done / budget.max_rounds))


def _warm_up(call: Call, timer: Timer, budget: Budget, sharers: int) -> None:
    start = timer.now()
    timer.sample(call)
    while timer.now() - start < budget.warmup_seconds / sharers:
        timer.sample(call)


def _take(key: str, call: Call, timer: Timer, into: Measurement) -> None:
    into.samples.setdefault(key, []).append(timer.sample(call))


def _attempt(key: str, action: Call, into: Measurement, live: dict[str, Call]) -> None:
    try:
        action()
    except Exception as error:
        into.failures[key] = failure(error)
        into.samples.pop(key, None)
        del live[key]


def _quantile(ordered: list[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
