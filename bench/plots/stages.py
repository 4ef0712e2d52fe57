"""Panels of bars on one scale: a panel for each stage, in it a group for each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from ..shapes import Case, Shape
from . import style
from .bars import SLOT, Bar, draw_bars, number_room, slot_width
from .captions import stage_title
from .card import Grid
from .lines import scale_y

PANEL_HEIGHT = 1.75
ROOMY_BARS = 20
"""Where a panel has more bars than this, each gets a row of its own."""
WIDEST = 20.0
"""Inches that a picture may grow to for the sake of its bars."""

Groups = dict[Case, list[Bar]]


def by_shape(cases: Iterable[Case]) -> dict[Shape, list[Case]]:
    """Cases of each shape, in order of appearance."""
    found: dict[Shape, list[Case]] = {}
    for case in cases:
        found.setdefault(case.shape, []).append(case)
    return found


def stage_grid(groups: Groups, below: float) -> Grid:
    """The panels that `draw_stages` fills."""
    panels = by_shape(groups)
    most = max(sum(len(groups[case]) for case in cases) for cases in panels.values())
    columns = 1 if most > ROOMY_BARS or len(panels) == 1 else 2
    grid = Grid((PANEL_HEIGHT,) * -(-len(panels) // columns), columns, left=0.6, gap=0.2, below=below)
    slot = min(slot_width([groups[case] for case in cases], grid.panel_width) for cases in panels.values())
    wider = (SLOT / slot - 1) * grid.panel_width * columns
    return replace(grid, width=min(max(grid.width, grid.width + wider), WIDEST))


def draw_stages(
    rows: list[list[Axes]],
    grid: Grid,
    groups: Groups,
    label: str,
    show: Callable[[float], str],
    *,
    is_log: bool = False,
) -> dict[Shape, Axes]:
    """Fills the panels; `label` and `show` are the y axis's name and its numbers' form. Returns the panels by shape."""
    panels = by_shape(groups)
    axes = [ax for row in rows for ax in row]
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    limits = _limits(groups, grid, is_log)
    found = {}
    for index, (shape, cases) in enumerate(panels.items()):
        ax = found[shape] = axes[index]
        style.dress(ax, stage_title(shape))
        draw_bars(ax, [groups[case] for case in cases], grid.panel_width)
        ax.set_xticks(range(len(cases)), [f"batch {case.batch}" for case in cases], color=style.INK)
        if is_log:
            ax.set_yscale("log")
        else:
            ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        ax.set_ylim(*limits)
        if is_log:
            scale_y(ax, show)
        if index % grid.columns:
            ax.yaxis.set_major_formatter(NullFormatter())
        else:
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: show(y)))
            ax.set_ylabel(label, color=style.MUTED, fontsize=style.TICK)
    return found


def _limits(groups: Groups, grid: Grid, is_log: bool) -> tuple[float, float]:
    """One scale for all panels, with room for the numbers."""
    panels = [[groups[case] for case in cases] for cases in by_shape(groups).values()]
    drawn = [bar for bars in groups.values() for bar in bars if bar.height is not None]
    highest = max((bar.top for bar in drawn), default=1.0) or 1.0
    room = max(number_room(panel, grid.panel_width) for panel in panels) / PANEL_HEIGHT
    if not is_log:
        return 0, highest / (1 - room)
    lowest = min((bar.height for bar in drawn if bar.height), default=highest) / 2
    return lowest, lowest * (highest / lowest) ** (1 / (1 - room))
