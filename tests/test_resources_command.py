"""What `sk-triton resources` writes; what the kernels use is tested in `test_compile.py`."""

from __future__ import annotations

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from sk_triton import cli, environment, planning
from sk_triton.bench.commands import resources as command
from sk_triton.bench.compiled import processes, resources, shipping
from sk_triton.bench.grid import CASES
from sk_triton.tuning import lookup, shipped

from . import fake_code


def test_shipped_configs_name_the_triton_that_amds_pytorch_brings(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.setattr(shipped, "shipped", lambda chip: {})
    monkeypatch.setattr(environment, "version", {"pytorch-triton-rocm": "3.5.0+rocm"}.get)
    used = dataclasses.replace(fake_code.resources({}), target="gfx942")
    shipping.write_configs([resources.Row(CASES[0], "select", "", used, None, None)])
    assert json.loads((tmp_path / "gfx942.json").read_text())["triton"] == "3.5.0+rocm"


def test_what_is_written_is_analytic_whatever_is_shipped_today(monkeypatch):
    """Else a file would be written anew from itself once the analytic rules have changed."""
    case = next(case for case in CASES if case.name == "stage 4" and case.precision == "fp16")

    def measure(case, target):
        return [planning.make_plan("store", resources.workload_of(case, target)).branch_launches[0].config]

    with lookup.analytic_only():
        (analytic,) = measure(case, "sm_90")
    other = dataclasses.replace(analytic, num_warps=2 * analytic.num_warps)
    monkeypatch.setattr(lookup, "shipped", lambda chip: SimpleNamespace(get=lambda key: other))
    assert measure(case, "sm_90") == [other]
    monkeypatch.setattr(shipping, "measure", measure)
    assert shipping.measure_analytic(case, "sm_90") == [analytic]


def test_configs_are_written_from_analytic_plans_of_inference_alone(monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(
        command, "measure_all", lambda jobs, workers: measured.extend(j.func for j in jobs) or []
    )
    monkeypatch.setattr(command, "write_configs", lambda rows: None)
    assert cli.main(["resources", "--unit", "stage 4", "--write-configs"]) == 0
    assert set(measured) == {shipping.measure_analytic}
    assert cli.main(["resources", "--unit", "stage 4", "--training", "--write-configs"]) == 2
    assert "--write-configs does not act on --training" in capsys.readouterr().err


def test_a_batch_that_is_no_power_of_two_is_not_shipped(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.setattr(shipped, "shipped", lambda chip: {})
    case = dataclasses.replace(CASES[0], n=100)
    (launch,) = planning.make_plan("store", resources.workload_of(case, "sm_90")).branch_launches
    used = dataclasses.replace(fake_code.resources({"HMMA.16816.F32": 1}), target="sm_90")
    with pytest.raises(ValueError, match="a batch that is shipped for must be a power of two, got 100"):
        shipping.write_configs([resources.Row(case, "branch_conv_window", "", used, None, launch)])


class OneThread(ThreadPoolExecutor):
    """A pool whose one process is a thread here, and notes that it was ended."""

    def __init__(self, ended: list[str]) -> None:
        super().__init__(1)
        self._processes = {1: SimpleNamespace(terminate=lambda: ended.append("process"))}


def interrupted() -> list[resources.Row]:
    raise KeyboardInterrupt


def test_ctrl_c_waits_for_no_job_and_begins_no_other(monkeypatch):
    ended, begun, may_end = [], [], threading.Event()
    pool = OneThread(ended)
    monkeypatch.setattr(processes, "compiling_processes", lambda workers: pool)
    with pytest.raises(KeyboardInterrupt):
        list(
            resources.measure_all([interrupted, lambda: may_end.wait(1), lambda: begun.append("another")], 1)
        )
    may_end.set()
    pool.shutdown(wait=True)
    assert ended == ["process"]
    assert not begun
