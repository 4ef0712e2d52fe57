"""The same cases under several runs: other GPUs, other commits, or both."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .. import results
from ..results import Record, Results
from ..shapes import Case
from ..verdict import sk_triton_records
from . import style
from .bars import Bar
from .captions import Clock, commit, notices, stamp, unit_title
from .card import Words, draw_card
from .stages import draw_stages, stage_grid

LIGHTEST = 0.66

Best = dict[Case, list[Record | None]]
"""sk_triton's fastest record of a case in each run."""


def labels(runs: Sequence[Results]) -> list[str]:
    """What tells the runs apart: device, commit, both, or else the date; then a number, if nothing does."""
    devices = [run.stamp.device for run in runs]
    commits = [commit(run) or "no commit" for run in runs]
    dates = [run.stamp.date for run in runs]
    parts = [values for values in (devices, commits) if len(set(values)) > 1]
    if len({*zip(*parts, strict=True)} if parts else ()) < len(runs):
        parts.append(dates)
    names = [", ".join(values) for values in zip(*parts, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, start=1)]


def shared_cases(runs: Sequence[Results]) -> Best:
    """Cases that at least two runs have timed sk_triton in."""
    best: Best = {}
    for index, run in enumerate(runs):
        for case, records in results.by_case(run.records).items():
            own = results.fastest_ours(sk_triton_records(records))
            best.setdefault(case, [None] * len(runs))[index] = own
    return {case: records for case, records in best.items() if sum(r is not None for r in records) > 1}


def draw(runs: Sequence[Results], best: Best) -> Figure:
    """sk_triton's speed in each run, the first one = 1x; `best` has one subject, dtype and direction.

    Where an objection stands against a run, its times are shown, and nothing is compared.
    """
    names, sound = labels(runs), all(run.sound for run in runs)
    clock = Clock.for_records([record for records in best.values() for record in records if record])
    bars = {case: _bars(records, clock, sound) for case, records in best.items()}
    grid = stage_grid(bars, below=0.34)
    first = next(iter(best))
    better = f"higher is faster; {names[0]} = 1x" if sound else "lower is faster; logarithmic"
    text = Words(
        title=f"{unit_title(first)}: sk_triton in {len(runs)} runs",
        subtitle=f"{first.dtype} · {better} · number: median in {clock.name} of the fastest form; line: 20 % to 80 %",
        footer=[[name, *stamp(run)] for name, run in zip(names, runs, strict=True)],
        notices=list(dict.fromkeys(notice for run in runs for notice in notices(run))),
    )
    legend = [(Patch(facecolor=_shade(index, len(runs))), name) for index, name in enumerate(names)]
    figure, rows = draw_card(text, [legend], grid)
    if sound:
        draw_stages(rows, grid, bars, "speed, first run = 1x", "{:g}x".format)
    else:
        draw_stages(
            rows, grid, bars, f"{clock.name} per call", lambda ms: f"{ms * clock.per_ms:g}", is_log=True
        )
    return figure


def _bars(records: list[Record | None], clock: Clock, sound: bool) -> list[Bar]:
    """One bar for each run that has the case; a speed needs a time of the first run."""
    base = records[0].timing.median_ms if records[0] and records[0].timing else None
    bars = []
    for index, record in enumerate(records):
        if record is None or record.timing is None or (sound and base is None):
            continue
        low, middle, high = record.timing.q20_ms, record.timing.median_ms, record.timing.q80_ms
        number = clock.show(middle)
        if sound and base is not None:
            low, middle, high = base / high, base / middle, base / low
        bars.append(Bar(record, middle, number, low, high, important=True, face=_shade(index, len(records))))
    return bars


def _shade(index: int, runs: int) -> str:
    """sk_triton's blue, from light for the first run to full for the last."""
    return style.tint(style.colour("ours"), LIGHTEST * (1 - index / max(runs - 1, 1)))
