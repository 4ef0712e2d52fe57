"""`sk-triton report`: its steps at tiny size, what it skips, what it refuses, and the folder it leaves."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from sk_triton import cli, environment
from sk_triton.bench import plots, results, shapes, suites
from sk_triton.bench.commands import report
from sk_triton.bench.measuring import forms, protocol, session
from sk_triton.bench.measuring.providers import Provider
from sk_triton.bench.report import file as report_file
from sk_triton.bench.report import page as report_page
from sk_triton.bench.report import predictions as report_predictions
from sk_triton.bench.report import pytest_run
from sk_triton.bench.report import steps as report_steps
from sk_triton.bench.report.file import DONE, FAILED, INTERRUPTED, PARTIAL, Report, StepState
from sk_triton.bench.report.steps import STEPS, Ending, Step
from sk_triton.bench.stamp import take_stamp

from .bench_fakes import CPU, SHORT, BreaksWhenBuilt, FakeSource
from .synthetic_results import a_stamp, small

SUITE_FILES = {f"{suite}.json" for suite in ("layer", "train", "model", "sweep", "grid", "host", "scaling")}
REVISION = environment.Revision("c0ffee", False)
GREEN = results.Tests("pytest", 3, 0, 0, REVISION.commit)


@pytest.fixture
def tiny(monkeypatch):
    """Steps in seconds: small shapes, three rounds, one picture, and no other process."""
    monkeypatch.setattr(protocol, "QUICK", SHORT)
    monkeypatch.setattr(shapes, "STAGES", {1: (32, 14), 3: (32, 12), 4: (64, 10)})
    model = next(iter(suites.layer(suites.Choice(False, quick=True, batches=(1,)))))
    for suite in suites.SUITES:
        case = dataclasses.replace(model, suite=suite)
        monkeypatch.setitem(suites.SUITES, suite, lambda choice, case=case: [case])
    records = [dataclasses.replace(record) for record in small("cpu").records[:1]]
    monkeypatch.setattr(session.host, "measure", lambda setting, revisions: iter(records))
    monkeypatch.setattr(session, "measure_ceilings", lambda device, dtypes: results.Ceilings(1e15, {}))
    monkeypatch.setattr(report_steps, "measure_ceilings", lambda device, dtypes: results.Ceilings(1e15, {}))
    monkeypatch.setattr(plots, "pictures", lambda run: {"one": draw_little})
    monkeypatch.setattr(environment, "git_revision", lambda: REVISION)
    monkeypatch.setattr(pytest_run, "run_pytest", lambda arguments, seconds: True)
    monkeypatch.setattr(pytest_run, "read_junit", lambda path, command, complete: GREEN)
    monkeypatch.setitem(STEPS, "evidence", Step(say_little, 1, with_gpu=False))
    monkeypatch.setitem(STEPS, "tune", Step(say_little, 1))
    monkeypatch.setattr(report_predictions, "predictions", lambda: "125 µs")


def draw_little():
    from matplotlib.figure import Figure

    return Figure(figsize=(1, 1))


def say_little(course) -> Ending:
    course.report.evidence["counted"] = "<6 T>"
    return Ending()


def make(folder, *options) -> tuple[int, Report]:
    code = cli.main(["report", "--device", "cpu", "--output", str(folder), *options])
    return code, report_file.load(folder)


class Links(HTMLParser):
    """Everything that a page would load."""

    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.usefixtures("tiny")
def test_without_a_gpu_the_whole_report_leaves_one_small_folder_that_stands_alone(tmp_path, capsys):
    code, made = make(tmp_path)
    out = capsys.readouterr().out

    assert code == 0
    assert {path.name for path in tmp_path.iterdir()} == {*SUITE_FILES, "report.json", "report.html"}
    assert all(path.stat().st_size <= 16 << 20 for path in tmp_path.iterdir())
    assert {state.status for state in made.steps.values()} == {DONE}
    assert list(made.steps) == [name for name, step in STEPS.items() if step.without_gpu]
    assert made.tests == GREEN
    assert "no GPU here" in out
    assert "min left" in out
    for suite in SUITE_FILES - {"host.json"}:
        run = results.load(tmp_path / suite)
        assert (run.tests, run.ceilings, run.interrupted) == (GREEN, made.ceilings, False)

    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert links.open == ["html"] or not links.open
    assert links.found
    assert all(link.startswith("data:image/png;base64,") for link in links.found)
    assert not re.search(r"https?://|@import|<script", page)
    assert "prefers-color-scheme: dark" in page
    assert "Nothing on this page is a GPU" in page
    assert "&lt;6 T&gt;" in page


@pytest.mark.usefixtures("tiny")
def test_a_provider_that_fails_makes_its_step_and_the_command_fail(tmp_path, monkeypatch):
    chosen = [Provider(source, forms.NCHW) for source in (FakeSource("paper"), BreaksWhenBuilt("ours"))]
    monkeypatch.setattr(session, "competitors", lambda *a: chosen)
    code, made = make(tmp_path, "--step", "layer-fp32", "summary")
    assert code == 1
    state = made.steps["layer-fp32"]
    assert state.status == FAILED
    assert "failed: ours, NCHW: TypeError: no such argument" in state.message
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<li>failed: ours, NCHW: TypeError: no such argument</li>" in page
    assert make(tmp_path, "--step", "summary")[0] == 1


@pytest.mark.usefixtures("tiny")
def test_a_suites_file_of_another_setting_is_not_overwritten_unasked(tmp_path):
    make(tmp_path, "--step", "layer-fp32")
    path = tmp_path / "layer.json"
    run = results.load(path)
    results.save(dataclasses.replace(run, stamp=dataclasses.replace(run.stamp, threads=99)), path)
    (tmp_path / "report.json").unlink()
    before = path.read_bytes()
    code, made = make(tmp_path, "--step", "layer-fp32")
    assert (code, path.read_bytes()) == (1, before)
    assert "threads 99, now" in made.steps["layer-fp32"].message
    assert "--again to replace it" in made.steps["layer-fp32"].message
    assert make(tmp_path, "--step", "layer-fp32", "--again")[0] == 0


@pytest.mark.usefixtures("tiny")
def test_steps_that_are_done_are_skipped_unless_asked_for_again(tmp_path, monkeypatch):
    ran = []
    for name in ("environment", "ceilings"):
        step = Step(lambda course, name=name: ran.append(name) or Ending(), 1)
        monkeypatch.setitem(STEPS, name, step)
    make(tmp_path, "--step", "environment")
    make(tmp_path, "--step", "ceilings", "environment")
    assert ran == ["environment", "ceilings"]
    make(tmp_path, "--step", "environment", "--again")
    assert ran == ["environment", "ceilings", "environment"]


@pytest.mark.usefixtures("tiny")
def test_a_failing_step_costs_the_others_nothing_and_runs_again(tmp_path, monkeypatch):
    def fail(course):
        raise RuntimeError("no such clock\nand more")

    monkeypatch.setitem(STEPS, "ceilings", Step(fail, 1))
    code, made = make(tmp_path, "--step", "ceilings", "layer-fp32")
    assert code == 1
    assert (made.steps["ceilings"].status, made.steps["ceilings"].message) == (
        FAILED,
        "RuntimeError: no such clock",
    )
    assert made.steps["layer-fp32"].status == DONE
    assert not made.is_done("ceilings", take_stamp(CPU))


@pytest.mark.usefixtures("tiny")
def test_ctrl_c_keeps_what_was_measured_and_the_next_run_goes_on(tmp_path, monkeypatch):
    first = next(iter(suites.SUITES["layer"](None)))
    cases = [first, dataclasses.replace(first, batch=2)]
    monkeypatch.setitem(suites.SUITES, "layer", lambda choice: cases)
    measured, run_case = [], session.run_case

    def interrupted(case, *arguments):
        if measured:
            raise KeyboardInterrupt
        run_case(case, *arguments)
        measured.append(case)

    monkeypatch.setattr(session, "run_case", interrupted)
    code, made = make(tmp_path, "--step", "layer-fp32", "sweep")
    assert code == 130
    assert made.steps["layer-fp32"].status == INTERRUPTED
    assert "sweep" not in made.steps

    monkeypatch.setattr(session, "run_case", lambda case, *a: (measured.append(case), run_case(case, *a)))
    code, made = make(tmp_path, "--step", "layer-fp32")
    assert (code, measured, made.steps["layer-fp32"].status) == (0, cases, DONE)


@pytest.mark.usefixtures("tiny")
def test_a_step_that_its_time_limit_ends_is_not_done(tmp_path, monkeypatch):
    case = next(iter(suites.SUITES["layer"](None)))
    monkeypatch.setitem(
        suites.SUITES, "layer", lambda choice: [dataclasses.replace(case, batch=n) for n in (1, 2, 3)]
    )
    now = [0.0]
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    run_case = session.run_case
    monkeypatch.setattr(session, "run_case", lambda *a: (now.__setitem__(0, now[0] + 30), run_case(*a)))
    _, made = make(tmp_path, "--step", "layer-fp32", "--time-limit", "70")
    state = made.steps["layer-fp32"]
    assert (state.status, made.is_done("layer-fp32", state.stamp)) == (PARTIAL, False)
    assert "1 cases left" in state.message
    _, made = make(tmp_path, "--step", "layer-fp32", "--time-limit", "70")
    assert made.steps["layer-fp32"].status == DONE


@pytest.mark.usefixtures("tiny")
def test_again_measures_a_steps_cases_anew_and_keeps_the_others(tmp_path, monkeypatch):
    case = next(iter(suites.SUITES["layer"](None)))
    by_dtype = {"fp32": case, "bf16": dataclasses.replace(case, dtype="bf16")}
    monkeypatch.setitem(suites.SUITES, "layer", lambda choice: [by_dtype[choice.dtypes[0]]])
    monkeypatch.setitem(STEPS, "layer-bf16", dataclasses.replace(STEPS["layer-bf16"], without_gpu=True))
    make(tmp_path, "--step", "layer-bf16", "layer-fp32")
    before = results.by_case(results.load(tmp_path / "layer.json").records)
    make(tmp_path, "--step", "layer-fp32", "--again")
    after = results.by_case(results.load(tmp_path / "layer.json").records)
    assert set(before) == set(after) == set(by_dtype.values())
    assert after[by_dtype["bf16"]] == before[by_dtype["bf16"]]
    assert after[by_dtype["fp32"]] != before[by_dtype["fp32"]]


@pytest.mark.usefixtures("tiny")
def test_tests_that_the_time_limit_stopped_have_not_failed_and_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pytest_run, "run_pytest", lambda arguments, seconds: False)
    monkeypatch.setattr(
        pytest_run,
        "read_junit",
        lambda path, command, complete: dataclasses.replace(GREEN, complete=complete),
    )
    _, made = make(tmp_path, "--step", "tests")
    assert made.steps["tests"].status == PARTIAL
    assert "stopped after" in made.steps["tests"].message
    assert not made.is_done("tests", take_stamp(CPU))


@pytest.mark.usefixtures("tiny")
def test_red_tests_forbid_every_claim_also_of_what_was_measured_before(tmp_path, monkeypatch):
    assert make(tmp_path, "--step", "layer-fp32")[0] == 0
    red = dataclasses.replace(GREEN, failed=1)
    monkeypatch.setattr(pytest_run, "read_junit", lambda path, command, complete: red)
    code, made = make(tmp_path, "--step", "tests", "sweep", "summary")
    assert code == 1
    assert made.steps["tests"].status == FAILED
    for suite in ("layer", "sweep"):
        run = results.load(tmp_path / f"{suite}.json")
        assert "1 tests failed" in run.objections[0]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No speed is claimed" in page
    assert "the speed of the fastest" not in page


@pytest.mark.usefixtures("tiny")
def test_without_a_checkout_the_tests_are_not_run_and_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "CLONE_DIR", tmp_path / "nowhere")
    _, made = make(tmp_path / "out", "--step", "tests")
    assert made.tests is None
    assert "not run" in made.steps["tests"].message


def test_the_tests_that_run_without_a_gpu_are_there():
    assert all((environment.CLONE_DIR / file).is_file() for file in report_steps.INTERPRETED_TESTS)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("change", [{"git_commit": "0" * 40}, {"source_hash": "0"}])
def test_another_states_results_are_not_replaced_unasked(change, tmp_path, capsys):
    make(tmp_path, "--step", "ceilings")
    made = report_file.load(tmp_path)
    state = made.steps["ceilings"]
    made.steps["ceilings"] = dataclasses.replace(state, stamp=dataclasses.replace(state.stamp, **change))
    report_file.save(made, tmp_path)
    capsys.readouterr()

    code, _ = make(tmp_path, "--step", "layer-fp32")
    assert code == 2
    assert next(iter(change)) in capsys.readouterr().err
    assert make(tmp_path, "--step", "summary")[0] == 0
    assert make(tmp_path, "--step", "layer-fp32", "--again")[0] == 0


@pytest.mark.usefixtures("tiny")
def test_a_summary_drawn_on_another_machine_stays_that_of_the_measurements(tmp_path):
    measured = a_stamp()
    made = Report(steps={"layer-fp16": StepState(DONE, "2020-11-22T17:00:00+00:00", 1.0, measured)})
    report_file.save(made, tmp_path)
    results.save(small(), tmp_path / "layer.json")
    for _ in range(2):
        code, made = make(tmp_path, "--step", "summary")
        assert (code, made.stamp) == (0, measured)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"sk_triton on {measured.device}" in page
    assert "No GPU" not in page


@pytest.mark.usefixtures("tiny")
def test_another_seed_does_not_mix(tmp_path):
    make(tmp_path, "--step", "ceilings")
    assert make(tmp_path, "--step", "layer-fp32", "--seed", "1")[0] == 2


def test_a_step_is_done_only_under_a_stamp_like_its_own():
    stamp = a_stamp()
    made = Report(steps={"sweep": StepState(DONE, "2026-11-22T17:00:00+00:00", 1.0, stamp)})
    assert made.is_done("sweep", dataclasses.replace(stamp, load=9.0))
    assert not made.is_done("sweep", dataclasses.replace(stamp, driver="1"))
    assert not made.is_done("train", stamp)


def test_a_step_has_its_machine():
    on_gpu, without = (report.choose_steps(None, on_gpu=on_gpu) for on_gpu in (True, False))
    assert {"layer-fp16", "layer-bf16"} == set(on_gpu) - set(without)
    assert {"evidence"} == set(without) - set(on_gpu)
    assert report.choose_steps(["summary", "tests"], on_gpu=True) == ["tests", "summary"]
    with pytest.raises(ValueError, match="--step layer-fp16 is for a GPU"):
        report.choose_steps(["layer-fp16"], on_gpu=False)


@pytest.mark.parametrize("seconds", ["0", "abc"])
def test_a_time_limit_that_is_none_is_refused(seconds, capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", "--time-limit", seconds])
    assert f"must be a whole number from 1 to 604800, got '{seconds}'" in capsys.readouterr().err


def test_the_page_stays_small_and_says_which_pictures_it_leaves_out(tmp_path, monkeypatch):
    drawn = {f"picture {n}": draw_little for n in range(4)}
    monkeypatch.setattr(plots, "pictures", lambda run: drawn)
    made = Report(steps={"summary": StepState(DONE, "2026-11-22T17:00:00+00:00", 1.0, a_stamp())})
    runs = [small()]
    assert report_page.write_page(made, runs, tmp_path) == []
    whole = (tmp_path / "report.html").stat().st_size

    monkeypatch.setattr(report_page, "MAX_BYTES", whole - 10)
    left_out = report_page.write_page(made, runs, tmp_path)
    assert left_out == ["layer/picture 3 (the page is full)"]
    assert (tmp_path / "report.html").stat().st_size <= whole - 10


def test_a_picture_that_cannot_be_drawn_does_not_cost_the_page(tmp_path, monkeypatch):
    def fail():
        raise TypeError("no axis")

    monkeypatch.setattr(plots, "pictures", lambda run: {"bad": fail, "good": draw_little})
    assert report_page.write_page(Report(), [small()], tmp_path) == ["layer/bad (TypeError: no axis)"]
    assert "alt='good'" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_report_survives_its_file(tmp_path):
    state = StepState(PARTIAL, "2026-11-22T17:00:00+00:00", 1.5, take_stamp(torch.device("cpu")), "why")
    made = Report(3, {"sweep": state}, ["a", "b"], GREEN, results.Ceilings(1.0, {"fp16": 2.0}), {"t": "x"})
    report_file.save(made, tmp_path)
    assert report_file.load(tmp_path) == made
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert report_file.load(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("text", ["nonsense", "[]", json.dumps({"schema": 99}), json.dumps({"schema": 1})])
def test_what_is_no_report_is_refused(text, tmp_path, capsys):
    (tmp_path / "report.json").write_text(text)
    assert cli.main(["report", "--device", "cpu", "--output", str(tmp_path)]) == 2
    assert "report.json" in capsys.readouterr().err


def test_a_suites_file_that_cannot_be_read_is_named_before_the_steps_run(tmp_path, monkeypatch, capsys):
    run = []
    monkeypatch.setitem(STEPS, "environment", Step(lambda context: run.append("it") or Ending(), 1))
    (tmp_path / "layer.json").write_text("[1]", encoding="utf-8")
    assert make(tmp_path, "--step", "environment")[0] == 2
    assert not run
    assert f"sk-triton report: {tmp_path / 'layer.json'}: schema must be" in capsys.readouterr().err
    assert make(tmp_path, "--step", "environment", "--again")[0] == 2
    assert run
    assert f"sk-triton report: {tmp_path / 'layer.json'}: schema must be" in capsys.readouterr().err
