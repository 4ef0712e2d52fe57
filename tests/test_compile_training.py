"""The kernels of training steps compiled for the chips that training is budgeted for."""

from functools import partial
from itertools import product

import pytest
import torch

from sk_triton.bench.compiled import resources, training_resources
from sk_triton.bench.grid import CASES, GridCase, paper_unit

from .versions import needs_narrow_products

pytestmark = [pytest.mark.compile, needs_narrow_products]
CHIPS = ["sm_80", "sm_90", "sm_100"]
FP16 = {case.name: case for case in CASES if case.precision == "fp16"}
# Whose gradients alone are compiled.
GRADIENTS = [
    FP16["stage 2"],
    FP16["one branch"],
    GridCase("2 channels per group", paper_unit(64), 128, 56, torch.float16),
    GridCase("stage 2, one branch", paper_unit(256, kernels=(3,), dilations=(2,)), 128, 28, torch.float16),
]
# Branches of slices of the input, which stream or go by columns where windows take the others; they alone are compiled.
SPLIT = [
    GridCase(
        f"{channels} channels, split",
        paper_unit(channels, in_channels=2 * channels, split_input=True),
        128,
        size,
        torch.float16,
    )
    for channels, size in ((128, 56), (512, 14))
]


@pytest.fixture(scope="module")
def rows():
    """For sm_90, the chip that was measured, each kernel; for the others the backward kernels.
    `sk-triton resources --training` compiles the whole grid."""
    backward = ("branch_grad", "select_bwd")
    jobs = [
        *jobs_on(["sm_90"], [FP16["stage 1"]]),
        *jobs_on(["sm_90"], [FP16["stage 3"], FP16["stage 4"]], ("branch_", "pooled", "select", "norm_bwd")),
        *jobs_on(["sm_90"], GRADIENTS, "branch_grad"),
        *jobs_on(["sm_90"], SPLIT, "branch_conv"),
        *jobs_on(["sm_80", "sm_100"], [FP16["stage 1"], FP16["stage 3"]], backward),
    ]
    return [row for found in resources.measure_all(jobs, 2) for row in found]


def jobs_on(chips, cases, kernels=""):
    return [partial(training_resources.measure, case, chip, kernels) for case, chip in product(cases, chips)]


def test_every_product_takes_the_tensor_cores(rows):
    assert {row.resources.target for row in rows} == set(CHIPS)
    assert {row.kernel for row in rows if row.resources.matrix} == {
        *(
            f"branch_conv_{kind}, {task}"
            for kind in ("window", "stream", "column")
            for task in ("train", "measure", "pool", "select")
        ),
        *("branch_grad_stream", "branch_grad_data", "branch_grad_weight"),
    }


def test_no_kernel_spills(rows):
    assert sum(row.kernel.startswith(("gate_", "gather")) for row in rows) >= 7
    gradients = {row.case.name for row in rows if row.kernel.startswith("branch_grad")}
    assert gradients == {"stage 1", "stage 3", *(case.name for case in GRADIENTS)}
    spilling = {(row.case.name, row.kernel, row.resources.target) for row in rows if row.resources.spills}
    assert not spilling


def test_instructions_per_output_of_narrow_groups(rows):
    """Data and weight gradients together; 47 are what five passes over memory leave an H100 in stage 1."""
    case = "stage 1", "branch_grad_stream"
    counts = {row.resources.target: row.per_output for row in rows if (row.case.name, row.kernel) == case}
    assert set(counts) == set(CHIPS)
    assert max(counts.values()) <= 34.5


def test_taking_moments_alone_costs_no_more_than_storing_too(rows):
    counts = {(row.case.name, row.resources.target, row.kernel): row.per_output for row in rows}
    pairs = [
        (count, counts[name, chip, kernel.replace("measure", "train")])
        for (name, chip, kernel), count in counts.items()
        if kernel.endswith("measure")
    ]
    assert len(pairs) == 4
    assert all(alone <= stored for alone, stored in pairs)
