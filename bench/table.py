"""The results of a run as tables in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import coverage, results
from .formats import NOTHING, byte_size, ratio, three_digits
from .problems import complaints
from .results import Record, Results
from .revisions import against_revisions
from .shapes import Case, subject_title
from .stamp import Stamp
from .verdict import Comparison, cases_in_order, comparisons, losses, losses_count, speed_summary

Groups = dict[Case, list[Record]]

STATUS_STYLE = {
    results.WRONG: "bold red",
    results.FAILED: "red",
    results.OUT_OF_MEMORY: "magenta",
    results.SKIPPED: "yellow",
    results.NOT_MEASURED: "dim",
}
BUSY_SHARE = 0.5
"""Load per CPU above which a CPU run is called noisy."""

LEGEND = {"speed": "speed: fastest measured peer = 1x", "error": "error: share of what is allowed"}


@dataclass(frozen=True)
class Column:
    """A column and its cell for a record, given the other records of its case."""

    title: str
    cell: Callable[[Record, list[Record]], str]


def show(run: Results, console: Console) -> None:
    """Prints a table for each subject, dtype and direction, what went wrong, then how sk_triton compares."""
    groups = cases_in_order(run)
    for key in dict.fromkeys(map(_table_of, groups)):
        console.print(_table(run, {case: rows for case, rows in groups.items() if _table_of(case) == key}))
    _show_problems(run, console)
    _show_verdict(run, console)


def _table_of(case: Case) -> tuple[str, str, str]:
    return case.subject, case.dtype, case.direction


def _table(run: Results, groups: Groups) -> Table:
    first = next(iter(groups))
    title = subject_title(first.subject)
    stamp = run.stamp
    columns = [column for column in _columns(run) if _is_filled(column, groups)]
    where = f"{stamp.device_type.upper()}: {escape(stamp.device)}"
    table = Table(
        title=f"{title}\n{', '.join(part for part in (first.direction, first.dtype, where) if part)}",
        title_justify="left",
        caption="; ".join(LEGEND[column.title] for column in columns if column.title in LEGEND),
        caption_justify="left",
        box=box.SIMPLE,
    )
    table.add_column("provider", overflow="fold")
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for case, records in groups.items():
        table.add_row(_case_name(case), style="bold underline")
        for record in records:
            table.add_row(
                f"  {escape(record.label)}",
                *(column.cell(record, records) for column in columns),
                style="bold" if record.ours and record.timing else STATUS_STYLE.get(record.status),
                end_section=record is records[-1],
            )
    return table


def _case_name(case: Case) -> str:
    if not case.shape.channels:
        return "in a new process"
    what = f"{case.axis} {case.value:g}: {case.shape.name}" if case.axis else case.shape.name
    return f"{what}, batch {case.batch}"


def _columns(run: Results) -> list[Column]:
    """Every column; one without a single value in a table is left out of it. Speeds need a run without objections."""
    speed = [Column("speed", _speed)] if run.sound else []
    return [
        Column("ms", _median),
        Column("20-80 %", _quantiles),
        Column("warm ms", lambda record, _: three_digits(record.warm.median_ms) if record.warm else NOTHING),
        *speed,
        Column("images/s", _images),
        Column("peak", lambda record, _: byte_size(record.memory.peak_bytes) if record.memory else NOTHING),
        Column("saved", _saved),
        Column(
            "host µs", lambda record, _: NOTHING if record.host_us is None else three_digits(record.host_us)
        ),
        Column("host 20-80 %", _host_quantiles),
        Column("launches", lambda record, _: NOTHING if record.launches is None else str(record.launches)),
        Column("error", _error),
    ]


def _is_filled(column: Column, groups: Groups) -> bool:
    return any(column.cell(record, records) != NOTHING for records in groups.values() for record in records)


def _median(record: Record, _: list[Record]) -> str:
    if record.timing:
        return three_digits(record.timing.median_ms)
    return NOTHING if record.status == results.OK else record.status


def _quantiles(record: Record, _: list[Record]) -> str:
    timing = record.timing
    return f"{three_digits(timing.q20_ms)}-{three_digits(timing.q80_ms)}" if timing else NOTHING


def _speed(record: Record, records: list[Record]) -> str:
    fastest = results.fastest_peer(records)
    if fastest is None or fastest.timing is None or record.timing is None:
        return NOTHING
    return ratio(fastest.timing.median_ms / record.timing.median_ms)


def _images(record: Record, _: list[Record]) -> str:
    rate = record.samples_per_second
    return three_digits(rate) if rate is not None and record.case.is_network else NOTHING


def _saved(record: Record, _: list[Record]) -> str:
    saved = record.memory.saved_bytes if record.memory else None
    return NOTHING if saved is None else byte_size(saved)


def _host_quantiles(record: Record, _: list[Record]) -> str:
    """Of the host's time where it is all that was measured."""
    if record.timing is not None or record.host_q20_us is None or record.host_q80_us is None:
        return NOTHING
    return f"{three_digits(record.host_q20_us)}-{three_digits(record.host_q80_us)}"


def _error(record: Record, _: list[Record]) -> str:
    shares = [_error_share(check) for check in record.checks]
    return f"{max(shares):.2f}" if shares else NOTHING


def _error_share(check: results.Check) -> float:
    """Infinite if the error is not finite, or there is one where none is allowed."""
    if check.error is None:
        return math.inf
    return check.error / check.allowed if check.allowed else math.inf if check.error else 0.0


def _show_problems(run: Results, console: Console) -> None:
    for complaint in complaints(run.records):
        style = STATUS_STYLE[complaint.status]
        console.print(f"[{style}]{complaint.status}[/]: {escape(complaint.words)}", soft_wrap=True)
    if run.interrupted:
        console.print("[yellow]interrupted[/]: what was measured until then is kept")
    for note in run.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def _show_verdict(run: Results, console: Console) -> None:
    if not run.sound:
        console.print("[bold red]No speed is claimed:[/]")
        for objection in run.objections:
            console.print(f"  {objection}", markup=False, highlight=False, soft_wrap=True)
    else:
        _show_speeds(run, comparisons(run), console)
        _show_revisions(run, console)
    if run.stamp.device_type == "cpu":
        _show_cpu_notes(run.stamp, console)


def _show_speeds(run: Results, compared: list[Comparison], console: Console) -> None:
    for key in dict.fromkeys(_table_of(comparison.case) for comparison in compared):
        here = [comparison for comparison in compared if _table_of(comparison.case) == key]
        if summary := speed_summary(here):
            left_out = coverage.headline(run, [comparison.case for comparison in here])
            summary += f"; not measured: {left_out}" if left_out else ""
            console.print(f"[bold]{' '.join(key)}[/]: {summary}", highlight=False, soft_wrap=True)
    if not any(comparison.peer for comparison in compared):
        return
    if left_out := coverage.sentence(run):
        console.print(left_out, markup=False, highlight=False, soft_wrap=True)
    lost = losses(compared)
    console.print(f"We lose in {losses_count(compared)}{':' if lost else '.'}", highlight=False)
    for line in lost:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _show_revisions(run: Results, console: Console) -> None:
    for verdict in against_revisions(run):
        console.print(verdict.summary, markup=False, highlight=False, soft_wrap=True)
        for line in verdict.slower:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _show_cpu_notes(stamp: Stamp, console: Console) -> None:
    if stamp.load and stamp.cpus and stamp.load > BUSY_SHARE * stamp.cpus:
        console.print(
            f"The machine was busy when the run began (load {stamp.load:.1f} on {stamp.cpus} CPUs): expect noise.",
            style="yellow",
        )
    console.print(
        "CPU run: sk_triton runs PyTorch operators here, folded and in place; its kernels need a GPU.",
        style="yellow",
    )
