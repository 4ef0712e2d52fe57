"""What forbids a claim: impossible times, wrong results, a throttled GPU, red tests. Each is broken here."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch

from sk_triton.backend import SCHEDULES
from sk_triton.bench import results
from sk_triton.bench.measuring import ceilings, clocks, guards, protocol
from sk_triton.bench.results import Ceilings, ClockSample, Timing

from .bench_fakes import CPU, FakeTimer
from .synthetic_results import a_stamp, small, with_status


def one_case():
    """A run of one case, and its floor."""
    run = small()
    records = tuple(record for record in run.records if record.case == run.records[0].case)
    return dataclasses.replace(run, records=records), results.floor(list(records)).timing


def timed(run, chosen, timing):
    """The run with other times where `chosen` says so."""
    records = [dataclasses.replace(r, timing=timing) if chosen(r) else r for r in run.records]
    return dataclasses.replace(run, records=tuple(records))


def about(median_ms):
    return Timing(median_ms, median_ms * 0.99, median_ms * 1.01, 50)


def objections(run) -> tuple[str, ...]:
    return guards.judged(run).objections


def test_a_sound_run_has_no_objections():
    assert objections(small()) == ()
    assert guards.judged(small()).sound


def test_objections_are_found_anew():
    assert objections(small(objections=("an old one",))) == ()


def test_a_wrong_result_is_an_objection():
    run = guards.judged(with_status(small(), 0, results.WRONG))
    assert len(run.objections) == 1
    assert "wrong result" in run.objections[0]
    assert (run.sound, run.exit_code) == (False, 1)


@pytest.mark.parametrize("status", [results.SKIPPED, results.OUT_OF_MEMORY])
def test_a_provider_that_could_not_run_is_none(status):
    run = guards.judged(with_status(small(), 0, status))
    assert (run.objections, run.exit_code) == ((), 0)


def test_nothing_is_faster_than_the_copy():
    run, floor = one_case()
    fast, allowed = about(floor.median_ms * 0.5), about(floor.median_ms * 0.95)
    assert "200% of the copy bandwidth: sk_triton" in objections(timed(run, lambda r: r.ours, fast))[0]
    # The copy may be a little slower than memory allows.
    assert objections(timed(run, lambda r: r.ours, allowed)) == ()


def test_a_noisy_copy_is_no_objection():
    run, floor = one_case()
    noisy = dataclasses.replace(floor, q20_ms=floor.median_ms * 0.1)
    run = timed(run, lambda r: r.role == results.FLOOR, noisy)
    assert objections(timed(run, lambda r: r.ours, about(floor.median_ms * 0.5))) == ()


@pytest.mark.parametrize(
    ("runs", "share"),
    [
        *[(f"triton/{name}", 4.0 if name in ("merged", "library") else 1.0) for name in SCHEDULES],
        ("reference/eager", 4.0),
        (None, 4.0),
    ],
)
def test_nothing_exceeds_the_matrix_rate_and_only_libraries_may_save_multiplies(runs, share):
    run, _ = one_case()
    case = run.records[0].case

    def at(rate_share):
        limit = case.flops / run.records[0].timing.median_ms * 1e3 / share / rate_share
        one = dataclasses.replace(run.records[0], runs=runs)
        return dataclasses.replace(run, records=(one,), ceilings=Ceilings(1e12, {case.dtype: limit}))

    assert "of the matrix rate" in objections(at(1.2))[0]
    assert objections(at(1.05)) == ()


def test_without_ceilings_the_matrix_rate_is_not_judged():
    assert objections(dataclasses.replace(small(), ceilings=None)) == ()


def a_reading(*throttle, sm_mhz=1755):
    return ClockSample(1.0, sm_mhz, 2619, 60, 500.0, throttle)


@pytest.mark.parametrize("reason", [clocks.THERMAL, clocks.HARDWARE, clocks.POWER_BRAKE])
def test_a_throttled_gpu_is_an_objection(reason):
    run = dataclasses.replace(small(), clocks=(a_reading(), a_reading(reason, sm_mhz=900)))
    assert objections(run) == (f"{reason} in 1 of 2 clock readings, down to 900 MHz",)


def test_a_power_cap_is_none():
    assert objections(dataclasses.replace(small(), clocks=(a_reading(clocks.POWER_CAP),))) == ()


def some_tests(**changes):
    commit = a_stamp().git_commit
    return dataclasses.replace(results.Tests("pytest -m gpu", 40, 0, 2, commit), **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"failed": 1}, "1 tests failed, 40 passed: pytest -m gpu"),
        ({"passed": 0}, "0 tests failed, 0 passed: pytest -m gpu"),
        ({"complete": False}, "did not get to the end"),
        ({"git_commit": "0" * 40}, "tests were of commit 000"),
    ],
)
def test_tests_that_are_not_green_are_an_objection(changes, words):
    found = objections(dataclasses.replace(small(), tests=some_tests(**changes)))
    assert len(found) == 1
    assert words in found[0]


def test_green_tests_and_none_at_all_are_no_objection():
    assert objections(dataclasses.replace(small(), tests=some_tests())) == ()
    assert objections(dataclasses.replace(small(), tests=None)) == ()


def test_ceilings_are_the_fastest_of_their_runs(monkeypatch):
    timer = FakeTimer()
    costs = iter([*[4] * (ceilings.REPEATS - 1), 2, *[8] * (ceilings.REPEATS - 1), 5])
    monkeypatch.setattr(protocol, "timer_for", lambda device: timer)
    monkeypatch.setattr(timer, "sample", lambda call: (call(), {protocol.COLD: float(next(costs))})[1])
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1000})
    monkeypatch.setattr(ceilings, "MATRIX_SIZE", {"cpu": 10})
    found = ceilings.measure_ceilings(CPU, ("fp32",))
    assert found.copy_bytes_per_s == 2 * 1000 / 2e-3
    assert found.matrix_flop_per_s == {"fp32": 2 * 10**3 / 5e-3}


def test_products_follow_the_convolutions_tf32_switch(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", seen.append)
    for allowed in (True, False):
        monkeypatch.setattr(ceilings, "allows_tf32", lambda allowed=allowed: allowed)
        with ceilings._products_like_convolutions():
            pass
    before = torch.get_float32_matmul_precision()
    assert seen == ["high", before, "highest", before]


@pytest.fixture
def fake_nvml(monkeypatch):
    """NVIDIA's library, for a GPU that throttles as `state.bits` say."""
    state = SimpleNamespace(bits=0, broken=False, asked=[])

    def reasons(handle):
        if state.broken:
            raise RuntimeError("the GPU has fallen off the bus")
        return state.bits

    nvml = SimpleNamespace(
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: state.asked.append(uuid) or "handle",
        nvmlDeviceGetCurrentClocksThrottleReasons=reasons,
        nvmlDeviceGetClockInfo=lambda handle, kind: {1: 1755, 2: 2619}[kind],
        nvmlDeviceGetTemperature=lambda handle, kind: 61,
        nvmlDeviceGetPowerUsage=lambda handle: 512_345,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-5"))
    return state


def test_clocks_are_read_at_most_so_often_with_their_reasons_in_words(fake_nvml, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clocks.time, "monotonic", lambda: now[0])
    log = clocks.ClockLog(torch.device("cuda"))
    fake_nvml.bits = 0x01 | 0x04 | 0x20 | 0x40
    for _ in range(10):
        now[0] += clocks.INTERVAL_SECONDS / 2
        log.tick()

    assert fake_nvml.asked == ["GPU-1234-5"]
    assert len(log.samples) == 1 + 5
    assert log.samples[0] == ClockSample(0.0, 1755, 2619, 61, 512.345, ())
    assert log.samples[-1].throttle == (clocks.POWER_CAP, clocks.THERMAL)
    assert log.unavailable is None


def test_a_log_that_breaks_ends_without_stopping_the_run(fake_nvml, monkeypatch):
    monkeypatch.setattr(clocks, "INTERVAL_SECONDS", 0)
    log = clocks.ClockLog(torch.device("cuda"))
    fake_nvml.broken = True
    for _ in range(2):
        log.tick()
    assert len(log.samples) == 1
    assert "fallen off the bus" in log.unavailable


def test_without_a_gpu_or_its_library_the_log_stays_empty_and_says_why(monkeypatch):
    assert clocks.ClockLog(CPU).unavailable == "not an NVIDIA GPU"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    log = clocks.ClockLog(torch.device("cuda"))
    log.tick()
    assert "pynvml" in log.unavailable
    assert log.samples == []
