"""Units measured launch by launch: the kernels' time by stage, eager PyTorch's beside it, and the memory floor."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter

from ..formats import three_digits
from ..shapes import CLASSIC, INFERENCE, PAPER, Case
from ..unit_times import EAGER, NAME, UnitTime, by_case, fastest_schedule, other_runs
from . import style
from .captions import stage_title
from .card import Grid, Words, draw_card
from .selection import FLOOR_LINE

WIDTH = 0.36
TITLES = {PAPER: "Paper's and timm's unit", CLASSIC: "Classic class: 3x3 and 5x5, no norm"}


def draw(times: Sequence[UnitTime]) -> Figure:
    """Inference: a panel for each unit, in it eager's and sk_triton's time of each stage that both were measured in,
    in one dtype at one batch.

    Raises:
        ValueError: no stage has both.
    """
    chosen = {
        case: schedules
        for case, schedules in by_case(times).items()
        if case.direction == INFERENCE and EAGER in schedules and fastest_schedule(schedules)
    }
    if not chosen:
        raise ValueError("units must hold a case of inference that eager was measured in as well, found none")
    first = next(iter(chosen))
    alike = (first.batch, first.dtype)
    chosen = {case: times for case, times in chosen.items() if (case.batch, case.dtype) == alike}
    subjects = [subject for subject in TITLES if any(case.subject == subject for case in chosen)]
    gpu = times[0].gpu.name
    text = Words(
        title=f"Inference of one unit on an {gpu}",
        subtitle=f"lower is faster · batch {first.batch} · {first.dtype} · channels_last · kernels added up, cold L2 · "
        "number: µs, and sk_triton's speed",
        footer=_footer([time for schedules in chosen.values() for time in schedules.values()]),
    )
    legend = [
        (Patch(facecolor=style.colour("ours-reference")), "PyTorch, eager"),
        (Patch(facecolor=style.colour("ours")), "sk_triton"),
        (Line2D([], [], **FLOOR_LINE), "memory floor: x read and v written once"),
    ]
    grid = Grid((1.9,), columns=len(subjects), left=0.6, below=0.5)
    figure, ((*panels,),) = draw_card(text, [legend], grid)
    highest = max(schedules[EAGER].seconds for schedules in chosen.values()) * 1e6
    for index, (ax, subject) in enumerate(zip(panels, subjects, strict=True)):
        cases = {case: schedules for case, schedules in chosen.items() if case.subject == subject}
        style.dress(ax, TITLES[subject])
        _draw_cases(ax, cases)
        ax.set_ylim(0, highest * 1.15)
        if index:
            ax.yaxis.set_major_formatter(NullFormatter())
    panels[0].set_ylabel("µs", color=style.MUTED, fontsize=style.TICK)
    return figure


def _footer(times: Sequence[UnitTime]) -> list[list[str]]:
    """Where the drawn times are from."""
    note = other_runs(times)
    facts = [f"{NAME}, beside it README.md: torch, Triton, driver, dates", "no suite of sk-triton bench"]
    if note is None:
        facts.insert(0, f"commit {', '.join(dict.fromkeys(time.commit for time in times))}")
    return [facts, [note] if note else []]


def _draw_cases(ax: Axes, cases: dict[Case, dict[str, UnitTime]]) -> None:
    labels = []
    for position, (case, schedules) in enumerate(cases.items()):
        ours, eager = fastest_schedule(schedules), schedules[EAGER]
        assert ours is not None
        speed = f"{eager.seconds / ours.seconds:.1f}x"
        for side, source, seconds in ((-0.5, "ours-reference", eager.seconds), (0.5, "ours", ours.seconds)):
            middle, height = position + side * WIDTH, seconds * 1e6
            ax.bar(middle, height, WIDTH * 0.95, color=style.colour(source), zorder=2)
            number = three_digits(height) + (f"\n{speed}" if source == "ours" else "")
            ax.annotate(
                number, (middle, height), (0, 2), textcoords="offset points", ha="center", va="bottom",
                fontsize=style.NUMBER, weight="bold" if source == "ours" else "normal", color=style.INK,
            )  # fmt: skip
        floor = ours.floor_seconds * 1e6
        ax.plot([position - WIDTH, position + WIDTH], [floor, floor], zorder=3, **FLOOR_LINE)
        labels.append(f"{stage_title(case.shape).replace(': ', chr(10))}\n{ours.schedule}")
    ax.set_xticks(range(len(cases)), labels, color=style.INK)
