"""The suites: what they cover, and each of them measured at tiny size on the CPU."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from rich.console import Console

from sk_triton.bench import results, shapes, suites, verdict
from sk_triton.bench.grid import GRID_UNITS, paper_unit
from sk_triton.bench.measuring import competition, host, protocol, providers, session
from sk_triton.bench.measuring.peers import SKNet50
from sk_triton.bench.measuring.providers import competitors
from sk_triton.bench.measuring.sources import Ours
from sk_triton.bench.shapes import CLASSIC, INFERENCE, PAPER, SKNET50, TRAINING, unit_shape
from sk_triton.bench.suites import OPTIONS, SUITES, Choice
from sk_triton.preference import MAX_KERNEL_CHANNELS

from .bench_fakes import CPU, SHORT
from .synthetic_results import slowed

EVERY_CHOICE = [Choice(on_gpu, quick) for on_gpu in (True, False) for quick in (True, False)]


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("choice", EVERY_CHOICE, ids=str)
def test_a_suites_cases_are_its_own_and_each_comes_once(suite, choice):
    cases = list(SUITES[suite](choice))
    assert cases
    assert {case.suite for case in cases} == {suite}
    assert len(set(cases)) == len(cases)
    assert len({case.title for case in cases}) == len(cases)


@pytest.mark.parametrize("suite", SUITES)
def test_options_choose_what_a_suite_covers(suite):
    def cover(**options):
        cases = list(SUITES[suite](Choice(on_gpu=False, quick=True, **options)))
        return {case.batch for case in cases}, {case.dtype for case in cases}, {case.shape for case in cases}

    batches, dtypes, sizes = cover()
    for option, chosen, default, found in (
        ("batch", {"batches": (3,)}, batches, lambda: cover(batches=(3,))[0]),
        ("dtype", {"dtypes": ("bf16",)}, dtypes, lambda: cover(dtypes=("bf16",))[1]),
        ("stage", {"stages": (2,)}, sizes, lambda: cover(stages=(2,))[2]),
    ):
        assert (found() != default) == (option in OPTIONS[suite]), chosen


def test_on_a_gpu_the_paper_at_the_paper_batch_comes_first():
    for suite in ("layer", "train"):
        cases = list(SUITES[suite](Choice(on_gpu=True)))
        assert {(case.subject, case.batch) for case in cases[:4]} == {(PAPER, 128)}
    first, second = list(SUITES["model"](Choice(on_gpu=True)))[:2]
    assert {first.batch, second.batch} == {128}


def test_a_sweep_varies_one_thing_up_to_a_dense_unit():
    cases = list(suites.sweep(Choice(on_gpu=True)))
    usual = unit_shape(PAPER, 256, 28)
    for case in cases:
        differing = [
            field.name
            for field in dataclasses.fields(usual)
            if getattr(case.shape, field.name) != getattr(usual, field.name)
        ]
        assert (
            set(differing)
            <= {
                "channels per group": {"groups"},
                "dilation": {"dilations"},
                "kernel size": {"kernels", "dilations"},
                "branches": {"kernels", "dilations"},
            }[case.axis]
        )
    assert min(case.shape.groups for case in cases) == 1


def test_the_grid_is_measured_as_it_is_compiled():
    """Each unit of the support grid once, with the parameters that it has there, against every peer of its kind."""
    cases = list(suites.grid(Choice(on_gpu=True, dtypes=("fp16",))))
    assert [case.name for case in cases] == [name for name, *_ in GRID_UNITS]
    for case, (_, spec, n, size) in zip(cases, GRID_UNITS, strict=True):
        assert (case.batch, case.shape.height) == (n, size)
        providers = competitors(case, "cuda", quick=False)
        assert {p.source.key for p in providers} >= ({"classic"} if spec.is_linear else {"timm", "paper"})
        assert {p.form.is_graph for p in providers if p.source.role == results.PEER} == {True, False}
        assert Ours().module(case).spec == spec


@pytest.mark.parametrize(
    "choice",
    [Choice(on_gpu=True, batches=(8,)), Choice(on_gpu=False, quick=True), Choice(on_gpu=False)],
    ids=str,
)
def test_no_unit_of_the_grid_is_measured_twice_under_two_names(choice):
    cases = list(suites.grid(choice))
    assert len({dataclasses.replace(case, name=None) for case in cases}) == len(cases)
    assert all(case.batch == 1 for case in cases if "batch 1" in case.name)


def test_the_grid_holds_dense_wide_split_and_strided_units():
    dense = [spec for _, spec, *_ in GRID_UNITS if spec.group_channels > MAX_KERNEL_CHANNELS]
    assert {len(spec.branches) for spec in dense} == {1, 2}
    assert {spec.is_linear for spec in dense} == {spec.stride > 1 for spec in dense} == {True, False}
    assert {spec.branches[0].groups == 1 for spec in dense} == {True, False}
    assert any(spec.split_input for _, spec, *_ in GRID_UNITS)


def test_a_unit_of_the_grid_that_is_lost_is_listed(monkeypatch):
    """On a CPU, three units of the grid made small; who is faster there does not matter here."""
    small = [(name, paper_unit(16, groups, **more), 2, 6) for name, groups, more in (
        ("dense", 1, {}), ("split", 1, {"split_input": True}), ("strided", 2, {"stride": 2}),
    )]  # fmt: skip
    monkeypatch.setattr(suites, "GRID_UNITS", small)
    monkeypatch.setattr(protocol, "QUICK", SHORT)
    monkeypatch.setattr(session, "measure_ceilings", lambda device, dtypes: results.Ceilings(1e15, {}))
    run, left = measure(request("grid"))
    assert left == 0
    assert {(record.status, record.message) for record in run.records} == {(results.OK, None)}
    slow = slowed(run, 1000.0, lambda record: record.ours and record.case.name != "dense")
    lost = verdict.losses(verdict.comparisons(slow))
    assert [line.partition(":")[2].partition(")")[0] for line in lost if "0.00x" in line] == [
        " paper (split", " paper (strided",
    ]  # fmt: skip
    assert results.Results.from_json(run.to_json()) == run


@pytest.fixture
def tiny(monkeypatch):
    """All suites on small shapes, three rounds each. Of fewer pixels, chance takes the largest error of one output in
    some hundreds past twice eager's."""
    monkeypatch.setattr(protocol, "QUICK", SHORT)
    monkeypatch.setattr(shapes, "STAGES", {1: (32, 14), 3: (32, 12), 4: (64, 10)})
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.setattr(host, "REPEATS", 2)
    monkeypatch.setattr(host, "PROCESSES", 1)
    monkeypatch.setattr(session, "measure_ceilings", lambda device, dtypes: results.Ceilings(1e15, {}))


def request(suite, revisions=(), **options):
    return session.SuiteRequest(suite, CPU, Choice(on_gpu=False, quick=True, **options), revisions=revisions)


def measure(wanted, **arguments):
    return session.measure_suite(wanted, Console(quiet=True), **arguments)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("suite", ["layer", "train", "sweep", "scaling"])
def test_a_suite_on_the_cpu(suite):
    run, left = measure(request(suite, batches=(2,)))
    assert {(record.status, record.message) for record in run.records} == {(results.OK, None)}
    assert (left, run.interrupted, run.objections) == (0, False, ())
    assert len(results.by_case(run.records)) == len(list(SUITES[suite](request(suite, batches=(2,)).choice)))


def test_networks_on_the_cpu(monkeypatch):
    monkeypatch.setattr(protocol, "QUICK", SHORT)
    monkeypatch.setattr(SKNet50, "DEPTHS", (1, 1, 1, 1))
    monkeypatch.setattr(providers, "CALIBRATION_BATCH", 2)
    every = suites.model(Choice(False, quick=True, batches=(4,)))
    cases = [case for case in every if (case.subject, case.direction) == (SKNET50, TRAINING)]
    monkeypatch.setitem(SUITES, "model", lambda choice: cases)
    run, _ = measure(request("model"))
    assert {(record.status, record.message) for record in run.records} == {(results.OK, None)}
    assert {record.runs for record in run.records if record.ours} == {"reference/eager"}  # training
    # Images need no gradient, and nobody knows the least traffic of a network.
    assert {check.tensor for record in run.records for check in record.checks} == {"v", "parameters"}
    assert results.FLOOR not in {record.role for record in run.records}


@pytest.mark.usefixtures("tiny")
def test_host_costs_on_the_cpu_leave_the_launches_out(monkeypatch):
    monkeypatch.setattr(host, "_in_new_process", lambda before, timed: 0.007)
    revision = Ours("rev-1", "sk_triton at 1", role=results.REVISION)
    run, _ = measure(request("host", revisions=(revision,)))
    assert {(record.status, record.message) for record in run.records} == {(results.OK, None)}
    assert all(0 < r.host_q20_us <= r.host_us <= r.host_q80_us for r in run.records)
    stubbed = [record for record in run.records if record.source in ("ours-stubbed", "rev-1")]
    kinds = [(record.case.subject, record.case.direction) for record in stubbed]
    assert (
        kinds == [(unit, direction) for unit in (CLASSIC, PAPER) for direction in (INFERENCE, TRAINING)] * 2
    )
    assert {record.runs.partition("/")[0] for record in stubbed} == {"triton"}
    assert all(
        record.launches == 2 if record.case.direction == INFERENCE else record.launches > 10
        for record in stubbed
    )
    by_subject = {record.case.subject: record for record in run.records}
    assert {host.IMPORT_TORCH, host.IMPORT_OURS, host.CONV2D} < set(by_subject)
    start = by_subject[host.IMPORT_TORCH]
    assert (start.label, start.role, start.host_us) == ("PyTorch", results.PEER, pytest.approx(7))
    assert (start.case.title, start.case.dtype) == ("host: import torch", "")


@pytest.mark.usefixtures("tiny")
def test_without_triton_host_costs_are_skipped_with_the_line_that_mends_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name)
    )
    monkeypatch.setattr(host, "_start_up_records", lambda on_gpu: iter(()))
    run, _ = measure(request("host"))
    stubbed = [record for record in run.records if record.source == "ours-stubbed"]
    assert [record.status for record in stubbed] == [results.SKIPPED] * 4
    assert all("pip install" in record.message for record in stubbed)
    assert [record.source for record in run.records if record.status == results.OK] == [host.CONV2D]


@pytest.mark.usefixtures("tiny")
def test_what_was_measured_of_the_host_is_saved_as_it_comes(monkeypatch, tmp_path):
    first = results.Record(next(iter(host._cases())), "ours", "sk_triton", "", "", results.OURS, results.OK)

    def fail(setting, revisions):
        yield first
        raise RuntimeError("no such clock")

    monkeypatch.setattr(session.host, "measure", fail)
    path = tmp_path / "host.json"
    with pytest.raises(RuntimeError, match="no such clock"):
        measure(request("host"), checkpoint=lambda run: results.save(run, path))
    assert results.load(path).records == (first,)


@pytest.fixture
def counted(monkeypatch, tiny):
    """Cases that were really measured, and what happens in each."""
    measured, run_case = [], session.run_case
    happen = {}

    def counting(case, *arguments):
        happen.get(len(measured), lambda: None)()
        run_case(case, *arguments)
        measured.append(case)

    monkeypatch.setattr(session, "run_case", counting)
    return measured, happen


def interrupt():
    raise KeyboardInterrupt


def test_ctrl_c_keeps_what_was_measured_and_the_next_run_goes_on(counted, tmp_path):
    measured, happen = counted
    wanted, path = request("layer", batches=(1,)), tmp_path / "layer.json"
    happen[2] = interrupt
    first, _ = measure(wanted, checkpoint=lambda run: results.save(run, path))
    assert first.interrupted
    assert {record.case for record in first.records} == set(measured)
    results.save(first, path)

    happen.clear()
    second, _ = measure(wanted, earlier=session.reusable(path, wanted))
    cases = list(suites.layer(wanted.choice))
    assert measured == cases
    assert not second.interrupted
    assert {record.case for record in second.records} == set(cases)
    assert second.records[: len(first.records)] == first.records


def test_a_killed_run_leaves_its_finished_cases(counted, tmp_path):
    _, happen = counted
    path = tmp_path / "layer.json"

    def kill():
        raise SystemExit

    happen[2] = kill
    with pytest.raises(SystemExit):
        measure(request("layer", batches=(1,)), checkpoint=lambda run: results.save(run, path))
    left = results.load(path)
    assert left.interrupted
    assert len(results.by_case(left.records)) == 2


def test_results_of_another_setting_are_refused_and_named(tmp_path):
    path, wanted = tmp_path / "layer.json", request("layer")
    run = results.Results("layer", 0, session.take_stamp(CPU), budget=wanted.budget)
    results.save(run, path)
    assert session.reusable(path, wanted) == run
    assert session.reusable(tmp_path / "missing.json", wanted) is None
    for change, words in (({"seed": 1}, "seed 0, now 1"), ({"suite": "train"}, "suite 'layer', now 'train'")):
        with pytest.raises(ValueError, match=words):
            session.reusable(path, dataclasses.replace(wanted, **change))
    for change in ({"git_commit": "0" * 40}, {"source_hash": "0"}, {"threads": 99}, {"git_dirty": None}):
        results.save(dataclasses.replace(run, stamp=dataclasses.replace(run.stamp, **change)), path)
        name, before = next(iter(change.items()))
        with pytest.raises(
            ValueError, match=f"layer.json was measured under another .*{name} {before!r}, now"
        ):
            session.reusable(path, wanted)
    results.save(dataclasses.replace(run, stamp=dataclasses.replace(run.stamp, load=99.0, date="2020")), path)
    assert session.reusable(path, wanted) is not None
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"layer.json: schema must be"):
        session.reusable(path, wanted)


def test_what_was_measured_in_a_hurry_is_no_full_measurement(tmp_path):
    """However many rounds it fitted into its second."""
    path, quick = tmp_path / "layer.json", request("layer")
    full = dataclasses.replace(quick, choice=Choice(on_gpu=False))
    run = results.Results("layer", 0, session.take_stamp(CPU), budget=quick.budget)
    results.save(run, path)
    with pytest.raises(ValueError, match=r"seconds of a case 1.0, now 2.0"):
        session.reusable(path, full)
    results.save(dataclasses.replace(run, budget=None), path)
    with pytest.raises(ValueError, match=r"seconds of a case None, now 1.0"):
        session.reusable(path, quick)


def test_no_case_is_begun_that_would_pass_the_time_limit(counted, monkeypatch):
    measured, happen = counted
    now = [0.0]
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])

    def takes(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    happen.update({0: takes(10), 1: takes(40), 2: takes(10), 3: takes(10)})
    limited = dataclasses.replace(request("layer", batches=(1,)), time_limit=99)
    run, left = measure(limited)
    # After 60 s a case as slow as the slowest would end at 100 s.
    assert (len(measured), left) == (3, 1)
    assert "1 cases left" in run.notes[0]
    assert run.unmeasured == tuple(suites.layer(limited.choice))[3:]


def test_notes_and_what_is_left_outlast_a_run_of_other_cases(counted, monkeypatch, tmp_path):
    """As one file holds the layers of all dtypes, each measured by a step of its own."""
    measured, happen = counted
    now = [0.0]
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    happen.update({0: lambda: now.__setitem__(0, 60.0)})
    wanted, path = request("layer", batches=(1,), dtypes=("fp32",)), tmp_path / "layer.json"
    first, left = measure(dataclasses.replace(wanted, time_limit=99))
    assert (left, len(first.unmeasured)) == (3, 3)
    results.save(dataclasses.replace(first, notes=(*first.notes, "of the first")), path)
    assert len(results.load(path).unmeasured) == 3

    other = request("layer", batches=(1,), dtypes=("bf16",))
    second, left = measure(other, earlier=session.reusable(path, other))
    assert (left, second.unmeasured) == (0, first.unmeasured)
    assert second.notes == ("of the first", "time limit or interrupt: 3 cases left unmeasured")

    results.save(second, path)
    third, _ = measure(wanted, earlier=session.reusable(path, wanted))
    assert (third.unmeasured, third.notes) == ((), ("of the first",))
    assert len(measured) == 8


def test_a_revision_that_is_not_compared_any_more_is_left_out(counted, tmp_path, capsys):
    measured, _ = counted
    revision = Ours("rev-1", "sk_triton at 1", role=results.REVISION)
    wanted, path = request("layer", batches=(1,), stages=(3,)), tmp_path / "layer.json"
    both, _ = measure(dataclasses.replace(wanted, revisions=(revision,)))
    assert {record.role for record in both.records} == {
        results.PEER, results.OURS, results.REVISION, results.FLOOR,
    }  # fmt: skip
    results.save(both, path)
    alone, _ = session.measure_suite(wanted, Console(), session.reusable(path, wanted))
    assert len(measured) == 2
    assert alone.records == tuple(r for r in both.records if r.role != results.REVISION)
    assert "left out: sk_triton at 1" in capsys.readouterr().out


def test_a_check_of_a_part_of_the_batch_is_noted(counted, monkeypatch):
    judge = competition.Judge

    def narrow(case, state, kind, x, dv, dtype):
        if x.shape[0] > 2:
            raise torch.OutOfMemoryError("float64 does not fit")
        return judge(case, state, kind, x, dv, dtype)

    monkeypatch.setattr(competition, "Judge", narrow)
    run, _ = measure(request("layer", batches=(4,), stages=(3,)))
    assert len(run.notes) == 2
    assert all(note.startswith("checked in part: 2 of 4 samples") for note in run.notes)
    assert results.Results.from_json(run.to_json()) == run


def test_a_gpu_that_fails_ends_the_suite_and_the_results_say_so(counted, monkeypatch):
    measured, _ = counted
    monkeypatch.setattr(
        protocol, "device_trouble", lambda device: "an illegal memory access" if measured else ""
    )
    run, left = measure(request("layer", batches=(1,)))
    assert (len(measured), left) == (1, 3)
    assert "an illegal memory access" in run.notes[0]
