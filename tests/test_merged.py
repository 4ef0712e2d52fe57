"""Whole units through schedule "merged", interpreted, against float64; its kernels, compiled; its traffic."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sk_triton import dispatch, planning, reference
from sk_triton.bench.grid import classic_unit, paper_unit
from sk_triton.chips import CHIPS
from sk_triton.kernels.config import MergedConfig, WindowConfig
from sk_triton.pack_cache import PackCache
from sk_triton.packing import pack
from sk_triton.spec import BranchSpec
from sk_triton.workload import Workload

from .compiling import rows_of
from .tolerances import assert_errs_like_eager, assert_same
from .units import random_unit, sizes, specs
from .versions import needs_narrow_products

SM_90 = CHIPS["sm_90"]
CLASSIC = classic_unit(16, groups=4)
UNITS = {
    "classic": CLASSIC,
    "classic, one branch": classic_unit(16, num_branches=1, groups=4),
    "classic, three branches": classic_unit(16, num_branches=3, groups=4),
    "1, 3, 5 and 7": dataclasses.replace(CLASSIC, branches=tuple(BranchSpec(k, 1, 4) for k in (1, 3, 5, 7))),
    "norms": dataclasses.replace(CLASSIC, branch_norm=True, branch_bias=False),
    "norms after biases, dilations": dataclasses.replace(
        CLASSIC, branch_norm=True, branches=(BranchSpec(3, 1, 4), BranchSpec(3, 2, 4))
    ),
    "no biases": dataclasses.replace(CLASSIC, branch_bias=False),
    "stride 2": dataclasses.replace(CLASSIC, stride=2),
    "depthwise": classic_unit(16, groups=16),
    "dense": classic_unit(8, groups=1),
    "out of in": dataclasses.replace(CLASSIC, in_channels=24, out_channels=8),
}


def run(spec, branches, gate, x, cache=None):
    n, _, h, w = x.shape
    plan = planning.plan_schedule("merged", Workload(spec, n, h, w, x.dtype, SM_90, True, x.stride(1) != 1))
    with torch.no_grad():
        return dispatch.run(plan, x, branches, gate, spec, cache)


def compare(spec, x):
    branches, gate = random_unit(spec, x.dtype)
    v = run(spec, branches, gate, x)
    with torch.no_grad():
        eager = reference.sk_conv(x, branches, gate, spec)
        exact = reference.sk_conv(x.double(), *as_double(branches, gate), spec)
    assert v.stride() == eager.stride()
    assert_errs_like_eager(v, eager, exact)


def as_double(*parts):
    def convert(value):
        if isinstance(value, torch.Tensor):
            return value.detach().double()
        if isinstance(value, torch.nn.Module):
            return copy.deepcopy(value).double()
        return tuple(map(convert, value)) if isinstance(value, tuple) else value

    return [
        part._replace(**{k: convert(v) for k, v in part._asdict().items()})
        if hasattr(part, "_asdict")
        else tuple(as_double(*part))
        for part in parts
    ]


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", UNITS)
def test_units(name, dtype):
    if planning.refusal("merged", Workload(UNITS[name], 2, 6, 5, dtype, SM_90, True)):
        pytest.skip("fp32 weights on this lattice do not fit in registers")
    compare(
        UNITS[name],
        torch.randn(2, UNITS[name].in_channels, 6, 5).to(dtype).to(memory_format=torch.channels_last),
    )


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["classic", "stride 2"])
def test_nchw(name):
    compare(UNITS[name], torch.randn(2, 16, 6, 5).half())


@pytest.mark.interpret
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 9, 11), (3, 1, 4)], ids=str)
def test_sizes(size):
    n, h, w = size
    compare(CLASSIC, torch.randn(n, 16, h, w))


@pytest.mark.interpret
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, 1:, ::2],
        lambda x: x.to(memory_format=torch.channels_last)[:, :, 1:, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x),
    ],
    ids=["crop", "crop, channels_last", "transposed", "broadcast", "misaligned"],
)
def test_views(view):
    compare(CLASSIC, view(torch.randn(2, 16, 6, 5).half()))


@pytest.mark.interpret
@settings(max_examples=10)
@given(specs(acts=("identity", "relu")), sizes, st.booleans())
def test_any_unit(spec, size, has_norm):
    spec = dataclasses.replace(
        spec,
        branch_act="identity",
        branch_norm=has_norm,
        in_channels=spec.branch_in_channels,
        split_input=False,
        branches=tuple(dataclasses.replace(b, groups=spec.branches[0].groups) for b in spec.branches),
    )
    assume(not planning.refusal("merged", Workload(spec, 2, 6, 5, torch.float32, SM_90, True)))
    n, h, w = size
    branches, gate = random_unit(spec, torch.float32)
    x = torch.randn(n, spec.in_channels, h, w)
    with torch.no_grad():
        assert_same(run(spec, branches, gate, x), reference.sk_conv(x, branches, gate, spec))


@pytest.mark.interpret
def test_empty_batch():
    branches, gate = random_unit(CLASSIC, torch.float32)
    assert run(CLASSIC, branches, gate, torch.empty(0, 16, 7, 5)).shape == (0, 16, 7, 5)


@pytest.mark.interpret
def test_scratch_memory_is_written_before_it_is_read(nan_in_new_memory):
    for name in ("stride 2", "norms", "depthwise"):
        compare(UNITS[name], torch.randn(2, UNITS[name].in_channels, 7, 5).half())


@pytest.mark.interpret
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_stay_in_their_sample(value):
    branches, gate = random_unit(CLASSIC, torch.float32)
    x = torch.randn(3, 16, 6, 5)
    clean = run(CLASSIC, branches, gate, x)
    x[1, 2, 3, 4] = value
    v = run(CLASSIC, branches, gate, x)
    assert torch.equal(v[[0, 2]], clean[[0, 2]])
    with torch.no_grad():
        eager = reference.sk_conv(x, branches, gate, CLASSIC)
    assert v[1][eager[1].isnan()].isnan().all()


@pytest.mark.interpret
def test_packed_weights_follow_parameters_and_size():
    branches, gate = random_unit(CLASSIC, torch.float32)
    cache = PackCache()
    plan = planning.plan_schedule("merged", Workload(CLASSIC, 2, 6, 5, torch.float32, SM_90, True))
    first = pack(plan, 6, 5, branches, gate, cache)
    assert pack(plan, 6, 5, branches, gate, cache) is first
    assert pack(plan, 2, 5, branches, gate, cache) is not first
    assert pack(plan, 6, 5, branches, gate, cache) is first
    # The sections of larger images meet the same taps.
    assert pack(plan, 60, 31, branches, gate, cache) is first
    with torch.no_grad():
        branches[1].weight.add_(1)
    second = pack(plan, 6, 5, branches, gate, cache)
    assert not torch.equal(second.weights[0], first.weights[0])
    assert not torch.equal(second.section_weights, first.section_weights)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"branch_act": "relu"}, "branch_act is relu; only linear branches merge into one convolution"),
        ({"split_input": True}, "split_input is set; branches of different inputs do not merge"),
        (
            {"branches": (BranchSpec(3, 1, 4), BranchSpec(3, 1, 2))},
            r"the branches have \[2, 4\] groups; only equal groups merge",
        ),
        (
            {"branches": (BranchSpec(3, 1, 4), BranchSpec(3, 5, 4))},
            "on a 11 x 11 lattice take 264 registers; at most 120",
        ),
        ({"branches": (BranchSpec(3),), "in_channels": 32}, "a group has 32 channels; above 16"),
    ],
)  # fmt: skip
def test_reasons(change, reason):
    spec = dataclasses.replace(CLASSIC, **change)
    with pytest.raises(RuntimeError, match=f"schedule 'merged' cannot run here: .*{reason}"):
        planning.plan_schedule("merged", Workload(spec, 2, 6, 5, torch.float16, SM_90))


def test_ieee_is_refused():
    assert planning.refusal("merged", Workload(CLASSIC, 2, 6, 5, torch.float32, SM_90)).startswith(
        "fp32 is IEEE; "
    )
    assert planning.refusal("merged", Workload(CLASSIC, 2, 6, 5, torch.float32, SM_90, True)) == ""


def test_plan_counts_three_passes():
    assert (
        planning.plan_schedule(
            "merged", Workload(classic_unit(128), 128, 56, 56, torch.float16, SM_90)
        ).passes
        == 3
    )
    assert (
        planning.plan_schedule(
            "merged", Workload(classic_unit(128), 128, 56, 56, torch.float16, SM_90, False, True)
        ).passes
        == 5
    )
    assert planning.refusal("merged", Workload(paper_unit(128), 2, 6, 5, torch.float16, SM_90))


@pytest.fixture(scope="module")
def compiled():
    """What the kernels of the classic units use on each chip."""
    chips = ("sm_80", "sm_90", "sm_100")
    rows = rows_of("merged_resources.py", *chips)
    assert {row["chip"] for row in rows} == set(chips)
    return rows


@pytest.mark.compile
@needs_narrow_products
def test_no_kernel_spills(compiled):
    assert not [(row["chip"], row["unit"], row["kernel"], row["spills"]) for row in compiled if row["spills"]]


@needs_narrow_products
@pytest.mark.parametrize(
    ("unit", "n", "size", "config"),
    [
        (classic_unit(512), 128, 14, MergedConfig),
        (classic_unit(512), 128, 15, WindowConfig),
        (classic_unit(512), 1, 14, WindowConfig),
        (classic_unit(256), 128, 14, WindowConfig),
    ],
)
def test_columns_as_high_as_the_image_in_groups_of_16_channels(unit, n, size, config):
    """Where a batch fills the chip with them; elsewhere windows of rows."""
    plan = planning.plan_schedule("merged", Workload(unit, n, size, size, torch.float16, SM_90))
    assert isinstance(plan.merged_launch.conv, config)


@pytest.mark.compile
@needs_narrow_products
def test_convolution_reads_rows_without_shared_memory(compiled):
    """A row's loads wait for no other row: no barrier stands between them, only before each store."""
    for row in compiled:
        if row["kernel"].startswith("merged_conv"):
            assert row["barriers"] <= row["stores"] + 4, row
            assert row["matrix"] > 0
    kernels = {(row["dtype"], row["kernel"]) for row in compiled}
    assert {("float16", "merged_conv_window"), ("float32", "merged_conv")} <= kernels


@pytest.mark.compile
@needs_narrow_products
@pytest.mark.parametrize(
    ("unit", "kernel", "most"),
    [
        ("classic, M = 2", "merged_conv_window", 20),
        ("classic, stage 2", "merged_conv_window", 22),
        ("classic, stage 3", "merged_conv", 24),
        ("classic, M = 2, tiles", "merged_conv", 12),
        ("classic, stage 2, tiles", "merged_conv", 17),
    ],
)
def test_instructions_per_output(compiled, unit, kernel, most):
    """Of one convolution in place of two branches: the budget is 10, 10 and 12 for each branch. A window's programs are
    shorter, and each builds its weights: past the budget in stage 2."""
    (row,) = [row for row in compiled if (row["chip"], row["unit"], row["kernel"]) == ("sm_90", unit, kernel)]
    assert row["per_output"] <= most
