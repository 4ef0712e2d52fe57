"""When a config has won: right on the device, fastest in the rounds, and again at least 3 % faster in rounds of two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from sk_triton.tuning.entries import Choice, Entry, Trial

from ..problems import in_one_line
from .targets import Settled, Target

MARGIN = 0.03
"""The share of the analytic choice's time that a config must save, twice."""

LEFT = "left for the next run: the budget is spent"


class Machine(Protocol):
    """All that only a device can say. `begin` comes first; the others are about its target."""

    def now(self) -> float:
        """Seconds."""

    def begin(self, target: Target, settled: Settled) -> None:
        """Gets ready for a target's choices and lets go of what was made for another's."""

    def wrong(self, choice: Choice) -> str:
        """What is wrong with the unit's result under a choice, "" if nothing; raises what running it raises."""

    def times(self, choices: Iterable[Choice]) -> Mapping[Choice, float | str]:
        """The median seconds of each from a cold L2, measured in turns; a text where one failed."""

    def trouble(self) -> str:
        """What a device says that can run nothing more, else ""."""


class DeviceLostError(RuntimeError):
    """The device can run nothing more in this process."""


@dataclass(frozen=True)
class Outcome:
    """What became of a target. Without an entry, `note` says why; `is_known`: from an earlier run."""

    target: Target
    entry: Entry | None
    note: str = ""
    is_known: bool = False


def tune(
    targets: Iterable[Target],
    machine: Machine,
    assess: Callable[[Target, Settled], list[Trial]],
    known: Callable[[str], Entry | None],
    keep: Callable[[Target, Entry], object],
    seconds: float,
    report: Callable[[Target], object] = lambda target: None,
) -> Iterator[Outcome]:
    """Tunes one target after the other, and keeps each as soon as it is done, so that nothing is lost on the way.

    Args:
        assess: the trials of a target before anything runs: predictions, and what is out already.
        known: an earlier run's entry for a key, which is not measured again.
        keep: stores an entry.
        seconds: no target is begun after them.
        report: receives each target as it begins.

    Raises:
        DeviceLostError: the device failed for good. The target at which it did keeps an entry that says so, so that the
            next run gets past it.
    """
    settled: dict[str, Choice] = {}
    start = machine.now()
    for target in targets:
        earlier = known(target.key)
        if earlier is not None and target.takes(earlier):
            outcome = Outcome(target, earlier, is_known=True)
        elif machine.now() - start >= seconds:
            outcome = Outcome(target, None, LEFT)
        else:
            report(target)
            outcome = _tune_one(target, machine, assess(target, settled), settled)
            if outcome.entry is not None:
                keep(target, outcome.entry)
        if outcome.entry is not None and outcome.entry.choice is not None:
            settled[target.key] = outcome.entry.choice
        yield outcome
        if trouble := machine.trouble():
            raise DeviceLostError(trouble)


def _tune_one(target: Target, machine: Machine, trials: list[Trial], settled: Settled) -> Outcome:
    analytic = target.choices[0]
    try:
        machine.begin(target, settled)
    except (RuntimeError, MemoryError) as error:  # float64 may not fit
        if trouble := machine.trouble():
            return _lost(target, trials, trouble)
        return Outcome(target, None, f"cannot be judged: {in_one_line(error)[:200]}")
    # The analytic choice is what runs today, spills or not: only a fault on the device takes it out.
    trials = [
        trial
        if trial.dropped and trial.choice != analytic
        else replace(trial, dropped=_fault(machine, trial))
        for trial in trials
    ]
    if trouble := machine.trouble():
        return _lost(target, trials, trouble)
    if dropped := next((trial.dropped for trial in trials if trial.choice == analytic), ""):
        return Outcome(target, None, f"the analytic choice: {dropped}")
    measured = machine.times([trial.choice for trial in trials if not trial.dropped])
    trials = [_with_time(trial, measured) for trial in trials]
    if trouble := machine.trouble():
        return _lost(target, trials, trouble)
    by_choice = {trial.choice: trial.measured for trial in trials if trial.measured is not None}
    if analytic not in by_choice:
        return Outcome(target, None, "the analytic choice could not be timed")
    before, best = by_choice[analytic], min(by_choice, key=lambda choice: by_choice[choice])
    n = target.workload.n
    kept = Entry(analytic if target.is_schedule else None, n, before, before, tuple(trials))
    if not _beats(by_choice[best], before):
        return Outcome(target, kept)
    again = machine.times([analytic, best])
    before_again, best_again = again.get(analytic), again.get(best)
    if not isinstance(before_again, float) or not isinstance(best_again, float):
        return Outcome(target, kept, f"failed when run again: {again}")
    if not _beats(best_again, before_again):
        return Outcome(target, kept, "faster once, but not when run again")
    return Outcome(target, Entry(best, n, before_again, best_again, tuple(trials)))


def _lost(target: Target, trials: list[Trial], trouble: str) -> Outcome:
    failed = Entry(None, target.workload.n, 0.0, 0.0, tuple(trials), f"the GPU failed: {trouble}")
    return Outcome(target, failed, trouble)


def _beats(seconds: float, analytic: float) -> bool:
    return seconds <= (1 - MARGIN) * analytic


def _fault(machine: Machine, trial: Trial) -> str:
    if trouble := machine.trouble():
        return f"not tried: {trouble}"
    try:
        return machine.wrong(trial.choice)
    except Exception as error:  # whatever a launch raises
        return in_one_line(error)[:200]


def _with_time(trial: Trial, measured: Mapping[Choice, float | str]) -> Trial:
    time = measured.get(trial.choice)
    if isinstance(time, str):
        return replace(trial, dropped=time)
    return trial if time is None else replace(trial, measured=time)
