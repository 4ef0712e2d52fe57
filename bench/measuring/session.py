"""One suite from its first case to its results: what is measured already, the time limit, interrupts, the clock log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
class Request:
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
class _Course:
    """A suite while it runs."""

    request: Request
    stamp: Stamp
    clocks: ClockLog
    earlier: results.Results | None
    records: list[results.Record]
    ceilings: results.Ceilings | None = None
    notes: list[str] = field(default_factory=list)
    cases_left: int = 0

    def results(self, interrupted: bool) -> results.Results:
        """What is known by now, judged."""
        notes = list(self.notes)
        if self.cases_left:
            notes.append(f"{results.TIME_LIMIT}: {self.cases_left} cases left unmeasured")
        if self.clocks.unavailable and self.request.device.type == "cuda":
            notes.append(f"no clock log: {self.clocks.unavailable}")
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
                notes=tuple(notes),
            )
        )


def measure_suite(
    request: Request,
    console: Console,
    earlier: results.Results | None = None,
    checkpoint: Callable[[results.Results], object] = lambda run: None,
) -> tuple[results.Results, int]:
    """The suite's results, and how many of its cases the time limit left.

    Args:
        earlier: results under the same stamp and seed, whose finished cases are kept.
        checkpoint: receives all there is after each case, marked as interrupted, so that even a killed process leaves
            its results.

    Ctrl-C ends it early: `interrupted` is set, and what was measured is kept.
    """
    kept = results.finished_cases(earlier.records, request.budget.min_rounds) if earlier else []
    course = _Course(request, take_stamp(request.device), ClockLog(request.device), earlier, kept)
    interrupted = False
    try:
        if request.suite == HOST:
            _measure_host(course, console)
        else:
            _measure_cases(course, console, lambda: checkpoint(course.results(interrupted=True)))
    except KeyboardInterrupt:
        interrupted = True
    return course.results(interrupted), course.cases_left


def reusable(path: Path, request: Request) -> results.Results | None:
    """What an earlier run of the same suite on the same machine, software and seed left at `path`."""
    try:
        earlier = results.read(path)
    except ValueError:
        return None
    same_stamp = earlier.stamp.measures_like(take_stamp(request.device))
    return earlier if same_stamp and (earlier.suite, earlier.seed) == (request.suite, request.seed) else None


def _measure_host(course: _Course, console: Console) -> None:
    request = course.request
    course.records = []
    setting = _setting(course)
    with console.status("host time") as status:
        for record in host.measure(setting, request.revisions):
            course.records.append(record)
            status.update(f"host time: {len(course.records)} measured")


def _measure_cases(course: _Course, console: Console, checkpoint: Callable[[], object]) -> None:
    request = course.request
    every = list(SUITES[request.suite](request.choice))
    setting = _setting(course)
    measured = {case: {r.key for r in records} for case, records in results.by_case(course.records).items()}
    # Anew where others are to compete than did: further forms, another revision.
    cases = [
        case for case in every if not {p.key for p in setting.competitors(case)} <= measured.get(case, set())
    ]
    course.records = [record for record in course.records if record.case not in {*cases}]
    course.ceilings = request.ceilings or (course.earlier.ceilings if course.earlier else None)
    known = tuple(course.ceilings.matrix_flop_per_s) if course.ceilings else ()
    wanted = tuple(dict.fromkeys((*known, *(case.dtype for case in every))))
    if cases and set(wanted) != set(known):
        with console.status("copy bandwidth and matrix rate"):
            course.ceilings = measure_ceilings(request.device, wanted)
    start, slowest = time.monotonic(), 0.0
    with case_progress(console, len(cases)) as report:
        for index, case in enumerate(cases):
            began = time.monotonic()
            if request.time_limit is not None and index and began - start + slowest > request.time_limit:
                course.cases_left = len(cases) - index
                return
            run_case(case, setting, course.records, partial(report, index, case.title))
            slowest = max(slowest, time.monotonic() - began)
            checkpoint()
            trouble = device_trouble(request.device)
            if trouble:
                course.notes.append(f"the GPU failed in {case.title}, which ends this process: {trouble}")
                course.cases_left = len(cases) - index - 1
                return


def _setting(course: _Course) -> Setting:
    request = course.request

    def chosen(case: Case) -> Sequence:
        quick = request.choice.quick
        return competitors(case, request.device.type, quick, request.revisions, request.every_form)

    return Setting(
        device=request.device,
        seed=request.seed,
        competitors=chosen,
        timer=protocol.timer_for(request.device),
        budget=request.budget,
        on_round=course.clocks.tick,
    )


def device_trouble(device: torch.device) -> str | None:
    """What a GPU says that can run nothing more in this process, as after an illegal access."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None
