"""The card that a picture stands on: title, takeaway, subtitle, badges and legends above, the stamp below.

All lengths are in inches, so that text keeps its size and its distance whatever a picture's height.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


@dataclass(frozen=True)
class Block:
    """A part of a card as wide as the card: its height, and what draws it on the figure, its top so far below the
    figure's. Without the latter it is a gap."""

    height: float
    draw: Callable[[Figure, float], object] = lambda figure, y: None


def draw_card(
    words: Words, legends: Sequence[Sequence[Entry]], grid: Grid
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with everything but the data, and its empty panels by row and column."""
    room = grid.width - 2 * MARGIN
    panels: list[list[Axes]] = []
    blocks = [
        *_heading(words, room),
        Block(0.06),
        *(_badge(kind, text, room) for kind, text in words.notices),
        *(_legend_row(row) for entries in legends for row in _legend_rows(entries, room)),
        Block(0.04),
        Block(grid.height, lambda figure, y: panels.extend(_add_panels(figure, grid, y))),
        *_footer(words.footer, room),
        Block(0.16),
    ]
    height = sum(block.height for block in blocks)
    figure = Figure(figsize=(grid.width, height), facecolor=style.BACKGROUND, dpi=style.DPI)
    FigureCanvasAgg(figure)
    y = 0.0
    for block in blocks:
        block.draw(figure, y)
        y += block.height
    frame = Rectangle(
        (0, 0), 1, 1, fill=False, edgecolor=style.GRID, linewidth=1.2, transform=figure.transFigure
    )
    figure.add_artist(frame)
    return figure, panels


def _heading(words: Words, room: float) -> Iterator[Block]:
    yield _line(0.36, 0.25, words.title, style.TITLE, color=style.INK, weight="bold")
    for line in wrap(words.takeaway.split(), room, style.TAKEAWAY, " ", "bold") if words.takeaway else ():
        yield _line(0.19, 0.16, line, style.TAKEAWAY, color=style.colour("ours"), weight="bold")
    for line in wrap(words.subtitle.split(" · "), room, style.SUBTITLE, "  ·  "):
        yield _line(0.165, 0.135, line, style.SUBTITLE, color=style.MUTED)


def _badge(kind: str, text: str, room: float) -> Block:
    lines = wrap(text.split(), room - 0.2, style.SUBTITLE, " ")
    height = 0.22 + 0.155 * len(lines)
    fill, edge = style.BADGES[kind]
    box = {"facecolor": fill, "edgecolor": edge, "linewidth": 0.7, "boxstyle": "round,pad=0.35"}
    return _line(
        height, height / 2, "\n".join(lines), style.SUBTITLE, MARGIN + 0.05, color=style.INK, bbox=box
    )


def _legend_row(row: list[tuple[float, Entry]]) -> Block:
    return Block(0.2, lambda figure, y: _draw_legend_row(figure, row, y + 0.12))


def _footer(paragraphs: Sequence[Sequence[str]], room: float) -> Iterator[Block]:
    for facts in paragraphs:
        for line in wrap(facts, room, style.FOOTER, "  ·  "):
            yield _line(0.14, 0.1, line, style.FOOTER, color=style.MUTED)


def _line(height: float, centre: float, text: str, size: float, left: float = MARGIN, **more: Any) -> Block:
    """A block of text whose centre is so far below the block's top."""

    def write(figure: Figure, y: float) -> None:
        width, tall = figure.get_size_inches()
        figure.text(left / width, 1 - (y + centre) / tall, text, fontsize=size, va="center", **more)

    return Block(height, write)


def _add_panels(figure: Figure, grid: Grid, y: float) -> Iterator[list[Axes]]:
    width, height = figure.get_size_inches()
    for panel_height in grid.heights:
        y += grid.above
        yield [
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
        y += panel_height + grid.below


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
