"""One case of the benchmark: building, checking, weighing and timing providers, and their failures."""

from __future__ import annotations

import importlib.util
import threading

import pytest
import torch

from sk_triton.bench import results
from sk_triton.bench.measuring import competition, forms, inputs, judge, protocol
from sk_triton.bench.measuring.providers import Provider, competitors
from sk_triton.bench.measuring.sources import Ours, Timm, forced_schedules
from sk_triton.bench.shapes import CLASSIC, PAPER, SKRESNEXT50, TRAINING, UNITS, Case, network_shape

from .bench_fakes import (
    BreaksWhenBuilt,
    FakeSource,
    Raising,
    SwappedBranches,
    Wrapped,
    run_small,
    setting,
    small_case,
)


@pytest.fixture
def without_timm(monkeypatch):
    """Makes timm look as if it were not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else find_spec(name))


@pytest.mark.parametrize("wrong", [SwappedBranches("wrong"), Wrapped(lambda v: v * (1 + 1e-4))])
def test_a_wrong_provider_is_caught_and_never_timed(wrong):
    records = run_small(FakeSource("right"), wrong)

    assert records["right"].status == results.OK
    assert records["right"].timing.samples == 3
    assert {check.input for check in records["right"].checks} == set(inputs.KINDS)
    assert records["wrong"].status == results.WRONG
    assert records["wrong"].timing is None
    assert "allowed" in records["wrong"].message


def test_a_failing_provider_and_one_out_of_memory_are_recorded_and_the_others_go_on():
    records = run_small(
        Raising(torch.OutOfMemoryError("no room"), on_call=1), BreaksWhenBuilt("broken"), FakeSource("right")
    )
    assert records["raising"].status == results.OUT_OF_MEMORY
    assert records["broken"].status == results.FAILED
    assert "no such argument" in records["broken"].message
    assert records["right"].status == results.OK


# A provider is called by two checks, twice for its memory, once to warm up, and then to be timed.
@pytest.mark.parametrize("call", [2, 3, 4, 5, 7])
def test_a_provider_may_fail_at_any_time(call):
    records = run_small(Raising(RuntimeError("too late"), on_call=call), FakeSource("right"))
    assert (records["raising"].status, records["raising"].timing) == (results.FAILED, None)
    assert records["right"].status == results.OK


def test_interrupting_a_case_keeps_what_was_measured():
    records: list[results.Record] = []
    with pytest.raises(KeyboardInterrupt):
        competition.run_case(
            small_case(), setting(FakeSource("right"), Raising(KeyboardInterrupt(), on_call=7)), records
        )
    _, raising, floor = records
    assert [record.status for record in records] == [results.OK] * 3
    assert raising.timing.samples == 1
    assert floor.role == results.FLOOR
    assert results.finished_cases(records, min_samples=3) == []


def test_interrupting_the_checks_leaves_the_case_marked_as_not_measured():
    records: list[results.Record] = []
    with pytest.raises(KeyboardInterrupt):
        competition.run_case(small_case(), setting(Raising(KeyboardInterrupt(), on_call=1)), records)
    assert [record.status for record in records] == [results.NOT_MEASURED]
    assert results.finished_cases(records, min_samples=3) == []


def test_where_eager_overflows_a_provider_of_nan_is_not_ok(monkeypatch):
    eager = judge._eager
    monkeypatch.setattr(judge, "_eager", lambda *a: {k: v * float("inf") for k, v in eager(*a).items()})
    record = run_small(Wrapped(lambda v: v * float("nan")))["wrong"]
    assert (record.status, record.timing) == (results.FAILED, None)
    assert "not finite" in record.message


def test_an_input_that_cannot_be_made_fails_the_case_for_everyone(monkeypatch):
    monkeypatch.setattr(inputs, "make_input", lambda *a: (_ for _ in ()).throw(MemoryError("too large")))
    assert run_small(FakeSource("right"))["right"].status == results.OUT_OF_MEMORY


def test_where_float64_does_not_fit_a_part_of_the_batch_is_checked_and_the_whole_is_timed(monkeypatch):
    judge, judged, timed = competition.Judge, [], []

    def narrow(case, state, kind, x, dv, dtype):
        if x.shape[0] > 2:
            raise torch.OutOfMemoryError("float64 does not fit")
        judged.append(x.shape[0])
        return judge(case, state, kind, x, dv, dtype)

    monkeypatch.setattr(competition, "Judge", narrow)
    records = run_small(Wrapped(lambda v: timed.append(v.shape[0]) or v, key="right"), batch=8)
    assert records["right"].status == results.OK
    assert judged == [2, 2]
    assert {check.samples for check in records["right"].checks} == {2}
    assert timed[-3:] == [8, 8, 8]


def test_what_is_timed_is_the_call_that_was_checked(monkeypatch):
    bound, timed = [], []
    bind = competition.Entrant.bind

    def counted(entrant, x, dv):
        call, read = bind(entrant, x, dv)
        bound.append(call)
        return call, read

    def measure(contestants, *arguments):
        timed.extend(contestants["fake/nchw"].call for _ in range(1))

    monkeypatch.setattr(competition.Entrant, "bind", counted)
    monkeypatch.setattr(protocol, "measure", measure)
    run_small(FakeSource())
    assert timed == bound[-1:]


@pytest.mark.parametrize("direction", ["inference", TRAINING])
def test_everyone_gets_input_and_gradient_in_the_memory_format_of_its_form(direction):
    seen = []

    class Seeing(FakeSource):
        def module(self, case):
            module = super().module(case)
            module.register_forward_hook(lambda m, x, v: seen.append((self.key, x[0])))
            if direction == TRAINING:
                module.register_full_backward_hook(lambda m, dx, dv: seen.append((self.key, dv[0])))
            return module

    pairs = [("nchw", forms.NCHW), ("channels_last", forms.CHANNELS_LAST)]
    run_small(providers=[Provider(Seeing(key), form) for key, form in pairs], direction=direction)
    for key, form in pairs:
        tensors = [tensor for name, tensor in seen if name == key]
        assert tensors
        assert all(tensor.is_contiguous(memory_format=form.memory_format) for tensor in tensors)


def test_a_form_with_a_thread_of_its_own_makes_every_call_in_it():
    seen = {"nchw": set(), "heuristic-nchw": set()}

    class Seeing(FakeSource):
        def module(self, case):
            module = super().module(case)
            module.register_forward_hook(lambda *_: seen[self.key].add(threading.get_ident()))
            return module

    chosen = (forms.NCHW, forms.HEURISTIC[0])
    records = run_small(providers=[Provider(Seeing(form.key), form) for form in chosen])
    assert {record.status for record in records.values()} == {results.OK}
    assert seen["nchw"] == {threading.get_ident()}
    assert seen["heuristic-nchw"] == {forms.HEURISTIC[1].run(threading.get_ident)}
    assert records["heuristic-nchw"].memory == records["nchw"].memory


@pytest.mark.parametrize("unit", list(UNITS))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_cpu_provider_computes_the_same_function(unit, dtype):
    case = small_case(unit, dtype=dtype)
    chosen = competitors(case, "cpu", quick=False)
    records: list[results.Record] = []
    competition.run_case(case, setting(providers=chosen, seed=3), records)

    assert {record.label: (record.status, record.message) for record in records} == {
        record.label: (results.OK, None) for record in records
    }
    assert len(records) == len(chosen) + 1


def test_the_record_says_what_really_ran():
    chosen = [Ours(), Ours("ours-reference", "sk_triton, reference", backend="reference"), FakeSource()]
    records = run_small(*chosen)
    assert records["ours"].runs.startswith("torch/")
    assert f"[{records['ours'].runs}]" in records["ours"].label
    assert records["ours-reference"].runs == "reference/eager"
    assert records["fake"].runs is None


@pytest.mark.interpret
def test_a_schedule_that_cannot_run_a_unit_is_skipped_and_says_why():
    schedules = {source.schedule: source for source in forced_schedules()}
    merged = run_small(schedules["merged"], FakeSource())["ours-merged"]
    assert (merged.status, merged.timing) == (results.SKIPPED, None)
    assert "merged" in merged.message
    store = run_small(schedules["store"])["ours-store"]
    assert (store.status, store.runs) == (results.OK, "triton/store")


def test_memory_counts_what_a_call_makes_and_what_training_keeps():
    found = [run_small(FakeSource(), direction=way)["fake"].memory for way in ("inference", TRAINING)]
    inference, training = found
    t = small_case().tensor_bytes
    assert 4 * t <= inference.peak_bytes < 8 * t
    assert inference.saved_bytes is None
    assert 4 * t <= training.saved_bytes < 6 * t  # outputs of convolutions and ReLUs; x is the caller's
    assert training.peak_bytes > training.saved_bytes


def test_memory_leaves_the_input_out_whatever_its_format():
    pairs = [(FakeSource(form.key), form) for form in forms.EAGER]
    records = run_small(providers=[Provider(*pair) for pair in pairs], direction=TRAINING)
    nchw, channels_last = (records[form.key].memory for form in forms.EAGER)
    assert channels_last.saved_bytes == nchw.saved_bytes


def test_the_floor_is_timed_in_the_same_rounds_as_everyone_else():
    records = run_small(FakeSource())
    assert records["copy"].role == results.FLOOR
    assert records["copy"].timing.samples == records["fake"].timing.samples
    assert "2 passes" in records["copy"].source_label
    assert "5 passes" in run_small(FakeSource(), direction=TRAINING)["copy"].source_label


def test_without_timm_its_provider_is_skipped_with_the_line_that_mends_it(without_timm):
    records = run_small(Timm(), FakeSource("right"))
    assert records["timm"].status == results.SKIPPED
    assert "pip install" in records["timm"].message
    assert records["right"].status == results.OK


def test_without_its_yardstick_a_case_is_skipped(without_timm):
    case = Case("model", SKRESNEXT50, network_shape(32), 1, "fp32")
    records: list[results.Record] = []
    competition.run_case(case, setting(providers=competitors(case, "cpu", quick=True)), records)
    assert {record.status for record in records} == {results.SKIPPED}


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["inference", TRAINING])
@pytest.mark.parametrize("unit", [CLASSIC, PAPER])
def test_every_gpu_provider_is_right_and_timed(unit, direction):
    case, device = small_case(unit, batch=8, dtype="fp16", direction=direction), torch.device("cuda")
    chosen = competitors(case, "cuda", quick=False)
    records: list[results.Record] = []
    run_setting = competition.Setting(
        device, 0, lambda case: chosen, protocol.timer_for(device), protocol.Budget(0, 0, 3, 3)
    )
    competition.run_case(case, run_setting, records)

    assert {record.label: (record.status, record.message) for record in records} == {
        record.label: (results.OK, None) for record in records
    }
    assert all(record.warm and record.host_us for record in records if record.role != results.FLOOR)
