"""Arithmetic rate against arithmetic intensity, under the ceilings that were measured on the same machine."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .. import results
from ..formats import three_digits
from ..results import Ceilings, Record, Results
from ..shapes import UNITS, Case
from ..verdict import sk_triton_records
from . import style
from .captions import direction, words
from .card import Entry, Grid, draw_card
from .lines import scale_y
from .selection import Groups

PANEL_HEIGHT = 1.9
SMALLEST, LARGEST = 3.0, 8.0
"""Markers of the smallest and the largest batch, in points; of one batch alone the latter."""


def intensity(case: Case) -> float:
    """FLOP per byte of an implementation that moves nothing twice."""
    return case.flops / (case.floor_passes * case.tensor_bytes)


def ceiling(case: Case, ceilings: Ceilings) -> float:
    """FLOP per second that the machine allows at the case's intensity."""
    by_memory = ceilings.copy_bytes_per_s * intensity(case)
    return min(by_memory, ceilings.matrix_flop_per_s.get(case.dtype, by_memory))


def rate(record: Record) -> float:
    """FLOP per second that a timed record reached."""
    assert record.timing is not None
    return record.case.flops / record.timing.median_ms * 1e3


def draw(run: Results, groups: Groups) -> Figure:
    """One panel for each unit: sk_triton and the fastest peer of each case, of one dtype and direction.

    Raises:
        ValueError: the run has no ceilings.
    """
    if run.ceilings is None:
        raise ValueError("run must have measured ceilings for a roofline, got none")
    panels: dict[str, Groups] = {}
    for case, records in groups.items():
        panels.setdefault(case.subject, {})[case] = records
    points = [record for records in groups.values() for record in _points(records)]
    grid = Grid((PANEL_HEIGHT,) * len(panels), left=0.62, below=0.5)
    batches = sorted({case.batch for case in groups})
    reading = "higher is faster; both axes logarithmic · each source's fastest form"
    if len(batches) > 1:
        reading += f" · small to large markers: batch {batches[0]} to {batches[-1]}"
    if run.sound:
        reading += f" · number: share of the roof at batch {batches[-1]}"
    size, prefix = (1e12, "T") if max(map(rate, points), default=0.0) > 1e12 else (1e9, "G")
    title = f"Roofline, {direction(next(iter(groups)))}"
    figure, rows = draw_card(words(run, title, reading, list(groups)), [_legend(points)], grid)
    axes = [ax for (ax,) in rows]
    for ax, (subject, panel) in zip(axes, panels.items(), strict=True):
        style.dress(ax, UNITS[subject].partition(":")[0], grid="y")
        _draw_points(ax, panel, batches)
        roof = _draw_roof(ax, panel, run.ceilings)
        rates = [rate(record) for record in points]
        ax.set_ylim(min(rates, default=roof) / 3, max([roof, *rates]) * 2.2)
        scale_y(ax, lambda flop: f"{flop / size:g}")
        if run.sound:
            _label_shares(ax, panel, run.ceilings, batches[-1])
        _label_intensities(ax, panel)
        _label_roof(ax, run.ceilings, next(iter(panel)).dtype)
        ax.set_ylabel(f"{prefix}FLOP per second", color=style.MUTED, fontsize=style.TICK)
    return figure


def _points(records: list[Record]) -> list[Record]:
    best = (results.fastest_peer(records), results.fastest_ours(sk_triton_records(records)))
    return [record for record in best if record]


def _legend(points: list[Record]) -> list[Entry]:
    handles = {
        record.source_label: Line2D([], [], color=style.colour(record.source), marker="o", linestyle="none")
        for record in points
    }
    return [(handle, label) for label, handle in handles.items()]


def _draw_points(ax: Axes, groups: Groups, batches: list[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    for case, records in groups.items():
        share = batches.index(case.batch) / (len(batches) - 1) if len(batches) > 1 else 1.0
        for record in _points(records):
            ax.plot(
                intensity(case), rate(record), marker="o", markersize=SMALLEST + (LARGEST - SMALLEST) * share,
                markerfacecolor=style.colour(record.source), markeredgecolor=style.BACKGROUND,
                markeredgewidth=0.5, zorder=4,
            )  # fmt: skip


def _draw_roof(ax: Axes, groups: Groups, ceilings: Ceilings) -> float:
    """Draws the ceilings over the panel's intensities; returns the highest rate."""
    intensities = [intensity(case) for case in groups]
    matrix = ceilings.matrix_flop_per_s.get(next(iter(groups)).dtype, math.inf)
    knee = matrix / ceilings.copy_bytes_per_s if matrix < math.inf else max(intensities)
    low, high = min(*intensities, knee / 2) / 2, max(*intensities, knee) * 2.2
    rates = [min(ceilings.copy_bytes_per_s * x, matrix) for x in (low, knee, high)]
    ax.plot((low, knee, high), rates, color=style.INK, linewidth=1.5, zorder=3)
    ax.set_xlim(low, high)
    return rates[-1]


def _label_shares(ax: Axes, groups: Groups, ceilings: Ceilings, batch: int) -> None:
    for case, records in groups.items():
        for record in _points(records) if case.batch == batch else ():
            ax.annotate(
                f"{rate(record) / ceiling(case, ceilings):.0%}", (intensity(case), rate(record)),
                (7 if record.ours else -7, 0),
                textcoords="offset points", ha="left" if record.ours else "right", va="center", fontsize=style.NUMBER,
                weight="bold" if record.ours else "normal", color=style.INK, path_effects=style.HALO, zorder=6,
            )  # fmt: skip


def _label_intensities(ax: Axes, groups: Groups) -> None:
    """The shapes' intensities are the ticks; above each stands the shape's name."""
    by_shape = {case.shape.name: intensity(case) for case in groups}
    for name, x in by_shape.items():
        ax.axvline(x, color=style.GRID, linewidth=0.6, zorder=1)
        ax.annotate(
            name, (x, 0), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center",
            va="bottom", fontsize=style.NUMBER, color=style.MUTED, path_effects=style.HALO,
        )  # fmt: skip
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(by_shape.values()))))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("FLOP per byte that must be moved", color=style.MUTED, fontsize=style.TICK, labelpad=2)


def _label_roof(ax: Axes, ceilings: Ceilings, dtype: str) -> None:
    """Names the ceilings along their lines; the limits of both axes are final."""
    matrix = ceilings.matrix_flop_per_s.get(dtype, math.inf)
    low, high = ax.get_xlim()
    knee = min(matrix / ceilings.copy_bytes_per_s, high)
    look: dict[str, Any] = {
        "fontsize": style.NUMBER,
        "color": style.INK,
        "textcoords": "offset points",
        "ha": "center",
        "va": "bottom",
    }
    if knee > low * 1.5:
        x = low * (knee / low) ** 0.45
        y = ceilings.copy_bytes_per_s * x
        start, end = ax.transData.transform([(x, y), (2 * x, 2 * y)])
        angle = math.atan2(end[1] - start[1], end[0] - start[0])
        shift = (-4 * math.sin(angle), 4 * math.cos(angle))
        text = f"copy {_rate(ceilings.copy_bytes_per_s, 'B/s')}"
        ax.annotate(text, (x, y), shift, rotation=math.degrees(angle), rotation_mode="anchor", **look)
    if knee < high / 1.5:
        x = high / (high / knee) ** 0.5
        ax.annotate(f"matrix {_rate(matrix, 'FLOP/s')}", (x, matrix), (0, 4), **look)


def _rate(value: float, unit: str) -> str:
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= size:
            return f"{three_digits(value / size)} {prefix}{unit}"
    return f"{three_digits(value / 1e6)} M{unit}"
