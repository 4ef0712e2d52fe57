"""Compiling processes that end: a compiler's assertion takes its process along, and no candidate but its own."""

from __future__ import annotations

import os
from concurrent.futures import BrokenExecutor, Executor, Future

import pytest

from sk_triton.bench.model.gpus import find_gpu
from sk_triton.bench.tuning import assessing, ranking
from sk_triton.bench.tuning.assessing import KILLED, Assessor, assess_singly
from sk_triton.bench.tuning.ranking import rank
from sk_triton.bench.tuning.targets import targets_of
from sk_triton.tuning.entries import Trial

from .tuned import workload

GPU = find_gpu("h100")
TARGETS = [target for target in targets_of("a unit", workload(), 3) if not target.is_schedule]
CULPRIT = TARGETS[1].key, TARGETS[1].choices[1]
TASKS = [(target, choice, {}) for target in TARGETS for choice in target.choices]


def survives(target, choice, settled, gpu):
    return Trial(choice, 1e-5, None)


class Fragile(Executor):
    """Breaks as a pool of processes does: what was not done fails, and so does whatever comes later."""

    made = 0

    def __init__(self, workers):
        Fragile.made += 1
        self.is_broken, self.pending = False, []

    def submit(self, function, *arguments):
        if self.is_broken:
            raise BrokenExecutor
        future: Future = Future()
        self.pending.append((future, function, arguments))
        finish = future.result
        future.result = lambda: (self.work(), finish())[1]
        return future

    def work(self):
        for future, function, arguments in self.pending:
            pairs = arguments[0] if function is ranking.assess_all else [arguments[:2]]
            if any((target.key, choice) == CULPRIT for target, choice in pairs if function is not bounds):
                self.is_broken = True
            if self.is_broken:
                future.set_exception(BrokenExecutor("a process in the process pool was terminated abruptly"))
            else:
                future.set_result(function(*arguments))
        self.pending = []


def bounds(target, gpu):
    return [1e-6 for _ in target.choices]


@pytest.fixture
def fragile(monkeypatch):
    monkeypatch.setattr(Fragile, "made", 0)
    monkeypatch.setattr(assessing, "assess", survives)


def test_all_are_assessed_but_the_one_that_no_process_survives(fragile):
    assessor = Assessor(GPU, 2, Fragile)
    for task in TASKS:
        assessor.begin(*task)
    found = {(task[0].key, task[1]): assessor.trial(*task) for task in TASKS}
    assert {key for key, trial in found.items() if trial.dropped} == {CULPRIT}
    assert found[CULPRIT].dropped == KILLED
    assert Fragile.made == 4  # the first, one before the culprit and one behind it, the last


def test_what_comes_after_is_assessed_as_well(fragile):
    assessor = Assessor(GPU, 2, Fragile)
    target, choice = next(task[:2] for task in TASKS if (task[0].key, task[1]) == CULPRIT)
    assert assessor.trial(target, choice, {}).dropped == KILLED
    assert not assessor.trial(TARGETS[0], TARGETS[0].choices[0], {}).dropped


def test_a_dry_run_ranks_all_but_the_one_that_no_process_survives(fragile, monkeypatch):
    class Waited(Fragile):
        def submit(self, function, *arguments):
            future = super().submit(function, *arguments)
            self.work()
            return future

    monkeypatch.setattr(ranking, "assess", survives)
    monkeypatch.setattr(ranking, "least_seconds", bounds)
    found = rank(TARGETS, GPU, 600, 2, make_pool=Waited)
    dropped = {(key, trial.choice): trial.dropped for key, trials in found.items() for trial in trials}
    assert {key: text for key, text in dropped.items() if text} == {CULPRIT: KILLED}


class Aborts:
    """A choice that no process can as much as receive."""

    def __reduce__(self):
        return os.abort, ()


def test_a_real_process_that_aborts_is_survived():
    choices = ("no config", Aborts(), "no config")
    trials = assess_singly([(TARGETS[0], choice, {}) for choice in choices], GPU)
    assert [trial.dropped == KILLED for trial in trials] == [False, True, False]
    assert trials[0].dropped
