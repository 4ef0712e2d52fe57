"""Ranks candidates by their predicted times on a GPU that need not be present.

Compiling one takes seconds, so what cannot win by the margin that tuning asks for is ruled out before, by the time that
its bytes take at least. First the expected schedule of each unit is compiled, with its analytic configs. Other
schedules that cannot beat its prediction are out, and with them the launches that only they have; of the other
launches, the candidates that cannot beat the analytic choice.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait

from sk_triton.tuning.entries import Choice, Trial
from sk_triton.workload import Workload

from ..compiled.processes import compiling_processes
from ..model.gpus import Gpu
from .assessing import MakePool, Task, assess_singly, is_lost
from .flow import MARGIN
from .targets import Target, assess, least_seconds

LEFT_OUT = "left: the budget is spent"
CANNOT_WIN = "cannot win: "
"""What `Trial.dropped` says, or begins with, of a candidate that was not compiled."""

Ranked = Mapping[str, Sequence[Trial]]
"""By a target's key, a trial for each of its choices."""


def rank(
    targets: Sequence[Target],
    gpu: Gpu,
    seconds: float,
    workers: int,
    report: Callable[[int, Target], object] = lambda done, target: None,
    make_pool: MakePool = compiling_processes,
) -> Ranked:
    """The candidates of targets, assessed as far as the time goes.

    Args:
        seconds: nothing is begun after them; what is being compiled is waited for.
        workers: processes that compile.
        report: receives how many candidates are settled, and the target of the latest.
        make_pool: makes an executor of so many such processes.
    """
    ranking = _Ranking(targets, gpu, workers, report, make_pool)
    try:
        ranking.run(time.monotonic() + seconds)
    finally:
        ranking.close()
    return {
        target.key: [
            ranking.trials.get((target.key, c), Trial(c, None, None, LEFT_OUT)) for c in target.choices
        ]
        for target in targets
    }


def failures(targets: Iterable[Target], ranked: Ranked) -> int:
    """How many analytic choices were compiled and are out: for a fault of theirs, not for the time or the bounds."""
    dropped = [ranked[target.key][0].dropped for target in targets]
    return sum(bool(text) and text != LEFT_OUT and not text.startswith(CANNOT_WIN) for text in dropped)


def assess_all(pairs: Sequence[tuple[Target, Choice]], gpu: Gpu) -> list[Trial]:
    """:func:`.targets.assess` for several, in one process, where equal kernels are compiled once."""
    return [assess(target, choice, {}, gpu) for target, choice in pairs]


_Job = list[tuple[Target, Choice]]


class _Ranking:
    def __init__(
        self,
        targets: Sequence[Target],
        gpu: Gpu,
        workers: int,
        report: Callable[[int, Target], object],
        make_pool: MakePool,
    ) -> None:
        self._targets, self._gpu, self._workers, self._report = targets, gpu, workers, report
        self._make_pool = make_pool
        self._pool = make_pool(workers)
        self.trials: dict[tuple[str, Choice], Trial] = {}
        self._least: dict[str, list[float]] = {}
        # A pool takes more than it has processes for, and cannot give it back: it gets no more than it works on.
        self._waiting: deque[_Job] = deque()
        self._running: dict[Future[list[Trial]], _Job] = {}
        self._of_unit: defaultdict[tuple[Workload, bool], list[Target]] = defaultdict(list)
        for target in targets:
            self._of_unit[target.workload, target.is_training].append(target)

    def run(self, deadline: float) -> None:
        bounds = [self._pool.submit(least_seconds, target, self._gpu) for target in self._targets]
        _, late = wait(bounds, timeout=deadline - time.monotonic())
        if not late:
            self._least = {t.key: f.result() for t, f in zip(self._targets, bounds, strict=True)}
            self._begin()
        while self._start() and time.monotonic() < deadline:
            done, _ = wait(self._running, timeout=deadline - time.monotonic(), return_when=FIRST_COMPLETED)
            for future in done:
                if future in self._running:  # `_mend` may have concluded it
                    self._settle(future)
        self._waiting.clear()
        while self._running:
            self._settle(next(iter(self._running)))

    def close(self) -> None:
        """Gives up what is not done yet."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> bool:
        """Keeps every process at work; False if there is nothing left to do."""
        while self._waiting and len(self._running) < self._workers:
            job = self._waiting.popleft()
            try:
                self._running[self._pool.submit(assess_all, job, self._gpu)] = job
            except BrokenExecutor:
                self._waiting.appendleft(job)
                self._mend()
        return bool(self._running)

    def _begin(self) -> None:
        """With the expected schedule of each unit and all its launches; with all launches if there is no other."""
        for members in self._of_unit.values():
            expected = {target.schedule for target in members if target.is_schedule}
            first = [t for t in members if t.is_schedule or not expected or t.schedule in expected]
            self._waiting.append([(target, target.choices[0]) for target in first])

    def _settle(self, future: Future[list[Trial]]) -> None:
        try:
            trials = future.result()
        except BrokenExecutor:
            self._mend()
        else:
            self._conclude(self._running.pop(future), trials)

    def _mend(self) -> None:
        """One process that ends takes all others along: what they were at is done again singly."""
        self.close()
        running, self._running = self._running, {}
        self._pool = self._make_pool(self._workers)
        for future, job in running.items():
            if not is_lost(future):
                self._conclude(job, future.result())
                continue
            tasks: list[Task] = [(target, choice, {}) for target, choice in job]
            self._conclude(job, assess_singly(tasks, self._gpu, self._make_pool))

    def _conclude(self, job: _Job, trials: Sequence[Trial]) -> None:
        for (target, choice), trial in zip(job, trials, strict=True):
            self._note(target, trial)
            if choice == target.choices[0]:
                self._go_on(target, trial)

    def _note(self, target: Target, trial: Trial) -> None:
        self.trials[target.key, trial.choice] = trial
        self._report(len(self.trials), target)

    def _go_on(self, target: Target, analytic: Trial) -> None:
        """With what can still beat the analytic choice."""
        to_beat = float("inf") if analytic.predicted is None else (1 - MARGIN) * analytic.predicted
        for choice, least in zip(target.choices[1:], self._least[target.key][1:], strict=True):
            launches = [
                other
                for other in self._of_unit[target.workload, target.is_training]
                if target.is_schedule and not other.is_schedule and other.schedule == choice
            ]
            if least <= to_beat:
                self._waiting.append(
                    [(target, choice), *((launch, launch.choices[0]) for launch in launches)]
                )
                continue
            least_text = f"at least {least * 1e6:.2f} µs"
            self._note(target, Trial(choice, None, None, CANNOT_WIN + least_text))
            for launch in launches:
                for unused in launch.choices:
                    self._note(launch, Trial(unused, None, None, f"{CANNOT_WIN}{choice} takes {least_text}"))
