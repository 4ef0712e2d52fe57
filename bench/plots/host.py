"""What a call costs the host: microseconds until it returns, and kernels that it starts."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..formats import three_digits
from ..results import Record, Results
from ..shapes import INFERENCE, TRAINING, Case
from . import style
from .bars import GROUP_WIDTH, SLOT, Bar, draw_bars, number_room
from .captions import subject_name, words
from .card import WIDTH, Grid, draw_card
from .selection import Groups, bar_legends, shown

PANEL_HEIGHT = 1.6
_CALLS = {INFERENCE: "inference", TRAINING: "training"}
CASE_WIDTH = 0.66
"""Inches that the name of a case takes."""


def draw(run: Results, groups: Groups, all_forms: bool) -> Figure:
    """Two panels, one above the other, with a group of bars for each case."""
    chosen = {case: _least_host_time(records, all_forms) for case, records in groups.items()}
    most = max(map(len, chosen.values()))
    width = max(WIDTH, 0.8 + len(groups) * max(CASE_WIDTH, most * SLOT / GROUP_WIDTH))
    grid = Grid((PANEL_HEIGHT, PANEL_HEIGHT), left=0.6, below=0.58, width=width)
    reading = "lower is better · each in the memory format that costs the host less"
    text = words(
        run, f"{subject_name(next(iter(groups)))}: what a call costs the host", reading, list(groups)
    )
    figure, ((time,), (launches,)) = draw_card(
        text, bar_legends(record for records in chosen.values() for record in records), grid
    )
    bars = [[_bar(record, record.host_us) for record in records] for records in chosen.values()]
    _draw_panel(time, "until the call returns", "µs", bars, list(groups), grid)
    bars = [[_bar(record, record.launches) for record in records] for records in chosen.values()]
    # Where launches are stubbed out, what other operators start is not seen.
    title = "kernels started" if run.stamp.device_type != "cpu" else "Triton kernels started"
    _draw_panel(launches, title, "launches", bars, list(groups), grid)
    launches.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def _least_host_time(records: list[Record], all_forms: bool) -> list[Record]:
    """As `shown`, but of each source every mode that it was run in, in the memory format that costs the host less."""
    if all_forms:
        return shown(records, all_forms)
    sources = {record.source for record in shown(records, all_forms=False)}
    best: dict[tuple[str, str], Record] = {}
    for record in (record for record in records if record.source in sources):
        key = (record.source, style.mode(record.form))
        if key not in best or _host_us(record) < _host_us(best[key]):
            best[key] = record
    return list(best.values())


def _host_us(record: Record) -> float:
    return math.inf if record.host_us is None else record.host_us


def _bar(record: Record, value: float | None) -> Bar:
    if value is None:
        return Bar(record, None)
    return Bar(
        record, value, str(value) if isinstance(value, int) else three_digits(value), important=record.ours
    )


def _draw_panel(
    ax: Axes, title: str, unit: str, bars: list[list[Bar]], cases: list[Case], grid: Grid
) -> None:
    style.dress(ax, title)
    draw_bars(ax, bars, grid.panel_width)
    highest = max((bar.top for group in bars for bar in group), default=1.0) or 1.0
    ax.set_ylim(0, highest / (1 - number_room(bars, grid.panel_width) / PANEL_HEIGHT))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.set_ylabel(unit, color=style.MUTED, fontsize=style.TICK)
    ax.set_xticks(
        range(len(cases)),
        [f"{case.shape.name}\n{_CALLS[case.direction]}\nbatch {case.batch}" for case in cases],
        color=style.INK,
    )
