"""What a run leaves behind: dataclasses, stamped with where they were measured, and their JSON file."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sk_triton import environment
from sk_triton.dispatch import allows_tf32

SCHEMA = 1

OK = "ok"
WRONG = "wrong"
FAILED = "failed"
OUT_OF_MEMORY = "out of memory"
SKIPPED = "skipped"
NOT_MEASURED = "not measured"

Case = tuple[str, str, int, int]
"""What competing records share: unit, dtype, stage, batch."""


@dataclass(frozen=True)
class Stamp:
    """Machine, software and settings of a run; `threads` are PyTorch's intra-op ones."""

    device: str
    device_type: str
    driver: str | None
    python: str
    torch: str
    torch_built_for: str
    triton: str | None
    timm: str | None
    sk_triton: str | None
    git_commit: str | None
    git_dirty: bool | None
    tf32_convolution: bool
    float32_matmul_precision: str
    cudnn_benchmark: bool
    threads: int
    load: float | None
    """Runnable processes of the whole machine when the run began (1-minute average)."""
    cpus: int | None
    platform: str
    date: str
    """UTC, ISO 8601, to the second."""


@dataclass(frozen=True)
class Check:
    """Largest absolute error against float64 on one input; None if not finite or of another shape."""

    input: str
    error: float | None
    eager_error: float
    allowed: float
    passed: bool


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median, 20 % and 80 % quantile of `samples` interleaved calls."""

    median_ms: float
    q20_ms: float
    q80_ms: float
    samples: int


@dataclass(frozen=True)
class Record:
    """One provider in one case. `timing` is present exactly where `status` is "ok"."""

    unit: str
    stage: int
    channels: int
    height: int
    width: int
    batch: int
    dtype: str
    source: str
    source_label: str
    form: str
    form_label: str
    ours: bool
    status: str
    message: str | None = None
    checks: tuple[Check, ...] = ()
    timing: Timing | None = None

    @property
    def label(self) -> str:
        """The provider as people read it."""
        return f"{self.source_label}, {self.form_label}"

    @property
    def case(self) -> Case:
        return (self.unit, self.dtype, self.stage, self.batch)


@dataclass(frozen=True)
class Results:
    """Everything that one run measured."""

    suite: str
    seed: int
    stamp: Stamp
    records: tuple[Record, ...] = ()
    interrupted: bool = False
    schema: int = field(default=SCHEMA)

    @property
    def sound(self) -> bool:
        """False if any provider gave a wrong result: then no speed is claimed."""
        return all(record.status != WRONG for record in self.records)

    @property
    def exit_code(self) -> int:
        """1 if a provider gave a wrong result or failed to run; skipped and out of memory are no failure."""
        return int(any(record.status in (WRONG, FAILED) for record in self.records))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Inverse of `to_json`. Raises ValueError for another schema version."""
        data = json.loads(text)
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA}, got {data.get('schema')!r}")
        records = tuple(_record(entry) for entry in data.pop("records"))
        return cls(stamp=Stamp(**data.pop("stamp")), records=records, **data)


def save(results: Results, path: Path) -> None:
    """Writes JSON in one atomic step, so that an interrupted save leaves no half file."""
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(results.to_json(), encoding="utf-8")
    os.replace(partial, path)


def load(path: Path) -> Results:
    """Reads what `save` wrote. Raises ValueError for another schema version."""
    return Results.from_json(path.read_text(encoding="utf-8"))


def stamp(device: torch.device) -> Stamp:
    """The stamp of a run on `device`, taken now."""
    revision = environment.git_revision()
    return Stamp(
        device=environment.device_name(device),
        device_type=device.type,
        driver=environment.driver_version() if device.type == "cuda" else None,
        python=platform.python_version(),
        torch=torch.__version__,
        torch_built_for=environment.torch_built_for(),
        triton=environment.version("triton"),
        timm=environment.version("timm"),
        sk_triton=environment.version("sk-triton"),
        git_commit=revision.commit,
        git_dirty=revision.dirty,
        tf32_convolution=allows_tf32(),
        float32_matmul_precision=torch.get_float32_matmul_precision(),
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        cpus=os.cpu_count(),
        platform=platform.platform(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def fastest_peer(records: list[Record]) -> Record | None:
    """The peer with the smallest median among the records of one case; None if no peer was timed."""
    timed = [record for record in records if not record.ours and record.timing]
    return min(timed, key=_median, default=None)


def fastest_ours(records: list[Record]) -> Record | None:
    """The form of sk_triton with the smallest median among the records of one case."""
    timed = [record for record in records if record.ours and record.timing]
    return min(timed, key=_median, default=None)


def by_case(records: tuple[Record, ...] | list[Record]) -> dict[Case, list[Record]]:
    """Records grouped by case, both in order of appearance."""
    groups: dict[Case, list[Record]] = {}
    for record in records:
        groups.setdefault(record.case, []).append(record)
    return groups


def _median(record: Record) -> float:
    assert record.timing is not None
    return record.timing.median_ms


def _record(entry: dict[str, Any]) -> Record:
    timing = entry.pop("timing")
    checks = tuple(Check(**check) for check in entry.pop("checks"))
    return Record(**entry, checks=checks, timing=Timing(**timing) if timing else None)
