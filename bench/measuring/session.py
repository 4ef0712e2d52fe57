"""One suite from its first case to its results: what is measured already, the time limit, interrupts, the clock log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from .. import results
from ..progress import case_progress
from ..shapes import Case
from ..stamp import Stamp, take_stamp
from ..suites import HOST, SUITES, Choice
from . import host, protocol
from .ceilings import measure_ceilings
from .clocks import ClockLog
from .competition import Setting, run_case
from .guards import judged
from .providers import competitors
from .sources import Ours


@dataclass(frozen=True)
class SuiteRequest:
    """What one suite is asked to do.

    revisions: sk_triton at other revisions, which compete as well.
    time_limit: seconds; a case that would probably end after them is not begun. "host", of a few minutes, has none.
    ceilings, tests: of this machine and commit, if they are known already.
    """

    suite: str
    device: torch.device
    choice: Choice
    seed: int = 0
    every_form: bool = False
    revisions: Sequence[Ours] = ()
    time_limit: float | None = None
    ceilings: results.Ceilings | None = None
    tests: results.Tests | None = None

    @property
    def budget(self) -> protocol.Budget:
        return protocol.QUICK if self.choice.quick else protocol.Budget()


@dataclass
class _SuiteRun:
    """A suite while it runs. `wanted`: its cases, and those that `earlier` was asked for and left."""

    request: SuiteRequest
    stamp: Stamp
    clocks: ClockLog
    earlier: results.Results | None
    records: list[results.Record]
    ceilings: results.Ceilings | None = None
    notes: list[str] = field(default_factory=list)
    wanted: list[Case] = field(default_factory=list)
    cases_left: int = 0

    def results(self, interrupted: bool) -> results.Results:
        """What is known by now, judged."""
        unmeasured = self._unmeasured()
        notes = [*self.notes, *_carried_notes(self.earlier)]
        if unmeasured:
            notes.append(f"{results.TIME_LIMIT} or interrupt: {len(unmeasured)} cases left unmeasured")
        if self.clocks.unavailable and self.request.device.type == "cuda":
            notes.append(f"no clock log: {self.clocks.unavailable}")
        notes += _partly_checked(self.records)
        return judged(
            results.Results(
                self.request.suite,
                self.request.seed,
                self.stamp,
                tuple(self.records),
                ceilings=self.ceilings,
                clocks=(*(self.earlier.clocks if self.earlier else ()), *self.clocks.samples),
                tests=self.request.tests,
                interrupted=interrupted,
                notes=tuple(dict.fromkeys(notes)),
                budget=self.request.budget,
                unmeasured=unmeasured,
            )
        )

    def _unmeasured(self) -> tuple[Case, ...]:
        finished = results.by_case(results.finished_cases(self.records, self.request.budget.min_rounds))
        return tuple(case for case in self.wanted if case not in finished)


def _carried_notes(earlier: results.Results | None) -> list[str]:
    """Of an earlier run's notes those that are not made anew."""
    notes = results.lasting_notes(earlier) if earlier else []
    return [note for note in notes if not note.startswith(results.PARTLY_CHECKED)]


def _partly_checked(records: Sequence[results.Record]) -> list[str]:
    """A note for each case of which float64 fitted for a part of the batch alone."""
    notes = []
    for case, rows in results.by_case(list(records)).items():
        samples = [check.samples for row in rows for check in row.checks if check.samples is not None]
        if samples and min(samples) < case.batch:
            notes.append(
                f"{results.PARTLY_CHECKED}: {min(samples)} of {case.batch} samples, since float64 of all of them does "
                f"not fit: {case.title}"
            )
    return notes


def measure_suite(
    request: SuiteRequest,
    console: Console,
    earlier: results.Results | None = None,
    checkpoint: Callable[[results.Results], object] = lambda run: None,
) -> tuple[results.Results, int]:
    """The suite's results, and how many of its cases the time limit left.

    Args:
        earlier: results under the same stamp, seed and budget, whose finished cases are kept; of "host", which is
            measured as a whole, nothing is.
        checkpoint: receives all there is after each case, marked as interrupted, so that even a killed process leaves
            its results.

    Ctrl-C ends it early: `interrupted` is set, and what was measured is kept.
    """
    kept = results.finished_cases(earlier.records, request.budget.min_rounds) if earlier else []
    suite_run = _SuiteRun(request, take_stamp(request.device), ClockLog(request.device), earlier, kept)
    measure = _measure_host if request.suite == HOST else _measure_cases
    interrupted = False
    try:
        measure(suite_run, console, lambda: checkpoint(suite_run.results(interrupted=True)))
    except KeyboardInterrupt:
        interrupted = True
    return suite_run.results(interrupted), suite_run.cases_left


def reusable(path: Path, request: SuiteRequest) -> results.Results | None:
    """What an earlier run of the same suite left at `path`; None if nothing did.

    Raises:
        ValueError: it cannot be read, or was measured on another machine, by other software, or in another way; the
            message says what differs.
    """
    if not path.exists():
        return None
    earlier = results.read(path)
    differing = earlier.stamp.changes(take_stamp(request.device))
    for name, before, now in (
        ("suite", earlier.suite, request.suite),
        ("seed", earlier.seed, request.seed),
        *_budget_changes(earlier.budget, request.budget),
    ):
        differing += [f"{name} {before!r}, now {now!r}"] if before != now else []
    if differing:
        raise ValueError(f"{path} was measured under another setting ({'; '.join(differing)})")
    return earlier


def _budget_changes(
    before: protocol.Budget | None, now: protocol.Budget
) -> list[tuple[str, float | None, float]]:
    """Each part of a case's budget, before and now."""
    return [
        (f"{part.name} of a case", getattr(before, part.name, None), getattr(now, part.name))
        for part in fields(now)
    ]


def _measure_host(suite_run: _SuiteRun, console: Console, checkpoint: Callable[[], object]) -> None:
    with console.status("host time") as status:
        for record in host.measure(_setting(suite_run), suite_run.request.revisions):
            suite_run.records.append(record)
            status.update(f"host time: {len(suite_run.records)} measured")
            checkpoint()


def _measure_cases(suite_run: _SuiteRun, console: Console, checkpoint: Callable[[], object]) -> None:
    request, earlier = suite_run.request, suite_run.earlier
    every = list(SUITES[request.suite](request.choice))
    suite_run.wanted = list(dict.fromkeys((*every, *(earlier.unmeasured if earlier else ()))))
    setting = _setting(suite_run)
    _drop_other_revisions(suite_run, console)
    measured = {
        case: {r.key for r in records} for case, records in results.by_case(suite_run.records).items()
    }
    # Anew where others are to compete than did: further forms, another revision.
    cases = [
        case for case in every if not {p.key for p in setting.competitors(case)} <= measured.get(case, set())
    ]
    suite_run.records = [record for record in suite_run.records if record.case not in {*cases}]
    suite_run.ceilings = request.ceilings or (earlier.ceilings if earlier else None)
    known = tuple(suite_run.ceilings.matrix_flop_per_s) if suite_run.ceilings else ()
    wanted = tuple(dict.fromkeys((*known, *(case.dtype for case in every))))
    if cases and set(wanted) != set(known):
        with console.status("copy bandwidth and matrix rate"):
            suite_run.ceilings = measure_ceilings(request.device, wanted)
    start, slowest = time.monotonic(), 0.0
    with case_progress(console, len(cases)) as report:
        for index, case in enumerate(cases):
            began = time.monotonic()
            if request.time_limit is not None and index and began - start + slowest > request.time_limit:
                suite_run.cases_left = len(cases) - index
                return
            run_case(case, setting, suite_run.records, partial(report, index, case.title))
            slowest = max(slowest, time.monotonic() - began)
            checkpoint()
            trouble = protocol.device_trouble(request.device)
            if trouble:
                suite_run.notes.append(f"the GPU failed in {case.title}, which ends this process: {trouble}")
                suite_run.cases_left = len(cases) - index - 1
                return


def _drop_other_revisions(suite_run: _SuiteRun, console: Console) -> None:
    """Leaves out what an earlier run measured of revisions that this one does not name, and says so."""
    named = {revision.key for revision in suite_run.request.revisions}
    others = [r for r in suite_run.records if r.role == results.REVISION and r.source not in named]
    for label in dict.fromkeys(record.source_label for record in others):
        console.print(
            f"left out: {label}, measured earlier and not named by --compare", markup=False, style="yellow"
        )
    suite_run.records = [record for record in suite_run.records if record not in others]


def _setting(suite_run: _SuiteRun) -> Setting:
    request = suite_run.request

    def chosen(case: Case) -> Sequence:
        quick = request.choice.quick
        return competitors(case, request.device.type, quick, request.revisions, request.every_form)

    return Setting(
        device=request.device,
        seed=request.seed,
        competitors=chosen,
        timer=protocol.timer_for(request.device),
        budget=request.budget,
        on_round=suite_run.clocks.tick,
    )
