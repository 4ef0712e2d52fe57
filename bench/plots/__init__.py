"""The pictures of a run, drawn by matplotlib without any global state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from matplotlib.figure import Figure

from .. import results
from ..results import Results
from ..shapes import NETWORKS, UNITS
from ..verdict import cases_in_order
from . import host, memory, networks, roofline, scaling, several, speedup, style, sweep, throughput, waterfall
from .selection import Groups

Picture = Callable[[], Figure]
Kept = TypeVar("Kept")
PASSES = "passes"
THROUGHPUT = "throughput"

Draw = Callable[[Results, Groups, bool], Figure]
DRAWINGS: dict[str, dict[str, Draw]] = {
    "layer": {"speed": speedup.draw, THROUGHPUT: throughput.draw},
    "train": {"speed": speedup.draw, THROUGHPUT: throughput.draw, "memory": memory.draw},
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
            if kind == THROUGHPUT and len({case.batch for case in groups}) == 1:
                continue  # a line needs two points
            found[f"{kind}-{name}"] = partial(draw, run, groups, all_forms)
    if run.suite in ("layer", "train") and run.ceilings is not None:
        for name, groups in _groups(run, by_subject=False).items():
            found[f"roofline-{name}"] = partial(roofline.draw, run, groups)
    if run.suite == "layer":
        found[PASSES] = waterfall.draw
    return found


def save_plots(
    run: Results, folder: Path, stem: str | None = None, all_forms: bool = False
) -> Iterator[tuple[str, Path | Exception]]:
    """Draws a run into `folder`, PNG files named `stem` and what they show; yields as `drawn`.

    Without `stem` the suite and the device type name them.

    Raises:
        ValueError: a suite that has no pictures.
    """
    stem = stem or f"{run.suite}-{run.stamp.device_type}"
    return _saved({f"{stem}-{name}": draw for name, draw in pictures(run, all_forms).items()}, folder)


def save_comparisons(runs: Sequence[Results], folder: Path) -> Iterator[tuple[str, Path | Exception]]:
    """Draws sk_triton in several runs side by side, for the cases that they share, maybe none; yields as `drawn`. A
    picture shows the cases of the first run that has any, and the runs that have some of these."""
    best = several.shared_cases(runs)
    found: dict[str, Picture] = {}
    for subject, dtype, direction in dict.fromkeys((c.subject, c.dtype, c.direction) for c in best):
        chosen = {
            c: r for c, r in best.items() if (c.subject, c.dtype, c.direction) == (subject, dtype, direction)
        }
        first = min(i for i in range(len(runs)) if any(records[i] for records in chosen.values()))
        chosen = {case: records for case, records in chosen.items() if records[first]}
        present = [i for i in range(len(runs)) if any(records[i] for records in chosen.values())]
        shared = {case: [records[i] for i in present] for case, records in chosen.items()}
        picture = partial(several.draw, [runs[i] for i in present], shared)
        found[f"comparison-{subject}-{direction}-{dtype}"] = picture
    return _saved(found, folder)


def drawn(
    found: Mapping[str, Picture], keep: Callable[[str, Figure], Kept]
) -> Iterator[tuple[str, Kept | Exception]]:
    """Draws one picture after another; yields each name with what `keep` makes of the figure, or with the error that
    it failed by: that one picture cannot be drawn must not cost the others."""
    for name, draw in found.items():
        kept: Kept | Exception
        try:
            kept = keep(name, draw())
        except Exception as error:
            kept = error
        yield name, kept


def _saved(found: Mapping[str, Picture], folder: Path) -> Iterator[tuple[str, Path | Exception]]:
    return drawn(found, lambda name, figure: save_picture(figure, folder / f"{name}.png"))


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
