"""Lines over a quantity on a logarithmic axis, for every picture that has some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ..formats import byte_size
from ..results import Record, Timing
from . import style
from .selection import FLOOR_LINE, line_width

Position = Callable[[Record], float]
Measure = Callable[[Record, float], float]
"""A record's value for one of its times in milliseconds."""


def draw_source(ax: Axes, records: Sequence[Record], position: Position, measure: Measure) -> None:
    """One source's records as a line with a band from the 20 % to the 80 % quantile; each marker shows its form."""
    timed = [(record, record.timing) for record in records if record.timing]
    if not timed:
        return
    own = style.colour(timed[0][0].source)
    order = 4 if timed[0][0].ours else 3
    xs = [position(record) for record, _ in timed]
    ys = [measure(record, timing.median_ms) for record, timing in timed]
    ax.plot(xs, ys, color=own, linewidth=line_width(timed[0][0]), zorder=order, solid_capstyle="round")
    _band(ax, timed, xs, measure, own)
    for record, x, y in zip((record for record, _ in timed), xs, ys, strict=True):
        size = 5.4 if record.ours else 4.6
        ax.plot(x, y, markersize=size, zorder=order + 0.5, **style.marker_style(record.source, record.form))


def draw_form(ax: Axes, records: Sequence[Record], position: Position, measure: Measure) -> None:
    """One source in one form, as a thin dashed line behind the fastest."""
    timed = [(record, record.timing) for record in records if record.timing]
    if not timed:
        return
    first = timed[0][0]
    look: dict[str, Any] = {
        **style.marker_style(first.source, first.form),
        "color": style.colour(first.source),
    }
    xs = [position(record) for record, _ in timed]
    ys = [measure(record, timing.median_ms) for record, timing in timed]
    dashes = style.MODE_DASHES[style.mode(first.form)]
    ax.plot(xs, ys, linewidth=0.8, linestyle=dashes, markersize=3.4, alpha=0.8, zorder=2, **look)


def draw_floor(ax: Axes, records: Sequence[Record], position: Position, measure: Measure) -> None:
    """The memory floor as a dashed limit; a single point as a mark."""
    timed = [record for record in records if record.timing]
    if not timed:
        return
    xs = [position(record) for record in timed]
    ys = [measure(record, record.timing.median_ms) for record in timed if record.timing]
    ax.plot(xs, ys, zorder=2.5, **FLOOR_LINE, marker="_" if len(xs) == 1 else "")


def scale_x(ax: Axes, values: Sequence[float], labels: dict[float, str] | None = None) -> None:
    """A logarithmic axis whose ticks are the measured values."""
    values = sorted(set(values))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(values))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: (labels or {}).get(x, f"{x:g}")))
    ax.xaxis.set_minor_locator(NullLocator())


def scale_y(ax: Axes, show: Callable[[float], str]) -> None:
    """A logarithmic axis with ticks at powers of ten, and between them where it spans little."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    span = high / low
    ax.yaxis.set_major_locator(
        LogLocator(10, subs=(1, 2, 5) if span < 60 else (1, 3) if span < 3000 else (1,))
    )
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: show(y)))


def scale_numbers(ax: Axes) -> None:
    """A logarithmic axis of plain numbers."""
    scale_y(ax, "{:g}".format)


def scale_bytes(ax: Axes) -> None:
    """A logarithmic axis whose ticks are powers of two with binary units."""
    ax.set_yscale("log", base=2)
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(4 if high / low < 300 else 16))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: byte_size(y, "{:g}".format)))


def _band(
    ax: Axes, timed: Sequence[tuple[Record, Timing]], xs: Sequence[float], measure: Measure, own: str
) -> None:
    low = [measure(record, timing.q20_ms) for record, timing in timed]
    high = [measure(record, timing.q80_ms) for record, timing in timed]
    if len(xs) > 1:
        ax.fill_between(xs, low, high, color=own, alpha=0.18, linewidth=0, zorder=2)
    else:
        ax.vlines(xs, low, high, color=own, linewidth=1, zorder=2)
