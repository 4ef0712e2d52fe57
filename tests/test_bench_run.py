"""`sk-triton bench` as a whole: what it writes, its options, and how it ends."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re

import pytest
import torch

from sk_triton import cli
from sk_triton.bench import plots, results, shapes, suites
from sk_triton.bench.commands import arguments
from sk_triton.bench.commands import bench as bench_command
from sk_triton.bench.measuring import protocol, providers, session
from sk_triton.bench.measuring.providers import Provider
from sk_triton.bench.shapes import CLASSIC, PAPER

from .bench_fakes import SHORT, FakeSource, SwappedBranches


@pytest.fixture
def tiny(monkeypatch):
    """Three rounds of small shapes, and no pictures."""
    monkeypatch.setattr(protocol, "QUICK", SHORT)
    monkeypatch.setattr(shapes, "STAGES", {1: (32, 14), 3: (32, 12)})
    monkeypatch.setattr(plots, "save_plots", lambda run, folder: [])
    monkeypatch.setattr(session, "measure_ceilings", lambda device, dtypes: results.Ceilings(1e15, {}))


def bench(tmp_path, *options, suite="layer") -> tuple[int, results.Results]:
    arguments = ["bench", "--quick", "--device", "cpu", "--stage", "3", "--batch", "1", "--suite", suite]
    code = cli.main([*arguments, "--output", str(tmp_path / "out"), *options])
    return code, results.load(tmp_path / "out" / f"{suite}-cpu.json")


def test_the_whole_command_on_the_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(protocol, "QUICK", SHORT)
    pictures = plots.pictures
    monkeypatch.setattr(plots, "pictures", lambda *a: dict(list(pictures(*a).items())[:1]))
    code, run = bench(tmp_path, "--stage", "4")
    out = capsys.readouterr().out

    assert code == 0
    assert {record.status for record in run.records} == {results.OK}
    peers = {"classic", "plain-classic", "timm", "paper"}
    assert {record.source for record in run.records} == {*peers, "ours", "copy"}
    assert {(case.subject, case.shape.name) for case in results.by_case(run.records)} == {
        (CLASSIC, "1024@7²"),
        (PAPER, "1024@7²"),
    }
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"layer-cpu.json", "layer-cpu.csv", "layer-cpu-speed-paper-fp32.png"} == written
    assert all(name in out for name in ("layer-cpu.json", "layer-cpu-speed-paper-fp32.png", "CPU"))
    assert all((tmp_path / "out" / name).stat().st_size > 20_000 for name in written if name.endswith(".png"))


@pytest.mark.usefixtures("tiny")
def test_several_suites_in_one_command(tmp_path):
    code, _ = bench(tmp_path, "--suite", "layer", "train", "layer", "--batch", "2")
    assert code == 0
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {"layer-cpu.json", "train-cpu.json"}


@pytest.mark.usefixtures("tiny")
def test_a_wrong_provider_makes_the_command_fail(tmp_path, monkeypatch):
    chosen = [
        Provider(source, providers.forms.NCHW) for source in (SwappedBranches("paper"), FakeSource("ours"))
    ]
    monkeypatch.setattr(session, "competitors", lambda *a: chosen)
    code, run = bench(tmp_path)
    assert code == 1
    assert any("wrong result" in objection for objection in run.objections)


@pytest.mark.usefixtures("tiny")
def test_ctrl_c_saves_what_was_measured_and_resume_goes_on(tmp_path, monkeypatch, capsys):
    run_case, finished = session.run_case, []

    def interrupted(case, *arguments):
        if len(finished) == 1:
            raise KeyboardInterrupt
        run_case(case, *arguments)
        finished.append(case)

    monkeypatch.setattr(session, "run_case", interrupted)
    code, run = bench(tmp_path)
    assert code == 130
    assert run.interrupted
    assert set(results.by_case(run.records)) == set(finished)
    assert "interrupted" in capsys.readouterr().out

    monkeypatch.setattr(session, "run_case", lambda case, *a: (finished.append(case), run_case(case, *a)))
    code, run = bench(tmp_path, "--resume")
    assert code == 0
    assert len(finished) == len(set(finished)) == len(results.by_case(run.records)) == 2


@pytest.mark.parametrize("suite", ["layer", "sweep"])
def test_an_interrupt_before_anything_was_measured_still_ends_in_order(suite, tmp_path, monkeypatch):
    def interrupted(case, setting, records, report):
        records.append(results.Record(case, "ours", "sk_triton", "nchw", "NCHW", results.OURS))
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "run_case", interrupted)
    options = ["--quick", "--device", "cpu", "--suite", suite, "--output", str(tmp_path)]
    assert cli.main(["bench", *options]) == 130
    assert results.load(tmp_path / f"{suite}-cpu.json").interrupted


@pytest.mark.usefixtures("tiny")
def test_an_interrupt_ends_the_suites_that_follow(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "run_case", interrupted)
    assert bench(tmp_path, "--suite", "layer", "train")[0] == 130
    assert not (tmp_path / "out" / "train-cpu.json").exists()


@pytest.mark.usefixtures("tiny")
def test_without_resume_everything_is_measured_again(tmp_path, monkeypatch):
    bench(tmp_path)
    measured, run_case = [], session.run_case
    monkeypatch.setattr(session, "run_case", lambda case, *a: (measured.append(case), run_case(case, *a)))
    bench(tmp_path)
    assert len(measured) == 2
    bench(tmp_path, "--resume")
    assert len(measured) == 2


@pytest.mark.usefixtures("tiny")
def test_resume_measures_anew_where_others_compete(tmp_path, monkeypatch):
    bench(tmp_path)
    measured, run_case = [], session.run_case
    monkeypatch.setattr(session, "run_case", lambda case, *a: (measured.append(case), run_case(case, *a)))
    code, run = bench(tmp_path, "--resume", "--compare", "HEAD")
    assert code == 0
    assert len(measured) == 2
    assert all(
        any(record.source.startswith("rev-") for record in records)
        and len({record.key for record in records}) == len(records)
        for records in results.by_case(run.records).values()
    )


@pytest.mark.usefixtures("tiny")
def test_another_revision_has_a_verdict_of_its_own(tmp_path, capsys):
    code, run = bench(tmp_path, "--compare", "HEAD")
    assert code == 0
    others = [record for record in run.records if record.source.startswith("rev-")]
    assert {record.role for record in others} == {results.REVISION}
    assert all(
        results.fastest_peer(records) not in others for records in results.by_case(run.records).values()
    )
    label = re.escape(others[0].source_label)
    verdict = rf"(the speed of|no difference beyond the noise from) {label}( \([^)]+\))?, behind in"
    assert re.search(verdict, capsys.readouterr().out.replace("\n", " "))


@pytest.mark.parametrize("package", ["rich", "matplotlib", "sklearn"])
def test_a_missing_package_is_one_line_with_its_remedy(package, tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    assert cli.main(["bench", "--quick", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "pip install" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "tpu"], "'tpu'"),
        (["--device", "meta"], "'meta'"),
        (["--device", "cuda:99"], "'cuda:99'"),
        (["--compare", "nosuch"], "'nosuch'"),
        (["--suite", "sweep", "--stage", "1"], "--stage acts on suites layer, train"),
        (["--suite", "host", "--batch", "1"], "got --suite host"),
        (
            ["--suite", "host"],
            "--quick acts on suites layer, train, model, sweep, scaling, grid, got --suite host",
        ),
        (["--suite", "sweep", "--batch", "1", "8"], "--batch takes one size for suites sweep, got 1 8"),
        (["--suite", "layer", "scaling", "--batch", "1", "8"], "--batch takes one size for suites scaling"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(options, words, tmp_path, capsys):
    assert cli.main(["bench", "--quick", "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert words in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "on_gpu", "words"),
    [
        (["--resume"], True, "--resume acts on suites layer"),
        (["--time-limit", "9"], True, "--time-limit acts on suites layer"),
        (["--every-form"], False, "--every-form acts on suites layer.*, without a GPU"),
        (["--every-form", "--quick"], True, None),
    ],
)
def test_options_that_do_nothing_for_the_host_suite_are_refused(options, on_gpu, words):
    parser = argparse.ArgumentParser()
    bench_command.add_arguments(parser)
    args = parser.parse_args(["--suite", "host", *options])
    with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
        bench_command.refuse_idle_options(args, on_gpu)


@pytest.mark.parametrize("folder", ["/proc", "/proc/some/where"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_measured(folder, capsys):
    assert cli.main(["bench", "--device", "cpu", "--output", folder]) == 2
    assert f"--output must be a folder that can be written to, got {folder}" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("damaged", [False, True])
def test_resume_refuses_what_it_would_overwrite(damaged, tmp_path, capsys):
    bench(tmp_path)
    path = tmp_path / "out" / "layer-cpu.json"
    if damaged:
        path.write_text(path.read_text()[:100])
    before = path.read_bytes()
    command = ["bench", "--quick", "--device", "cpu", "--stage", "3", "--batch", "1", "--seed", "1"]
    capsys.readouterr()
    assert cli.main([*command, "--resume", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert ("not a results file" if damaged else "seed 0, now 1") in error
    assert "leave --resume out to replace it" in error
    assert path.read_bytes() == before


@pytest.mark.usefixtures("tiny")
def test_a_suite_and_a_picture_that_fail_cost_the_other_suites_nothing(tmp_path, monkeypatch, capsys):
    def fail(device, dtypes):
        monkeypatch.setattr(session, "measure_ceilings", lambda *a: results.Ceilings(1e15, {}))
        raise RuntimeError("no room\nfor more")

    monkeypatch.setattr(session, "measure_ceilings", fail)
    drawn = [("one", tmp_path / "one.png"), ("two", TypeError("no axis"))]
    monkeypatch.setattr(plots, "save_plots", lambda run, folder: drawn)
    code, made = bench(tmp_path, "--suite", "layer", "train", "--batch", "2", suite="train")
    out = capsys.readouterr().out
    assert code == 1
    assert {record.status for record in made.records} == {results.OK}
    assert "suite layer failed: RuntimeError: no room\n" in out
    assert "picture two failed: TypeError: no axis" in out
    assert "one.png" in out


@pytest.mark.parametrize(
    "options",
    [["--batch", "0"], ["--dtype", "fp8"], ["--stage", "5"], ["--suite", "all"], ["--time-limit", "0"]],
)
def test_bad_options_are_refused(options, capsys):
    with pytest.raises(SystemExit) as refusal:
        cli.main(["bench", *options])
    assert refusal.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_help_says_what_each_suite_measures(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    out = capsys.readouterr().out
    assert all(f"{suite}:" in out for suite in ("layer", "train", "model", "sweep", "host", "scaling"))


def test_help_needs_no_docstrings(monkeypatch, capsys):
    for suite in suites.SUITES.values():
        monkeypatch.setattr(suite, "__doc__", None)
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "--help"])
    assert done.value.code == 0
    assert "scaling: scaling;" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_has_its_index(monkeypatch, name):
    """`torch.cuda.set_device` refuses a device without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert arguments.choose_device(name) == torch.device("cuda:1")
