"""How time and memory grow with batch, image and channels: points and a fitted power of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import linear_regression

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..results import Record, Results
from . import style
from .captions import Clock, unit_title, words
from .card import Grid, draw_card
from .lines import scale_bytes, scale_numbers, scale_x
from .selection import Groups, line_legends, line_width, peak_in_channels_last, series, shown

PANEL_HEIGHT = 2.0
Measure = Callable[[Record], float | None]


def fit_exponent(values: Sequence[float], measures: Sequence[float]) -> tuple[float, float]:
    """Exponent p and factor c of `c * value ** p` by least squares on logarithms.

    Raises:
        ValueError: fewer than two different values, or something not above 0.
    """
    if any(number <= 0 for number in (*values, *measures)):
        raise ValueError(f"values and measures must be above 0, got {list(values)} and {list(measures)}")
    if len(set(values)) < 2:
        raise ValueError(f"values must hold at least two different ones, got {list(values)}")
    exponent, offset = linear_regression([math.log(v) for v in values], [math.log(m) for m in measures])
    return exponent, math.exp(offset)


def draw(run: Results, groups: Groups, all_forms: bool) -> Figure:
    """A column for each axis; time above, memory below. Exponents stand in each panel.

    Memory is that of the form in channels_last with the least peak: the fastest may be a graph, which is not weighed.
    """
    names = list(dict.fromkeys(case.axis for case in groups if case.axis))
    timed = {case: shown(records, all_forms) for case, records in groups.items()}
    weighed = {case: shown(records, all_forms, peak_in_channels_last) for case, records in groups.items()}
    clock = Clock.for_records([record for records in timed.values() for record in records])
    rows: list[tuple[str, Groups, Measure, Callable[[Axes], None]]] = [
        (f"{clock.name} per call", timed, lambda record: _time(record, clock), scale_numbers)
    ]
    if any(record.memory for records in weighed.values() for record in records):
        rows.append(("peak memory", weighed, _memory, scale_bytes))
    every = [record for _, chosen, *_ in rows for records in chosen.values() for record in records]
    grid = Grid((PANEL_HEIGHT,) * len(rows), len(names), left=0.66, gap=0.56, below=0.46)
    reading = "lower is better; both axes logarithmic · dashed: fitted power, its exponent in the panel; 1 is linear"
    if len(rows) > 1:
        reading += " · memory: the least peak in channels_last, out of CUDA graphs"
    text = words(run, f"{unit_title(next(iter(groups)))}: how cost grows", reading, list(groups))
    figure, panels = draw_card(text, line_legends(every, floor=None), grid)
    for axes, (label, chosen, measure, scale) in zip(panels, rows, strict=True):
        for ax, name in zip(axes, names, strict=True):
            style.dress(ax, f"{label}, by {name}", grid="both")
            _draw_panel(ax, [records for case, records in chosen.items() if case.axis == name], measure)
            scale(ax)
            ax.set_xlabel(name, color=style.MUTED, fontsize=style.TICK, labelpad=2)
    return figure


def _draw_panel(ax: Axes, groups: list[list[Record]], measure: Measure) -> None:
    values: set[float] = set()
    exponents: list[tuple[Line2D, str]] = []
    for records in series(groups).values():
        points = [
            (x, y, r) for r in records if (x := r.case.value) is not None and (y := measure(r)) is not None
        ]
        for x, y, record in points:
            look = style.marker_style(record.source, record.form)
            ax.plot(x, y, markersize=5, zorder=4, **look)
        xs = [x for x, _, _ in points]
        values.update(xs)
        if len(set(xs)) > 1:
            exponent, factor = fit_exponent(xs, [y for _, y, _ in points])
            ends = [min(xs), max(xs)]
            own, width = style.colour(records[0].source), line_width(records[0]) * 0.6
            fitted = [factor * x**exponent for x in ends]
            (line,) = ax.plot(ends, fitted, color=own, linewidth=width, linestyle=(0, (4, 2)), zorder=3)
            exponents.append((line, f"exponent {exponent:.2f}"))
    ax.set_yscale("log")
    scale_x(ax, sorted(values))
    low, high = ax.get_ylim()
    # Room for the exponents above the rising lines.
    ax.set_ylim(low, high * (high / low) ** (0.12 * len(exponents)))
    ax.legend(
        [line for line, _ in exponents], [text for _, text in exponents], loc="upper left", frameon=False,
        fontsize=style.NUMBER, labelcolor=style.INK, handlelength=1.8, borderaxespad=0.1, labelspacing=0.3,
    )  # fmt: skip


def _time(record: Record, clock: Clock) -> float | None:
    return record.timing.median_ms * clock.per_ms if record.timing else None


def _memory(record: Record) -> float | None:
    return record.memory.peak_bytes if record.memory else None
