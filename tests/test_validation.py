"""Predictions beside measurements: pairs, rank correlation, committed results."""

import dataclasses

import pytest

from sk_triton.bench import results, suites, unit_times
from sk_triton.bench.grid import GRID_UNITS
from sk_triton.bench.model import speed_of_light as sol
from sk_triton.bench.model import validation
from sk_triton.bench.model.gpus import find_gpu
from sk_triton.bench.shapes import CLASSIC, PAPER

from .synthetic_results import a_stamp, slowed, some_results
from .versions import needs_unhoisted_loops

H100 = find_gpu("h100")


def pairs(predicted, measured):
    return [validation.Compared("", "", p, m) for p, m in zip(predicted, measured, strict=True)]


def test_rank_correlation():
    assert validation.rank_correlation(pairs([1, 2, 3], [10, 200, 201])) == pytest.approx(1)
    assert validation.rank_correlation(pairs([1, 2, 3], [9, 8, -7])) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4.
    assert validation.rank_correlation(pairs([1, 2, 2, 5], [1, 3, 2, 4])) == pytest.approx(
        4.5 / (4.5 * 5) ** 0.5
    )
    assert validation.rank_correlation(pairs([1, 1], [2, 3])) is None
    assert validation.rank_correlation([]) is None


@needs_unhoisted_loops
@pytest.mark.usefixtures("fake_code")
def test_predictions_meet_the_fastest_measured_form():
    measured = some_results(every=True, batches=(8, 128), stages=(1, 4), dtypes=("fp16", "fp32"))
    # NCHW inputs are another problem than the predicted one, however fast.
    faster = results.Timing(1e-6, 1e-6, 1e-6, 1)
    records = (
        r if "channels_last" in r.form or not r.form else dataclasses.replace(r, timing=faster)
        for r in measured.records
    )
    measured = dataclasses.replace(measured, records=tuple(records))
    found = validation.compare(validation.seconds_of(measured, PAPER, "fp16"), H100, "fp16")
    # The synthetic run forces no reference: eager is left out.
    ours = {1: {"store", "recompute", "resident", "library"}, 4: {"store", "recompute", "library"}}
    assert {(c.case, c.schedule) for c in found} == {
        (case.title, name)
        for case in results.by_case(measured.records)
        if (case.subject, case.dtype) == (PAPER, "fp16")
        for name in (*ours[1 if case.shape.channels == 128 else 4], sol.COMPILED, sol.FLOOR)
    }
    for each in found:
        if each.schedule == "store":
            timed = [
                record.timing.median_ms / 1e3
                for record in measured.records
                if (record.case.title, record.source) == (each.case, "ours-store")
                and "channels_last" in record.form
            ]
            assert each.measured == min(timed)
    assert validation.rank_correlation(found) > 0.5
    # The synthetic run allows TF32, so its fp32 is not IEEE.
    assert validation.compare(validation.seconds_of(measured, CLASSIC, "tf32"), H100, "tf32")
    assert not validation.seconds_of(measured, CLASSIC, "fp32")


def test_units_of_the_support_grid_are_predicted_as_they_are_measured():
    specs = {name: spec for name, spec, *_ in GRID_UNITS}
    cases = list(suites.grid(suites.Choice(on_gpu=True, dtypes=("fp16",))))
    assert any(case.shape.split_input for case in cases)
    assert [case.name for case in cases if validation.problem_of(case, "fp16").spec != specs[case.name]] == []


def test_committed_results_are_those_of_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "RESULTS", tmp_path)
    assert validation.committed(H100, PAPER, "fp16") == {}
    folder = tmp_path / "h100"
    folder.mkdir()
    measured = some_results(batches=(8,), stages=(1,))
    results.save(measured, folder / "layer-cuda.json")
    found = validation.seconds_of(measured, PAPER, "fp16")
    assert found
    assert validation.committed(H100, PAPER, "fp16") == found
    assert validation.committed(find_gpu("a100"), PAPER, "fp16") == {}
    results.save(dataclasses.replace(measured, objections=("clocks fell",)), folder / "layer-cuda.json")
    assert validation.committed(H100, PAPER, "fp16") == {}


def test_units_measured_launch_by_launch_are_compared_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "RESULTS", tmp_path)
    (tmp_path / "h100").mkdir()
    (tmp_path / "h100" / unit_times.NAME).write_text(
        "commit,unit,shape,batch,dtype,direction,schedule,kernels,sum_microseconds,span_microseconds\n"
        "aaa,paper,128@56x56,128,fp16,inference,store,3,600,610\n"
        "aaa,paper,128@56x56,128,fp16,inference,eager,24,1200,1300\n"
        "aaa,paper,128@56x56,128,fp16,training,eager,69,4500,4600\n",
        encoding="utf-8",
    )
    ((case, seconds),) = validation.committed(H100, PAPER, "fp16").items()
    assert (case.shape.name, case.batch) == ("128@56²", 128)
    assert seconds == pytest.approx({"store": 600e-6, sol.EAGER: 1200e-6})
    assert validation.committed(H100, CLASSIC, "fp16") == {}
    assert validation.committed(H100, PAPER, "bf16") == {}
    measured = some_results(batches=(8,), stages=(1,))
    results.save(measured, tmp_path / "h100" / "layer-cuda.json")
    suite = validation.seconds_of(measured, PAPER, "fp16")
    assert validation.committed(H100, PAPER, "fp16") == {case: seconds} | suite


def test_what_the_dispatcher_took_counts_for_its_schedule():
    """Without runs of single schedules as well."""
    measured = some_results(batches=(8,), stages=(1,))
    record = next(
        r for r in measured.records if (r.source, r.form, r.case.subject) == ("ours", "channels_last", PAPER)
    )
    assert record.timing
    run = dataclasses.replace(measured, records=(dataclasses.replace(record, runs="triton/recompute"),))
    seconds = validation.seconds_of(run, PAPER, record.case.dtype)
    assert seconds == {record.case: {"recompute": record.timing.median_ms / 1e3}}


def test_of_each_case_the_newest_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "RESULTS", tmp_path)
    (tmp_path / "h100").mkdir()
    wide = some_results(batches=(8, 128), stages=(1,), stamp=a_stamp(date="2026-11-01T00:00:00+00:00"))
    new = some_results(batches=(8,), stages=(1,), stamp=a_stamp(date="2026-11-02T00:00:00+00:00"))
    new = slowed(new, 2, lambda record: True)
    results.save(new, tmp_path / "h100" / "layer-a-cuda.json")
    results.save(wide, tmp_path / "h100" / "layer-cuda.json")
    old, newest = (validation.seconds_of(run, PAPER, "fp16") for run in (wide, new))
    assert validation.committed(H100, PAPER, "fp16") == {**old, **newest}
    assert old != {**old, **newest}
