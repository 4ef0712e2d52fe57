"""Speed of every provider against the fastest peer, by stage and batch, with absolute times."""

from __future__ import annotations

from matplotlib.figure import Figure

from .. import results
from ..results import Record, Results
from ..verdict import comparisons
from . import style
from .bars import Bar
from .captions import Clock, unit_title, words
from .card import draw_card
from .selection import Groups, bar_legends, shown
from .speeds import label_speed
from .stages import by_shape, draw_stages, stage_grid


def draw(run: Results, groups: Groups, all_forms: bool) -> Figure:
    """One panel for each shape, in it a group of bars for each batch; `groups` have one subject, dtype and direction.

    Where no speed may be claimed, the bars are times, on a logarithmic axis, and nothing is compared.
    """
    chosen = {case: shown(records, all_forms) for case, records in groups.items()}
    every = [record for records in chosen.values() for record in records]
    clock = Clock.for_records(every)
    bars = {case: _bars(run, groups[case], records, clock) for case, records in chosen.items()}
    grid = stage_grid(bars, below=0.44 if run.sound else 0.34)
    marks = f"number: median in {clock.name}; line: 20 % to 80 % quantile"
    title = unit_title(next(iter(groups)))
    if not run.sound:
        text = words(run, f"{title}: time", f"lower is faster; logarithmic · {marks}", list(groups))
        figure, rows = draw_card(text, bar_legends(every), grid)
        draw_stages(
            rows, grid, bars, f"{clock.name} per call", lambda ms: f"{ms * clock.per_ms:g}", is_log=True
        )
        return figure
    reading = f"higher is faster · {marks} · below a batch: sk_triton's speed"
    text = words(run, f"{title}: speed", reading, list(groups), with_takeaway=True)
    figure, rows = draw_card(text, bar_legends(every), grid)
    panels = draw_stages(rows, grid, bars, "speed, fastest peer = 1x", "{:g}x".format)
    compared = {comparison.case: comparison for comparison in comparisons(run)}
    for shape, cases in by_shape(groups).items():
        panels[shape].axhline(1, color=style.INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=3)
        for position, case in enumerate(cases):
            label_speed(panels[shape], compared.get(case), position, 0, -16)
    return figure


def _bars(run: Results, records: list[Record], chosen: list[Record], clock: Clock) -> list[Bar]:
    """Bars of one case: speeds against its fastest peer, or times where no speed may be claimed."""
    peer, best = results.fastest_peer(records), results.fastest_ours(chosen)
    base = peer.timing.median_ms if peer and peer.timing else None
    bars = []
    for record in chosen:
        timing = record.timing
        if timing is None or (run.sound and base is None):
            bars.append(Bar(record, None, absent="no peer" if timing else "not measured"))
            continue
        low, middle, high = timing.q20_ms, timing.median_ms, timing.q80_ms
        if run.sound and base is not None:
            low, middle, high = base / high, base / middle, base / low
        important = record is peer or record is best
        bars.append(Bar(record, middle, clock.show(timing.median_ms), low, high, important))
    return bars
