"""The picture of a run: speed of every provider relative to the fastest peer, with absolute times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from . import results
from .providers import UNITS
from .shapes import STAGES
from .table import three_digits

# Okabe and Ito's colour-blind-safe palette: one colour for one source, in every plot.
SOURCE_COLOURS = {
    "ours-triton": "#0072B2",
    "ours-reference": "#56B4E9",
    "seed": "#E69F00",
    "timm": "#009E73",
    "paper": "#CC79A7",
}
# The form shows as a hatch, so that it never competes with the source's colour.
FORM_HATCHES = {
    "nchw": "",
    "channels_last": "////",
    "compile-nchw": "....",
    "compile-channels_last": "xxxx",
}
INK = "#1f2328"
MUTED = "#57606a"
GRID = "#d8dee4"
BACKGROUND = "#ffffff"
ALARM = "#B3261E"
BADGES = {"cpu": ("#FFF4D6", "#E69F00"), "wrong": ("#FBE4E2", ALARM)}
"""Fill and edge."""

HALO = [patheffects.withStroke(linewidth=1.5, foreground=BACKGROUND)]
"""Keeps a number readable where it crosses the line of the fastest peer."""

WIDTH_INCHES = 8.0
DPI = 200
COLUMNS = 2
ROW_INCHES = 2.2
UNIT_HEADER_INCHES = 0.85
HEADER_INCHES = 0.7
BADGE_INCHES = 0.32
FOOTER_INCHES = 0.35
GROUP_WIDTH = 0.86
CROWDED_BARS = 12
"""A panel with more bars than this labels only the fastest of sk_triton and the fastest peer."""
STATUS_WORDS = {
    results.WRONG: "wrong",
    results.FAILED: "failed",
    results.OUT_OF_MEMORY: "out of memory",
    results.SKIPPED: "skipped",
    results.NOT_MEASURED: "not measured",
}


def save_plots(run: results.Results, folder: Path) -> list[Path]:
    """Draws one PNG for each dtype that was run, 1600 px wide, into `folder`; returns their paths."""
    paths = []
    for dtype in dict.fromkeys(record.dtype for record in run.records):
        figure = draw(run, dtype)
        path = folder / f"layer-{run.stamp.device_type}-{dtype}.png"
        figure.savefig(path, dpi=DPI, facecolor=BACKGROUND)
        paths.append(path)
    return paths


def draw(run: results.Results, dtype: str) -> Figure:
    """One panel for each unit and stage; in it a group of bars for each batch size."""
    groups = {case: rows for case, rows in results.by_case(run.records).items() if case[1] == dtype}
    units = list(dict.fromkeys(case[0] for case in groups))
    rows = {unit: -(-len(_stages(groups, unit)) // COLUMNS) for unit in units}
    notices = _notices(run)
    heights = [HEADER_INCHES + BADGE_INCHES * len(notices)]
    heights += [UNIT_HEADER_INCHES + rows[unit] * ROW_INCHES for unit in units]
    heights.append(FOOTER_INCHES)
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights)), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    bands = figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0, squeeze=False)[:, 0]
    clock = Clock.for_records([record for records in groups.values() for record in records])
    _header(bands[0], run, dtype, clock, notices, heights[0])
    for index, unit in enumerate(units, start=1):
        _draw_unit(bands[index], unit, rows[unit], groups, clock, heights[index])
    _footer(bands[-1], run)
    return figure


@dataclass(frozen=True)
class Clock:
    """The unit of time of a figure's numbers."""

    name: str
    per_ms: float

    @classmethod
    def for_records(cls, records: list[results.Record]) -> Clock:
        """Microseconds where every median is below 10 ms, else milliseconds."""
        medians = [record.timing.median_ms for record in records if record.timing]
        return cls("µs", 1e3) if medians and max(medians) < 10 else cls("ms", 1.0)

    def show(self, ms: float) -> str:
        return three_digits(ms * self.per_ms)


def _draw_unit(
    band: SubFigure,
    unit: str,
    rows: int,
    groups: dict[results.Case, list[results.Record]],
    clock: Clock,
    height: float,
) -> None:
    stages = _stages(groups, unit)
    axes = band.subplots(rows, min(COLUMNS, len(stages)), squeeze=False, sharey=True)
    top = 1 - (UNIT_HEADER_INCHES + 0.12) / height
    band.subplots_adjust(left=0.075, right=0.98, top=top, bottom=0.52 / height, hspace=0.52, wspace=0.06)
    band.text(0.02, 1 - 0.14 / height, UNITS[unit].title, color=INK, fontsize=10, weight="bold", va="center")
    records = [record for case in groups if case[0] == unit for record in groups[case]]
    _legends(band, records, height)
    tallest = 1.0
    for ax, stage in zip(axes.flat, stages, strict=False):
        panel = {case: rows for case, rows in groups.items() if (case[0], case[2]) == (unit, stage)}
        tallest = max(tallest, _draw_panel(ax, stage, panel, clock))
    for ax in axes.flat[len(stages) :]:
        ax.set_axis_off()
    axes[0, 0].set_ylim(0, tallest * 1.2)
    axes[0, 0].yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes[0, 0].yaxis.set_major_formatter("{x:.1f}")
    for row in axes:
        row[0].set_ylabel("speed, fastest peer = 1", color=MUTED, fontsize=7.5)


def _legends(band: SubFigure, records: list[results.Record], height: float) -> None:
    """Colours name the sources in one line, hatches the forms in the next."""
    sources = {record.source_label: _style(record.source, "nchw") for record in records}
    forms = {record.form_label: _style("", record.form) for record in records}
    for styles, inches_down in ((sources, 0.29), (forms, 0.5)):
        legend = band.legend(
            [Patch(**style) for style in styles.values()],
            list(styles),
            loc="upper left",
            bbox_to_anchor=(0.014, 1 - inches_down / height),
            ncols=len(styles),
            fontsize=7.5,
            frameon=False,
            labelcolor=INK,
            handlelength=1.6,
            columnspacing=1.4,
            borderaxespad=0,
        )
        band.add_artist(legend)


def _draw_panel(
    ax: Axes, stage: int, groups: dict[results.Case, list[results.Record]], clock: Clock
) -> float:
    """Draws one stage; returns the height of its tallest bar."""
    crowded = sum(len(records) for records in groups.values()) > CROWDED_BARS
    tallest = 0.0
    ticks = []
    for centre, ((_, _, _, batch), records) in enumerate(groups.items()):
        fastest, ours = results.fastest_peer(records), results.fastest_ours(records)
        base_ms = fastest.timing.median_ms if fastest and fastest.timing else None
        width = GROUP_WIDTH / len(records)
        for index, record in enumerate(records):
            left = centre - GROUP_WIDTH / 2 + index * width
            if record.timing is None or base_ms is None:
                _draw_status(ax, left + width / 2, record, crowded)
                continue
            number = clock.show(record.timing.median_ms)
            if crowded and record is not ours and record is not fastest:
                number = ""
            tallest = max(tallest, _draw_bar(ax, left, width, record, base_ms, number, crowded))
        gap = "\n" if len(groups) > 2 else " "
        best = f"\nfastest peer{gap}{clock.show(base_ms)} {clock.name}" if base_ms is not None else ""
        ticks.append(f"batch {batch}{best}")
    ax.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=3)
    ax.set_title(f"stage {stage}: {STAGES[stage].name}", loc="left", fontsize=8.5, color=INK, pad=5)
    ax.set_xticks(range(len(ticks)), ticks, fontsize=7.5 if len(ticks) <= 2 else 6.5)
    ax.set_xlim(-0.52, len(ticks) - 0.48)
    ax.tick_params(axis="x", length=0, colors=INK, pad=4)
    ax.tick_params(axis="y", length=0, colors=MUTED, labelsize=7)
    ax.grid(axis="y", color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_facecolor(BACKGROUND)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(MUTED)
    return tallest


def _draw_bar(
    ax: Axes, left: float, width: float, record: results.Record, base_ms: float, number: str, crowded: bool
) -> float:
    timing = record.timing
    assert timing is not None
    speed = base_ms / timing.median_ms
    low, high = base_ms / timing.q80_ms, base_ms / timing.q20_ms
    style = _style(record.source, record.form)
    ax.bar(left, speed, width * 0.92, align="edge", zorder=2, **style)
    middle = left + width * 0.46
    ax.plot([middle, middle], [low, high], color=INK, linewidth=0.9, zorder=4, solid_capstyle="butt")
    ax.annotate(
        number,
        (middle, high),
        (0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        rotation=90 if crowded else 0,
        fontsize=5.5 if crowded else 6.5,
        weight="bold" if record.ours else "normal",
        color=INK,
        zorder=5,
        path_effects=HALO,
    )
    return max(high, speed)


def _draw_status(ax: Axes, middle: float, record: results.Record, crowded: bool) -> None:
    alarming = record.status in (results.WRONG, results.FAILED)
    ax.text(
        middle,
        0.03,
        STATUS_WORDS.get(record.status, record.status),
        rotation=90,
        ha="center",
        va="bottom",
        fontsize=5.5 if crowded else 6.5,
        weight="bold" if alarming else "normal",
        color=ALARM if alarming else MUTED,
        zorder=5,
        path_effects=HALO,
    )


def _notices(run: results.Results) -> list[tuple[str, str]]:
    """What a reader must know before looking at a bar: kind of badge and its text."""
    notices = []
    if run.stamp.device_type == "cpu":
        text = "Measured on a CPU: sk_triton runs its plain PyTorch reference here. Its kernels need a GPU."
        notices.append(("cpu", text))
    if not run.sound:
        notices.append(("wrong", "A provider gave a wrong result in this run: no speed is claimed."))
    return notices


def _header(
    band: SubFigure,
    run: results.Results,
    dtype: str,
    clock: Clock,
    notices: list[tuple[str, str]],
    height: float,
) -> None:
    stamp = run.stamp
    on_cpu = stamp.device_type == "cpu"

    def down(inches: float) -> float:
        return 1 - inches / height

    title = "Selective Kernel layer, forward"
    band.text(0.02, down(0.22), title, color=INK, fontsize=14, weight="bold", va="center")
    threads = f", {stamp.threads} thread{'s' * (stamp.threads != 1)}" if on_cpu else ""
    band.text(
        0.02,
        down(0.5),
        f"{'CPU' if on_cpu else 'GPU'}: {stamp.device}{threads}  ·  {dtype}  ·  "
        f"higher is faster; number: median in {clock.name}; line: 20 % to 80 % quantile",
        color=MUTED,
        fontsize=8,
        va="center",
    )
    for index, (kind, text) in enumerate(notices):
        fill, edge = BADGES[kind]
        box = {"facecolor": fill, "edgecolor": edge, "linewidth": 0.6, "boxstyle": "round,pad=0.4"}
        middle = down(0.8 + index * BADGE_INCHES)
        band.text(0.027, middle, text, color=INK, fontsize=8, va="center", bbox=box)


def _footer(band: SubFigure, run: results.Results) -> None:
    stamp = run.stamp
    commit = (stamp.git_commit or "")[:9] + ("+changes" if stamp.git_dirty else "")
    facts = [f"torch {stamp.torch}", f"triton {stamp.triton}", f"sk_triton {stamp.sk_triton}"]
    facts += [commit] if commit else []
    facts += [f"driver {stamp.driver}"] if stamp.driver else []
    if stamp.device_type == "cuda":
        facts.append(f"TF32 convolutions {'on' if stamp.tf32_convolution else 'off'}")
    facts.append(stamp.date[:10])
    if run.interrupted:
        facts.append("interrupted run")
    band.text(0.02, 0.5, "  ·  ".join(facts), color=MUTED, fontsize=6.5, va="center")


def _stages(groups: dict[results.Case, list[results.Record]], unit: str) -> list[int]:
    return list(dict.fromkeys(case[2] for case in groups if case[0] == unit))


def _style(source: str, form: str) -> dict[str, Any]:
    return {
        "facecolor": SOURCE_COLOURS.get(source, MUTED),
        "hatch": FORM_HATCHES.get(form, ""),
        "edgecolor": BACKGROUND,
        "linewidth": 0.6,
    }
