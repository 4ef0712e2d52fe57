"""Units measured launch by launch on a GPU, outside of the suites: `bench/results/<gpu>/units.csv`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import passes
from .formats import three_digits
from .model.gpus import Gpu, find_gpu
from .shapes import CLASSIC, DIRECTIONS, INFERENCE, PAPER, UNITS, Case, unit_shape

NAME = "units.csv"
EAGER = "eager"
SUITE = "launches"
"""Of the cases: no suite of `sk-triton bench`."""


@dataclass(frozen=True)
class UnitTime:
    """The kernels of one call, added up, without the host's gaps: a schedule of sk_triton, or "eager"."""

    gpu: Gpu
    commit: str
    case: Case
    schedule: str
    seconds: float

    @property
    def floor_seconds(self) -> float:
        """Reading the input and writing the output once, at the rate of a copy."""
        return passes.FLOOR * self.case.tensor_bytes / self.gpu.memory_bytes_per_s


def load(path: Path) -> list[UnitTime]:
    """The newest time of each case and schedule; the folder names the GPU.

    Raises:
        ValueError: an unknown GPU or unit.
    """
    gpu = find_gpu(path.parent.name)
    found: dict[tuple[Case, str], UnitTime] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["unit"] not in UNITS:
                raise ValueError(f"{path}: unit must be one of {', '.join(UNITS)}, got {row['unit']!r}")
            subject, (channels, size) = row["unit"], row["shape"].split("@")
            shape = unit_shape(subject, int(channels), int(size.partition("x")[0]))
            case = Case(SUITE, subject, shape, int(row["batch"]), row["dtype"], row["direction"])
            seconds = float(row["sum_microseconds"]) * 1e-6
            found[case, row["schedule"]] = UnitTime(gpu, row["commit"], case, row["schedule"], seconds)
    return list(found.values())


def by_case(times: Sequence[UnitTime]) -> dict[Case, dict[str, UnitTime]]:
    """The times of each case by schedule."""
    cases: dict[Case, dict[str, UnitTime]] = {}
    for time in times:
        cases.setdefault(time.case, {})[time.schedule] = time
    return cases


def fastest_schedule(times: dict[str, UnitTime]) -> UnitTime | None:
    """sk_triton's fastest schedule among those of one case."""
    return min((t for name, t in times.items() if name != EAGER), key=lambda t: t.seconds, default=None)


def _place(item: tuple[Case, dict[str, UnitTime]]) -> tuple[int, str, int, int, int]:
    """Inference before training, large batches first, the paper's unit before the classic class, stage by stage."""
    case = item[0]
    unit = (PAPER, CLASSIC).index(case.subject)
    return DIRECTIONS.index(case.direction), case.dtype, -case.batch, unit, case.shape.channels


def markdown(times: Sequence[UnitTime]) -> str:
    """A row for each case that eager was measured in as well."""
    lines = [
        "| unit | sk_triton | schedule | eager | speed-up | share of the floor |",
        "|---|---|---|---|---|---|",
    ]
    kinds = {(time.case.batch, time.case.dtype) for time in times}
    for case, schedules in sorted(by_case(times).items(), key=_place):
        ours, eager = fastest_schedule(schedules), schedules.get(EAGER)
        if ours is None or eager is None:
            continue
        is_inference = case.direction == INFERENCE
        cells = [
            f"{case.subject} {case.shape.name}, {case.direction}"
            + (f", batch {case.batch}, {case.dtype}" if len(kinds) > 1 else ""),
            f"**{three_digits(ours.seconds * 1e6)} µs**",
            ours.schedule,
            f"{three_digits(eager.seconds * 1e6)} µs",
            f"{eager.seconds / ours.seconds:.1f}x",
            f"{ours.floor_seconds / ours.seconds:.0%}" if is_inference else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = other_runs(times)
    return "\n".join([*lines, "", f"{note}."] if note else lines) + "\n"


def other_runs(times: Sequence[UnitTime]) -> str | None:
    """That eager and sk_triton were not timed together, where that is so."""
    pairs = [(fastest_schedule(schedules), schedules.get(EAGER)) for schedules in by_case(times).values()]
    apart = [(ours, eager) for ours, eager in pairs if ours and eager and ours.commit != eager.commit]
    if not apart:
        return None
    ours_at, eager_at = (
        ", ".join(dict.fromkeys(time.commit for time in side)) for side in zip(*apart, strict=True)
    )
    return f"Eager was timed at {eager_at}, sk_triton at {ours_at}: in other runs, perhaps on other cards of the model"


def schedule_seconds(times: Sequence[UnitTime], subject: str, dtype: str) -> dict[Case, dict[str, float]]:
    """Of a unit in inference: each case's seconds by schedule, eager's among them."""
    return {
        case: {name: time.seconds for name, time in schedules.items()}
        for case, schedules in by_case(times).items()
        if (case.subject, case.dtype, case.direction) == (subject, dtype, INFERENCE)
    }
