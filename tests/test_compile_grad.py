"""The backward kernels compiled for the chips that training is budgeted for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .versions import needs_narrow_products

pytestmark = [pytest.mark.compile, needs_narrow_products]
CHIPS = ("sm_80", "sm_90", "sm_100")


@pytest.fixture(scope="module")
def rows():
    script = Path(__file__).with_name("grad_resources.py")
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, script, *CHIPS], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_product_takes_the_tensor_cores(rows):
    assert {row["chip"] for row in rows} == set(CHIPS)
    assert all(row["matrix"] or row["kernel"] == "branch_grad_reduce" for row in rows)


def test_one_narrow_branch_and_weights_of_wide_groups_do_not_spill(rows):
    """Two branches in one launch and the data of wide groups do: kernels/README.md."""
    found = [
        row for row in rows if row["unit"] == "stage 1, one branch" or row["kernel"] == "branch_grad_weight"
    ]
    assert len(found) == 18
    assert not [row for row in found if row["spills"]]


def test_instructions_per_output_of_narrow_groups(rows):
    """Data and weight gradients together; 47 are what five passes over memory leave an H100 in stage 1."""
    case = "stage 1", "branch_grad_stream"
    counts = {row["chip"]: row["per_output"] for row in rows if (row["unit"], row["kernel"]) == case}
    assert counts["sm_90"] <= 38
    assert max(counts.values()) <= 40
