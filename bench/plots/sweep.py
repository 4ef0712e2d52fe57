"""Time against one property of the unit, one panel for each property."""

from __future__ import annotations

from matplotlib.figure import Figure

from .. import results
from ..results import Record, Results
from ..shapes import Case
from ..verdict import comparisons
from . import style
from .captions import Clock, unit_title, words
from .card import Grid, draw_card
from .lines import Measure, draw_floor, draw_form, draw_source, scale_x, scale_y
from .selection import Groups, line_legends, series, shown
from .speeds import label_speed

PANEL_HEIGHT = 1.9


def draw(run: Results, groups: Groups, all_forms: bool) -> Figure:
    """A line for each source, its fastest form at each value; above each value the speed against the fastest peer."""
    axes_names = list(dict.fromkeys(case.axis for case in groups if case.axis))
    fastest = {case: shown(records, all_forms=False) for case, records in groups.items()}
    every = (
        {case: shown(records, all_forms=True) for case, records in groups.items()} if all_forms else fastest
    )
    floors = {case: floor for case, records in groups.items() if (floor := results.floor(records))}
    clock = Clock.for_records([record for records in fastest.values() for record in records])
    columns = min(len(axes_names), 2)
    grid = Grid(
        (PANEL_HEIGHT,) * -(-len(axes_names) // columns), columns, left=0.62, gap=0.55, above=0.36, below=0.5
    )
    first = next(iter(groups))
    reading = "lower is faster · marker: the fastest form there; band: 20 % to 80 % quantile"
    if run.sound:
        reading += " · above: sk_triton's speed, fastest measured peer = 1x"
    text = words(run, f"{unit_title(first)}: what the shape costs", reading, list(groups), with_takeaway=True)
    floor = next(iter(floors.values()), None)
    legends = line_legends((record for records in every.values() for record in records), floor)
    figure, rows = draw_card(text, legends, grid)
    compared = {comparison.case: comparison for comparison in comparisons(run)}
    panels = [ax for row in rows for ax in row]
    for index, ax in enumerate(panels):
        if index >= len(axes_names):
            ax.set_axis_off()
            continue
        here = sorted((case for case in groups if case.axis == axes_names[index]), key=_case_value)
        style.dress(ax, str(axes_names[index]), grid="both")
        for records in series(fastest[case] for case in here).values():
            draw_source(ax, records, _value, _time(clock))
        if all_forms:
            for records in series(every[case] for case in here).values():
                for form in dict.fromkeys(record.form for record in records):
                    draw_form(ax, [r for r in records if r.form == form], _value, _time(clock))
        draw_floor(ax, [floors[case] for case in here if case in floors], _value, _time(clock))
        scale_x(ax, [_case_value(case) for case in here], _labels(here))
        ax.set_yscale("log")
        if any(record.timing for case in here for record in groups[case]):
            low, high = ax.get_ylim()
            ax.set_ylim(low, high * (high / low) ** 0.22)
        scale_y(ax, lambda y: f"{y:g}")
        ax.set_ylabel(f"{clock.name} per call", color=style.MUTED, fontsize=style.TICK)
        ax.set_xlabel(_constant(here), color=style.MUTED, fontsize=style.NUMBER, labelpad=2)
        if run.sound:
            for case in here:
                label_speed(ax, compared.get(case), _case_value(case), 1, -3, style.NUMBER)
    return figure


def _labels(cases: list[Case]) -> dict[float, str]:
    """A dense convolution is named at its place among the channels per group."""
    dense = [case for case in cases if case.axis == "channels per group" and case.shape.groups == 1]
    return {_case_value(case): f"{_case_value(case):g}\ndense" for case in dense}


def _constant(cases: list[Case]) -> str:
    """What a panel's cases have in common."""
    names, batches = {case.shape.name for case in cases}, {case.batch for case in cases}
    shared = [
        *(names if len(names) == 1 else ()),
        *(f"batch {batch}" for batch in batches if len(batches) == 1),
    ]
    return ", ".join(shared)


def _case_value(case: Case) -> float:
    return case.value if case.value is not None else 0.0


def _value(record: Record) -> float:
    return _case_value(record.case)


def _time(clock: Clock) -> Measure:
    return lambda record, ms: ms * clock.per_ms
