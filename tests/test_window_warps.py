"""Window kernels of several warps a program, as the compiler makes them: nothing chooses them by itself yet."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .versions import needs_narrow_products

pytestmark = [pytest.mark.compile, needs_narrow_products]
CHIPS = ("sm_90", "sm_100")


@pytest.fixture(scope="module")
def compiled():
    script = Path(__file__).with_name("window_resources.py")
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, script, *CHIPS], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["chip"] for row in rows} == set(CHIPS)
    assert {row["task"] for row in rows} == {"pool", "select", "store", "train", "measure", "merged"}
    assert {row["blocks"] for row in rows} == {4}
    return rows


def test_no_kernel_spills(compiled):
    """But for selecting at 128@56² on sm_100, once a row."""
    spilling = {(row["chip"], row["unit"], row["task"]) for row in compiled if row["spills"]}
    assert spilling <= {("sm_100", "stage 1", "select")}
    assert max(row["spills"] for row in compiled) <= 56 + 4


def test_lines_are_written_whole(compiled):
    """Sixteen bytes a thread, eight threads a line; a row's last, odd pixel eight. Pooled sums and moments are few."""
    for row in compiled:
        if row["task"] in ("pool", "measure"):
            assert row["barriers"] < 12, row
        else:
            assert row["wide_stores"] >= 0.6 * row["stores"], row


def test_rows_are_fetched_ahead(compiled):
    assert not [row for row in compiled if not row["prefetches"]]
