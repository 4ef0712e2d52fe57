"""What a run leaves behind: dataclasses, stamped with where they were measured, and their JSON file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import json_file
from .shapes import Case, Shape
from .stamp import Stamp
from .text_file import write_text

SCHEMA = 2

TIME_LIMIT = "time limit"
"""What the note begins with that says how many cases a run had no time for, or was interrupted before."""
PARTLY_CHECKED = "checked in part"
"""What the note begins with that says of how many samples the results of a case were checked."""

OK = "ok"
WRONG = "wrong"
FAILED = "failed"
OUT_OF_MEMORY = "out of memory"
SKIPPED = "skipped"
NOT_MEASURED = "not measured"

OURS = "ours"
PEER = "peer"
REVISION = "revision"
FLOOR = "floor"
"""Roles. A revision is sk_triton at another commit, and no peer. The floor is a copy of the input to the output: what
memory allows, measured in the same rounds."""

SK_TRITON = "ours"
"""Source key of sk_triton as its users get it; "ours-<schedule>" force one schedule."""
SAVING_INPUT = "ours-input"
"""Source key of sk_triton in training with save="input"."""

_TIMES = ("median_ms", "q20_ms", "q80_ms")
_HOST_TIMES = ("host_us", "host_q20_us", "host_q80_us")


@dataclass(frozen=True)
class Check:
    """Absolute error of one tensor against float64 on one input; None if not finite or of another shape.

    `tensor` is "v", or in training also "dx" and "parameters": of those the one closest to its limit. `norm` says which
    error: the "largest", or the "root mean square". `samples` of the batch were checked: fewer than all where float64
    does not fit; None in files that do not say.
    """

    input: str
    tensor: str
    error: float | None
    eager_error: float
    allowed: float
    passed: bool
    norm: str = "largest"
    samples: int | None = None


@dataclass(frozen=True)
class Budget:
    """How long one case is measured, all its providers together. Seconds, and rounds of one turn each."""

    warmup_seconds: float = 0.3
    seconds: float = 2.0
    min_rounds: int = 7
    max_rounds: int = 100


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median, 20 % and 80 % quantile of `samples` interleaved calls."""

    median_ms: float
    q20_ms: float
    q80_ms: float
    samples: int


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors: the most that were alive during a call beyond its input and parameters, and, in training, what
    was kept from the forward to the backward pass."""

    peak_bytes: int
    saved_bytes: int | None = None


@dataclass(frozen=True)
class Record:
    """One provider in one case. `timing` is present exactly where `status` is "ok", except in the suite "host".

    timing: on a GPU with a cold L2 cache; warm: with the previous call's data in it (GPU only).
    host_us: microseconds until the call returns, the device's work not awaited, with its 20 % and 80 % quantile;
    launches: kernels that it starts.
    runs: what sk_triton's dispatcher took, as "triton/store"; with counts where a network's units differ.
    commit: of the run that this is from, where several were joined and it is not of the latest.
    """

    case: Case
    source: str
    source_label: str
    form: str
    form_label: str
    role: str
    status: str = NOT_MEASURED
    message: str | None = None
    checks: tuple[Check, ...] = ()
    timing: Timing | None = None
    warm: Timing | None = None
    memory: Memory | None = None
    host_us: float | None = None
    launches: int | None = None
    runs: str | None = None
    host_q20_us: float | None = None
    host_q80_us: float | None = None
    commit: str | None = None

    @property
    def key(self) -> str:
        return f"{self.source}/{self.form}"

    @property
    def label(self) -> str:
        """The provider as people read it: sk_triton with what really ran."""
        source = f"{self.source_label} [{self.runs}]" if self.runs else self.source_label
        return f"{source}, {self.form_label}" if self.form_label else source

    def with_host_time(self, timing: Timing) -> Record:
        """The record with how long a call keeps the host."""
        return dataclasses.replace(
            self,
            host_us=timing.median_ms * 1e3,
            host_q20_us=timing.q20_ms * 1e3,
            host_q80_us=timing.q80_ms * 1e3,
        )

    @property
    def ours(self) -> bool:
        return self.role == OURS

    @property
    def samples_per_second(self) -> float | None:
        """Throughput: samples (images) of the batch per second, from the median."""
        return self.case.batch / self.timing.median_ms * 1e3 if self.timing else None


@dataclass(frozen=True)
class Ceilings:
    """The machine's measured limits: bytes read and written by a copy, and FLOP of a matrix product by dtype, per
    second."""

    copy_bytes_per_s: float
    matrix_flop_per_s: dict[str, float]


@dataclass(frozen=True)
class ClockSample:
    """One reading of a GPU during a run. `throttle` lists the driver's reasons for running below its clocks."""

    seconds: float
    sm_mhz: int
    memory_mhz: int
    temperature_c: int
    power_w: float
    throttle: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tests:
    """How the project's tests fared at `git_commit`, by the command that ran them; `complete`, if it got to its end."""

    command: str
    passed: int
    failed: int
    skipped: int
    git_commit: str | None
    complete: bool = True

    @property
    def green(self) -> bool:
        return self.complete and self.failed == 0 and self.passed > 0


@dataclass(frozen=True)
class Results:
    """Everything that one suite measured.

    objections: why no speed may be claimed; empty for a sound run. notes: what else a reader should know.
    budget: of each case; None in files that do not say. unmeasured: cases that were asked for and are left.
    """

    suite: str
    seed: int
    stamp: Stamp
    records: tuple[Record, ...] = ()
    ceilings: Ceilings | None = None
    clocks: tuple[ClockSample, ...] = ()
    tests: Tests | None = None
    objections: tuple[str, ...] = ()
    interrupted: bool = False
    notes: tuple[str, ...] = ()
    budget: Budget | None = None
    unmeasured: tuple[Case, ...] = ()
    schema: int = field(default=SCHEMA)

    @property
    def sound(self) -> bool:
        return not self.objections

    @property
    def exit_code(self) -> int:
        """1 if a provider failed to run or anything objects; skipped and out of memory are no failure."""
        return int(not self.sound or any(record.status in (WRONG, FAILED) for record in self.records))

    def to_json(self) -> str:
        return json_file.text_of(self)

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Inverse of `to_json`. Raises ValueError for text that is no results file of this schema version."""
        data = json_file.fields_of(text, SCHEMA, "results file")
        data["stamp"] = Stamp(**data["stamp"])
        data["records"] = tuple(_record(entry) for entry in data["records"])
        data["ceilings"] = Ceilings(**data["ceilings"]) if data["ceilings"] else None
        data["clocks"] = tuple(_clock(entry) for entry in data["clocks"])
        data["tests"] = Tests(**data["tests"]) if data["tests"] else None
        data["objections"] = tuple(data["objections"])
        data["notes"] = tuple(data.get("notes", ()))
        data["budget"] = Budget(**data["budget"]) if data.get("budget") else None
        data["unmeasured"] = tuple(_case(entry) for entry in data.get("unmeasured", ()))
        return cls(**data)


def save(results: Results, path: Path) -> None:
    """Writes JSON in one atomic step, so that an interrupted save leaves no half file."""
    write_text(results.to_json(), path)


def load(path: Path) -> Results:
    """Reads what `save` wrote. Raises ValueError for another schema version."""
    return Results.from_json(path.read_text(encoding="utf-8"))


def read(path: Path) -> Results:
    """The results in a file.

    Raises:
        ValueError: the file is missing or holds no results of this schema; the message names it.
    """
    try:
        return load(path)
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; a results file that `sk-triton bench` wrote is needed"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a results file of schema {SCHEMA}: {error!r}") from None


def lasting_notes(run: Results) -> list[str]:
    """Of a run's notes those that hold beside other runs."""
    return [note for note in run.notes if not note.startswith(TIME_LIMIT)]


def fastest_peer(records: list[Record]) -> Record | None:
    """The peer with the smallest median among the records of one case; None if no peer was timed."""
    return _fastest_of_role(records, PEER)


def fastest_ours(records: list[Record]) -> Record | None:
    """The form of sk_triton with the smallest median among the records of one case."""
    return _fastest_of_role(records, OURS)


def floor(records: list[Record]) -> Record | None:
    """The record of the memory floor among those of one case."""
    return _fastest_of_role(records, FLOOR)


def by_case(records: tuple[Record, ...] | list[Record]) -> dict[Case, list[Record]]:
    """Records grouped by case, both in order of appearance."""
    groups: dict[Case, list[Record]] = {}
    for record in records:
        groups.setdefault(record.case, []).append(record)
    return groups


def finished_cases(records: Iterable[Record], min_samples: int) -> list[Record]:
    """The records of the cases that no interrupt cut short: every timing rests on at least `min_samples`."""
    return [
        record
        for case in by_case(list(records)).values()
        if all(_is_finished(other, min_samples) for other in case)
        for record in case
    ]


def _is_finished(record: Record, min_samples: int) -> bool:
    if record.timing is not None:
        return record.timing.samples >= min_samples
    return record.status != NOT_MEASURED


def _fastest_of_role(records: list[Record], role: str) -> Record | None:
    timed = [record for record in records if record.role == role and record.timing]
    return min(timed, key=_median, default=None)


def _median(record: Record) -> float:
    assert record.timing is not None
    return record.timing.median_ms


def _record(entry: dict[str, Any]) -> Record:
    case = _case(entry.pop("case"))
    entry["checks"] = tuple(Check(**check) for check in entry["checks"])
    for name in ("timing", "warm"):
        entry[name] = Timing(**_timed(entry[name], _TIMES)) if entry[name] else None
    entry["memory"] = Memory(**entry["memory"]) if entry["memory"] else None
    _timed(entry, [name for name in _HOST_TIMES if entry.get(name) is not None])
    return Record(case=case, **entry)


def _case(entry: dict[str, Any]) -> Case:
    fields = _counted(dict(entry), ("batch",), 1)
    shape = _counted(dict(fields.pop("shape")), ("groups", "stride"), 1)
    shape = _counted(shape, ("channels", "height", "width"), 0)  # none at the start of a process
    shape["kernels"], shape["dilations"] = tuple(shape["kernels"]), tuple(shape["dilations"])
    return Case(shape=Shape(**shape), **fields)


def _counted(fields: dict[str, Any], names: Iterable[str], least: int) -> dict[str, Any]:
    """The fields. Raises ValueError where one of `names` is there and is no whole number from `least` on."""
    for name in names:
        value = fields.get(name, least)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be a whole number from {least} on, got {value!r}")
    return fields


def _timed(fields: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The fields. Raises ValueError where one of `names` is there and is no positive finite number."""
    for name in names:
        value = fields.get(name, 1.0)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return fields


def _clock(entry: dict[str, Any]) -> ClockSample:
    return ClockSample(**{**entry, "throttle": tuple(entry["throttle"])})
