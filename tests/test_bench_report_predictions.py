"""The report's predictions: against measured times where there are any, alone without a GPU."""

import dataclasses

import pytest
import torch
from rich.console import Console

from sk_triton.bench import results
from sk_triton.bench.model import validation
from sk_triton.bench.model.validation import Compared
from sk_triton.bench.report import predictions as report_predictions
from sk_triton.bench.report.file import DONE, FAILED, Report
from sk_triton.bench.report.predictions import (
    NothingToCompareError,
    UnknownGpuError,
    against_measured,
)
from sk_triton.bench.report.steps import STEPS, Context
from sk_triton.bench.shapes import CLASSIC, PAPER

from .synthetic_results import small


@pytest.fixture
def layer(tmp_path):
    measured = small("cuda")
    stamp = dataclasses.replace(measured.stamp, device="NVIDIA H100 80GB HBM3")
    results.save(dataclasses.replace(measured, stamp=stamp), tmp_path / "layer.json")
    return tmp_path / "layer.json"


def test_every_schedule_is_shown_with_its_ratio_and_the_rank_correlation(layer, monkeypatch):
    def compare(cases, gpu, dtype):
        assert gpu.name == "H100 SXM"
        if {(case.subject, dtype) for case in cases} != {(PAPER, "fp16")}:
            return []
        return [Compared("stage 1", "store", 2e-6, 3e-6), Compared("stage 1", "recompute", 1e-6, 2e-6)]

    monkeypatch.setattr(validation, "compare", compare)
    text = against_measured(layer, 60)
    rows = [line.split() for line in text.splitlines() if line.startswith("stage 1")]
    assert [row[2:] for row in rows] == [["store", "2.0", "3.0", "1.50"], ["recompute", "1.0", "2.0", "2.00"]]
    assert "rank correlation (Spearman): 1.00 over 2 times" in text


def test_units_that_no_time_is_left_for_are_named(layer, monkeypatch):
    monkeypatch.setattr(validation, "compare", lambda *_: pytest.fail("nothing should be compiled"))
    assert f"{CLASSIC}, fp16: left out, the time was over" in against_measured(layer, -1)


def test_why_there_is_nothing_to_compare_is_said(layer, tmp_path, monkeypatch):
    with pytest.raises(NothingToCompareError, match="suite layer has not been measured"):
        against_measured(tmp_path / "none.json", 60)
    monkeypatch.setattr(validation, "compare", lambda *_: [])
    with pytest.raises(NothingToCompareError, match="no schedule has been measured"):
        against_measured(layer, 60)
    measured = results.load(layer)
    unknown = dataclasses.replace(measured.stamp, device="Tegra X1")
    results.save(dataclasses.replace(measured, stamp=unknown), layer)
    with pytest.raises(UnknownGpuError, match=r"gpu must be one of .*Tegra X1"):
        against_measured(layer, 60)


def test_the_step_takes_what_the_device_allows(layer, tmp_path, monkeypatch):
    monkeypatch.setattr(report_predictions, "predictions", lambda: "125 µs")
    console = Console(quiet=True)
    without = Context(tmp_path, torch.device("cpu"), Report(), console, 60)
    assert STEPS["predictions"].run(without).status == DONE
    assert without.report.evidence == {report_predictions.PREDICTED: "125 µs"}

    monkeypatch.setattr(validation, "compare", lambda *_: [Compared("stage 1", "store", 2e-6, 3e-6)])
    on_gpu = Context(tmp_path, torch.device("cuda"), Report(), console, 60)
    assert STEPS["predictions"].run(on_gpu).status == DONE
    assert "1.50" in on_gpu.report.evidence[report_predictions.COMPARED]

    layer.unlink()
    ending = STEPS["predictions"].run(on_gpu)
    assert (ending.status, ending.message) == (FAILED, "suite layer has not been measured")
