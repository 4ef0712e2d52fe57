"""The README's generated parts, rendered from the committed results under `bench/results/`.

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``; NAME is a key of `SECTIONS`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sk_triton.tuning import user_file

from . import coverage, unit_times
from .joining import join
from .markdown import markdown_table
from .peer_table import peer_table
from .report import file as report_file
from .results import Record, Results, read
from .shapes import PAPER, SKNET50
from .unit_times import UnitTime
from .verdict import comparisons, graph_summary, is_graph, losses, losses_count, speed_summary

FOLDER = "bench/results"
PREFERRED_DTYPES = ("fp16", "bf16", "fp32")
"""The README shows the first of these that was measured; the others are in the results files."""

MARKED = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
OPENING = re.compile(r"<!-- generated: [\w-]+ -->")

UNITS_PICTURE = "units-inference.png"
NO_SUITES = (report_file.NAME, user_file.FILE_NAME)
"""JSON files of `sk-triton report` that hold no suite's results."""


@dataclass(frozen=True)
class Evidence:
    """A committed results file: its path from the repository's root, with forward slashes, and what is in it. Several
    of one suite on one device are shown as one (`joining.join`).

    Attributes:
        older: those that the newest, which `path` is of, was joined with.
    """

    path: str
    run: Results
    older: tuple[Evidence, ...] = ()

    @classmethod
    def joined(cls, items: Sequence[Evidence]) -> Evidence:
        newest, *older = sorted(items, key=lambda item: item.run.stamp.date, reverse=True)
        return cls(newest.path, join([item.run for item in items]), tuple(older))

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def stem(self) -> str:
        """What its pictures' names begin with."""
        return self.run.suite if self.older else self.name

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2].removesuffix(".json")


@dataclass(frozen=True)
class UnitEvidence:
    """A committed file of units measured launch by launch, likewise."""

    path: str
    times: list[UnitTime]

    @property
    def picture(self) -> str:
        return f"{self.path.rpartition('/')[0]}/{UNITS_PICTURE}"


def load_units(root: Path) -> list[UnitEvidence]:
    """Every file of unit times under `root`'s `bench/results/<gpu>/`, by path.

    Raises:
        ValueError: a file cannot be read.
    """
    return [
        UnitEvidence(path.relative_to(root).as_posix(), unit_times.load(path))
        for path in sorted((root / FOLDER).glob(f"*/{unit_times.NAME}"))
    ]


def load_evidence(root: Path) -> list[Evidence]:
    """Every results file under `root`'s `bench/results/<device>/`, by path.

    Raises:
        ValueError: a file is no results file, or has an objection against it: it may back no claim.
    """
    found = []
    for path in sorted((root / FOLDER).glob("*/*.json")):
        if path.name in NO_SUITES:
            continue
        run = read(path)
        if not run.sound:
            raise ValueError(
                f"{path}: committed results must be sound, got the objection: {run.objections[0]}"
            )
        found.append(Evidence(path.relative_to(root).as_posix(), run))
    return found


def render(section: str, evidence: Sequence[Evidence], units: Sequence[UnitEvidence] = ()) -> str:
    """The text of one part. GPU results are shown where there are any, else the CPU's, which are called that, and
    `units`.

    Raises:
        ValueError: an unknown section, or nothing to render it from.
    """
    if section not in SECTIONS:
        raise ValueError(f"a generated part must be one of {', '.join(SECTIONS)}, got {section!r}")
    if not evidence:
        raise ValueError(f"{FOLDER} must hold a results file, found none")
    return SECTIONS[section](_shown(evidence), units).strip() + "\n"


def fill(text: str, evidence: Sequence[Evidence], units: Sequence[UnitEvidence] = ()) -> str:
    """`text` with every generated part rendered anew.

    Raises:
        ValueError: as `render`; no part, or one that is not closed.
    """
    opened, closed = OPENING.findall(text), MARKED.findall(text)
    if not opened:
        raise ValueError("a README must have a part after <!-- generated: NAME -->, found none")
    if len(opened) != len(closed) or any(OPENING.search(part[2]) for part in closed):
        raise ValueError("every <!-- generated: NAME --> must have an <!-- end --> before the next one")
    return MARKED.sub(lambda match: match[1] + render(match[2], evidence, units) + match[4], text)


def update(path: Path) -> list[Path]:
    """Draws the linked pictures beside their results and fills the README; returns the files written.

    Raises:
        OSError: the README cannot be read or written.
        ValueError: as `load_evidence` and `fill`.
    """
    from . import plots
    from .plots.units import draw

    text = path.read_text(encoding="utf-8")
    root = path.resolve().parent
    evidence, units = load_evidence(root), load_units(root)
    filled = fill(text, evidence, units)
    written = [plots.save_picture(draw(file.times), root / file.picture) for file in units]
    for item in _shown(evidence):
        drawn = plots.pictures(item.run)
        for name in picture_names(item):
            written.append(plots.save_picture(drawn[name](), root / item.folder / f"{item.stem}-{name}.png"))
    path.write_text(filled, encoding="utf-8")
    return [*written, path]


def picture_names(item: Evidence) -> list[str]:
    """The pictures of a results file that the README links: those of one dtype, the paper's unit first, then the passes
    over memory."""
    from . import plots

    dtypes = {record.case.dtype for record in item.run.records}
    dtype = next((dtype for dtype in PREFERRED_DTYPES if dtype in dtypes), None)
    every = list(plots.pictures(item.run))
    names = [name for name in every if name.endswith(f"-{dtype}")]
    names.sort(key=lambda name: (PAPER not in name and SKNET50 not in name, every.index(name)))
    return [*names, *(name for name in every if name == plots.PASSES)]


def _shown(evidence: Sequence[Evidence]) -> list[Evidence]:
    """The GPUs' results, or without one the CPU's, those of a suite on a device joined; layers first."""
    on_gpu = [item for item in evidence if item.run.stamp.device_type != "cpu"]
    groups: dict[tuple[bool, str, str], list[Evidence]] = {}
    for item in on_gpu or evidence:
        suite = item.run.suite
        groups.setdefault((suite != "layer", suite, item.run.stamp.device), []).append(item)
    return [Evidence.joined(groups[key]) for key in sorted(groups)]


def _plots(shown: list[Evidence], units: Sequence[UnitEvidence]) -> str:
    """The first picture as it is, the others folded away: of the suites, then of units launch by launch."""
    links = [
        f"![{item.run.suite} on {item.run.stamp.device}: {name}]({item.folder}/{item.stem}-{name}.png)"
        for item in shown
        for name in picture_names(item)
    ]
    links += [f"![{file.times[0].gpu.name}: units, inference]({file.picture})" for file in units]
    if not links:
        return "Not measured."
    first, *others = links
    return "\n\n".join([first, *([_folded("More plots", "\n\n".join(others))] if others else [])])


def _units(shown: list[Evidence], units: Sequence[UnitEvidence]) -> str:
    """A table for each GPU."""
    if not units:
        return "Not measured."
    return "\n\n".join(
        f"**{file.times[0].gpu.name}:**\n\n{unit_times.markdown(file.times)}" for file in units
    )


def _results(shown: list[Evidence], units: Sequence[UnitEvidence]) -> str:
    """What each suite that compares says in a few sentences, its table folded away."""
    parts = []
    for item in _compared(shown):
        what = f"{item.run.suite} on {item.run.stamp.device}"
        compared = comparisons(item.run)
        lines = [f"**{what}:** {speed_summary(compared)}, each in its fastest measured form."]
        if graphs := graph_summary(compared):
            lines.append(f"{graphs[0].upper()}{graphs[1:]}.")
        if ungraphed := _ungraphed(item):
            lines.append(ungraphed)
        if gaps := coverage.sentence(item.run):
            lines.append(
                "Some of the peers' default forms were not measured: they are listed below the cases."
            )
        lines.append(f"{_provenance(item)}: {_files(item)}.")
        parts.append("\n".join(lines))
        notes = [*filter(None, (gaps,)), *(item.run.notes if item.older else ())]
        table = markdown_table(item.run).strip()
        parts.append(_folded(f"Every case of {what}", "\n\n".join([table, *notes])))
    return "\n\n".join(parts)


def _provenance(item: Evidence) -> str:
    if not item.older:
        return "Geometric mean and range"
    return "Geometric mean and range, sk_triton's newest time of each case, each peer's fastest with the same torch"


def _ungraphed(item: Evidence) -> str | None:
    """A sentence on the speed where nobody is in a CUDA graph, if some were."""
    run = _without(item.run, is_graph)
    if len(run.records) == len(item.run.records):
        return None
    return f"Without CUDA graphs, on either side: {speed_summary(comparisons(run))}."


def _without(run: Results, left_out: Callable[[Record], bool]) -> Results:
    return dataclasses.replace(run, records=tuple(record for record in run.records if not left_out(record)))


def _files(item: Evidence) -> str:
    """Links to the files behind it, with their dates and commits."""
    return ", ".join(map(_file, (item, *item.older)))


def _file(item: Evidence) -> str:
    stamp = item.run.stamp
    commit = f", commit {stamp.git_commit[:9]}" if stamp.git_commit else ""
    return f"[{item.name}.json]({item.path}) ({stamp.date[:10]}{commit})"


def _losses(shown: list[Evidence], units: Sequence[UnitEvidence]) -> str:
    """Every case that is lost to the fastest measured peer, or would be with peers in CUDA graphs and us out."""
    parts = []
    for item in _compared(shown):
        where = f"On {item.run.stamp.device}"
        parts += _lost(item.run, f"{where} we lose")
        ungraphed = _without(item.run, lambda record: record.ours and is_graph(record))
        if len(ungraphed.records) < len(item.run.records):
            parts += _lost(ungraphed, f"{where}, out of a CUDA graph and peers in one, we lose")
    return "\n\n".join(parts) or "None."


def _lost(run: Results, sentence: str) -> list[str]:
    """Nothing where no case is lost."""
    compared = comparisons(run)
    lost = [f"- {line}" for line in losses(compared)]
    return [f"{sentence} in {losses_count(compared)} of suite {run.suite}:", "\n".join(lost)] if lost else []


def _peers(shown: list[Evidence], units: Sequence[UnitEvidence]) -> str:
    """How many times our time each peer takes, in the dtype that the plots show."""
    devices: dict[str, list[Results]] = {}
    for item in _compared(shown):
        devices.setdefault(item.run.stamp.device, []).append(item.run)
    tables = []
    for device, runs in devices.items():
        dtypes = {record.case.dtype for run in runs for record in run.records}
        dtype = next(dtype for dtype in PREFERRED_DTYPES if dtype in dtypes)
        if table := peer_table(runs, dtype):
            tables.append(f"**{device}, {dtype}:**\n\n{table}")
    return "\n".join(tables) or "Not measured."


def _compared(shown: list[Evidence]) -> list[Evidence]:
    """Files whose times can be compared with a peer's: all but those of host costs."""
    return [item for item in shown if any(comparison.peer for comparison in comparisons(item.run))]


def _folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


SECTIONS: dict[str, Callable[[list[Evidence], Sequence[UnitEvidence]], str]] = {
    "plots": _plots,
    "units": _units,
    "results": _results,
    "losses": _losses,
    "peers": _peers,
}
"""What a generated part is called, and what renders it from the results to show."""
