"""The card that a picture stands on: title, takeaway, subtitle, badges and legends above, the stamp below.

All lengths are in inches, so that text keeps its size and its distance whatever a picture's height.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.path import Path
from matplotlib.textpath import TextPath

from . import style

WIDTH = 7.5
MARGIN = 0.2
LEGEND_HANDLE = 0.36
LEGEND_GAP = 0.2

Entry = tuple[Artist, str]
"""What a legend shows and its label."""


@dataclass(frozen=True)
class Grid:
    """Panels of a picture: one row for each of `heights`. `left` and `gap` leave room for the labels of y axes, `below`
    for those of x axes, `above` for a panel's title. `width` is the picture's."""

    heights: tuple[float, ...]
    columns: int = 1
    left: float = 0.62
    gap: float = 0.3
    above: float = 0.3
    below: float = 0.42
    right: float = MARGIN
    width: float = WIDTH

    @property
    def height(self) -> float:
        return sum(height + self.above + self.below for height in self.heights)

    @property
    def panel_width(self) -> float:
        return (self.width - self.left - self.right - self.gap * (self.columns - 1)) / self.columns


@dataclass(frozen=True)
class Words:
    """The text of a picture. `footer` are paragraphs of facts, `notices` kinds of badge and their texts."""

    title: str
    subtitle: str
    footer: Sequence[Sequence[str]]
    takeaway: str | None = None
    notices: Sequence[tuple[str, str]] = ()


def draw_card(
    words: Words, legends: Sequence[Sequence[Entry]], grid: Grid
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with everything but the data, and its empty panels by row and column."""
    width = grid.width
    room = width - 2 * MARGIN
    subtitle = wrap(words.subtitle.split(" · "), room, style.SUBTITLE, "  ·  ")
    badges = [(kind, wrap(text.split(), room - 0.2, style.SUBTITLE, " ")) for kind, text in words.notices]
    footer = [line for facts in words.footer for line in wrap(facts, room, style.FOOTER, "  ·  ")]
    takeaway = wrap(words.takeaway.split(), room, style.TAKEAWAY, " ", "bold") if words.takeaway else []
    rows = [row for entries in legends for row in _legend_rows(entries, room)]

    top = 0.36 + 0.19 * len(takeaway) + 0.165 * len(subtitle) + 0.06
    top += sum(0.22 + 0.155 * len(lines) for _, lines in badges)
    top += 0.2 * len(rows) + 0.04
    bottom = 0.16 + 0.14 * len(footer)
    height = top + grid.height + bottom
    figure = Figure(figsize=(width, height), facecolor=style.BACKGROUND, dpi=style.DPI)
    FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, size: float, **more: Any) -> None:
        figure.text(x / width, 1 - y / height, text, fontsize=size, va="center", **more)

    y = 0.25
    write(MARGIN, y, words.title, style.TITLE, color=style.INK, weight="bold")
    y += 0.11
    for line in takeaway:
        y += 0.19
        write(MARGIN, y - 0.03, line, style.TAKEAWAY, color=style.colour("ours"), weight="bold")
    for line in subtitle:
        y += 0.165
        write(MARGIN, y - 0.03, line, style.SUBTITLE, color=style.MUTED)
    y += 0.06
    for kind, lines in badges:
        tall = 0.22 + 0.155 * len(lines)
        fill, edge = style.BADGES[kind]
        box = {"facecolor": fill, "edgecolor": edge, "linewidth": 0.7, "boxstyle": "round,pad=0.35"}
        write(MARGIN + 0.05, y + tall / 2, "\n".join(lines), style.SUBTITLE, color=style.INK, bbox=box)
        y += tall
    for row in rows:
        y += 0.2
        _draw_legend_row(figure, row, y - 0.08)

    panels = []
    y = top
    for panel_height in grid.heights:
        y += grid.above
        panels.append(
            [
                figure.add_axes(
                    (
                        (grid.left + column * (grid.panel_width + grid.gap)) / width,
                        1 - (y + panel_height) / height,
                        grid.panel_width / width,
                        panel_height / height,
                    )
                )
                for column in range(grid.columns)
            ]
        )
        y += panel_height + grid.below

    for index, line in enumerate(footer):
        write(MARGIN, height - bottom + 0.1 + 0.14 * index, line, style.FOOTER, color=style.MUTED)
    frame = Rectangle(
        (0, 0), 1, 1, fill=False, edgecolor=style.GRID, linewidth=1.2, transform=figure.transFigure
    )
    figure.add_artist(frame)
    return figure, panels


@lru_cache(maxsize=4096)
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width in inches of one line."""
    if not text.strip():
        return 0.0
    # A dollar sign would start mathematics.
    path = TextPath((0, 0), text.replace("$", "S"), size=size, prop=FontProperties(weight=weight))
    # Of a curve's points too: fonts end curves where they reach furthest, and `get_extents` solves for each curve.
    x = path.vertices[path.codes != Path.CLOSEPOLY, 0]
    return float(x.max() - x.min()) / 72


def wrap(parts: Sequence[str], room: float, size: float, separator: str, weight: str = "normal") -> list[str]:
    """`parts` joined into as few lines as fit into `room`; a part that does not fit alone is broken between words."""
    lines: list[str] = []
    for part in parts:
        if " " in part and text_width(part, size, weight) > room:
            lines += wrap(part.split(), room, size, " ", weight)
            continue
        longer = f"{lines[-1]}{separator}{part}" if lines else part
        if lines and text_width(longer, size, weight) <= room:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def _legend_rows(entries: Sequence[Entry], room: float) -> list[list[tuple[float, Entry]]]:
    """Rows that fit, each entry with its distance from the left."""
    rows: list[list[tuple[float, Entry]]] = []
    x = room
    for entry in entries:
        width = LEGEND_HANDLE + text_width(entry[1], style.LEGEND)
        if x + width > room:
            rows.append([])
            x = 0.0
        rows[-1].append((x, entry))
        x += width + LEGEND_GAP
    return rows


def _draw_legend_row(figure: Figure, row: list[tuple[float, Entry]], y: float) -> None:
    width, height = figure.get_size_inches()
    for x, (handle, label) in row:
        figure.legend(
            [handle],
            [label],
            loc="center left",
            bbox_to_anchor=((MARGIN + x) / width, 1 - y / height),
            fontsize=style.LEGEND,
            frameon=False,
            labelcolor=style.INK,
            handlelength=2.2,
            handletextpad=0.6,
            borderpad=0,
            borderaxespad=0,
        )
