"""How calls are timed: in turns, so that a slow minute of the machine falls on all of them, and by medians.

On a GPU every turn is timed twice: after the L2 cache has been overwritten ("cold", the figure that is quoted), and
right after that with the cache as the call left it ("warm"). Of the first the time until the call returns is kept too
("host"): a call whose host time exceeds its device time is bound by the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from sk_triton.environment import MissingPackageError

from .. import results
from ..problems import in_one_line
from ..results import Budget

Call = Callable[[], object]

COLD = "cold"
WARM = "warm"
HOST = "host"
SLEEP_CYCLES = 200_000
"""About 0.1 ms of a GPU, as long as overwriting the cache takes: keeps it busy while the host queues a call."""


class NotApplicableError(Exception):
    """A provider has no place in a case; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """A call to time, what holds around each of its turns without being timed, and what runs a turn, where it must."""

    call: Call
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    run: Callable[[Call], object] = lambda turn: turn()


def device_trouble(device: torch.device) -> str:
    """What a GPU says that can run nothing more in this process, as after an illegal access; else ""."""
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return ""


class Timer(Protocol):
    """Times single calls: `now` in seconds, `sample` in milliseconds by regime ("cold"; on a GPU "warm", "host")."""

    def now(self) -> float: ...

    def sample(self, call: Call) -> dict[str, float]: ...


class CpuTimer:
    """Wall clock around one call."""

    def now(self) -> float:
        return time.perf_counter()

    def sample(self, call: Call) -> dict[str, float]:
        start = time.perf_counter()
        call()
        return {COLD: (time.perf_counter() - start) * 1e3}


class CudaTimer:
    """CUDA (or HIP) events around one call, as in Triton's `do_bench`.

    Before the first event the device is kept busy, by overwriting the cache or by sleeping, so a call of many small
    launches is charged for the host's gaps only as far as they outlast that: the same head start for everyone.
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

    def sample(self, call: Call) -> dict[str, float]:
        cold, host = self._elapsed(call, self.scratch.zero_)
        warm, _ = self._elapsed(call, partial(torch.cuda._sleep, SLEEP_CYCLES))
        return {COLD: cold, WARM: warm, HOST: host}

    def _elapsed(self, call: Call, occupy: Call) -> tuple[float, float]:
        """Milliseconds of the device and of the host."""
        stream = torch.cuda.current_stream(self.device)
        occupy()
        self.start.record(stream)
        start = time.perf_counter()
        call()
        host = (time.perf_counter() - start) * 1e3
        self.end.record(stream)
        self.end.synchronize()
        return self.start.elapsed_time(self.end), host


def timer_for(device: torch.device) -> Timer:
    """The clock that fits a device."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


QUICK = Budget(warmup_seconds=0.2, seconds=1.0, min_rounds=5)


@dataclass
class Measurement:
    """Samples in milliseconds by provider and regime, and failures `(status, message)`, filled while measuring.

    The caller owns it, so that what was measured survives an exception on the way.
    """

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)

    def timing(self, key: str, regime: str = COLD) -> results.Timing | None:
        """Median and quantiles of a provider; None if it has no sample."""
        samples = self.samples.get(key, {}).get(regime)
        return summarise(samples) if samples else None


def measure(
    contestants: Mapping[str, Contestant],
    timer: Timer,
    budget: Budget,
    into: Measurement,
    on_progress: Callable[[float], None] = lambda fraction: None,
    on_round: Call = lambda: None,
) -> None:
    """Warms each call up, then times them in rounds of one turn each, rotating who goes first.

    A call that raises is dropped from the rounds and recorded in `into.failures`; the others go on. `on_progress`
    receives the finished share of the budget, 0 to 1; `on_round` is called between rounds, untimed.
    """
    live = dict(contestants)
    for key, contestant in contestants.items():
        _attempt(key, contestant, partial(_warm_up, contestant.call, timer, budget, len(live)), into, live)
    start = timer.now()
    for round_index in range(budget.max_rounds):
        keys = list(live)
        if not keys:
            break
        first = round_index % len(keys)
        for key in keys[first:] + keys[:first]:
            _attempt(key, live[key], partial(_take, key, live[key].call, timer, into), into, live)
        on_round()
        done, elapsed = round_index + 1, timer.now() - start
        on_progress(_progress(done, elapsed, budget))
        if done >= budget.min_rounds and elapsed >= budget.seconds:
            break
    on_progress(1.0)


def summarise(samples: list[float]) -> results.Timing:
    """Median with 20 % and 80 % quantiles (interpolated, ends included) of at least one sample."""
    shares = torch.tensor((0.5, 0.2, 0.8), dtype=torch.float64)
    median, low, high = torch.tensor(samples, dtype=torch.float64).quantile(shares).tolist()
    return results.Timing(median, low, high, len(samples))


def failure(error: Exception) -> tuple[str, str]:
    """Status and one-line message of what a provider raised: out of memory is told from other failures.

    A capture that runs out of memory raises another error when it ends: what it was raised from counts as well.
    """
    if isinstance(error, MissingPackageError | NotApplicableError):
        return results.SKIPPED, str(error)
    cause: BaseException | None = error
    while cause is not None and not is_out_of_memory(cause):
        cause = cause.__cause__ or cause.__context__
    return (results.OUT_OF_MEMORY if cause else results.FAILED), in_one_line(cause or error)


NO_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
"""What others than PyTorch's allocator for GPUs say: that for the CPU, the driver, Triton, cuDNN and cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the CPU had no memory left."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        text in str(error) for text in NO_MEMORY
    )


def _progress(done: int, elapsed: float, budget: Budget) -> float:
    by_time = elapsed / budget.seconds if budget.seconds else 1.0
    return min(1.0, max(min(by_time, done / budget.min_rounds), done / budget.max_rounds))


def _warm_up(call: Call, timer: Timer, budget: Budget, sharers: int) -> None:
    start = timer.now()
    timer.sample(call)
    while timer.now() - start < budget.warmup_seconds / sharers:
        timer.sample(call)


def _take(key: str, call: Call, timer: Timer, into: Measurement) -> None:
    regimes = into.samples.setdefault(key, {})
    for regime, milliseconds in timer.sample(call).items():
        regimes.setdefault(regime, []).append(milliseconds)


def _attempt(
    key: str, contestant: Contestant, action: Call, into: Measurement, live: dict[str, Contestant]
) -> None:
    try:
        with contestant.scope():
            contestant.run(action)
    except Exception as error:
        into.failures[key] = failure(error)
        into.samples.pop(key, None)
        del live[key]
