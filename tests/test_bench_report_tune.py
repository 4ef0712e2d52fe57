"""The tuning step of a report."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sk_triton.bench.report import steps as report_steps
from sk_triton.bench.report.file import DONE, FAILED, PARTIAL, Report
from sk_triton.bench.report.steps import Ending
from sk_triton.bench.tuning.flow import LEFT


@pytest.fixture
def commands(monkeypatch):
    """The commands that steps start, with the folder for tuned configs; each prints one line and a lock file stays."""
    started = []

    def start(command, env, **options):
        started.append((command[3:], env["SK_TRITON_CACHE_DIR"], options["timeout"]))
        Path(env["SK_TRITON_CACHE_DIR"], "tuned.json.lock").touch()
        return subprocess.CompletedProcess(command, 0, f"gate: 5% faster\n3 targets {LEFT}\n", "")

    monkeypatch.setattr(report_steps.subprocess, "run", start)
    return started


def course(folder, device, **settings) -> report_steps.Context:
    return report_steps.Context(folder, torch.device(device), Report(), Console(quiet=True), 300, **settings)


def test_the_tune_step_leaves_its_configs_in_the_report_and_the_users_alone(tmp_path, commands):
    made = course(tmp_path, "cuda:0")
    ending = report_steps.tune(made)
    ((command, folder, timeout),) = commands
    wanted = "tune --model sknet50 --direction both --device cuda:0 --budget 240s"
    assert command == wanted.split()
    assert (folder, timeout) == (str(tmp_path), 300)
    assert ending == Ending(PARTIAL, f"sk-triton configs import {tmp_path / 'tuned.json'}")
    assert made.report.evidence["Tuned configs"].startswith("gate: 5% faster")
    assert list(tmp_path.iterdir()) == []
    report_steps.tune(course(tmp_path, "cuda:0", again=True))
    assert commands[1][0][-1] == "--again"


def test_without_a_gpu_the_tune_step_is_a_dry_run_and_says_so(tmp_path, commands):
    ending = report_steps.tune(course(tmp_path, "cpu"))
    assert commands[0][0][:2] == ["tune", "--dry-run"]
    assert ending == Ending(DONE, "no GPU here: candidates of stage 4 ranked by prediction, none measured")


def test_a_tune_step_that_fails_or_takes_too_long_says_so(tmp_path, monkeypatch):
    def fail(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "sk-triton tune: no luck\n")

    def hang(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(report_steps.subprocess, "run", fail)
    assert report_steps.tune(course(tmp_path, "cpu")) == Ending(
        FAILED, "Tuned configs: sk-triton tune: no luck"
    )
    monkeypatch.setattr(report_steps.subprocess, "run", hang)
    assert report_steps.tune(course(tmp_path, "cuda")).status == PARTIAL
