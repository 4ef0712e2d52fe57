"""`sk-triton tune`: what it refuses, what a dry run tells, and a whole run on a GPU that is made up."""

from __future__ import annotations

import re
from concurrent.futures import Executor, Future
from functools import partial

import pytest
import torch

from sk_triton import cli
from sk_triton.bench.commands import tune
from sk_triton.bench.model.gpus import find_gpu
from sk_triton.bench.tuning import machine, ranking, session
from sk_triton.bench.tuning.assessing import Assessor
from sk_triton.bench.tuning.flow import LEFT
from sk_triton.chips import CHIPS, Chip
from sk_triton.tuning import keys, user_file
from sk_triton.tuning.entries import Trial

from .fake_machine import FakeMachine
from .tuned import H100
from .versions import needs_narrow_products, needs_unhoisted_loops

SMALL = ("--shape", "4,64,7,7", "--candidates", "2", "--workers", "1")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")


def run(*options, capsys) -> tuple[int, str, str]:
    try:
        code = cli.main(["tune", *options])
    except SystemExit as done:
        code = done.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--stage", "1", "--gpu", "h100"), "--gpu is for --dry-run"),
        (
            ("--stage", "1", "--dry-run", "--gpu", "h100", "--device", "cuda:0"),
            "--device does not act on --gpu h100",
        ),
        (("--stage", "1", "--dry-run", "--gpu", "h100", "--again"), "--again does not act on --dry-run"),
        (
            ("--stage", "1", "--dry-run", "--gpu", "mi300x", "--dtype", "tf32"),
            "dtype must be fp16, bf16 or fp32 on MI300X, got tf32",
        ),
        (("--stage", "1", "--dry-run", "--gpu", "voodoo"), "gpu must be one of H100 SXM"),
        (("--stage", "1", "--direction", "sideways"), "invalid choice: 'sideways'"),
        (
            ("--stage", "1", "--budget", "soon"),
            "must be a time such as 60s or 5m, a week at most, got 'soon'",
        ),
        (("--stage", "1", "--budget", "604801s"), "a week at most, got '604801s'"),
        (("--stage", "1", "--budget", "10081m"), "a week at most, got '10081m'"),
        (("--stage", "1", "--budget", "9" * 400), "a week at most, got '999"),
        (("--stage", "1", "--budget", "0s"), "must be a time such as 60s or 5m"),
        (
            ("--stage", "1", "--candidates", "0"),
            "--candidates: must be a whole number from 1 to 65536, got '0'",
        ),
        (("--stage", "1", "--workers", "0"), "--workers: must be a whole number from 1 to 65536, got '0'"),
        (("--model", "sknet50", "--batch", "0"), "--batch: must be a whole number from 1 to 65536, got '0'"),
        (
            ("--shape", "4,64,7,7", "--batch", "3", "--dry-run", "--gpu", "h100"),
            "--batch does not act on --shape, whose first size is the batch, 4",
        ),
        (("--model", "resnet50"), "invalid choice: 'resnet50'"),
        (("--model", "sknet50", "--stage", "1"), "not allowed with argument"),
        (("--model", "sknet50", "--groups", "8"), "--groups does not act on --model sknet50"),
        ((), "one of the arguments --model --shape --stage is required"),
    ],
)
def test_bad_usage_is_refused_with_the_reason(options, reason, capsys):
    code, _, err = run(*options, capsys=capsys)
    assert code == 2
    assert reason in err


def test_a_batch_of_one_is_not_tuned_for_training(capsys):
    code, out, _ = run(
        *("--shape", "1,64,7,7", "--direction", "backward", "--dry-run", "--gpu", "h100"), capsys=capsys
    )
    assert code == 2
    assert "not tuned for training: training takes a batch of two samples" in out


@no_gpu
@pytest.mark.parametrize("options", [("--model", "sknet50"), ("--model", "sknet50", "--dry-run")])
def test_without_a_gpu_it_says_what_to_do(options, capsys):
    code, _, err = run(*options, capsys=capsys)
    assert code == 2
    assert "there is no GPU here to tune on; --dry-run --gpu h100 ranks candidates for one" in err


@pytest.mark.parametrize(
    ("text", "seconds"), [("60s", 60), ("5m", 300), ("90", 90), ("0.5m", 30), ("10080m", 604800)]
)
def test_budgets(text, seconds):
    assert tune._seconds(text) == seconds


def test_a_folder_that_there_is_not_is_refused_before_anything_is_measured(gpu, monkeypatch, capsys):
    monkeypatch.setenv(user_file.FOLDER_VARIABLE, "~nosuchuser/x")
    code, _, err = run(*SMALL, capsys=capsys)
    assert code == 2
    assert "SK_TRITON_CACHE_DIR must name a folder, got '~nosuchuser/x'" in err
    assert gpu == []


def test_predictions_take_the_figures_of_the_product_or_of_a_relative(monkeypatch):
    monkeypatch.setattr(session, "chip_of", lambda device: H100)
    assert session.present(torch.device("cuda")) == (H100, find_gpu("H100 SXM"))
    unknown = Chip("sm_90", 100, 50, "NVIDIA H100 NVL")
    monkeypatch.setattr(session, "chip_of", lambda device: unknown)
    chip, gpu = session.present(torch.device("cuda"))
    assert (chip, gpu.chip, gpu.processors) == (unknown, "sm_90", 100)
    assert session.product("h100 pcie")[0] == Chip("sm_90", 114, 50)
    assert CHIPS["sm_90"].processors == 132


@pytest.mark.compile
@needs_unhoisted_loops
def test_a_dry_run_ranks_every_launch_by_prediction_and_keeps_nothing(folder, capsys):
    code, out, _ = run("--dry-run", "--gpu", "a100", *SMALL, "--budget", "900s", capsys=capsys)
    assert code == 0
    for kind in (
        "branch_store (gated)",
        "gated_select (gated)",
        "gate (store)",
        "select (store)",
        "branch_pool (recompute)",
        "branch_select (recompute)",
        "pooled_sums (library)",
        "schedule",
    ):
        assert kind in out
    assert out.count("(analytic)") == 8
    assert re.search(r"8 launches and schedules with \d+ choices, 19 of them candidates: [1-9]", out)
    assert " 0 out, 0 left by the budget" in out
    assert "for A100 80GB in" in out
    assert "Predicted, not measured" in out
    assert not folder.exists()


class Instant(Executor):
    """Compiles nothing: whatever is asked for takes 10 µs, and every further candidate one more."""

    def __init__(self, workers):
        pass

    def submit(self, function, target, choice, settled, gpu):
        future = Future()
        future.set_result(Trial(choice, 1e-5 + 1e-6 * target.choices.index(choice), None))
        return future


@needs_unhoisted_loops
def test_a_dry_run_ranks_within_its_budget(monkeypatch, capsys):
    """Of how many candidates there are and what becomes of them, `test_tune_ranking.py` tells more."""
    asked = {}

    def left_out(targets, gpu, seconds, workers, report):
        asked.update(targets=len(targets), seconds=seconds, workers=workers)
        return {t.key: [Trial(choice, None, None, ranking.LEFT_OUT) for choice in t.choices] for t in targets}

    monkeypatch.setattr(tune, "rank", left_out)
    code, out, _ = run("--dry-run", "--gpu", "h100", *SMALL, "--budget", "0.2s", capsys=capsys)
    assert code == 0
    assert asked == {"targets": 8, "seconds": 0.2, "workers": 1}
    assert "19 of them candidates: 0 cannot win and were not compiled, 0 ranked, 0 out, 19 left" in out
    run("--dry-run", "--gpu", "h100", *SMALL, capsys=capsys)
    assert asked["seconds"] == tune.DRY_BUDGET_SECONDS < 120


@pytest.fixture
def gpu(monkeypatch, folder):
    """A GPU that runs whatever it is given in 100 µs, and the second candidate of each in 50."""
    made = []

    class FakeDevice(FakeMachine):
        def __init__(self, device):
            super().__init__()
            made.append(self)

        def begin(self, target, settled):
            super().begin(target, settled)
            self.given = {target.choices[-1]: 50e-6}

    monkeypatch.setattr(tune, "_gpu_device", lambda args: torch.device("cuda"))
    monkeypatch.setattr(session, "chip_of", lambda device: H100)
    monkeypatch.setattr(machine, "Device", FakeDevice)
    return made


def test_a_run_whose_configs_cannot_be_kept_says_so(gpu, folder, monkeypatch, capsys):
    folder.write_text("a file where the folder should be")
    monkeypatch.setattr(session, "Assessor", partial(Assessor, make_pool=Instant))
    with pytest.warns(RuntimeWarning, match="tuned configs are not kept"):
        code, out, _ = run(*SMALL, capsys=capsys)
    assert code == 1
    assert "100.0%" in out
    assert session.UNKEPT in out


@needs_narrow_products
@pytest.mark.parametrize(
    ("direction", "kinds"),
    [
        ("backward", {"select", "branch_train", "reduction", "branch_grad"}),
        ("both", set(keys.KINDS) - {"border_sums", "merged_conv"}),
    ],
)
def test_a_direction_is_tuned_and_kept_under_its_own_kinds(direction, kinds, gpu, monkeypatch, capsys):
    monkeypatch.setattr(session, "Assessor", partial(Assessor, make_pool=Instant))
    code, out, _ = run(*SMALL, "--direction", direction, capsys=capsys)
    assert code == 0
    ((_, entries),) = user_file.read().items()
    assert {keys.kind_of_key(key).name for key in entries} == kinds
    assert all(entry.choice is not None for entry in entries.values())
    assert "branch_grad (train)" in out


def test_a_run_keeps_what_is_faster_and_the_next_one_measures_nothing_again(gpu, folder, monkeypatch, capsys):
    """Candidates are compiled in `test_a_dry_run_ranks_every_launch_by_prediction_and_keeps_nothing`."""
    monkeypatch.setattr(session, "Assessor", partial(Assessor, make_pool=Instant))
    code, out, _ = run(*SMALL, "--budget", "2s", capsys=capsys)
    assert code == 0
    assert re.search(rf"^\d+ targets {LEFT}$", out, re.MULTILINE)
    assert len(gpu[0].begun) == 1
    code, out, _ = run(*SMALL, capsys=capsys)
    assert code == 0
    assert "100.0%" in out
    assert "(measured before)" in out
    assert "rank correlation (Spearman)" in out
    assert f"kept in {folder / 'tuned.json'}" in out
    ((origin, entries),) = user_file.read().items()
    assert (origin.gpu, origin.processors, origin.chip) == (H100.gpu, 132, "sm_90")
    assert {keys.kind_of_key(key).name for key in entries} == {
        "branch_store", "branch_pool", "branch_select", "gate", "select", "gated_select", "pooled_sums",
        "schedule",
    }  # fmt: skip
    tuned = [key for key, found in entries.items() if found.choice is not None]
    assert len(tuned) >= 4
    assert all(trial.predicted for found in entries.values() for trial in found.trials if not trial.dropped)
    code, out, _ = run(*SMALL, capsys=capsys)
    assert code == 0
    assert gpu[2].begun == []
