"""Throughput against batch size, one panel for each stage."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from .. import results
from ..formats import thousands
from ..results import Record, Results
from . import style
from .captions import stage_title, unit_title, words
from .card import Grid, draw_card
from .lines import draw_floor, draw_form, draw_source, scale_x, scale_y
from .selection import Groups, line_legends, series, shown

PANEL_HEIGHT = 1.9


def draw(run: Results, groups: Groups, all_forms: bool) -> Figure:
    """A line for each source, its fastest form at each batch; with `all_forms` thin dashed ones for the others."""
    shapes = list(dict.fromkeys(case.shape for case in groups))
    floors = [floor for records in groups.values() if (floor := results.floor(records))]
    fastest = {case: shown(records, all_forms=False) for case, records in groups.items()}
    every = (
        {case: shown(records, all_forms=True) for case, records in groups.items()} if all_forms else fastest
    )
    columns = min(len(shapes), 2)
    grid = Grid((PANEL_HEIGHT,) * -(-len(shapes) // columns), columns, left=0.68, gap=0.25, below=0.38)
    first = next(iter(groups))
    reading = "higher is faster; both axes logarithmic · marker: the fastest form there; band: 20 % to 80 % quantile"
    text = words(run, f"{unit_title(first)}: throughput", reading, list(groups))
    legends = line_legends(
        (record for records in every.values() for record in records), next(iter(floors), None)
    )
    figure, rows = draw_card(text, legends, grid)
    axes = [ax for row in rows for ax in row]
    for ax, shape in zip(axes, shapes, strict=False):
        style.dress(ax, stage_title(shape), grid="both")
        here = [case for case in groups if case.shape == shape]
        for records in series(fastest[case] for case in here).values():
            draw_source(ax, records, _batch, _throughput)
        if all_forms:
            for records in series(every[case] for case in here).values():
                for form in dict.fromkeys(record.form for record in records):
                    draw_form(ax, [r for r in records if r.form == form], _batch, _throughput)
        draw_floor(ax, [floor for floor in floors if floor.case.shape == shape], _batch, _throughput)
        scale_x(ax, [case.batch for case in here])
        ax.set_yscale("log")
    lows, highs = zip(*(ax.get_ylim() for ax in axes[: len(shapes)]), strict=True)
    for index, ax in enumerate(axes):
        if index >= len(shapes):
            ax.set_axis_off()
            continue
        ax.set_ylim(min(lows), max(highs))
        scale_y(ax, thousands)
        if index % columns == 0:
            ax.set_ylabel("samples per second", color=style.MUTED, fontsize=style.TICK)
        else:
            ax.yaxis.set_major_formatter(NullFormatter())
        if index + columns >= len(shapes):
            ax.set_xlabel("batch", color=style.MUTED, fontsize=style.TICK, labelpad=2)
    return figure


def _batch(record: Record) -> float:
    return record.case.batch


def _throughput(record: Record, ms: float) -> float:
    return record.case.batch / ms * 1e3
