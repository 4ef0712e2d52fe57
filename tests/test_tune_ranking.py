"""What a dry run compiles: the expected schedules first, then only what could still win."""

from __future__ import annotations

import math
import time
from concurrent.futures import Executor, Future
from types import SimpleNamespace

import pytest

from sk_triton.bench.compiled.processes import compiling_processes
from sk_triton.bench.grid import paper_unit
from sk_triton.bench.model.gpus import find_gpu
from sk_triton.bench.tuning import ranking, tables
from sk_triton.bench.tuning.ranking import CANNOT_WIN, LEFT_OUT, failures, rank
from sk_triton.bench.tuning.targets import assess, least_seconds, targets_of
from sk_triton.tuning.entries import Trial
from sk_triton.tuning.keys import DIRECTIONS, TRAINING

from .tuned import workload

GPU = find_gpu("h100")
TARGETS = targets_of("a unit", workload(), 3)
BY_KIND = {target.kind: target for target in TARGETS}
POOL, SCHEDULE = BY_KIND["branch_pool"], TARGETS[-1]
CANDIDATES = sum(len(target.choices) for target in TARGETS)


class Inline(Executor):
    """Runs what it is given at once."""

    def __init__(self, workers):
        pass

    def submit(self, function, *arguments):
        future: Future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def model(monkeypatch):
    """By kind and choice: bounds, 10 µs where none is given, and faults; and what was compiled, to take 100 µs."""
    model = SimpleNamespace(least={}, faults={}, compiled=[])

    def fake_assess(target, choice, settled, gpu):
        model.compiled.append((target.kind, choice))
        fault = model.faults.get((target.kind, choice), "")
        return Trial(choice, None if fault else 100e-6, None, fault)

    def fake_bounds(target, gpu):
        return [model.least.get((target.kind, choice), 10e-6) for choice in target.choices]

    monkeypatch.setattr(ranking, "assess", fake_assess)
    monkeypatch.setattr(ranking, "least_seconds", fake_bounds)
    return model


def ranked(seconds=math.inf, **settings):
    seconds = min(seconds, 3600)
    return rank(TARGETS, GPU, seconds, settings.pop("workers", 2), make_pool=Inline, **settings)


def test_everything_that_could_win_is_compiled_the_expected_schedule_first(model):
    found = ranked()
    assert SCHEDULE.schedule == "recompute"
    assert {kind for kind, _ in model.compiled[:4]} == {"schedule", "branch_pool", "branch_select", "gate"}
    assert len(model.compiled) == CANDIDATES
    assert not any(trial.dropped for trials in found.values() for trial in trials)
    assert {target.key: [trial.choice for trial in found[target.key]] for target in TARGETS} == {
        target.key: list(target.choices) for target in TARGETS
    }


@pytest.mark.parametrize(("least", "is_compiled"), [(96.9e-6, True), (97.1e-6, False)])
def test_a_candidate_whose_bound_is_no_three_percent_under_the_analytic_choice_is_not_compiled(
    model, least, is_compiled
):
    candidate = POOL.choices[1]
    model.least["branch_pool", candidate] = least
    found = ranked()
    assert (("branch_pool", candidate) in model.compiled) == is_compiled
    dropped = {trial.choice: trial.dropped for trial in found[POOL.key]}
    assert dropped[candidate] == ("" if is_compiled else f"{CANNOT_WIN}at least 97.10 µs")
    assert dropped[POOL.choices[2]] == ""


def test_a_schedule_that_cannot_win_takes_the_launches_that_only_it_has_along(model):
    model.least["schedule", "store"] = 98e-6
    found = ranked()
    kinds = {kind for kind, _ in model.compiled}
    assert kinds == {"schedule", "branch_pool", "branch_select", "gate", "gated_select", "pooled_sums"}
    assert ("schedule", "store") not in model.compiled
    stores = found[BY_KIND["branch_store"].key]
    assert {trial.dropped for trial in stores} == {f"{CANNOT_WIN}store takes at least 98.00 µs"}
    assert failures(TARGETS, found) == 0
    ranked_text = f"7 cannot win and were not compiled, {CANDIDATES - 7} ranked, 0 out, 0 left"
    assert ranked_text in tables.ranking(TARGETS, found)


def test_an_analytic_choice_that_spills_rules_nothing_out_and_is_a_failure(model):
    model.faults["branch_pool", POOL.choices[0]] = "3 spills"
    model.least.update({("branch_pool", choice): 1.0 for choice in POOL.choices})
    found = ranked()
    assert [trial.dropped for trial in found[POOL.key]] == ["3 spills", "", ""]
    assert failures(TARGETS, found) == 1


def test_without_a_choice_of_schedules_all_launches_begin_at_once(model):
    only = [target for target in TARGETS if target.schedule == "store" and not target.is_schedule]
    found = rank(only, GPU, 60, 1, make_pool=Inline)
    assert not any(trial.dropped for trials in found.values() for trial in trials)


def test_training_is_ranked_beside_inference(model):
    own = [t for t in targets_of("a unit", workload(), 2, TRAINING) if t.key not in {t.key for t in TARGETS}]
    both = [*TARGETS, *own]
    found = rank(both, GPU, 60, 1, make_pool=Inline)
    assert len(found) == len(both)
    assert not any(trial.dropped for trials in found.values() for trial in trials)


def test_nothing_begins_after_the_budget_and_what_was_running_still_counts(model, monkeypatch):
    start = time.monotonic()
    clock = [start]
    monkeypatch.setattr(ranking.time, "monotonic", lambda: clock[0])
    instant = ranking.assess_all

    def slow(pairs, gpu):
        clock[0] += 50
        return instant(pairs, gpu)

    monkeypatch.setattr(ranking, "assess_all", slow)
    found = ranked(60, workers=1)
    assert {kind for kind, _ in model.compiled[:4]} == {"schedule", "branch_pool", "branch_select", "gate"}
    assert len(model.compiled) == 5
    left = [trial for trials in found.values() for trial in trials if trial.dropped == LEFT_OUT]
    assert len(left) == CANDIDATES - 5
    assert failures(TARGETS, found) == 0


def test_no_more_is_handed_out_than_processes_can_work_on(model):
    class Busy(Inline):
        waiting, most = 0, 0

        def submit(self, function, *arguments):
            future = super().submit(function, *arguments)
            if function is ranking.assess_all:
                Busy.waiting += 1
                Busy.most = max(Busy.most, Busy.waiting)
                finish, take = (
                    future.result,
                    lambda: (setattr(Busy, "waiting", Busy.waiting - 1), finish())[1],
                )
                future.result = take
            return future

    rank(TARGETS, GPU, 60, 2, make_pool=Busy)
    assert Busy.most == 2


def test_progress_counts_every_candidate_once(model):
    model.least["schedule", "store"] = 1.0
    seen = []
    ranked(report=lambda done, target: seen.append(done))
    assert seen == list(range(1, CANDIDATES + 1))


@pytest.mark.compile
def test_bounds_are_no_longer_than_predictions():
    """Of what is known without compiling, nothing may be more than the compiled code says."""
    work = workload(8, spec=paper_unit(64), size=7)
    targets = [
        target
        for direction in DIRECTIONS
        for target in targets_of("a unit", work, 1, direction)
        if target.kind in ("branch_pool", "select", "reduction")
    ]
    with compiling_processes(1) as pool:
        for target in targets:
            bounds = pool.submit(least_seconds, target, GPU).result()
            for choice, bound in zip(target.choices, bounds, strict=True):
                predicted = pool.submit(assess, target, choice, {}, GPU).result().predicted
                assert 0.4 * predicted < bound <= predicted
