"""Which schedule is expected to be fastest, and in which words the others are not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sk_triton import planning
from sk_triton.backend import SCHEDULES
from sk_triton.bench.grid import classic_unit, paper_unit
from sk_triton.chips import CHIPS
from sk_triton.preference import expected_plan, expected_schedule

from .tuned import workload
from .versions import needs_narrow_products

SM_90 = CHIPS["sm_90"]


def strided(in_channels: int, channels: int):
    spec = replace(classic_unit(channels), in_channels=in_channels, stride=2)
    return workload(chip=SM_90, spec=spec)


@pytest.mark.parametrize(("in_channels", "merged"), [(128, 9), (256, 17)])
def test_merged_is_not_taken_where_it_saves_no_pass(in_channels, merged):
    """It reads the input twice, of four times the output's pixels."""
    work = strided(in_channels, 128)
    store = planning.make_plan("store", work)
    assert planning.make_plan("merged", work).passes == merged >= store.passes
    plan = expected_plan(work)
    assert plan.schedule == expected_schedule(work) == "store"
    assert dict(plan.rejected)["merged"] == f"{merged} passes over memory, against {store.passes:g}"


def test_merged_is_taken_where_it_saves_passes():
    plan = expected_plan(workload(chip=SM_90, spec=classic_unit(128)))
    assert (plan.schedule, plan.passes) == ("merged", 3)
    assert dict(plan.rejected)["store"] == "6 passes over memory, against 3"


def test_what_merged_leaves_out_says_what_it_cannot_do():
    """Kernels that no launch selects by are no matter of passes."""
    unit = classic_unit(128)
    unit = replace(unit, branches=replace_kernels(unit.branches, (3, 7)))
    work = workload(chip=SM_90, spec=unit)
    plan = expected_plan(work)
    assert plan.schedule == "merged"
    for name in ("recompute", "resident"):
        assert dict(plan.rejected)[name] == planning.refusal(name, work) != ""


@needs_narrow_products
def test_no_chips_choice_is_explained_by_times_of_another():
    narrow = replace(classic_unit(1024), branches=replace_kernels(classic_unit(1024).branches, (3, 7)))
    reasons = dict(expected_plan(workload(chip=CHIPS["sm_80"], spec=narrow, size=7)).rejected)
    assert reasons["store"].endswith("from 32 the library's convolution is expected to be faster")


@pytest.mark.parametrize("n", [1, 128])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    "spec",
    [paper_unit(128), paper_unit(1024), paper_unit(128, groups=1), classic_unit(128), classic_unit(1024)],
    ids=["narrow", "wide", "dense", "linear", "linear, wide"],
)
def test_every_other_schedule_has_its_reason(spec, chip, n):
    plan = expected_plan(workload(chip=CHIPS[chip], spec=spec, n=n))
    names = [name for name, _ in plan.rejected]
    assert sorted((plan.schedule, *names)) == sorted(("reference", *SCHEDULES))
    assert all(reason for _, reason in plan.rejected)


def replace_kernels(branches, kernels):
    return tuple(replace(branch, kernel_size=size) for branch, size in zip(branches, kernels, strict=True))
