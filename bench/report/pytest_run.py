"""Runs pytest in the checkout for as long as it may take, and counts what it found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from sk_triton import environment

from ..results import Tests

# A background job of a shell ignores Ctrl-C, and so would the Python that it starts.
_STOPPABLE = (
    "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def run_pytest(arguments: list[str], seconds: float) -> bool:
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


def read_junit(path: Path, command: str, complete: bool) -> Tests | None:
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
    return Tests(command, total - failed - skipped, failed, skipped, commit, complete)
