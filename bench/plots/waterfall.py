"""Passes over memory of each way to compute a unit, step by step: derived from its description, not measured."""

from __future__ import annotations

from typing import Any

from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..grid import unit_spec
from ..passes import FLOOR, PHASES, Route, routes
from ..shapes import CLASSIC, PAPER, UNITS, stage_shape
from . import style
from .card import Grid, Words, draw_card, text_width
from .selection import FLOOR_LINE

BAR_INCHES = 0.34
THICKNESS = 0.78
PHASE_TINTS = dict(zip(PHASES, (0.0, 0.35, 0.62), strict=True))


def draw() -> Figure:
    """One panel for each unit of the benchmark: a row for each way to compute it."""
    units = {unit: routes(unit_spec(unit, stage_shape(unit, 1))) for unit in (PAPER, CLASSIC)}
    grid = Grid(tuple(BAR_INCHES * len(found) for found in units.values()), left=1.62, right=0.5, below=0.32)
    text = Words(
        title="Passes over memory at inference",
        subtitle="lower is faster where memory is the limit · one pass (T) reads or writes an activation tensor",
        footer=[
            ["derived step by step from each unit's description (bench/passes.py)", "counted, not measured"]
        ],
    )
    grey = style.FAMILY_COLOURS["copy"]
    legend = [(Patch(facecolor=style.tint(grey, share)), phase) for phase, share in PHASE_TINTS.items()]
    limit = (Line2D([], [], **FLOOR_LINE), f"limit: {FLOOR} T, read the input and write the output")
    figure, rows = draw_card(text, [[*legend, limit]], grid)
    longest = max(route.passes for found in units.values() for route in found)
    for (ax,), (unit, found) in zip(rows, units.items(), strict=True):
        _draw_unit(ax, UNITS[unit], found, longest, grid.panel_width / longest)
    rows[-1][0].set_xlabel("passes, T", color=style.MUTED, fontsize=style.TICK, labelpad=2)
    return figure


def _draw_unit(ax: Axes, title: str, found: list[Route], longest: int, inches_per_pass: float) -> None:
    style.dress(ax, title, grid="x")
    for row, route in enumerate(found):
        left = 0
        own = style.FAMILY_COLOURS[style.family(route.source)]
        for step in route.steps:
            face = style.tint(own, PHASE_TINTS[step.phase])
            ax.barh(
                row,
                step.passes,
                THICKNESS,
                left=left,
                color=face,
                edgecolor=style.BACKGROUND,
                linewidth=0.8,
                zorder=2,
            )
            _label(ax, left + step.passes / 2, row, step.name, step.passes * inches_per_pass, face)
            left += step.passes
        ax.annotate(
            f"{route.passes} T", (left, row), (4, 0), textcoords="offset points", va="center",
            fontsize=style.PANEL, weight="bold", color=style.INK, annotation_clip=False,
        )  # fmt: skip
    ax.axvline(FLOOR, zorder=3, **FLOOR_LINE)
    ax.set_yticks(range(len(found)), [route.name for route in found], color=style.INK, fontsize=style.LEGEND)
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.set_xlim(0, longest)


def _label(ax: Axes, x: float, row: int, name: str, room: float, face: str) -> None:
    """The step's name along the bar, across it, or not at all: as it fits."""
    length = text_width(name, style.NUMBER)
    if length + 0.06 <= room:
        rotation = 0
    elif length <= BAR_INCHES * THICKNESS and room >= 0.12:
        rotation = 90
    else:
        return
    tone = style.BACKGROUND if style.is_dark(face) else style.INK
    # The outline keeps a name readable where the limit's line crosses it; an upright one would spill over the bar.
    outline = [patheffects.withStroke(linewidth=2, foreground=face)] if rotation == 0 else []
    look: dict[str, Any] = {
        "fontsize": style.NUMBER,
        "color": tone,
        "rotation": rotation,
        "path_effects": outline,
        "zorder": 4,
    }
    ax.text(x, row, name, ha="center", va="center", **look)
