"""Kernels compiled for every supported chip, none of which need be present."""

import functools
from itertools import product

import pytest
import torch

from sk_triton.backend import SCHEDULES
from sk_triton.bench.compiled import resources
from sk_triton.bench.grid import CASES, GridCase, paper_unit

from .compiling import output_of, rows_of
from .versions import (
    HAS_NARROW_PRODUCTS,
    HAS_UNHOISTED_LOOPS,
    MAX_SPILLS,
    needs_configured_compiler,
    needs_narrow_products,
)

pytestmark = pytest.mark.compile

TARGETS = resources.compilable_chips()
NVIDIA = [name for name in TARGETS if name.startswith("sm_")]
# Of 16-bit narrow groups, branches of slices of the input alone still stream, on NVIDIA.
SPLIT = GridCase("stage 1, split", paper_unit(128, in_channels=256, split_input=True), 128, 56, torch.float16)
LARGE = GridCase("over 2^31 elements", paper_unit(64, groups=16), 1, 8192, torch.float16)
# What is compiled here, cold in some minutes: everything for sm_90, the chip that was measured, each formulation for
# gfx942, whose compiler is another, and some of both for the others. `sk-triton resources` compiles the support grid.
UNITS = {
    ("stage 1", "fp16"): ["sm_80", "sm_90", "sm_100", "gfx942"],
    ("stage 2", "fp16"): ["sm_90"],
    ("stage 3", "fp16"): ["sm_90", "sm_120"],
    ("stage 4", "fp16"): ["sm_89", "sm_90"],
    ("classic, M = 2", "fp16"): ["sm_90", "gfx942"],
    ("dense", "fp16"): ["sm_90", "gfx942"],
    ("stage 1", "tf32"): ["sm_86", "sm_90"],
    ("depthwise", "tf32"): ["sm_90"],
    ("depthwise", "fp32"): ["gfx942"],  # where PyTorch's switch never allows TF32
}
CHOSEN = [
    *(
        (case, chip)
        for case in CASES
        for chip in UNITS.get((case.name, case.precision), ())
        if chip in TARGETS
    ),
    *((SPLIT, chip) for chip in ("sm_90", "sm_120")),
    (LARGE, "sm_90"),
]
# With the gate inside of the selection, and with pooling and selecting of what a library convolved: small kernels.
WITH_SMALL = [(case, chip) for case, chip in CHOSEN if chip in ("sm_90", "gfx942")]


def left_out(pair):
    """The schedules under which a unit is not compiled for a chip: "resident" is in `test_resident.py`, and where it is
    short of registers in `pressed_kernels.py`."""
    small = () if pair in WITH_SMALL else ("gated", "library")
    return ("resident", *small, *(["recompute"] if pair[0] is LARGE else []))


@pytest.fixture(scope="module")
def rows():
    jobs = [
        functools.partial(resources.measure, *pair, with_phases=False, without=left_out(pair))
        for pair in CHOSEN
    ]
    return [row for found in resources.measure_all(jobs, 2) for row in found]


@needs_narrow_products
@pytest.mark.parametrize("chip", TARGETS)
def test_no_kernel_has_a_fault(rows, chip):
    """No spills, shared memory within the chip's limit, tensor cores where meant."""
    found = [row for row in rows if row.resources.target == chip]
    units = {(case.name, case.precision) for case, target in CHOSEN if target == chip}
    assert {(row.case.name, row.case.precision) for row in found if row.kernel == "select"} == units
    small = {(case.name, case.precision) for case, target in WITH_SMALL if target == chip}
    assert {(row.case.name, row.case.precision) for row in found if row.kernel == "gated_select"} == small
    assert not [(row.case.name, row.case.precision, row.kernel, row.faults) for row in found if faults(row)]


def faults(row):
    """A row's faults; a few spills are none under Tritons that configs are not chosen for."""
    are_few = row.resources.spills <= MAX_SPILLS
    return [fault for fault in row.faults if not (are_few and fault == f"{row.resources.spills} spills")]


@pytest.mark.parametrize("chip", NVIDIA)
def test_activations_are_loaded_16_bytes_at_a_time(rows, chip):
    """All but the loads of shift, attention and the like: fp32 vectors of a few channels."""
    for row in rows:
        if row.resources.target != chip:
            continue
        if row.kernel in ("select", "pooled_sums"):
            narrow = row.resources.loads - row.resources.wide_loads
            assert narrow <= 2 * row.case.spec.num_branches, (row.case.name, row.kernel)
        elif row.kernel.startswith("branch_conv_stream"):
            assert row.resources.wide_loads >= 0.75 * row.resources.loads, (row.case.name, row.kernel)


@needs_narrow_products
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_a_window_loads_8_bytes_of_a_pixel_at_a_time(rows, chip):
    """Four threads load a pixel's 32 bytes, one its weights of a tap 16 at a time; shift and attention are few."""
    found = [
        row
        for row in rows
        if row.resources.target == chip
        and row.kernel.startswith(("branch_conv_window", "merged_conv_window"))
    ]
    assert len(found) >= 3
    for row in found:
        loads = {
            name: count
            for name, count in row.resources.by_instruction.items()
            if name.startswith(("LDG", "LDGSTS"))
        }
        narrow = sum(count for name, count in loads.items() if ".64" not in name and ".128" not in name)
        assert narrow <= 8 * row.case.spec.num_branches, (row.case.name, row.kernel, loads)


@needs_narrow_products
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_pooling_narrow_groups_needs_no_shared_memory(rows, chip):
    """Rows and weights go straight into the tensor core's registers: nothing waits for a barrier."""
    pools = [
        row
        for row in rows
        if row.resources.target == chip
        and (row.case.name, row.kernel)
        in (("stage 1", "branch_conv_window, pool"), (SPLIT.name, "branch_conv_stream, pool"))
        and row.case.precision == "fp16"
    ]
    assert len(pools) == {"sm_90": 2}.get(chip, 1)
    for row in pools:
        # Sums of several samples are folded through it at the end, those of several warps stored.
        is_folded = row.kernel.startswith("branch_conv_window") and (
            "BLOCK_N=1 " not in f"{row.config} " or row.resources.threads > 32
        )
        assert row.resources.shared == 0 or (is_folded and row.resources.shared <= 512)


@needs_narrow_products
@pytest.mark.parametrize(("stage", "most"), [(1, 10), (2, 10), (3, 12), (4, 16)])
def test_instructions_per_output_of_the_convolution(rows, stage, most):
    counts = {
        row.kernel: row.per_output
        for row in rows
        if (row.resources.target, row.case.name, row.case.precision) == ("sm_90", f"stage {stage}", "fp16")
        and row.kernel.startswith("branch_conv")
    }
    stored, pooled = (count for kernel, count in counts.items() if "select" not in kernel)
    assert pooled < stored <= most
    if stage < 4:
        assert all(kernel.startswith("branch_conv_window") for kernel in counts)
        # The selection included.
        assert counts["branch_conv_window, select"] <= most


@needs_narrow_products
def test_instructions_of_the_resident_kernel_are_those_of_its_phases():
    """It convolves twice: twice the budget of a convolution."""
    case = next(case for case, _ in CHOSEN if (case.name, case.precision) == ("stage 1", "fp16"))
    others = [schedule for schedule in SCHEDULES if schedule != "resident"]
    job = functools.partial(resources.measure, case, "sm_90", without=others)
    (rows,) = resources.measure_all([job], 1)
    (row,) = (row for row in rows if row.kernel == "unit_resident")
    assert 15 < row.per_output <= 20


def test_large_tensors_take_64_bit_offsets(rows):
    large = [row for row in rows if row.case is not None and row.case.name == LARGE.name]
    branches = "branch_conv_window" if HAS_NARROW_PRODUCTS else "branch_conv_stream"
    assert {row.kernel for row in large} == {
        branches, "gate", "select", "gated_select", "pooled_sums",
    }  # fmt: skip
    _, planned = resources.launches(LARGE, "sm_90")
    assert planned[0].constexprs["IS_LARGE"]
    assert planned[-1].constexprs["IS_LARGE"]
    assert not any(faults(row) for row in large)


def test_faults_are_found(rows):
    from dataclasses import replace

    from sk_triton.bench.compiled.compile import SHARED_LIMIT

    row = rows[0]
    assert row.kernel == ("branch_conv_window" if HAS_NARROW_PRODUCTS else "branch_conv_stream")
    worse = replace(row, resources=replace(row.resources, spills=3, shared=10**6, matrix=0))
    assert worse.faults == [
        "3 spills",
        f"1000000 of {SHARED_LIMIT[row.resources.target]} bytes of shared memory",
        "no tensor-core instruction",
    ]


@needs_configured_compiler
def test_kernels_short_of_registers_have_no_fault():
    rows = rows_of("pressed_kernels.py")
    assert {row["kernel"] for row in rows} == {
        "branch_conv_column", "branch_conv_column, pool", "branch_conv_column, select",
        "branch_conv_held", "branch_conv_held, pool",
        "branch_conv_window, pool", "branch_conv_window, select", "unit_resident",
    }  # fmt: skip
    assert not [row for row in rows if row["faults"]]


def test_kernels_that_pack_parameters_have_no_fault():
    chips = [chip for chip in ("sm_80", "sm_90", "gfx942") if chip in TARGETS]
    rows = rows_of("packing_resources.py", *chips)
    assert {(row["chip"], row["kernel"]) for row in rows} == set(
        product(chips, ("fold_norms", "gather", "section_weights"))
    )
    assert not [row for row in rows if row["faults"]]
    # Machine code that is read together is taken apart where each kernel begins.
    assert {row["is_as_alone"] for row in rows if row["chip"] == "sm_90"} == {True}


def test_launches_pass_the_jit():
    expected = {
        "branch_conv_stream", "branch_conv_tap", "branch_conv_depthwise",
        "border_sums", "merged_conv", "gate", "select", "pooled_sums", "gated_select",
        "fold_norms", "gather", "section_weights",
    }  # fmt: skip
    if HAS_NARROW_PRODUCTS:
        expected |= {"branch_conv_window", "branch_conv_column", "branch_conv_held", "merged_conv_window"}
    if HAS_UNHOISTED_LOOPS:
        expected.add("unit_resident")
    started = output_of("jit_path.py").split()
    assert {line.removesuffix("_kernel").removesuffix("_fwd") for line in started} == expected


@needs_narrow_products
def test_launches_of_training_pass_the_jit():
    expected = {
        "stack_vectors", "gather", "norm_scale_shift", "combine_moments", "pooled_moments", "gate_reduce", "gate_norm",
        "gate_select", "select", "select_bwd", "gate_select_bwd", "gate_norm_bwd", "gate_reduce_bwd", "gate_params_bwd",
        "grad_terms", "branch_grad_stream", "branch_grad_data", "branch_grad_weight", "branch_grad_reduce",
    }  # fmt: skip
    started = output_of("jit_path.py", "training").split()
    assert {line.removesuffix("_kernel").removesuffix("_fwd") for line in started} == expected
