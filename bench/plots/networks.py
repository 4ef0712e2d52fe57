"""Images per second of whole networks, one panel for each network and batch."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..formats import three_digits
from ..results import Record, Results
from ..shapes import NETWORKS, Case
from ..verdict import comparisons
from . import style
from .bars import Bar, draw_bars, number_room
from .captions import direction, words
from .card import Grid, draw_card
from .selection import Groups, bar_legends, shown
from .speeds import label_speed

PANEL_HEIGHT = 1.6
ROOMY_BARS = 6


def draw(run: Results, groups: Groups, all_forms: bool) -> Figure:
    """Each panel has its own scale, from zero; numbers are images per second."""
    chosen = {case: shown(records, all_forms) for case, records in groups.items()}
    by_network: dict[tuple[str, str], list[Case]] = {}
    for case in groups:
        by_network.setdefault((case.subject, case.shape.name), []).append(case)
    rows_of_cases = [cases[i : i + 4] for cases in by_network.values() for i in range(0, len(cases), 4)]
    most = max(map(len, chosen.values()))
    if most > ROOMY_BARS:
        rows_of_cases = [[case] for cases in rows_of_cases for case in cases]
    columns = max(map(len, rows_of_cases))
    grid = Grid((PANEL_HEIGHT,) * len(rows_of_cases), columns, left=0.3, gap=0.25, above=0.42, below=0.36)
    first = next(iter(groups))
    reading = "higher is faster · number: images per second; line: 20 % to 80 % quantile"
    if run.sound:
        reading += " · below: sk_triton's speed, fastest measured peer = 1x"
    text = words(run, f"Whole networks, {direction(first)}", reading, list(groups), with_takeaway=True)
    figure, rows = draw_card(text, bar_legends(r for records in chosen.values() for r in records), grid)
    compared = {comparison.case: comparison for comparison in comparisons(run)}
    for axes, cases in zip(rows, rows_of_cases, strict=True):
        for index, ax in enumerate(axes):
            if index >= len(cases):
                ax.set_axis_off()
                continue
            case = cases[index]
            bars = [_bar(record) for record in chosen[case]]
            style.dress(ax, f"batch {case.batch}", grid="y")
            if index == 0:
                name = f"{NETWORKS[case.subject]}, at {case.shape.height}²"
                look: dict[str, Any] = {"fontsize": style.PANEL, "weight": "bold", "color": style.INK}
                ax.annotate(name, (0, 1), (0, 20), "axes fraction", textcoords="offset points", **look)
            draw_bars(ax, [bars], grid.panel_width)
            highest = max((bar.top for bar in bars), default=1.0) or 1.0
            ax.set_ylim(0, highest / (1 - number_room([bars], grid.panel_width) / PANEL_HEIGHT))
            ax.xaxis.set_major_locator(NullLocator())
            ax.yaxis.set_major_locator(NullLocator())
            if run.sound:
                label_speed(ax, compared.get(case), 0, 0, -5)
    return figure


def _bar(record: Record) -> Bar:
    if record.timing is None:
        return Bar(record, None)
    batch, timing = record.case.batch * 1e3, record.timing
    rate = batch / timing.median_ms
    return Bar(record, rate, three_digits(rate), batch / timing.q80_ms, batch / timing.q20_ms, record.ours)
