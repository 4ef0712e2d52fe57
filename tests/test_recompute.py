"""Whole units through schedule "recompute", interpreted, and when it is taken."""

import math

import pytest
import torch
from hypothesis import given, settings

from sk_triton import functional, planning, preference, use_backend
from sk_triton.bench.grid import paper_unit
from sk_triton.chips import CHIPS
from sk_triton.workload import Workload

from .tolerances import assert_same
from .units import random_unit, sizes, specs
from .versions import needs_narrow_products
from .whole_units import LAYERS, compare, image

NAMES = (
    "classic",
    "classic, one branch",
    "three branches",
    "paper",
    "paper, stride 2",
    "split, groups",
    "dilation 2",
    pytest.param("16 channels per group", marks=needs_narrow_products),
    "depthwise",
)


@pytest.mark.interpret
@pytest.mark.parametrize("name", NAMES)
def test_layers(name, memory_format):
    layer = LAYERS[name]().half()
    x = torch.randn(2, layer.spec.in_channels, 7, 5).half().contiguous(memory_format=memory_format)
    compare(layer, x, "recompute")


@pytest.mark.interpret
def test_fp32():
    compare(LAYERS["paper"](), torch.randn(1, 16, 5, 9), "recompute")


@pytest.mark.interpret
@settings(max_examples=15)
@given(specs(acts=("relu", "identity")), sizes)
def test_any_unit_runs_or_says_why_not(spec, size):
    n, h, w = size
    branches, gate = random_unit(spec, torch.float32)
    x = torch.randn(n, spec.in_channels, h, w)
    with torch.no_grad(), use_backend("reference"):
        eager = functional.sk_conv(x, branches, gate, spec)
    refusal = planning.refusal("recompute", Workload(spec, n, h, w, torch.float32, CHIPS["sm_90"]))
    with torch.no_grad(), use_backend("triton", schedule="recompute"):
        if refusal:
            with pytest.raises(RuntimeError, match=r"differ in groups|no kernel that selects"):
                functional.sk_conv(x, branches, gate, spec)
        else:
            assert_same(functional.sk_conv(x, branches, gate, spec), eager)


@pytest.mark.interpret
@pytest.mark.parametrize(
    "name", ["paper, stride 2", pytest.param("16 channels per group", marks=needs_narrow_products)]
)
def test_every_output_element_is_written(name, nan_in_new_memory):
    layer = LAYERS[name]().half()
    compare(layer, image(layer, 2, 7, 5), "recompute")


@pytest.mark.interpret
def test_a_bad_value_stays_in_its_sample():
    layer, x = LAYERS["paper"]().eval().half(), torch.randn(3, 16, 7, 5).half()
    x[1, 2, 3, 4] = math.nan
    with torch.no_grad(), use_backend("triton", schedule="recompute"):
        bad = layer(x).isnan().flatten(1).any(1)
    assert bad.tolist() == [False, True, False]


def plan(spec, *, n=128, size=56, dtype=torch.float16):
    return preference.fastest_plan(Workload(spec, n, size, size, dtype, CHIPS["sm_90"]))


@needs_narrow_products
def test_it_is_taken_where_it_saves_passes_and_the_plan_says_why_not_elsewhere():
    chosen = plan(paper_unit(256), n=8, size=224)
    assert (chosen.schedule, chosen.passes) == ("recompute", 3)
    assert dict(chosen.rejected)["store"] == "6 passes over memory, against 3"
    for other, reason in (
        (plan(paper_unit(128), dtype=torch.float32), "bound by arithmetic"),
        (plan(paper_unit(1024), size=7), "bound by loading weights"),
        (plan(paper_unit(256, stride=2)), "9 passes over memory, against 9"),
    ):
        assert other.schedule == "store"
        assert reason in dict(other.rejected)["recompute"]
    dense = plan(paper_unit(128, groups=1), size=28)
    assert dense.schedule == "library"
    assert "no kernel that selects" in dict(dense.rejected)["recompute"]


def test_a_schedule_that_cannot_run_raises_with_the_reason():
    with pytest.raises(
        RuntimeError,
        match=r"schedule 'recompute' cannot run here: there is no kernel that selects for branches 3x3, 3x3 d2 of 128 "
        r"channels per group in float16 on sm_90; .* at most 5x5 in groups of 32 channels",
    ):
        planning.plan_schedule(
            "recompute", Workload(paper_unit(128, groups=1), 8, 28, 28, torch.float16, CHIPS["sm_90"])
        )
    with pytest.raises(
        ValueError,
        match="schedule must be one of 'store', 'gated', 'recompute', 'merged', 'resident', 'library' with backend "
        "'triton'",
    ):
        use_backend("auto", schedule="store")
