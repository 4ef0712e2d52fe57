"""What every picture shares: one colour for one source, one hatch and one marker for one form."""

from __future__ import annotations

from typing import Any, Literal

from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb

# Okabe and Ito's colour-blind-safe palette; its yellow is left out, which a white card would swallow.
FAMILY_COLOURS = {
    "ours": "#0072B2",
    "ours-reference": "#56B4E9",
    "classic": "#E69F00",
    "timm": "#009E73",
    "paper": "#CC79A7",
    "rev": "#D55E00",
    "copy": "#57606a",
}
PLAIN = {"plain-classic": "paper"}
"""Plain PyTorch has one colour, whichever unit it computes."""
# Forced schedules, and the other choice of what to save, keep sk_triton's hue, lightened.
SCHEDULE_TINTS = {
    "store": 0.16,
    "gated": 0.24,
    "recompute": 0.31,
    "input": 0.38,
    "merged": 0.45,
    "resident": 0.58,
    "library": 0.7,
}
PEAK_TINT = 0.6
"""White in the colour of a peak, around what is saved of it."""

CHANNELS_LAST = "channels_last"
# How a module is run shows as a hatch and a marker, its memory format as slashes and a filled marker.
MODE_HATCHES = {
    "eager": "",
    "graph": "---",
    "compile": "...",
    "graph-compile": "...--",
    "max-autotune": "+++",
    "graph-max-autotune": "|||",
    "heuristic": "xx",
    "heuristic-graph": "xx--",
}
MODE_MARKERS = {
    "eager": "o",
    "graph": "v",
    "compile": "^",
    "graph-compile": "s",
    "max-autotune": "D",
    "graph-max-autotune": "P",
    "heuristic": "X",
    "heuristic-graph": "*",
}
MODE_DASHES = {
    "eager": (0, (5, 1.5)),
    "graph-compile": (0, (1, 1)),
    "graph-max-autotune": (0, (3, 1, 1, 1)),
    "compile": (0, (4, 1.5, 1, 1.5)),
    "max-autotune": (0, (2, 1)),
    "graph": (0, (4, 1.5, 1, 1.5, 1, 1.5)),
    "heuristic": (0, (6, 2, 1, 2)),
    "heuristic-graph": (0, (6, 2, 1, 2, 1, 2)),
}

INK = "#1f2328"
MUTED = "#57606a"
GRID = "#d8dee4"
# A white card with an edge reads in GitHub's light and dark mode, on PyPI and in an editor alike; a pair of pictures
# for <picture> would double the files and work on GitHub only.
BACKGROUND = "#ffffff"
ALARM = "#B3261E"
BADGES = {"cpu": ("#FFF4D6", "#E69F00"), "alarm": ("#FBE4E2", ALARM)}
"""Fill and edge."""

TITLE, TAKEAWAY, SUBTITLE, LEGEND, PANEL, TICK, NUMBER, FOOTER = 14, 9.5, 8, 8, 8.5, 7.5, 6.8, 6.5
"""Sizes of text in points."""

DPI = 220
HALO = [patheffects.withStroke(linewidth=1.6, foreground=BACKGROUND)]
"""Keeps a number readable where it crosses a line."""


def family(source: str) -> str:
    """The key of `FAMILY_COLOURS` that a source belongs to; ValueError for an unknown source."""
    for key in (PLAIN.get(source, source), source.partition("-")[0]):
        if key in FAMILY_COLOURS:
            return key
    raise ValueError(f"source must be of a family in {', '.join(FAMILY_COLOURS)}, got {source!r}")


def colour(source: str) -> str:
    """The colour of a source, in every picture."""
    base = FAMILY_COLOURS[family(source)]
    name, _, schedule = source.partition("-")
    return tint(base, SCHEDULE_TINTS[schedule]) if name == "ours" and schedule in SCHEDULE_TINTS else base


def tint(base: str, share: float) -> str:
    """`base` mixed with a share of white."""
    red, green, blue = (part + (1 - part) * share for part in to_rgb(base))
    return to_hex((red, green, blue))


def is_dark(base: str) -> bool:
    """Whether white text reads better on a colour than ink."""
    red, green, blue = to_rgb(base)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.55


def mode(form: str) -> str:
    """How a form runs a module, whatever the memory format; ValueError for an unknown form."""
    name = form.replace(CHANNELS_LAST, "").replace("nchw", "").strip("-") or "eager"
    if name not in MODE_HATCHES:
        raise ValueError(f"form must run in one of {', '.join(MODE_HATCHES)}, got {form!r}")
    return name


def form_order(form: str) -> tuple[int, bool]:
    """Where a form stands in a legend."""
    return list(MODE_HATCHES).index(mode(form)), CHANNELS_LAST in form


def hatch(form: str) -> str:
    return MODE_HATCHES[mode(form)] + ("////" if CHANNELS_LAST in form else "")


def bar_style(source: str, form: str) -> dict[str, Any]:
    """Arguments of a bar or a patch."""
    return {"facecolor": colour(source), "hatch": hatch(form), "edgecolor": BACKGROUND, "linewidth": 0.6}


def marker_style(source: str, form: str) -> dict[str, Any]:
    """Arguments of a line's markers."""
    own = colour(source)
    return {
        "marker": MODE_MARKERS[mode(form)],
        "markerfacecolor": own if CHANNELS_LAST in form else BACKGROUND,
        "markeredgecolor": own,
    }


def dress(ax: Axes, title: str, *, grid: Literal["both", "x", "y"] = "y") -> None:
    """The look of a panel: title at the left, quiet grid, no box."""
    ax.set_title(title, loc="left", fontsize=PANEL, color=INK, pad=6, weight="bold")
    ax.tick_params(axis="both", which="both", length=0, colors=MUTED, labelsize=TICK, pad=3)
    ax.grid(axis=grid, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_facecolor(BACKGROUND)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(MUTED)
