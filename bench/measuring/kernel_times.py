"""The kernels of one call, each timed by PyTorch's profiler on a GPU, and the tables that keep them."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ..shapes import INFERENCE, TRAINING, Case
from ..unit_times import EAGER, NAME
from . import inputs
from .competition import DTYPES
from .entrant import Entrant
from .forms import CHANNELS_LAST
from .profiler import device_events
from .providers import Provider, make_state
from .sources import Ours

CALLS = 7
WARM_UPS = 4
"""A training step is recorded in its third call, and starts its kernels directly from then on."""
FLUSHED_BYTES = 256 << 20
"""Overwritten before each call: more than every L2."""

CALL_COLUMNS = ("commit", "unit", "shape", "batch", "dtype", "direction", "schedule")
UNIT_COLUMNS = (*CALL_COLUMNS, "kernels", "sum_microseconds", "span_microseconds")
LAUNCH_COLUMNS = (*CALL_COLUMNS, "position", "kernel", "microseconds")


class Kernel(NamedTuple):
    """One kernel of a call, as the profiler saw it; microseconds on its clock."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class CallTimes:
    """A call's kernels in the order in which they began, each with the median of its durations, in microseconds;
    `span`: from the first one's start to the last one's end, host gaps included."""

    kernels: tuple[tuple[str, float], ...]
    span: float

    @property
    def total(self) -> float:
        """All kernels added up."""
        return sum(duration for _, duration in self.kernels)


def medians(calls: Sequence[Sequence[Kernel]]) -> CallTimes:
    """Of several calls, those that ran the kernels that most of them ran.

    Raises:
        ValueError: no call ran a kernel.
    """
    ordered = [sorted(call, key=lambda kernel: kernel.start) for call in calls if call]
    if not ordered:
        raise ValueError("calls must run kernels on a GPU, none did")
    names = statistics.mode(tuple(kernel.name for kernel in call) for call in ordered)
    alike = [call for call in ordered if tuple(kernel.name for kernel in call) == names]
    durations = [statistics.median(k.end - k.start for k in kernels) for kernels in zip(*alike, strict=True)]
    span = statistics.median(max(k.end for k in call) - call[0].start for call in alike)
    return CallTimes(tuple(zip(names, durations, strict=True)), span)


def unit_source(schedule: str) -> Ours:
    """sk_triton held to a schedule, what "auto" takes, or PyTorch operator by operator ("eager")."""
    if schedule == EAGER:
        return Ours(EAGER, EAGER, backend="reference")
    return Ours() if schedule == "auto" else Ours(backend="triton", schedule=schedule)


def measure(case: Case, schedule: str, device: torch.device, seed: int = 0) -> tuple[str, CallTimes]:
    """What runs a unit, as `units.csv` names it, and its kernels' times: in channels_last, each call from a cold L2.

    Raises:
        NotApplicableError: the schedule cannot run the unit.
        ValueError: what runs is not sk_triton's kernels, or nothing ran on a GPU.
    """
    dtype, provider = DTYPES[case.dtype], Provider(unit_source(schedule), CHANNELS_LAST)
    with provider.scope():
        entrant = Entrant(case, provider, provider.module(case, make_state(case, seed), dtype, device))
        x = inputs.make_input(inputs.RANDOM, case.batch, case.shape, dtype, device, seed)
        dv = None
        if case.direction == TRAINING:
            dv = inputs.make_gradient(x.shape, dtype, device, seed)
        name = schedule if schedule == EAGER else _named(case, entrant.runs(x))
        call, _ = entrant.bind(x, dv)
        return name, medians(_profiled(call, device))


def _named(case: Case, runs: str | None) -> str:
    """The schedule as the tables have it. Raises ValueError where something else than the kernels runs."""
    backend, _, schedule = (runs or "").rpartition("/")
    if backend != "triton":
        raise ValueError(f"the unit must run on sk_triton's kernels, it runs on {runs}")
    return schedule if case.direction == INFERENCE else "train, branches saved"


def _profiled(call: Callable[[], object], device: torch.device) -> list[list[Kernel]]:
    """The kernels of CALLS calls."""
    scratch = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    for _ in range(WARM_UPS):
        call()
    calls = []
    for _ in range(CALLS):
        scratch.fill_(1)
        torch.cuda.synchronize(device)
        events = device_events(call, device)
        calls.append([Kernel(e.name, e.time_range.start, e.time_range.end) for e in events])
    return calls


def append(folder: Path, commit: str, case: Case, schedule: str, times: CallTimes) -> None:
    """Add a call to `units.csv` and `launches.csv` in `folder`, which are made where they are not there."""
    shape = f"{case.shape.channels}@{case.shape.height}x{case.shape.width}"
    call = (commit, case.subject, shape, case.batch, case.dtype, case.direction, schedule)
    total, span = round(times.total, 1), round(times.span, 1)
    _append(folder / NAME, UNIT_COLUMNS, [(*call, len(times.kernels), total, span)])
    launches = [
        (*call, position, name, round(duration, 2)) for position, (name, duration) in enumerate(times.kernels)
    ]
    _append(folder / "launches.csv", LAUNCH_COLUMNS, launches)


def _append(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(columns)
        writer.writerows(rows)
