"""The benchmark's protocol: how a provider is judged and timed, with a fake clock."""

from __future__ import annotations

import pytest
import torch

from sk_triton.bench import protocol, results


class FakeTimer:
    """A clock that only a call moves: `machine_slowness` multiplies the cost of work at a given time."""

    def __init__(self, machine_slowness=lambda seconds: 1.0):
        self.seconds = 0.0
        self.machine_slowness = machine_slowness

    def work(self, ms: float) -> None:
        self.seconds += ms / 1e3 * self.machine_slowness(self.seconds)

    def now(self) -> float:
        return self.seconds

    def sample(self, call) -> float:
        start = self.seconds
        call()
        return (self.seconds - start) * 1e3


def test_providers_take_turns_and_rotate_who_goes_first():
    timer, order = FakeTimer(), []

    def call(name):
        return lambda: (order.append(name), timer.work(1))

    measured = protocol.Measurement()
    budget = protocol.Budget(warmup_seconds=0, seconds=0, min_rounds=4, max_rounds=4)
    protocol.measure({name: call(name) for name in "abc"}, timer, budget, measured)

    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(samples) for name, samples in measured.samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_machine_that_slows_down_does_not_favour_anyone():
    timer = FakeTimer(machine_slowness=lambda seconds: 1 + 20 * seconds)
    measured = protocol.Measurement()
    budget = protocol.Budget(warmup_seconds=0, seconds=1, min_rounds=5, max_rounds=100)
    protocol.measure({"a": lambda: timer.work(2), "b": lambda: timer.work(1)}, timer, budget, measured)

    ratio = measured.timing("a").median_ms / measured.timing("b").median_ms
    assert ratio == pytest.approx(2, rel=0.05)


def test_rounds_end_with_the_budget_but_not_before_the_least_number():
    def rounds(call_ms, **budget):
        timer, measured = FakeTimer(), protocol.Measurement()
        limits = protocol.Budget(**{"warmup_seconds": 0, "max_rounds": 1000, **budget})
        protocol.measure({"a": lambda: timer.work(call_ms)}, timer, limits, measured)
        return len(measured.samples["a"])

    assert rounds(125, seconds=1, min_rounds=3) == 8
    assert rounds(1000, seconds=1, min_rounds=3) == 3
    assert rounds(1, seconds=1, min_rounds=3, max_rounds=10) == 10


def test_warm_up_lasts_its_time_and_is_not_counted():
    timer, measured, calls = FakeTimer(), protocol.Measurement(), []
    budget = protocol.Budget(warmup_seconds=0.5, seconds=0, min_rounds=2, max_rounds=2)
    protocol.measure({"a": lambda: (calls.append(1), timer.work(125))}, timer, budget, measured)

    assert len(calls) == 4 + 2
    assert len(measured.samples["a"]) == 2


def test_progress_only_grows_and_ends_at_one():
    timer, seen = FakeTimer(), []
    budget = protocol.Budget(warmup_seconds=0, seconds=0.1, min_rounds=3, max_rounds=50)
    protocol.measure({"a": lambda: timer.work(7)}, timer, budget, protocol.Measurement(), seen.append)

    assert seen == sorted(seen)
    assert 0 < seen[0] < 1
    assert seen[-1] == 1


def test_summary_is_the_median_with_its_quantiles():
    assert protocol.summarise([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == results.Timing(3.5, 2.0, 5.0, 6)
    assert protocol.summarise([7.0]) == results.Timing(7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), results.OUT_OF_MEMORY),
        (MemoryError(), results.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), results.OUT_OF_MEMORY),
        (RuntimeError("first line\nsecond line"), results.FAILED),
    ],
)
def test_a_provider_that_fails_half_way_is_recorded_and_the_others_go_on(error, status):
    timer, measured, done = FakeTimer(), protocol.Measurement(), []

    def failing():
        done.append(1)
        if len(done) == 3:
            raise error
        timer.work(1)

    budget = protocol.Budget(warmup_seconds=0, seconds=0, min_rounds=5, max_rounds=5)
    protocol.measure({"bad": failing, "good": lambda: timer.work(1)}, timer, budget, measured)

    assert measured.failures["bad"][0] == status
    assert "\n" not in measured.failures["bad"][1]
    assert measured.timing("bad") is None
    assert measured.timing("good").samples == 5


def test_error_rule_is_twice_eagers_own_error():
    reference = torch.full((2, 3), 8.0, dtype=torch.float64)
    assert protocol.check("random", reference + 0.02, reference, 0.01, torch.float32).passed
    assert not protocol.check("random", reference + 0.021, reference, 0.01, torch.float32).passed
    step = torch.finfo(torch.float16).eps * 8
    assert protocol.check("random", reference, reference, 0.0, torch.float16).allowed == step


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_fails_the_check(bad):
    reference = torch.zeros(20, 3, dtype=torch.float64)
    y = reference.clone()
    y[13, 1] = bad
    judged = protocol.check("random", y, reference, 1.0, torch.float32)
    assert (judged.passed, judged.error) == (False, None)


def test_an_output_of_another_shape_fails_the_check():
    judged = protocol.check("random", torch.zeros(2, 4), torch.zeros(2, 3), 1.0, torch.float32)
    assert not judged.passed
