"""What `sk-triton explain` prints."""

from __future__ import annotations

import contextlib
import json

import pytest

from sk_triton import cli
from sk_triton.bench import progress, results
from sk_triton.bench.model import speed_of_light as sol
from sk_triton.bench.model import validation
from sk_triton.bench.model.gpus import find_gpu
from sk_triton.bench.report.predictions import predictions
from sk_triton.bench.shapes import CLASSIC, PAPER
from sk_triton.chips import Chip

from .synthetic_results import some_results
from .versions import needs_narrow_products

H100 = find_gpu("h100")


@pytest.fixture
def command(monkeypatch, tmp_path, capsys, fake_code):
    """Runs `sk-triton explain` on fake code and without committed results; (exit code, output, errors)."""
    monkeypatch.setattr(validation, "RESULTS", tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(["explain", *arguments])
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run


def test_explain_names_times_bounds_configs_and_the_choice(command):
    code, out, _ = command("--shape", "128,128,56,56", "--gpu", "h100")
    assert code == 0
    assert all(name in out for name in (*sol.BOUNDS, "store", "select", "eager", "torch.compile", "floor"))
    assert "StreamConfig(" in out
    assert "choice: recompute: predicted" in out
    assert "not measured: no results of H100 SXM in fp16 are committed" in out
    _, wide, _ = command("--shape", "8,256,14,14", "--gpu", "h100", "--groups", "1")
    assert "choice: library: predicted" in wide
    assert "the library's 3x3 d2" in wide


def test_explain_in_json(command):
    code, out, _ = command("--stage", "2", "--batch", "4", "--gpu", "a100", "--unit", CLASSIC, "--json")
    data = json.loads(out)
    assert code == 0
    assert (data["gpu"], data["shape"]) == ("A100 80GB", [4, 256, 28, 28])
    assert data["branches"] == ["3x3 g32", "5x5 g32"]
    assert data["measured"] == []
    store = data["schedules"][0]
    assert store["total_us"] == pytest.approx(sum(step["total_us"] for step in store["steps"]))
    assert set(store["bounds_us"]) == set(sol.BOUNDS)


def test_explain_shows_measurements_where_there_are_some(command, tmp_path):
    (tmp_path / "h100").mkdir()
    measured = some_results(every=True, batches=(8, 128), stages=(1,))
    results.save(measured, tmp_path / "h100" / "layer.json")
    _, out, _ = command("--stage", "1", "--gpu", "h100")
    assert "measured / predicted" in out
    assert "rank correlation (Spearman): " in out
    assert "not measured" not in out


def test_an_installation_without_results_says_where_they_are(command, monkeypatch, tmp_path):
    monkeypatch.setattr(validation, "RESULTS", tmp_path / "results")
    _, out, _ = command("--stage", "4", "--gpu", "h100")
    assert (
        "not measured: this installation holds no measured results, which are in the repository's bench/results"
        in out
    )


@pytest.fixture
def measured(tmp_path):
    """Stage 1 was measured with 8 and with 128 samples."""
    (tmp_path / "h100").mkdir()
    run = some_results(every=True, batches=(8, 128), stages=(1,))
    results.save(run, tmp_path / "h100" / "layer.json")
    return validation.seconds_of(run, PAPER, "fp16")


@pytest.fixture
def predicted(monkeypatch):
    """The batches that were predicted, by schedule."""
    found = []
    predict = sol.predict

    def noted(problem, gpu, schedules):
        found.extend((problem.n, name) for name in schedules)
        return predict(problem, gpu, schedules)

    monkeypatch.setattr(sol, "predict", noted)
    return found


def test_only_what_was_asked_for_is_predicted_and_compared(command, measured, predicted):
    _, out, _ = command("--stage", "1", "--batch", "8", "--gpu", "h100", "--json")
    case = next(case for case in measured if case.batch == 8)
    data = json.loads(out)
    assert {each["case"] for each in data["measured"]} == {case.title}
    assert {each["schedule"] for each in data["measured"]} <= set(measured[case])
    by_name = {each["schedule"]: each["total_us"] for each in data["schedules"]}
    for each in data["measured"]:
        assert each["predicted_us"] == by_name[each["schedule"]]
        assert each["measured_us"] == pytest.approx(measured[case][each["schedule"]] * 1e6)
    assert len(predicted) == len(set(predicted))
    assert {n for n, _ in predicted} == {8}


def test_an_input_that_was_not_measured_is_compared_with_nothing(command, measured, predicted):
    _, out, _ = command("--stage", "1", "--batch", "9", "--gpu", "h100")
    assert (
        "not measured: this input is not among the 2 cases of H100 SXM in fp16; --validate compares those"
        in out
    )
    assert {n for n, _ in predicted} == {9}


def test_all_that_was_measured_is_compared_on_demand(command, measured):
    _, out, _ = command("--stage", "1", "--batch", "9", "--gpu", "h100", "--validate", "--json")
    found = json.loads(out)["measured"]
    assert {each["case"] for each in found} == {case.title for case in measured}
    every = validation.compare(measured, H100, "fp16")
    assert [(each["case"], each["schedule"]) for each in found] == [(c.case, c.schedule) for c in every]


def test_plans_are_made_for_the_product_and_not_for_a_typical_one(command, monkeypatch):
    asked, on = set(), sol.Problem.on
    monkeypatch.setattr(sol.Problem, "on", lambda problem, chip: asked.add(chip) or on(problem, chip))
    for options in ((), ("--json",)):
        assert command("--stage", "4", "--batch", "8", "--gpu", "h100 pcie", *options)[0] == 0
    assert asked == {Chip("sm_90", 114, 50)}


def test_progress_names_each_schedule_and_each_case(command, measured, monkeypatch):
    told = []

    @contextlib.contextmanager
    def noted(console, cases):
        assert console.stderr
        yield lambda done, title, share: told.append((done, cases, title))

    monkeypatch.setattr(progress, "case_progress", noted)
    assert command("--stage", "1", "--gpu", "h100", "--validate")[0] == 0
    assert [done for done, *_ in told] == list(range(len(told)))
    assert {cases for _, cases, _ in told} == {len(told)}
    titles = [title for *_, title in told]
    assert titles[0] == "store"
    assert titles[-2:] == [case.title for case in measured]


def test_names_are_whole_on_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = command("--stage", "2", "--gpu", "h100")
    starts = [line.split()[0] for line in out.splitlines() if line.strip()]
    for name in ("store", "gated", "recompute", "library", "torch.compile", "gated_select", "pooled_sums"):
        assert name in starts
    assert "the library's 3x3 d2 g32" in out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_what_is_not_taken_comes_with_the_dispatchers_words(command):
    _, out, _ = command("--shape", "128,256,28,28", "--gpu", "h100")
    refusal = "branch_act is relu; only linear branches merge into one convolution"
    assert f"\nmerged: {refusal}\n" in out
    assert "\n  not store: 6 passes over memory, against 3\n" in out
    assert out.count("\nrecompute, pool: ") == out.count("\nrecompute, select: ") == 1
    assert out.count("\nstore: ") == 1
    _, out, _ = command("--shape", "128,256,28,28", "--gpu", "h100", "--json")
    data = json.loads(out)
    assert data["refused"]["merged"] == refusal
    assert data["choice"]["rejected"]["store"] == "6 passes over memory, against 3"
    assert "merged" not in data["choice"]["rejected"]
    tasks = {s["schedule"]: [each["task"] for each in s["configs"]] for s in data["schedules"]}
    assert tasks["recompute"] == ["pool", "select"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "1", "--gpu", "h10"], "gpu must be one of"),
        (["--shape", "1,2,3", "--gpu", "h100"], "must be N,C,H,W"),
        (["--shape", "0,128,7,7", "--gpu", "h100"], "must be N,C,H,W, each from 1 to 65536"),
        (["--shape", "1,130,7,7", "--gpu", "h100"], "groups must divide"),
        (
            ["--stage", "1", "--gpu", "h100", "--kernels", "3"],
            "--kernels and --dilations must name as many branches, got 3 and 1 2",
        ),
        (
            ["--stage", "1", "--gpu", "h100", "--batch", "0"],
            "--batch: must be a whole number from 1 to 65536, got '0'",
        ),
        (
            ["--shape", "8,128,7,7", "--gpu", "h100", "--batch", "3"],
            "--batch does not act on --shape, whose first size is the batch, 8",
        ),
        (
            ["--stage", "1", "--gpu", "mi300x", "--dtype", "tf32"],
            "dtype must be fp16, bf16 or fp32 on MI300X, got tf32: on AMD fp32 is never rounded to it",
        ),
        (["--gpu", "h100"], "--shape"),
        (["--stage", "1"], "--gpu"),
    ],
)
def test_explain_refuses_what_it_does_not_know(arguments, message, command):
    code, _, error = command(*arguments)
    assert code == 2
    assert message in error
    assert "Traceback" not in error


@needs_narrow_products
@pytest.mark.usefixtures("fake_code")
def test_the_readme_table_has_a_row_per_stage():
    header, rule, *rows = predictions().splitlines()
    assert len(rows) == 4
    assert {line.count("|") for line in (header, rule, *rows)} == {header.count("|")}
    assert [row.split("|")[2].strip() for row in rows] == ["recompute", "recompute", "recompute", "store"]
    # 456 instructions of 32 threads and 1024 programs over two branches of 1024 x 7 x 7 outputs of 128 samples.
    assert float(rows[3].split("|")[4]) == pytest.approx(456 * 32 * 1024 / (2 * 128 * 1024 * 7**2), abs=0.05)
