"""The steps of a report. A step is one function here and one entry in `STEPS`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sk_triton import doctor, environment
from sk_triton.backend import SCHEDULES
from sk_triton.tuning import user_file

from .. import results, suites
from ..measuring.ceilings import measure_ceilings
from ..problems import complaints
from ..shapes import SKNET50
from ..tuning.flow import LEFT
from ..verdict import comparisons, speed_summary
from . import pytest_run, runs
from .file import DONE, FAILED, PARTIAL, Report

if TYPE_CHECKING:
    from rich.console import Console

DTYPES = {"cuda": ("fp16", "bf16", "fp32"), "cpu": ("fp32",)}
NO_GPU = "no GPU here: "
TUNE_MARGIN_SECONDS = 60
"""Of the time limit, to start and to finish the target in hand."""
INTERPRETED_TESTS = tuple(f"tests/test_{name}.py" for name in (*SCHEDULES, "kernels_gate"))
"""Every schedule through Triton's interpreter, which takes a minute or two; the kernels one by one take many."""


@dataclass
class Context:
    """A report while it is made."""

    folder: Path
    device: torch.device
    report: Report
    console: Console
    time_limit: float
    again: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def path(self, suite: str) -> Path:
        return runs.file_of(self.folder, suite)


@dataclass(frozen=True)
class Ending:
    """How a step ended, and what a reader should know about it."""

    status: str = DONE
    message: str | None = None


@dataclass(frozen=True)
class Step:
    """One step: `minutes` it takes on a GPU, about, and whether it runs on one, without one, or both."""

    run: Callable[[Context], Ending]
    minutes: float
    with_gpu: bool = True
    without_gpu: bool = True


def describe_environment(context: Context) -> Ending:
    """`sk-triton doctor`."""
    packages = [doctor.inspect_package(package) for package in environment.OPTIONAL_PACKAGES]
    backends = doctor.inspect_backends()
    context.report.environment = doctor.report(packages, backends)
    context.console.print("\n".join(context.report.environment), markup=False, highlight=False)
    broken = [f"{state.layer} on {state.device}: {state.reason}" for state in backends if not state.works]
    return Ending(FAILED, "; ".join(broken)) if broken else Ending()


def run_tests(context: Context) -> Ending:
    """The GPU tests of the checkout, or without a GPU those that interpret each schedule."""
    if not (environment.CLONE_DIR / "tests").is_dir() or not environment.in_clone():
        context.report.tests = None
        return Ending(DONE, "not run: sk_triton is not installed from a checkout with tests")
    chosen = ["-m", "gpu"] if context.on_gpu else ["-m", "interpret", *INTERPRETED_TESTS]
    with tempfile.TemporaryDirectory() as scratch:
        xml = Path(scratch) / "tests.xml"
        arguments = ["pytest", "-n", "0", *chosen, "-q", "-p", "no:cacheprovider"]
        complete = pytest_run.run_pytest([*arguments, f"--junitxml={xml}"], context.time_limit)
        tests = pytest_run.read_junit(xml, " ".join(arguments[:-2]), complete)
    if tests is None:
        context.report.tests = None
        return Ending(FAILED, "not run: pytest did not start (pip install -e '.[test]')")
    context.report.tests = tests
    runs.judge_anew(context.folder, tests)
    counts = f"{tests.passed} passed, {tests.failed} failed, {tests.skipped} skipped"
    what = counts if context.on_gpu else f"{NO_GPU}interpreted schedules only; {counts}"
    if not tests.complete:
        what += f"; stopped after {context.time_limit:.0f} s"
    return Ending(DONE if tests.green else FAILED if tests.failed else PARTIAL, what)


def find_ceilings(context: Context) -> Ending:
    """Copy bandwidth and matrix rates."""
    with context.console.status("copy bandwidth and matrix rate"):
        found = measure_ceilings(context.device, DTYPES[context.device.type])
    context.report.ceilings = found
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in found.matrix_flop_per_s.items())
    return Ending(DONE, f"copy {found.copy_bytes_per_s / 1e9:.4g} GB/s, products {rates}")


def measure(context: Context, *, suite: str, dtype: str | None = None) -> Ending:
    """A suite, or its cases of one dtype, into the suite's file; without a GPU in small sizes."""
    from .. import table
    from ..measuring import protocol, session

    choice = suites.Choice(
        on_gpu=context.on_gpu, quick=not context.on_gpu, dtypes=None if dtype is None else (dtype,)
    )
    request = session.SuiteRequest(
        suite,
        context.device,
        choice,
        seed=context.report.seed,
        time_limit=context.time_limit,
        ceilings=context.report.ceilings,
        tests=context.report.tests,
    )
    path = context.path(suite)
    own = set() if suite == suites.HOST else set(suites.SUITES[suite](choice))
    earlier = runs.earlier(context.folder, request, own, context.again)
    measured, left = session.measure_suite(
        request, context.console, earlier, lambda run: results.save(run, path)
    )
    results.save(measured, path)
    table.show(measured, context.console)
    if measured.interrupted:
        raise KeyboardInterrupt
    if trouble := protocol.device_trouble(context.device):
        return Ending(FAILED, trouble)
    messages = [f"{left} cases left for the next run"] if left else []
    messages += [] if context.on_gpu else [f"{NO_GPU}small sizes, PyTorch's own operators"]
    messages += measured.objections[:1]
    # What failed in the cases of other steps is theirs to tell.
    mine = replace(measured, records=tuple(r for r in measured.records if not own or r.case in own))
    messages += _failures(mine)
    status = FAILED if mine.exit_code else PARTIAL if left else DONE
    return Ending(status, "; ".join(messages) or None)


def _failures(run: results.Results) -> list[str]:
    """What failed, in few words; all of it is on the page."""
    failed = [found.words for found in complaints(run.records) if found.status == results.FAILED]
    more = f" and {len(failed) - 1} more" if failed[1:] else ""
    return [f"failed: {failed[0]}{more}; --again measures it anew"] if failed else []


def tune(context: Context) -> Ending:
    """`sk-triton tune` into the report's own folder: what the suites measure stays what a user gets untuned."""
    title = "Tuned configs"
    if context.on_gpu:
        seconds = max(context.time_limit - TUNE_MARGIN_SECONDS, 1)
        arguments = ["tune", "--model", SKNET50, "--direction", "both", "--device", str(context.device)]
        arguments += ["--budget", f"{seconds:g}s"]
        arguments += ["--again"] if context.again else []
    else:
        arguments = ["tune", "--dry-run", "--gpu", "h100", "--stage", "4", "--candidates", "2"]
    try:
        with context.console.status(title):
            trouble = _gather(
                context,
                title,
                arguments,
                context.time_limit,
                {user_file.FOLDER_VARIABLE: str(context.folder)},
            )
    except subprocess.TimeoutExpired:
        return Ending(PARTIAL, "the time limit came first; what was tuned is kept for the next run")
    finally:
        (context.folder / f"{user_file.FILE_NAME}.lock").unlink(missing_ok=True)
    if trouble:
        return Ending(FAILED, trouble)
    if not context.on_gpu:
        return Ending(DONE, f"{NO_GPU}candidates of stage 4 ranked by prediction, none measured")
    is_partial = LEFT in context.report.evidence[title]
    return Ending(
        PARTIAL if is_partial else DONE, f"sk-triton configs import {context.folder / user_file.FILE_NAME}"
    )


def _gather(
    context: Context,
    title: str,
    arguments: list[str],
    seconds: float,
    variables: dict[str, str] | None = None,
) -> str:
    """Puts what a subcommand prints among the report's evidence; returns why it failed, or ""."""
    done = subprocess.run(
        [sys.executable, "-m", "sk_triton", *arguments],
        env={**os.environ, "COLUMNS": "140", **(variables or {})},
        capture_output=True,
        text=True,
        timeout=max(seconds, 1),
    )
    context.report.evidence[title] = done.stdout
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return f"{title}: {lines[-1] if lines else f'exit code {done.returncode}'}"
    return ""


def gather_evidence(context: Context) -> Ending:
    """Without a GPU: what compiled and interpreted kernels tell, of two stages."""
    commands = {
        "Resources of compiled kernels": ["resources", "--chip", "sm_90", "--unit", "stage 1", "stage 4"],
        "Traffic of interpreted kernels, stage 3": ["traffic", "--stage", "3"],
        "Traffic of interpreted kernels, stage 4": ["traffic", "--stage", "4"],
    }
    deadline = time.monotonic() + context.time_limit
    for title, arguments in commands.items():
        with context.console.status(title):
            trouble = _gather(context, title, arguments, deadline - time.monotonic())
        if trouble:
            return Ending(FAILED, trouble)
    return Ending(DONE, f"{NO_GPU}predictions, no measurements")


def compare_predictions(context: Context) -> Ending:
    """What the model predicts, on a GPU that it knows against what suite "layer" measured."""
    from . import predictions as report_predictions

    with context.console.status("compiling kernels for the predictions"):
        if not context.on_gpu:
            context.report.evidence[report_predictions.PREDICTED] = report_predictions.predictions()
            return Ending(DONE, f"{NO_GPU}predictions alone")
        try:
            found = report_predictions.against_measured(context.path(suites.LAYER), context.time_limit / 2)
        except report_predictions.NothingToCompareError as error:
            return Ending(FAILED, str(error))
        except report_predictions.UnknownGpuError as error:
            return Ending(DONE, f"not compared: {error}")
    context.report.evidence[report_predictions.COMPARED] = found
    return Ending()


def summarise(context: Context) -> Ending:
    """Verdicts in the terminal, pictures and tables in report.html."""
    from .page import write_page

    found = runs.load_runs(context.folder)
    for run in found:
        summary = speed_summary(comparisons(run))
        words = summary if run.sound else f"no speed is claimed: {run.objections[0]}"
        context.console.print(f"{run.suite}: {words or 'nothing to compare'}", markup=False, soft_wrap=True)
    left_out = write_page(context.report, found, context.folder)
    if left_out:
        return Ending(DONE, f"left out of the page: {', '.join(left_out)}")
    return Ending()


STEPS: dict[str, Step] = {
    "environment": Step(describe_environment, 0.5),
    "tests": Step(run_tests, 4),
    "ceilings": Step(find_ceilings, 0.2),
    "layer-fp16": Step(partial(measure, suite=suites.LAYER, dtype="fp16"), 8, without_gpu=False),
    "layer-bf16": Step(partial(measure, suite=suites.LAYER, dtype="bf16"), 8, without_gpu=False),
    "layer-fp32": Step(partial(measure, suite=suites.LAYER, dtype="fp32"), 8),
    "train": Step(partial(measure, suite=suites.TRAIN), 8),
    "model": Step(partial(measure, suite=suites.MODEL), 8),
    "sweep": Step(partial(measure, suite=suites.SWEEP), 5),
    "grid": Step(partial(measure, suite=suites.GRID), 8),
    "host": Step(partial(measure, suite=suites.HOST), 2),
    "scaling": Step(partial(measure, suite=suites.SCALING), 5),
    "tune": Step(tune, 5),
    "evidence": Step(gather_evidence, 2, with_gpu=False),
    "predictions": Step(compare_predictions, 3),
    "summary": Step(summarise, 1),
}
"""The steps in their order, by name."""
