"""The pictures of a run, drawn by matplotlib without any global state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from .. import results
from ..export import cases_in_order
from ..results import Results
from ..shapes import NETWORKS, UNITS
from . import host, memory, networks, roofline, scaling, several, speedup, style, sweep, throughput, waterfall
from .selection import Groups

Picture = Callable[[], Figure]
PASSES = "passes"

Draw = Callable[[Results, Groups, bool], Figure]
DRAWINGS: dict[str, dict[str, Draw]] = {
    "layer": {"speed": speedup.draw, "throughput": throughput.draw},
    "train": {"speed": speedup.draw, "throughput": throughput.draw, "memory": memory.draw},
    "model": {"images": networks.draw},
    "sweep": {"time": sweep.draw},
    "host": {"calls": host.draw},
    "scaling": {"growth": scaling.draw},
    "grid": {},  # a list of units that share no axis
}
"""Kinds of picture by suite: one of each for each subject and dtype, or for networks each direction and dtype."""


def pictures(run: Results, all_forms: bool = False) -> dict[str, Picture]:
    """What can be drawn of a run, by a name without blanks: kind, subject (or direction), dtype.

    `all_forms` shows every form and every forced schedule, not each source's fastest form only.

    Raises:
        ValueError: a suite that has no pictures.
    """
    if run.suite not in DRAWINGS:
        raise ValueError(f"suite must be one of {', '.join(DRAWINGS)}, got {run.suite!r}")
    found: dict[str, Picture] = {}
    for kind, draw in DRAWINGS[run.suite].items():
        for name, groups in _groups(run, by_subject=run.suite != "model").items():
            found[f"{kind}-{name}"] = partial(draw, run, groups, all_forms)
    if run.suite in ("layer", "train") and run.ceilings is not None:
        for name, groups in _groups(run, by_subject=False).items():
            found[f"roofline-{name}"] = partial(roofline.draw, run, groups)
    if run.suite == "layer":
        found[PASSES] = waterfall.draw
    return found


def save_plots(run: Results, folder: Path, stem: str | None = None, all_forms: bool = False) -> list[Path]:
    """Draws a run into `folder`, PNG files 1650 px wide named `stem` and what they show; returns their paths.

    Without `stem` the suite and the device type name them.
    """
    stem = stem or f"{run.suite}-{run.stamp.device_type}"
    drawn = pictures(run, all_forms)
    return [save_picture(draw(), folder / f"{stem}-{name}.png") for name, draw in drawn.items()]


def save_comparisons(runs: Sequence[Results], folder: Path) -> list[Path]:
    """Draws sk_triton in several runs side by side, for the cases that they share; returns the paths, maybe none."""
    best = several.shared_cases(runs)
    paths = []
    for subject, dtype, direction in dict.fromkeys((c.subject, c.dtype, c.direction) for c in best):
        chosen = {
            c: r for c, r in best.items() if (c.subject, c.dtype, c.direction) == (subject, dtype, direction)
        }
        paths.append(
            save_picture(several.draw(runs, chosen), folder / f"comparison-{subject}-{direction}-{dtype}.png")
        )
    return paths


def save_picture(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=style.DPI, facecolor=style.BACKGROUND)
    return path


def _groups(run: Results, by_subject: bool) -> dict[str, Groups]:
    """Records by case, under the names of what one picture shows: a subject, or all of a direction, in a dtype.

    Without those of which an interrupt or failures left nothing to show.
    """
    found: dict[str, Groups] = {}
    for case, records in cases_in_order(run).items():
        if case.subject not in (*UNITS, *NETWORKS):  # starting up, and a call of PyTorch's own
            continue
        what = case.subject if by_subject else case.direction
        found.setdefault(f"{what}-{case.dtype}", {})[case] = records
    return {name: groups for name, groups in found.items() if any(map(_was_measured, groups.values()))}


def _was_measured(records: list[results.Record]) -> bool:
    return any(record.timing is not None or record.host_us is not None for record in records)
