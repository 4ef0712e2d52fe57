"""A run as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

from .results import Memory, Record, Results, Timing
from .shapes import Case, Shape
from .text_file import write_text


def write_csv(run: Results, path: Path) -> None:
    """One row for each record with everything in it and the run's stamp; column names end in their unit.

    Kernels and dilations are lists with spaces between; of each check there are four columns.
    """
    rows = [_row(run, record) for record in run.records]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(text.getvalue(), path)


def _row(run: Results, record: Record) -> dict[str, Any]:
    case = record.case
    row = _fields(case, Case)
    row |= {
        "samples_per_s": record.samples_per_second,
        "tensor_bytes": case.tensor_bytes,
        "floor_passes": case.floor_passes,
        "flop": case.flops,
    }
    row = _fields(case.shape, Shape) | row | _fields(record, Record)
    row |= _fields(record.timing, Timing) | _fields(record.warm, Timing, "warm_")
    row |= _fields(record.memory, Memory)
    row |= _fields(run.stamp, type(run.stamp), "stamp_")
    row |= {"seed": run.seed, "interrupted": run.interrupted}
    row |= {"objections": "; ".join(run.objections), "notes": "; ".join(run.notes)}
    for check in record.checks:
        prefix = f"check_{check.input}_{check.tensor}_{check.norm}".replace(" ", "_")
        for name in ("error", "eager_error", "allowed", "passed"):
            row[f"{prefix}_{name}"] = getattr(check, name)
    return row


def _fields(value: Any, kind: type, prefix: str = "") -> dict[str, Any]:
    """The plain fields of a dataclass by name; all None for None."""
    row = {}
    for field in dataclasses.fields(kind):
        entry = getattr(value, field.name, None)
        if dataclasses.is_dataclass(entry) or field.name in ("checks", "timing", "warm", "memory"):
            continue
        row[prefix + field.name] = " ".join(map(str, entry)) if isinstance(entry, tuple) else entry
    return row
