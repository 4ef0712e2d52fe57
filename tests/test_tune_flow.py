"""When a config wins: the whole tune flow with a machine whose times are made up, and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sk_triton.bench.tuning import tables
from sk_triton.bench.tuning.flow import LEFT, DeviceLostError, Outcome, tune
from sk_triton.bench.tuning.targets import targets_of
from sk_triton.tuning import user_file
from sk_triton.tuning.entries import Entry, Trial

from .fake_machine import FakeMachine
from .tuned import origin, workload
from .versions import needs_unhoisted_loops

TARGETS = targets_of("a unit", workload(), 4)
FIRST = TARGETS[0]
ANALYTIC, GOOD, BAD = FIRST.choices[:3]


def assess(target, settled):
    """Nothing is compiled: every candidate is predicted to take 50 µs, a little more for each."""
    return [Trial(choice, (50 + i) * 1e-6, None) for i, choice in enumerate(target.choices)]


def run(machine, targets=(FIRST,), seconds=math.inf, assess=assess, known=None):
    kept = {} if known is None else known
    found = list(
        tune(targets, machine, assess, dict(kept).get, lambda t, e: kept.update({t.key: e}), seconds)
    )
    return found, kept


def test_what_is_three_percent_faster_twice_is_kept_with_its_second_times():
    machine = FakeMachine({ANALYTIC: [100e-6, 110e-6], GOOD: [90e-6, 99e-6]})
    (outcome,), kept = run(machine)
    assert kept == {FIRST.key: outcome.entry}
    assert (outcome.entry.choice, outcome.entry.analytic_seconds, outcome.entry.tuned_seconds) == (
        GOOD,
        110e-6,
        99e-6,
    )
    assert machine.measured == [list(FIRST.choices), [ANALYTIC, GOOD]]
    assert [trial.measured for trial in outcome.entry.trials[:3]] == [100e-6, 90e-6, 100e-6]
    assert outcome.entry.trials[1].predicted == pytest.approx(51e-6)


@pytest.mark.parametrize(
    ("times", "measurements"),
    [({GOOD: 97.1e-6}, 1), ({GOOD: 100e-6}, 1), ({GOOD: [80e-6, 97.1e-6]}, 2), ({GOOD: [80e-6, 120e-6]}, 2)],
)
def test_less_than_that_or_faster_only_once_keeps_the_analytic_choice(times, measurements):
    machine = FakeMachine(times)
    _, kept = run(machine)
    assert kept[FIRST.key].choice is None
    assert kept[FIRST.key].tuned_seconds == 100e-6
    assert len(machine.measured) == measurements


def test_a_wrong_candidate_is_out_before_it_is_timed_however_fast():
    machine = FakeMachine({GOOD: 1e-6}, wrong={GOOD: "error 1.0e+00, allowed 1.0e-03"})
    (outcome,), _ = run(machine)
    assert outcome.entry.choice is None
    assert all(GOOD not in choices for choices in machine.measured)
    assert outcome.entry.trials[1].dropped == "error 1.0e+00, allowed 1.0e-03"


def test_candidates_that_fail_are_out_and_the_others_go_on():
    machine = FakeMachine(
        {GOOD: 50e-6, BAD: "OutOfResources: shared memory"},
        wrong={FIRST.choices[3]: RuntimeError("no launch")},
    )
    spilling = [Trial(c, None, None, "3 spills" if i == 4 else "") for i, c in enumerate(FIRST.choices)]
    (outcome,), _ = run(machine, assess=lambda target, settled: spilling)
    assert outcome.entry.choice == GOOD
    assert [trial.dropped for trial in outcome.entry.trials] == [
        "", "", "OutOfResources: shared memory", "RuntimeError: no launch",
    ]  # fmt: skip


def test_an_earlier_entry_that_is_no_candidate_is_never_run():
    """As one from a file that was imported: what nobody compiled and checked here does not reach the device."""
    strange = Entry(replace(ANALYTIC, BLOCK_W=512), 128, 1e-4, 1e-5)
    machine = FakeMachine()
    outcomes, kept = run(machine, TARGETS[:2], known={FIRST.key: strange})
    assert machine.begun == [target.key for target in TARGETS[:2]]
    assert all(strange.choice not in settled.values() for settled in machine.settled.values())
    assert kept[FIRST.key].choice is None
    assert not outcomes[0].is_known


def test_what_was_dropped_before_is_never_run():
    dropped = [Trial(c, None, None, "" if i == 0 else "9 spills") for i, c in enumerate(FIRST.choices)]
    machine = FakeMachine(wrong=dict.fromkeys(FIRST.choices[1:], AssertionError("ran")))
    (outcome,), _ = run(machine, assess=lambda target, settled: dropped)
    assert {trial.dropped for trial in outcome.entry.trials[1:]} == {"9 spills"}


def test_an_analytic_choice_that_spills_is_still_what_the_others_must_beat():
    spilling = [Trial(c, None, None, "11 spills" if i == 0 else "") for i, c in enumerate(FIRST.choices)]
    (outcome,), _ = run(FakeMachine({GOOD: 50e-6}), assess=lambda target, settled: spilling)
    assert (outcome.entry.choice, outcome.entry.analytic_seconds) == (GOOD, 100e-6)


@pytest.mark.parametrize("fault", [{"wrong": {ANALYTIC: "error 9"}}, {"times": {ANALYTIC: "failed"}}])
def test_where_the_analytic_choice_fails_nothing_is_kept_and_the_outcome_says_so(fault):
    (outcome,), kept = run(FakeMachine(**fault))
    assert outcome.entry is None
    assert "the analytic choice" in outcome.note
    assert kept == {}


def test_a_winner_that_fails_when_run_again_has_not_won():
    (outcome,), kept = run(FakeMachine({GOOD: [50e-6, "failed"]}))
    assert kept[FIRST.key].choice is None
    assert "failed when run again" in outcome.note


@needs_unhoisted_loops
def test_a_schedule_is_measured_with_the_configs_that_won_before():
    schedule = TARGETS[-1]
    assert schedule.is_schedule
    assert schedule.choices == ("recompute", "store", "gated", "resident", "library")
    machine = FakeMachine({GOOD: 50e-6, "store": 80e-6})
    outcomes, kept = run(machine, TARGETS)
    assert kept[schedule.key].choice == "store"
    assert machine.settled[FIRST.key] == {}
    assert machine.settled[schedule.key][FIRST.key] == GOOD
    assert [outcome.target for outcome in outcomes] == TARGETS


def test_a_schedule_that_stays_is_kept_by_its_name():
    """Which one is expected may be another one day; what was measured stays."""
    schedule = TARGETS[-1]
    outcomes, kept = run(FakeMachine(), (schedule,))
    assert (kept[schedule.key].choice, kept[schedule.key].n) == (schedule.choices[0], 128)
    assert not kept[schedule.key].is_tuned
    assert "%" not in rendered(tables.gained(outcomes))
    assert not schedule.takes(Entry(None, 128, 1e-4, 1e-4))
    assert schedule.takes(Entry(None, 128, 0.0, 0.0, (), "the GPU failed"))


def test_nothing_is_begun_after_the_budget_and_the_next_run_does_the_rest():
    machine = FakeMachine()
    outcomes, kept = run(machine, TARGETS, seconds=2)
    assert len(kept) == 2
    assert {outcome.note for outcome in outcomes[2:]} == {LEFT}
    rest = FakeMachine()
    outcomes, kept = run(rest, TARGETS, known=kept)
    assert len(kept) == len(TARGETS)
    assert rest.begun == [target.key for target in TARGETS[2:]]
    assert [outcome.is_known for outcome in outcomes] == [True, True] + [False] * (len(TARGETS) - 2)


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_loses_no_finished_target(folder, end):
    """What Ctrl-C, or whatever ends the process, leaves in the user's file is what the next run starts from."""

    def stop(target, settled):
        if target is TARGETS[2]:
            raise end
        return assess(target, settled)

    def keep(target, entry):
        user_file.save(origin(), {target.key: entry})

    with pytest.raises(end):
        list(tune(TARGETS, FakeMachine({GOOD: 50e-6}), stop, {}.get, keep, math.inf))
    left = user_file.read()[origin()]
    assert list(left) == sorted(target.key for target in TARGETS[:2])
    machine = FakeMachine()
    list(tune(TARGETS, machine, assess, left.get, keep, math.inf))
    assert machine.begun == [target.key for target in TARGETS[2:]]
    better = {target.key: GOOD for target in TARGETS[:2] if GOOD in target.choices}
    assert FIRST.key in better
    assert machine.settled[TARGETS[2].key] == better
    assert set(user_file.read()[origin()]) == {target.key for target in TARGETS}


def test_a_lost_device_ends_the_run_and_the_next_one_gets_past_what_lost_it():
    kept = {}
    machine = FakeMachine({GOOD: 10e-6}, lost_at=BAD)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        run(machine, TARGETS, known=kept)
    assert list(kept) == [FIRST.key]
    assert kept[FIRST.key].choice is None
    assert "illegal memory access" in kept[FIRST.key].trials[2].dropped
    assert kept[FIRST.key].trials[3].dropped.startswith("not tried")
    assert kept[FIRST.key].failure == "the GPU failed: an illegal memory access was encountered"
    again = FakeMachine()
    run(again, TARGETS, known=kept)
    assert again.begun == [target.key for target in TARGETS[1:]]


def test_a_device_lost_while_it_measures_is_got_past_as_well():
    class LosesItself(FakeMachine):
        def times(self, choices):
            found = super().times(choices)
            self.is_lost = True
            return dict.fromkeys(found, "RuntimeError: unspecified launch failure")

    kept = {}
    with pytest.raises(DeviceLostError):
        run(LosesItself(), TARGETS, known=kept)
    assert kept[FIRST.key].choice is None
    assert "launch failure" in kept[FIRST.key].trials[0].dropped


def rendered(table) -> str:
    from rich.console import Console

    console = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_the_table_says_what_was_gained():
    outcomes, _ = run(FakeMachine({GOOD: 50e-6}), TARGETS, seconds=1)
    text = rendered(tables.gained(outcomes))
    assert "100.00" in text
    assert "50.00" in text
    assert "100.0%" in text
    assert tables.short(GOOD) in text
    assert LEFT in text


def test_what_compilers_and_drivers_say_in_brackets_is_shown_as_it_is():
    said = "PTXASError: ptxas failed, log in [/tmp/x.log] [bold]"
    assert said in rendered(tables.predicted(FIRST, [Trial(ANALYTIC, None, None, said)]))
    assert said in rendered(tables.gained([Outcome(FIRST, None, said)]))


def test_an_entry_of_another_batch_says_so_in_the_table():
    known = {FIRST.key: Entry(None, 100, 1e-4, 1e-4)}
    assert "(measured before, at a batch of 100)" in rendered(
        tables.gained(run(FakeMachine(), known=known)[0])
    )


def test_predicted_and_measured_ranks_are_compared():
    in_order = {choice: (60 + i) * 1e-6 for i, choice in enumerate(FIRST.choices)}
    outcomes, _ = run(FakeMachine(in_order))
    assert tables.correlations(outcomes) == [
        "rank correlation (Spearman) of predicted and measured times: 1.00 over 4",
        "within a launch: 1.00 on average over 1 launches",
    ]
    reverse = {choice: (90 - i) * 1e-6 for i, choice in enumerate(FIRST.choices)}
    outcomes, _ = run(FakeMachine(reverse))
    assert "-1.00" in tables.correlations(outcomes)[0]
    assert tables.correlations([]) == []


def test_a_unit_that_cannot_be_judged_is_passed_over():
    class Crowded(FakeMachine):
        def begin(self, target, settled):
            super().begin(target, settled)
            if target == FIRST:
                raise torch.OutOfMemoryError("no room for float64")

    machine = Crowded()
    (first, second), kept = run(machine, TARGETS[:2])
    assert (first.entry, first.note) == (None, "cannot be judged: OutOfMemoryError: no room for float64")
    assert {*kept} == {second.target.key}


def test_a_device_lost_between_calls_is_a_failure_of_all_of_them(monkeypatch):
    from sk_triton.bench.measuring import protocol
    from sk_triton.bench.tuning.machine import Device

    def lost(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    machine = Device(torch.device("cpu"))
    machine._calls = {ANALYTIC: int, GOOD: int}
    monkeypatch.setattr(protocol, "measure", lost)
    with pytest.raises(RuntimeError, match="illegal memory"):
        machine.times([ANALYTIC, GOOD])
    monkeypatch.setattr(machine, "trouble", lambda: "lost")
    message = "CUDA error: an illegal memory access was encountered"
    assert machine.times([ANALYTIC, GOOD]) == {ANALYTIC: message, GOOD: message}
