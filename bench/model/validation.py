"""Predicted against measured times, where results of a GPU are committed."""

from __future__ import annotations

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sk_triton.backend import SCHEDULES

from .. import results, unit_times
from ..grid import PRECISIONS, unit_spec
from ..results import Record, Results
from ..shapes import INFERENCE, Case
from . import speed_of_light as sol
from .gpus import Gpu, find_gpu
from .speed_of_light import Prediction, Problem

RESULTS = Path(__file__).parents[1] / "results"
FILES = "*/layer*.json"
"""What results of suite "layer" are committed as, in a folder per GPU."""
SCHEDULES_AND_PEERS = (*SCHEDULES, sol.COMPILED, sol.FLOOR)
"""What a suite may have timed; eager operators are in the units measured launch by launch."""


@dataclass(frozen=True)
class Compared:
    """A schedule's predicted and measured time in one case, in seconds."""

    case: str
    schedule: str
    predicted: float
    measured: float


Seconds = dict[Case, dict[str, float]]
"""Of a unit in inference: the measured seconds of each case by schedule, or by what schedules are compared with."""


def committed(gpu: Gpu, unit: str, dtype: str) -> Seconds:
    """What is committed for a GPU: units measured launch by launch, and the newest of each case of suite "layer".

    Raises:
        ValueError: a results file cannot be read.
    """
    seconds: Seconds = {}
    for path in sorted(RESULTS.glob(f"*/{unit_times.NAME}")):
        if _is(gpu, path.parent.name):
            seconds |= unit_times.schedule_seconds(unit_times.load(path), unit, dtype)
    for found in sorted(map(results.read, RESULTS.glob(FILES)), key=lambda run: run.stamp.date):
        if found.stamp.device_type == "cuda" and found.sound and _is(gpu, found.stamp.device):
            seconds |= seconds_of(found, unit, dtype)
    return seconds


def seconds_of(measured: Results, unit: str, dtype: str) -> Seconds:
    """The fastest measured form of each schedule, and of what it is compared with, on channels_last inputs."""
    found: Seconds = {}
    for case, records in results.by_case(measured.records).items():
        if case.subject == unit and case.direction == INFERENCE and _precision(case, measured) == dtype:
            times = {name: _measured_seconds(name, records) for name in SCHEDULES_AND_PEERS}
            found[case] = {name: seconds for name, seconds in times.items() if seconds is not None}
    return found


def compare(
    cases: Seconds, gpu: Gpu, dtype: str, report: Callable[[int, Case], object] = lambda done, case: None
) -> list[Compared]:
    """Predicted against measured times, for every case and schedule that was measured.

    `report`: called before each case with how many are done.
    """
    predicted = sol.predict_each([problem_of(case, dtype) for case in cases], gpu)
    found = []
    for done, (case, measured) in enumerate(cases.items()):
        report(done, case)
        found += beside(case, measured, next(predicted))
    return found


def problem_of(case: Case, dtype: str) -> Problem:
    """The problem whose prediction a measured case is compared with."""
    shape = case.shape
    return Problem(unit_spec(case.subject, shape), case.batch, shape.height, shape.width, *PRECISIONS[dtype])


def measured_here(
    problem: Problem, measured: Seconds, dtype: str, predictions: list[Prediction]
) -> list[Compared]:
    """The predictions beside what was measured of the very problem, if anything was."""
    return [
        found
        for case, seconds in measured.items()
        if problem_of(case, dtype) == problem
        for found in beside(case, seconds, predictions)
    ]


def beside(case: Case, measured: Mapping[str, float], predictions: Iterable[Prediction]) -> list[Compared]:
    """The predictions for which the case has a measured time, beside it."""
    return [
        Compared(case.title, prediction.schedule, prediction.total, measured[prediction.schedule])
        for prediction in predictions
        if prediction.schedule in measured
    ]


def rank_correlation(compared: list[Compared]) -> float | None:
    """:func:`spearman` of predicted and measured times."""
    return spearman([(c.predicted, c.measured) for c in compared])


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation of pairs; None where one of the two does not vary."""

    def ranks(values: list[float]) -> list[float]:
        # The mean rank of what is equal: a value's own first place and its last, halved.
        ordered = sorted(values)
        return [(bisect_left(ordered, value) + bisect_right(ordered, value)) / 2 for value in values]

    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return statistics.correlation(ranks(first), ranks(second))


def _measured_seconds(schedule: str, records: list[Record]) -> float | None:
    def matches(record: Record) -> bool:
        if schedule == sol.FLOOR:
            return record.role == results.FLOOR
        if "channels_last" not in record.form:
            return False
        if schedule == sol.COMPILED:
            return record.role == results.PEER and record.form.startswith(("compile", "max-autotune"))
        return record.source == f"ours-{schedule}" or (record.ours and record.runs == f"triton/{schedule}")

    timed = [record.timing.median_ms for record in records if record.timing and matches(record)]
    return min(timed) / 1e3 if timed else None


def _precision(case: Case, measured: Results) -> str:
    return "tf32" if case.dtype == "fp32" and measured.stamp.tf32_convolution else case.dtype


def _is(gpu: Gpu, device: str) -> bool:
    try:
        return find_gpu(device) is gpu
    except ValueError:
        return False
