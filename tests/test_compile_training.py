"""The kernels of training steps compiled for the chips that training is budgeted for."""

import pytest
import torch

from sk_triton.bench import resources, training_resources
from sk_triton.bench.grid import CASES, Case, paper_unit

from .versions import needs_narrow_products

pytestmark = [pytest.mark.compile, needs_narrow_products]
CHIPS = ["sm_80", "sm_90", "sm_100"]
STAGES = [
    case for case in CASES if case.precision == "fp16" and case.name in ("stage 1", "stage 3", "stage 4")
]
ONE_BRANCH = Case(
    "stage 1, one branch", paper_unit(128, kernels=(3,), dilations=(1,)), 128, 56, torch.float16
)


@pytest.fixture(scope="module")
def rows():
    measured = resources.measure_all([*STAGES, ONE_BRANCH], CHIPS, 2, training_resources.measure)
    return [row for found in measured for row in found]


def test_every_product_takes_the_tensor_cores(rows):
    assert {row.resources.target for row in rows} == set(CHIPS)
    assert {row.kernel for row in rows if row.resources.matrix} == {
        *(f"branch_conv_{kind}, {task}" for kind in ("stream", "column") for task in ("train", "measure")),
        *(f"branch_conv_{kind}, {task}" for kind in ("stream", "column") for task in ("pool", "select")),
        *("branch_grad_stream", "branch_grad_data", "branch_grad_weight"),
    }


def test_only_gradients_of_two_narrow_branches_and_data_gradients_of_wide_groups_spill(rows):
    """By how much: kernels/README.md."""
    spilling = {(row.case.name, row.kernel) for row in rows if row.resources.spills}
    assert spilling <= {("stage 1", "branch_grad_stream"), ("stage 3", "branch_grad_data")}


def test_instructions_per_output_of_narrow_groups(rows):
    """Data and weight gradients together; 47 are what five passes over memory leave an H100 in stage 1."""
    case = "stage 1", "branch_grad_stream"
    counts = {row.resources.target: row.per_output for row in rows if (row.case.name, row.kernel) == case}
    assert counts["sm_90"] <= 38
    assert max(counts.values()) <= 40


def test_taking_moments_alone_costs_no_more_than_storing_too(rows):
    counts = {(row.case.name, row.resources.target, row.kernel): row.per_output for row in rows}
    pairs = [
        (count, counts[name, chip, kernel.replace("measure", "train")])
        for (name, chip, kernel), count in counts.items()
        if kernel.endswith("measure")
    ]
    assert len(pairs) == 3 * len(CHIPS)
    assert all(alone <= stored for alone, stored in pairs)
