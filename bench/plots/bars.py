"""Groups of bars with numbers on them, for every picture that has some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from .. import results
from ..results import Record
from . import style
from .card import text_width

GROUP_WIDTH = 0.86
WIDEST_BAR = 0.42
"""Inches; few bars stand together rather than swell."""
SLOT = 0.105
"""Inches that each of many bars should have."""
NUMBER_GAP = 0.04
"""Inches between two numbers that stand side by side: half a digit."""
NARROWEST = 0.085
"""Inches that a bar needs for an upright number; below, only numbers of `important` bars are shown."""


@dataclass(frozen=True)
class Bar:
    """One bar; without a height the record's status stands in its place.

    low, high: ends of the line for its spread; inner: height of a second, fuller bar inside; face: a colour other than
    the source's; absent: what stands in the place of a height where the status is "ok".
    """

    record: Record
    height: float | None
    number: str = ""
    low: float | None = None
    high: float | None = None
    important: bool = False
    inner: float | None = None
    face: str | None = None
    absent: str = "not measured"

    @property
    def top(self) -> float:
        """Where the number stands."""
        return max(self.height or 0.0, self.high or 0.0)


def slot_width(groups: Sequence[Sequence[Bar]], axes_width: float) -> float:
    """Inches that each bar of a panel has."""
    most = max((len(bars) for bars in groups), default=1)
    return min(axes_width / max(len(groups), 1) * GROUP_WIDTH / max(most, 1), WIDEST_BAR)


def number_room(groups: Sequence[Sequence[Bar]], axes_width: float) -> float:
    """Inches above the tallest bar that its number takes."""
    if _fits_flat(groups, slot_width(groups, axes_width)):
        return 0.16
    longest = max(
        (text_width(bar.number, style.NUMBER, "bold") for bars in groups for bar in bars), default=0
    )
    return longest + 0.08


def draw_bars(ax: Axes, groups: Sequence[Sequence[Bar]], axes_width: float) -> None:
    """Draws one group around each of 0, 1, 2, …; the limits of the y axis are the caller's."""
    width = slot_width(groups, axes_width)
    is_flat = _fits_flat(groups, width)
    for centre, bars in enumerate(groups):
        share = width / axes_width * len(groups)
        left = centre - share * len(bars) / 2
        for index, bar in enumerate(bars):
            middle = left + (index + 0.5) * share
            if bar.height is None:
                _draw_status(ax, middle, bar)
                continue
            _draw_bar(ax, middle, share * 0.92, bar)
            if width >= NARROWEST or is_flat or bar.important:
                _draw_number(ax, middle, bar, is_flat)
    ax.set_xlim(-0.52, len(groups) - 0.48)


def _draw_bar(ax: Axes, middle: float, width: float, bar: Bar) -> None:
    assert bar.height is not None
    look = style.bar_style(bar.record.source, bar.record.form)
    if bar.face is not None:
        look |= {"facecolor": bar.face, "hatch": ""}
    if bar.inner is not None:
        look["facecolor"] = style.tint(str(look["facecolor"]), style.PEAK_TINT)
    ax.bar(middle, bar.height, width, zorder=2, **look)
    if bar.inner is not None:
        inner = style.bar_style(bar.record.source, bar.record.form)
        ax.bar(middle, bar.inner, width, zorder=2, **inner)
    if bar.low is not None and bar.high is not None:
        ax.plot([middle, middle], [bar.low, bar.high], color=style.INK, linewidth=0.7, zorder=4)


def _draw_number(ax: Axes, middle: float, bar: Bar, is_flat: bool) -> None:
    ax.annotate(
        bar.number,
        (middle, bar.top),
        (0, 3.5 if not is_flat else 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        rotation=0 if is_flat else 90,
        fontsize=style.NUMBER,
        weight="bold" if bar.record.ours else "normal",
        color=style.INK,
        zorder=5,
        path_effects=style.HALO,
    )


def _draw_status(ax: Axes, middle: float, bar: Bar) -> None:
    status = bar.record.status
    alarming = status in (results.WRONG, results.FAILED)
    ax.annotate(
        bar.absent if status == results.OK else status,
        (middle, 0),
        (0, 4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        rotation=90,
        ha="center",
        va="bottom",
        fontsize=style.NUMBER,
        weight="bold" if alarming else "normal",
        color=style.ALARM if alarming else style.MUTED,
        zorder=5,
        path_effects=style.HALO,
    )


def _fits_flat(groups: Sequence[Sequence[Bar]], width: float) -> bool:
    """Whether every number may stand upright beside its neighbours'."""
    widest = max((text_width(bar.number, style.NUMBER, "bold") for bars in groups for bar in bars), default=0)
    return widest + NUMBER_GAP <= width
