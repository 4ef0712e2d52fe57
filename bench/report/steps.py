"""The steps of a report. A step is one function here and one entry in `STEPS`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import torch

from sk_triton import doctor, environment
from sk_triton.tuning import cache

from .. import export, results, suites
from ..measuring.ceilings import measure_ceilings
from ..measuring.guards import judged
from ..shapes import SKNET50
from ..tuning.flow import LEFT
from .file import DONE, FAILED, PARTIAL, Report

if TYPE_CHECKING:
    from rich.console import Console

DTYPES = {"cuda": ("fp16", "bf16", "fp32"), "cpu": ("fp32",)}
NO_GPU = "no GPU here: "
TUNE_MARGIN_SECONDS = 60
"""Of the time limit, to start and to finish the target in hand."""
INTERPRETED_TESTS = tuple(
    f"tests/test_{name}.py" for name in ("store", "recompute", "merged", "kernels_gate")
)
"""Every schedule through Triton's interpreter, which takes two minutes; the kernels one by one take many."""


@dataclass
class Course:
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
        return self.folder / f"{suite}.json"


@dataclass(frozen=True)
class Ending:
    """How a step ended, and what a reader should know about it."""

    status: str = DONE
    message: str | None = None


@dataclass(frozen=True)
class Step:
    """One step: `minutes` it takes on a GPU, about, and whether it runs on one, without one, or both."""

    run: Callable[[Course], Ending]
    minutes: float
    with_gpu: bool = True
    without_gpu: bool = True


def describe_environment(course: Course) -> Ending:
    """`sk-triton doctor`."""
    packages = [doctor.inspect_package(package) for package in environment.OPTIONAL_PACKAGES]
    backends = doctor.inspect_backends()
    course.report.environment = doctor.report(packages, backends)
    course.console.print("\n".join(course.report.environment), markup=False, highlight=False)
    broken = [f"{state.layer} on {state.device}: {state.reason}" for state in backends if not state.works]
    return Ending(FAILED, "; ".join(broken)) if broken else Ending()


def run_tests(course: Course) -> Ending:
    """The GPU tests of the checkout, or without a GPU those that interpret each schedule."""
    if not (environment.CLONE_DIR / "tests").is_dir() or not environment.in_clone():
        course.report.tests = None
        return Ending(DONE, "not run: sk_triton is not installed from a checkout with tests")
    chosen = ["-m", "gpu"] if course.on_gpu else ["-m", "interpret", *INTERPRETED_TESTS]
    with tempfile.TemporaryDirectory() as scratch:
        xml = Path(scratch) / "tests.xml"
        arguments = ["pytest", "-n", "0", *chosen, "-q", "-p", "no:cacheprovider"]
        complete = _run_pytest([*arguments, f"--junitxml={xml}"], course.time_limit)
        tests = _read_junit(xml, " ".join(arguments[:-2]), complete)
    if tests is None:
        course.report.tests = None
        return Ending(FAILED, "not run: pytest did not start (pip install -e '.[test]')")
    course.report.tests = tests
    _judge_anew(course)
    counts = f"{tests.passed} passed, {tests.failed} failed, {tests.skipped} skipped"
    what = counts if course.on_gpu else f"{NO_GPU}interpreted schedules only; {counts}"
    if not tests.complete:
        what += f"; stopped after {course.time_limit:.0f} s"
    return Ending(DONE if tests.green else FAILED if tests.failed else PARTIAL, what)


def find_ceilings(course: Course) -> Ending:
    """Copy bandwidth and matrix rates."""
    with course.console.status("copy bandwidth and matrix rate"):
        found = measure_ceilings(course.device, DTYPES[course.device.type])
    course.report.ceilings = found
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in found.matrix_flop_per_s.items())
    return Ending(DONE, f"copy {found.copy_bytes_per_s / 1e9:.4g} GB/s, products {rates}")


def measure(course: Course, *, suite: str, dtype: str | None = None) -> Ending:
    """A suite, or its cases of one dtype, into the suite's file; without a GPU in small sizes."""
    from .. import table
    from ..measuring import session

    choice = suites.Choice(
        on_gpu=course.on_gpu, quick=not course.on_gpu, dtypes=None if dtype is None else (dtype,)
    )
    request = session.Request(
        suite,
        course.device,
        choice,
        seed=course.report.seed,
        time_limit=course.time_limit,
        ceilings=course.report.ceilings,
        tests=course.report.tests,
    )
    path = course.path(suite)
    earlier = session.reusable(path, request)
    if earlier is not None and course.again and suite != suites.HOST:
        anew = set(suites.SUITES[suite](choice))
        kept = tuple(record for record in earlier.records if record.case not in anew)
        earlier = replace(earlier, records=kept, clocks=())
    measured, left = session.measure_suite(
        request, course.console, earlier, lambda run: results.save(run, path)
    )
    results.save(measured, path)
    table.show(measured, course.console)
    if measured.interrupted:
        raise KeyboardInterrupt
    if trouble := session.device_trouble(course.device):
        return Ending(FAILED, trouble)
    messages = [f"{left} cases left for the next run"] if left else []
    messages += [] if course.on_gpu else [f"{NO_GPU}small sizes, PyTorch's own operators"]
    messages += measured.objections[:1]
    return Ending(PARTIAL if left else DONE, "; ".join(messages) or None)


def tune(course: Course) -> Ending:
    """`sk-triton tune` into the report's own folder: what the suites measure stays what a user gets untuned."""
    title = "Tuned configs"
    if course.on_gpu:
        seconds = max(course.time_limit - TUNE_MARGIN_SECONDS, 1)
        arguments = ["tune", "--model", SKNET50, "--direction", "both", "--device", str(course.device)]
        arguments += ["--budget", f"{seconds:g}s"]
        arguments += ["--again"] if course.again else []
    else:
        arguments = ["tune", "--dry-run", "--gpu", "h100", "--stage", "4", "--candidates", "2"]
    try:
        with course.console.status(title):
            trouble = _gather(
                course, title, arguments, course.time_limit, {cache.FOLDER_VARIABLE: str(course.folder)}
            )
    except subprocess.TimeoutExpired:
        return Ending(PARTIAL, "the time limit came first; what was tuned is kept for the next run")
    finally:
        (course.folder / f"{cache.FILE_NAME}.lock").unlink(missing_ok=True)
    if trouble:
        return Ending(FAILED, trouble)
    if not course.on_gpu:
        return Ending(DONE, f"{NO_GPU}candidates of stage 4 ranked by prediction, none measured")
    is_partial = LEFT in course.report.evidence[title]
    return Ending(
        PARTIAL if is_partial else DONE, f"sk-triton configs import {course.folder / cache.FILE_NAME}"
    )


def _gather(
    course: Course, title: str, arguments: list[str], seconds: float, variables: dict[str, str] | None = None
) -> str:
    """Puts what a subcommand prints among the report's evidence; returns why it failed, or ""."""
    done = subprocess.run(
        [sys.executable, "-m", "sk_triton", *arguments],
        env={**os.environ, "COLUMNS": "140", **(variables or {})},
        capture_output=True,
        text=True,
        timeout=max(seconds, 1),
    )
    course.report.evidence[title] = done.stdout
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return f"{title}: {lines[-1] if lines else f'exit code {done.returncode}'}"
    return ""


def gather_evidence(course: Course) -> Ending:
    """Without a GPU: what compiled and interpreted kernels tell, of two stages."""
    commands = {
        "Resources of compiled kernels": ["resources", "--chip", "sm_90", "--unit", "stage 1", "stage 4"],
        "Traffic of interpreted kernels, stage 3": ["traffic", "--stage", "3"],
        "Traffic of interpreted kernels, stage 4": ["traffic", "--stage", "4"],
    }
    deadline = time.monotonic() + course.time_limit
    for title, arguments in commands.items():
        with course.console.status(title):
            trouble = _gather(course, title, arguments, deadline - time.monotonic())
        if trouble:
            return Ending(FAILED, trouble)
    return Ending(DONE, f"{NO_GPU}predictions, no measurements")


def compare_predictions(course: Course) -> Ending:
    """What the model predicts, on a GPU that it knows against what suite "layer" measured."""
    from . import predictions as report_predictions

    with course.console.status("compiling kernels for the predictions"):
        if not course.on_gpu:
            course.report.evidence[report_predictions.PREDICTED] = report_predictions.predictions()
            return Ending(DONE, f"{NO_GPU}predictions alone")
        try:
            found = report_predictions.against_measured(course.path(suites.LAYER), course.time_limit / 2)
        except report_predictions.NothingToCompareError as error:
            return Ending(FAILED, str(error))
    course.report.evidence[report_predictions.COMPARED] = found
    return Ending()


def summarise(course: Course) -> Ending:
    """Verdicts in the terminal, pictures and tables in report.html."""
    from .page import write_page

    runs = load_runs(course.folder)
    for run in runs:
        summary = export.speed_summary(export.comparisons(run))
        words = summary if run.sound else f"no speed is claimed: {run.objections[0]}"
        course.console.print(f"{run.suite}: {words or 'nothing to compare'}", markup=False, soft_wrap=True)
    left_out = write_page(course.report, runs, course.folder)
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


def load_runs(folder: Path) -> list[results.Results]:
    """The suites' results in a folder, in the steps' order."""
    paths = [folder / f"{suite}.json" for suite in suites.OPTIONS]
    return [results.read(path) for path in paths if path.exists()]


def _judge_anew(course: Course) -> None:
    """Puts the tests' result into the suites' files that were measured at the same commit."""
    tests = course.report.tests
    for run in load_runs(course.folder):
        if tests is not None and run.stamp.git_commit == tests.git_commit:
            results.save(judged(replace(run, tests=tests)), course.path(run.suite))


# A background job of a shell ignores Ctrl-C, and so would the Python that it starts.
_STOPPABLE = (
    "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def _run_pytest(arguments: list[str], seconds: float) -> bool:
    """Runs pytest in the checkout; False if it had to be stopped."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, "-c", _STOPPABLE, *arguments], cwd=environment.CLONE_DIR, env=kept
    )
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            _stop(process)
    return True


def _stop(process: subprocess.Popen) -> None:
    """As Ctrl-C does, so that pytest still writes its results; by force if it does not listen."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _read_junit(path: Path, command: str, complete: bool) -> results.Tests | None:
    """Counts from pytest's XML file; None without one."""
    try:
        suite = next(ElementTree.parse(path).iter("testsuite"))
    except (OSError, ElementTree.ParseError, StopIteration):
        return None
    total, failures, errors, skipped = (
        int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    commit = environment.git_revision().commit
    return results.Tests(command, total - failed - skipped, failed, skipped, commit, complete)
