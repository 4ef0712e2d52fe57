"""How `sk-triton report` runs the project's tests, and counts them."""

from __future__ import annotations

import subprocess
import time

import pytest

from sk_triton import environment
from sk_triton.bench.report import pytest_run

JUNIT = '<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10" /></testsuites>'


def test_counts_of_pytest(tmp_path):
    path = tmp_path / "tests.xml"
    assert pytest_run.read_junit(path, "pytest", True) is None
    path.write_text(JUNIT)
    found = pytest_run.read_junit(path, "pytest", complete=True)
    assert (found.passed, found.failed, found.skipped, found.green) == (4, 3, 3, False)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one test that passes and one that sleeps."""
    (tmp_path / "test_one.py").write_text(
        "import pathlib, time\n"
        "def test_quick(): pass\n"
        "def test_slow():\n"
        "    pathlib.Path('begun').touch()\n"
        "    time.sleep(float('SECONDS'))\n"
    )
    monkeypatch.setattr(environment, "CLONE_DIR", tmp_path)
    return tmp_path / "test_one.py"


@pytest.mark.parametrize(("seconds", "complete"), [("0", True), ("60", False)])
def test_pytest_runs_in_the_checkout_and_is_stopped_in_time(
    checkout, seconds, complete, tmp_path, monkeypatch
):
    def expire(process, timeout=None):
        """The limit is over as soon as the slow test has begun, however long pytest takes to start."""
        if timeout != 12:
            return wait(process, timeout)
        while not (tmp_path / "begun").exists() and process.poll() is None:
            time.sleep(0.05)
        raise subprocess.TimeoutExpired(process.args, timeout)

    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", expire)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    checkout.write_text(checkout.read_text().replace("SECONDS", seconds))
    xml = tmp_path / "tests.xml"
    arguments = ["pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}"]
    assert pytest_run.run_pytest(arguments, 120 if complete else 12) == complete
    found = pytest_run.read_junit(xml, "pytest", complete)
    assert (found.green, found.passed >= 1) == (complete, True)
