"""The results of a run as tables in the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import results
from .providers import UNITS
from .shapes import STAGES

Groups = dict[results.Case, list[results.Record]]

STATUS_STYLE = {
    results.WRONG: "bold red",
    results.FAILED: "red",
    results.OUT_OF_MEMORY: "magenta",
    results.SKIPPED: "yellow",
    results.NOT_MEASURED: "dim",
}
BUSY_SHARE = 0.5
"""Load per CPU above which a CPU run is called noisy."""


def show(run: results.Results, console: Console) -> None:
    """Prints one table for each unit and dtype, then what went wrong, then sk_triton against the peers."""
    groups = results.by_case(run.records)
    for unit, dtype in dict.fromkeys((unit, dtype) for unit, dtype, _, _ in groups):
        chosen = {case: records for case, records in groups.items() if case[:2] == (unit, dtype)}
        console.print(_table(unit, dtype, chosen, run.stamp))
    _show_problems(run, console)
    _show_headline(run, groups, console)


def three_digits(value: float) -> str:
    """Three significant digits at any scale from microseconds to minutes."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _table(unit: str, dtype: str, groups: Groups, stamp: results.Stamp) -> Table:
    table = Table(
        title=f"{UNITS[unit].title}\nforward, {dtype}, {stamp.device_type.upper()}: {escape(stamp.device)}",
        title_justify="left",
        caption="speed: fastest peer = 1; error: share of what is allowed",
        caption_justify="left",
        box=box.SIMPLE,
    )
    table.add_column("provider", overflow="fold")
    for header in ("ms", "20-80 %", "speed", "error"):
        table.add_column(header, justify="right", no_wrap=True)
    for (_, _, stage, batch), records in groups.items():
        fastest = results.fastest_peer(records)
        table.add_row(f"{STAGES[stage].name}, batch {batch}", style="bold underline")
        for record in records:
            table.add_row(
                f"  {escape(record.label)}",
                *_cells(record, fastest),
                style="bold" if record.ours and record.timing else STATUS_STYLE.get(record.status),
                end_section=record is records[-1],
            )
    return table


def _cells(record: results.Record, fastest: results.Record | None) -> tuple[str, str, str, str]:
    worst = max(
        (check.error / check.allowed for check in record.checks if check.error is not None), default=None
    )
    error = f"{worst:.2f}" if worst is not None else "-"
    if record.timing is None:
        return record.status, "-", "-", error
    timing = record.timing
    speed = f"{fastest.timing.median_ms / timing.median_ms:.2f}x" if fastest and fastest.timing else "-"
    quantiles = f"{three_digits(timing.q20_ms)}-{three_digits(timing.q80_ms)}"
    return three_digits(timing.median_ms), quantiles, speed, error


def _show_problems(run: results.Results, console: Console) -> None:
    """Each different complaint once, with the number of cases it stands for."""
    complaints: dict[tuple[str, str, str], int] = {}
    for record in run.records:
        if record.status not in (results.OK, results.NOT_MEASURED):
            key = (record.status, record.label, record.message or "")
            complaints[key] = complaints.get(key, 0) + 1
    for (status, label, message), count in complaints.items():
        cases = f" ({count} cases)" if count > 1 else ""
        style = STATUS_STYLE[status]
        console.print(f"[{style}]{status}[/]: {escape(label)}{cases}: {escape(message)}", soft_wrap=True)
    if run.interrupted:
        console.print("[yellow]interrupted[/]: what was measured until then is kept")


def _show_headline(run: results.Results, groups: Groups, console: Console) -> None:
    if not run.sound:
        console.print("[bold red]No speed is claimed: a provider gave a wrong result.[/]")
        return
    for (unit, dtype, stage, batch), records in groups.items():
        ours, peer = results.fastest_ours(records), results.fastest_peer(records)
        if ours and peer and ours.timing and peer.timing:
            what = f"{unit} {STAGES[stage].name} batch {batch} {dtype}"
            console.print(
                f"{what}: {_verdict(ours.timing, peer.timing)} ({escape(peer.label)})",
                highlight=False,
                soft_wrap=True,
            )
    if run.stamp.device_type == "cpu":
        if run.stamp.load and run.stamp.cpus and run.stamp.load > BUSY_SHARE * run.stamp.cpus:
            console.print(
                f"The machine was busy when the run began (load {run.stamp.load:.1f} on "
                f"{run.stamp.cpus} CPUs): expect noise.",
                style="yellow",
            )
        console.print(
            "CPU run: sk_triton runs its plain PyTorch reference here; its kernels need a GPU.",
            style="yellow",
        )


def _verdict(ours: results.Timing, peer: results.Timing) -> str:
    if ours.q20_ms <= peer.q80_ms and peer.q20_ms <= ours.q80_ms:
        return "no difference beyond the noise from the fastest peer"
    return f"[bold]{peer.median_ms / ours.median_ms:.2f}x[/] the speed of the fastest peer"
