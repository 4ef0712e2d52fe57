"""The words of a picture that come from its run: device, badges, takeaway, stamp, units of time."""

from __future__ import annotations

from dataclasses import dataclass

from .. import coverage, results
from ..formats import three_digits
from ..results import Record, Results
from ..shapes import STAGES, TRAINING, Case, Shape, subject_title
from ..suites import HOST
from ..verdict import comparisons, speed_summary
from .card import Words

CPU_NOTICE = "Measured on a CPU, where sk_triton runs PyTorch operators. Its kernels need a GPU."
HOST_NOTICE = (
    "Measured on a CPU: Triton schedules are called with their launches stubbed out, so that no kernel runs; "
    "everything else runs PyTorch operators."
)
OBJECTIONS_SHOWN = 2


@dataclass(frozen=True)
class Clock:
    """The unit of time of a picture's numbers."""

    name: str
    per_ms: float

    @classmethod
    def for_records(cls, records: list[Record]) -> Clock:
        """Microseconds where every median is below 10 ms, else milliseconds."""
        medians = [record.timing.median_ms for record in records if record.timing]
        return cls("µs", 1e3) if medians and max(medians) < 10 else cls("ms", 1.0)

    def show(self, ms: float) -> str:
        return three_digits(ms * self.per_ms)


def words(run: Results, title: str, reading: str, cases: list[Case], *, with_takeaway: bool = False) -> Words:
    """The text of a picture of some cases of one dtype. `reading` says which way is better and what a mark means.

    The takeaway names what was not measured of the peers; the footer has notes on these cases alone.
    """
    takeaway = None
    if with_takeaway and run.sound:
        compared = [comparison for comparison in comparisons(run) if comparison.case in cases]
        summary = speed_summary(compared)
        if summary:
            left_out = coverage.headline(run, cases)
            takeaway = f"sk_triton: {summary}" + (f"; not measured: {left_out}" if left_out else "")
            reading += " · headline: geometric mean"
        if any(comparison.is_ours_alone_in_graph for comparison in compared):
            reading += " · *: sk_triton in a CUDA graph, the fastest measured peer not"
    left_out = coverage.sentence(run, cases)
    dtypes = ", ".join(dict.fromkeys(case.dtype for case in cases))
    return Words(
        title=title,
        subtitle=f"{device(run)} · {dtypes} · {reading}",
        footer=[stamp(run), *([line] for line in (*_notes(run, cases), *([left_out] if left_out else ())))],
        takeaway=takeaway,
        notices=notices(run),
    )


def _notes(run: Results, cases: list[Case]) -> list[str]:
    """Where the cases are from, if not from the run of the stamp, and the run's notes but for those on other cases."""
    ours: dict[str, list[str]] = {}
    peers: dict[str, list[str]] = {}
    here = [(case, records) for case, records in results.by_case(run.records).items() if case in cases]
    for case, records in here:
        own = {record.commit for record in records if record.role != results.PEER}
        for commit in dict.fromkeys(record.commit for record in records if record.commit):
            (ours if commit in own else peers).setdefault(commit, []).append(case.short_title)
    found = [f"at {commit}: {', '.join(titles)}" for commit, titles in ours.items()]
    found += [f"peers that were faster at {commit}: {', '.join(titles)}" for commit, titles in peers.items()]
    elsewhere = {record.commit for record in run.records if record.commit} - {*ours, *peers}
    return found + [note for note in run.notes if note.partition(":")[0] not in elsewhere]


def unit_title(case: Case) -> str:
    """Unit or network, and what is run of it."""
    return f"{subject_name(case)}, {direction(case)}"


def subject_name(case: Case) -> str:
    """Unit or network."""
    return subject_title(case.subject).partition(":")[0]


def direction(case: Case) -> str:
    return "forward and backward" if case.direction == TRAINING else "forward"


def stage_title(shape: Shape) -> str:
    """A shape's name, and its stage of SKNet-50 if it has that size."""
    for stage, (channels, size) in STAGES.items():
        if (shape.channels, shape.height, shape.width) == (channels, size, size):
            return f"stage {stage}: {shape.name}"
    return shape.name


def device(run: Results) -> str:
    stamp = run.stamp
    if stamp.device_type != "cpu":
        return f"GPU: {stamp.device}"
    return f"CPU: {stamp.device}, {stamp.threads} thread{'s' * (stamp.threads != 1)}"


def notices(run: Results) -> list[tuple[str, str]]:
    """What a reader must know before looking at the data: kind of badge and its text."""
    found = []
    if run.stamp.device_type == "cpu":
        found.append(("cpu", HOST_NOTICE if run.suite == HOST else CPU_NOTICE))
    if not run.sound:
        shown = "; ".join(run.objections[:OBJECTIONS_SHOWN])
        more = len(run.objections) - OBJECTIONS_SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        found.append(("alarm", f"No speed is claimed: {shown}{rest}."))
    return found


def commit(run: Results) -> str | None:
    """The short commit that was measured; "+changes" where tracked files differed from it."""
    stamp = run.stamp
    return f"{stamp.git_commit[:9]}{'+changes' if stamp.git_dirty else ''}" if stamp.git_commit else None


def stamp(run: Results) -> list[str]:
    """The facts of the footer."""
    stamp = run.stamp
    facts = [
        f"torch {stamp.torch}",
        f"triton {stamp.triton or 'not installed'}",
        f"sk_triton {stamp.sk_triton}",
    ]
    if commit(run):
        facts[-1] += f" ({commit(run)})"
    if stamp.driver:
        facts.append(f"driver {stamp.driver}")
    facts.append(f"TF32 convolutions {'on' if stamp.tf32_convolution else 'off'}")
    facts.append(stamp.date[:10])
    if run.interrupted:
        facts.append("interrupted run")
    return facts
