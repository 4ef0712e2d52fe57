"""The CPU's inference schedules against the reference and against float64."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sk_triton import BranchSpec, SKSpec, dispatch, layout, reference
from sk_triton.cpu import choice as cpu
from sk_triton.cpu.merging import merged_branch, taps_of, window_sums
from sk_triton.kernels.merging import lattice_taps, merged_shape
from sk_triton.planning import conv_shapes

from .tolerances import assert_errs_like_eager, assert_same, assert_typical_errors_like_eager
from .units import CLASSIC, PAPER, mergeable, random_unit, sizes, specs

ACTS = ("relu", "identity")
formats = st.sampled_from([torch.contiguous_format, torch.channels_last])
seeds = st.integers(0, 2**16)


def unit(spec, dtype):
    branches, gate = random_unit(spec, torch.float64)
    return tuple(cast_to(part, dtype) for part in (*branches, gate))


def cast_to(part, dtype):
    """A branch or a gate in another dtype, without gradients."""

    def cast(value):
        if isinstance(value, torch.Tensor):
            return value.detach().to(dtype)
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).to(dtype).eval()
        return tuple(map(cast, value)) if type(value) is tuple else value

    return type(part)(*map(cast, part))


def plan_of(spec, x, schedule, samples):
    """A plan of a schedule, whether or not it would pay."""
    plan = dataclasses.replace(cpu.plan(x, spec), schedule=schedule, samples=samples, merged_branch=None)
    return dataclasses.replace(plan, merged_branch=merged_branch(spec)) if schedule == "merged" else plan


def run(spec, x, branches, gate, schedule, samples):
    with torch.no_grad():
        v = dispatch.run(plan_of(spec, x, schedule, samples), x, branches, gate, spec, None)
    assert v.is_contiguous(memory_format=layout.memory_format(x))
    return v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(specs(acts=ACTS), sizes, seeds, formats, st.integers(1, 3))
def test_folded_is_the_reference(dtype, spec, size, seed, memory_format, samples):
    torch.manual_seed(seed)
    *branches, gate = unit(spec, dtype)
    x = torch.randn(size[0], spec.in_channels, *size[1:], dtype=dtype).contiguous(memory_format=memory_format)
    v = run(spec, x, branches, gate, "folded", samples)
    assert_same(v, reference.sk_conv(x, branches, gate, spec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(specs(acts=ACTS).map(mergeable), sizes, seeds, formats, st.integers(1, 3))
def test_merged_is_the_reference(dtype, spec, size, seed, memory_format, samples):
    torch.manual_seed(seed)
    *branches, gate = unit(spec, dtype)
    x = torch.randn(size[0], spec.in_channels, *size[1:], dtype=dtype).contiguous(memory_format=memory_format)
    samples = 1 if memory_format == torch.channels_last else samples
    v = run(spec, x, branches, gate, "merged", samples)
    assert_same(v, reference.sk_conv(x, branches, gate, spec))


DEPTHWISE = SKSpec(16, 16, (BranchSpec(3, 1, 16), BranchSpec(5, 3, 16)), stride=2, gate_width=4)
LINEAR_DEPTHWISE = dataclasses.replace(
    DEPTHWISE, branches=(BranchSpec(3, 2, 16), BranchSpec(5, 1, 16)), branch_act="identity"
)
DENSE = SKSpec(16, 32, (BranchSpec(3), BranchSpec(5)), gate_width=4, branch_act="identity")
SPLIT = SKSpec(
    32, 16, (BranchSpec(3), BranchSpec(3, 2), BranchSpec(1), BranchSpec(7)), split_input=True, gate_width=4
)


@pytest.mark.parametrize(
    ("spec", "schedule"),
    [(spec, "folded") for spec in (CLASSIC, PAPER, DEPTHWISE, DENSE, SPLIT)]
    + [(spec, "merged") for spec in (CLASSIC, DENSE, LINEAR_DEPTHWISE)],
)
@pytest.mark.parametrize("size", [(1, 7, 7), (2, 2, 9), (3, 13, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_schedules_err_like_eager(spec, schedule, size, dtype):
    """Over several units together. Merged in float32 by the root mean square, with a quarter of a unit in the last
    place granted, less than eager errs: sums of other lengths than eager's leave the largest error of a small result to
    chance and to the order in which a processor's convolutions sum."""
    n, h, w = size
    c = spec.in_channels
    found = {}  # by kind of input and samples of a part
    for _ in range(4):
        *branches, gate = unit(spec, dtype)
        *exact_branches, exact_gate = (cast_to(part, torch.float64) for part in (*branches, gate))
        inputs = {
            "NCHW": torch.randn(n, c, h, w),
            "channels_last": torch.randn(n, h, w, c).permute(0, 3, 1, 2),
            "view": torch.randn(2 * n, c + 3, h + 2, w + 1)[::2, 2:-1, 1:-1, 1:],
        }
        for kind, x in inputs.items():
            x = x.to(dtype)
            eager = reference.sk_conv(x, branches, gate, spec)
            exact = reference.sk_conv(x.double(), exact_branches, exact_gate, spec)
            for samples in (1, n):
                if samples == 1 or schedule == "folded" or layout.memory_format(x) != torch.channels_last:
                    v = run(spec, x, branches, gate, schedule, samples)
                    assert_same(v, eager)
                    found.setdefault((kind, samples), []).append((v, eager, exact))
    for results in found.values():
        if dtype == torch.float32 and schedule == "merged":
            assert_typical_errors_like_eager(results, granted=0.25)
        else:
            columns = zip(*results, strict=True)
            assert_errs_like_eager(*(torch.cat([t.flatten() for t in column]) for column in columns))


def test_window_sums_are_a_convolution_with_ones():
    for kernel, stride, size in [(5, 1, (9, 8)), (3, 2, (7, 4)), (7, 3, (2, 5)), (5, 2, (1, 1))]:
        for dilation in (1, 2):
            x = torch.randn(2, 3, *size, dtype=torch.float64)
            branch = BranchSpec(kernel, dilation)
            columns = F.unfold(x, kernel, dilation, branch.padding, stride)
            expected = columns.sum(-1).view(2, 3, kernel, kernel)
            for memory_format in (torch.contiguous_format, torch.channels_last):
                sums = window_sums(x.contiguous(memory_format=memory_format), branch, stride)
                torch.testing.assert_close(sums, expected)


def test_the_merged_kernel_holds_every_branch():
    def kernel(*branches):
        return str(merged_branch(SKSpec(4, 4, branches, gate_width=1)))

    assert kernel(BranchSpec(3), BranchSpec(3, 2)) == "5x5"
    assert kernel(BranchSpec(3, 2), BranchSpec(3, 4), BranchSpec(1, 3)) == "5x5 d2"
    assert kernel(BranchSpec(1, 5), BranchSpec(1)) == "1x1"
    assert kernel(BranchSpec(3, 2, 2), BranchSpec(7, 3, 2)) == "19x19 g2"


@pytest.mark.parametrize(
    "branches", [((3, 1), (3, 2)), ((3, 2), (3, 4), (1, 3)), ((1, 5), (1, 1)), ((3, 2), (7, 3))]
)
def test_the_kernels_for_gpus_merge_branches_on_the_same_taps(branches):
    spec = SKSpec(4, 4, tuple(BranchSpec(*branch) for branch in branches), gate_width=1)
    ((_, _, shape),) = conv_shapes(spec)
    merged, expected = merged_branch(spec), merged_shape(shape)
    assert {(merged.kernel_size, merged.dilation)} == set(
        zip(expected.kernels, expected.dilations, strict=True)
    )
    taps = [tuple(range(merged.kernel_size)[taps_of(branch, merged)]) for branch in spec.branches]
    assert tuple(taps) == lattice_taps(shape)


@pytest.mark.parametrize("schedule", ["folded", "merged"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_sample(schedule, value, memory_format):
    spec = CLASSIC
    *branches, gate = unit(spec, torch.float32)
    x = torch.randn(4, 16, 9, 8)
    samples = 1 if memory_format == torch.channels_last else 2
    with torch.no_grad():
        clean = dispatch.run(plan_of(spec, x, schedule, samples), x, branches, gate, spec, None)
        x[1, 3, 4, 4] = value
        x = x.contiguous(memory_format=memory_format)
        v = dispatch.run(plan_of(spec, x, schedule, samples), x, branches, gate, spec, None)
        eager = reference.sk_conv(x, branches, gate, spec)
    others = [0, 2, 3]
    torch.testing.assert_close(v[others], clean[others])
    assert torch.equal(v[others].isfinite(), eager[others].isfinite())
    assert not v[1][~eager[1].isfinite()].isfinite().any()


def test_a_pixel_between_the_strides_is_not_read():
    """It would be 0 x NaN."""
    spec = dataclasses.replace(CLASSIC, branches=(BranchSpec(1, groups=4), BranchSpec(1, groups=4)), stride=2)
    *branches, gate = unit(spec, torch.float32)
    x = torch.randn(1, 16, 5, 5)
    x[:, :, 1, :] = float("nan")
    with torch.no_grad():
        for schedule in ("folded", "merged"):
            v = dispatch.run(plan_of(spec, x, schedule, 1), x, branches, gate, spec, None)
            assert_same(v, reference.sk_conv(x, branches, gate, spec))
