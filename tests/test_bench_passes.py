"""Passes over memory, derived step by step: they add up to the design's and to the dispatcher's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from matplotlib.text import Text

from sk_triton import planning
from sk_triton.bench import passes
from sk_triton.bench.plots import waterfall
from sk_triton.bench.shapes import CLASSIC, PAPER, stage_shape
from sk_triton.chips import CHIPS
from sk_triton.spec import BranchSpec
from sk_triton.workload import Workload

PASSES_IN_DESIGN = {
    PAPER: {
        "timm, eager": 27,
        "torch.compile": 9,
        "sk_triton, store": 6,
        "sk_triton, recompute": 3,
        "sk_triton, resident": 2,
        "sk_triton, library": 9,
    },
    CLASSIC: {
        "classic class, eager": 19,
        "torch.compile": 9,
        "sk_triton, store": 6,
        "sk_triton, recompute": 3,
        "sk_triton, merged": 3,
        "sk_triton, library": 9,
    },
}


@pytest.mark.parametrize("unit", [PAPER, CLASSIC])
def test_passes_add_up_to_those_of_the_design(unit):
    spec = waterfall.unit_spec(unit, stage_shape(unit, 1))
    found = {route.name: route.passes for route in passes.routes(spec)}
    assert found.items() >= PASSES_IN_DESIGN[unit].items()


@pytest.mark.parametrize("unit", [PAPER, CLASSIC])
@pytest.mark.parametrize("num_branches", [1, 2, 3])
@pytest.mark.parametrize("same_groups", [True, False])
def test_passes_agree_with_the_dispatcher(unit, num_branches, same_groups):
    shape = stage_shape(unit, 1)
    groups = [32 if same_groups else 32 // (1 + m % 2) for m in range(num_branches)]
    spec = dataclasses.replace(
        waterfall.unit_spec(unit, shape),
        branches=tuple(BranchSpec(3, 1 + m, g) for m, g in enumerate(groups)),
    )
    workload = Workload(spec, 8, shape.height, shape.width, torch.float16, CHIPS["sm_90"])
    assert passes.store(spec).passes == planning.plan_store(workload).passes
    assert passes.library(spec).passes == planning.plan_schedule("library", workload).passes
    assert passes.reference(spec).passes == planning.eager_passes(spec)


def test_merged_needs_linear_branches():
    with pytest.raises(ValueError, match="linear"):
        passes.merged(waterfall.unit_spec(PAPER, stage_shape(PAPER, 1)))


def test_the_waterfall_shows_every_route_with_its_total():
    figure = waterfall.draw()
    text = "\n".join(artist.get_text() for artist in figure.findobj(Text))
    for unit in (PAPER, CLASSIC):
        for route in passes.routes(waterfall.unit_spec(unit, stage_shape(unit, 1))):
            assert route.name in text
            assert f"{route.passes} T" in text
    assert "not measured" in text
    widths = [sum(bar.get_width() for bar in ax.patches) for ax in figure.axes]
    totals = [
        sum(r.passes for r in passes.routes(waterfall.unit_spec(u, stage_shape(u, 1))))
        for u in (PAPER, CLASSIC)
    ]
    assert widths == totals
