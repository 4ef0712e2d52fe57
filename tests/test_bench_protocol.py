"""The benchmark's protocol: turns, budgets, failures, and what a GPU's timer does, with fake clocks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sk_triton.bench import results
from sk_triton.bench.measuring import protocol
from sk_triton.bench.measuring.protocol import COLD, HOST, WARM, Contestant
from sk_triton.environment import MissingPackageError

from .bench_fakes import CPU, FakeTimer


def measure(calls, timer, budget, measured=None, **options):
    measured = protocol.Measurement() if measured is None else measured
    contestants = {name: Contestant(call) for name, call in calls.items()}
    protocol.measure(contestants, timer, protocol.Budget(**budget), measured, **options)
    return measured


def test_providers_take_turns_and_rotate_who_goes_first():
    timer, order = FakeTimer(), []

    def call(name):
        return lambda: (order.append(name), timer.work(1))

    budget = {"warmup_seconds": 0, "seconds": 0, "min_rounds": 4, "max_rounds": 4}
    measured = measure({name: call(name) for name in "abc"}, timer, budget)

    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: measured.timing(name).samples for name in "abc"} == {"a": 4, "b": 4, "c": 4}


def test_a_machine_that_slows_down_does_not_favour_anyone():
    timer = FakeTimer(machine_slowness=lambda seconds: 1 + 20 * seconds)
    budget = {"warmup_seconds": 0, "seconds": 1, "min_rounds": 5, "max_rounds": 100}
    measured = measure({"a": lambda: timer.work(2), "b": lambda: timer.work(1)}, timer, budget)

    ratio = measured.timing("a").median_ms / measured.timing("b").median_ms
    assert ratio == pytest.approx(2, rel=0.05)


def test_rounds_end_with_the_budget_but_not_before_the_least_number():
    def rounds(call_ms, **budget):
        timer = FakeTimer()
        limits = {"warmup_seconds": 0, "max_rounds": 1000, **budget}
        return measure({"a": lambda: timer.work(call_ms)}, timer, limits).timing("a").samples

    assert rounds(10, seconds=0.5, min_rounds=3) == 50
    assert rounds(400, seconds=0.5, min_rounds=7) == 7
    assert rounds(1, seconds=10, min_rounds=3, max_rounds=10) == 10


def test_warm_up_lasts_its_time_and_is_not_counted():
    timer, calls = FakeTimer(), []
    budget = {"warmup_seconds": 0.5, "seconds": 0, "min_rounds": 2, "max_rounds": 2}
    measured = measure({"a": lambda: (calls.append(1), timer.work(125))}, timer, budget)

    assert len(calls) == 4 + 2
    assert measured.timing("a").samples == 2


def test_a_scope_holds_around_each_turn_and_is_not_timed():
    timer, held = FakeTimer(), []

    class Scope:
        def __enter__(self):
            held.append(True)
            timer.work(50)

        def __exit__(self, *error):
            held.pop()
            timer.work(50)

    measured = protocol.Measurement()
    call = Contestant(lambda: (timer.work(2), held or pytest.fail("called outside of its scope")), Scope)
    protocol.measure({"a": call}, timer, protocol.Budget(0, 0, 2, 2), measured)
    assert measured.timing("a").median_ms == pytest.approx(2)
    assert not held


def test_progress_only_grows_and_ends_at_one():
    timer, seen = FakeTimer(), []
    budget = {"warmup_seconds": 0, "seconds": 0.1, "min_rounds": 3, "max_rounds": 50}
    measure({"a": lambda: timer.work(7)}, timer, budget, on_progress=seen.append)

    assert seen == sorted(seen)
    assert 0 < seen[0] < 1
    assert seen[-1] == 1


def test_what_happens_between_rounds_is_on_nobodys_time():
    timer, rounds = FakeTimer(), []

    def between():
        rounds.append(1)
        timer.work(1000)

    budget = {"warmup_seconds": 0, "seconds": 0, "min_rounds": 3, "max_rounds": 3}
    measured = measure({"a": lambda: timer.work(1)}, timer, budget, on_round=between)
    assert len(rounds) == 3
    assert measured.timing("a").q80_ms == pytest.approx(1)


def test_summary_is_the_median_with_its_quantiles():
    assert protocol.summarise([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == results.Timing(3.5, 2.0, 5.0, 6)
    assert protocol.summarise([7.0]) == results.Timing(7.0, 7.0, 7.0, 1)


def out_of_memory_while_capturing():
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        finally:
            raise RuntimeError("capture was invalidated")  # as ending the capture does
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), results.OUT_OF_MEMORY),
        (out_of_memory_while_capturing(), results.OUT_OF_MEMORY),
        (MemoryError(), results.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), results.OUT_OF_MEMORY),
        (MissingPackageError("timm is not installed: pip install timm"), results.SKIPPED),
        (RuntimeError("first line\nsecond line"), results.FAILED),
    ],
)
def test_a_provider_that_fails_half_way_is_recorded_and_the_others_go_on(error, status):
    timer, done = FakeTimer(), []

    def failing():
        done.append(1)
        if len(done) == 3:
            raise error
        timer.work(1)

    budget = {"warmup_seconds": 0, "seconds": 0, "min_rounds": 5, "max_rounds": 5}
    measured = measure({"bad": failing, "good": lambda: timer.work(1)}, timer, budget)

    assert measured.failures["bad"][0] == status
    assert "\n" not in measured.failures["bad"][1]
    assert measured.timing("bad") is None
    assert measured.timing("good").samples == 5


@pytest.fixture
def fake_gpu(monkeypatch):
    """CUDA's clock as a list of what was queued: events read it in milliseconds."""
    queue: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = len(queue)

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return float(other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append("sleep"))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1 << 20)
    )
    return queue


def test_on_a_gpu_a_call_is_timed_cold_and_warm_and_what_occupies_the_device_is_not(fake_gpu):
    timer = protocol.CudaTimer(CPU)
    assert timer.scratch.numel() >= 4 << 20
    timer.scratch = SimpleNamespace(zero_=lambda: fake_gpu.append("overwrite"))
    sample = timer.sample(lambda: fake_gpu.extend(["kernel", "kernel"]))

    assert fake_gpu == ["overwrite", "kernel", "kernel", "sleep", "kernel", "kernel"]
    assert (sample[COLD], sample[WARM]) == (2, 2)
    assert 0 <= sample[HOST] < 1000


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_no_memory_is_told_from_other_failures_whoever_says_so(message):
    assert protocol.failure(RuntimeError(message))[0] == results.OUT_OF_MEMORY
    assert protocol.failure(RuntimeError("CUDA error: misaligned address"))[0] == results.FAILED
