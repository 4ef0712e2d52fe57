"""What training costs: bytes counted by the interpreter, and kernels compiled for chips that need not be present."""

from dataclasses import replace

import pytest
import torch

from sk_triton import functional, save_for_backward, use_backend
from sk_triton.bench.grid import classic_unit, paper_unit
from sk_triton.bench.interpreted.meter import Meter
from sk_triton.chips import CHIPS
from sk_triton.kernels.launch import Launch
from sk_triton.training import plan as training_plan
from sk_triton.training.plan import make_training_plan, plan_training
from sk_triton.workload import Workload

from .units import random_unit
from .versions import needs_narrow_products


@pytest.fixture
def passes(monkeypatch):
    """Distinct bytes of 16-bit activations that launches touch, in units of T, while the fixture's list grows."""
    run, rows = Launch.__call__, []

    def metered(launch):
        names = zip(launch.kernel.arg_names, launch.arguments, strict=False)
        tensors = {name: t for name, t in names if isinstance(t, torch.Tensor | tuple)}
        with Meter(tensors).watch(launch.kernel.fn.__name__) as found:
            run(launch)
        first = {
            name: t[0] if isinstance(t, tuple) else t
            for name, t in tensors.items()
            if name not in ("weight_ptrs", "dw_ptr")
        }
        activations = [name for name, t in first.items() if t.dtype == torch.float16 and t.dim() >= 4]
        rows.append(
            (launch.kernel.fn.__name__, sum(row.touched for row in found if row.tensor in activations))
        )

    monkeypatch.setattr(Launch, "__call__", metered)
    return rows


@needs_narrow_products
@pytest.mark.interpret
@pytest.mark.parametrize(
    ("channels", "groups", "size"), [(16, 4, 14), (32, 2, 14)], ids=["stage 1", "stage 3"]
)
def test_passes_over_memory(passes, channels, groups, size):
    spec = paper_unit(channels, groups=groups)
    branches, gate = random_unit(spec, torch.float16, training=True)
    x = torch.randn(2, channels, size, size).half().to(memory_format=torch.channels_last).requires_grad_()
    unit = x.numel() * 2
    with use_backend("triton"):
        v = functional.sk_conv(x, branches, gate, spec)
    forward = {name: count / unit for name, count in passes}
    # x and both branches; both branches; both branches and v.
    assert [round(count, 2) for count in forward.values() if count] == [3, 2, 3]
    passes.clear()
    v.backward(torch.randn_like(v))
    # dv and both branches; then x, dv, both branches and dx at once, or in wide groups dv, both branches and dx, and x,
    # dv and a branch for each branch's weights. Sums of partial gradients touch no activation.
    gradients = [5] if channels // groups <= 8 else [4, 3, 3]
    assert [round(count / unit, 2) for _, count in passes if count] == [3, *gradients]


@needs_narrow_products
@pytest.mark.interpret
@pytest.mark.parametrize(("groups", "gradients"), [(4, [5]), (1, [4, 3, 3])], ids=["narrow", "wide"])
def test_saving_the_input_halves_the_forward_pass_and_adds_a_convolution(passes, groups, gradients):
    spec = paper_unit(16, groups=groups)
    branches, gate = random_unit(spec, torch.float16, training=True)
    x = torch.randn(2, 16, 7, 7).half().to(memory_format=torch.channels_last).requires_grad_()
    with use_backend("triton"), save_for_backward("input"):
        v = functional.sk_conv(x, branches, gate, spec)
    # For the statistics, to pool, to select: no branch is written.
    assert [round(count / x.numel() / 2, 2) for _, count in passes if count] == [1, 1, 2]
    passes.clear()
    v.backward(torch.randn_like(v))
    assert [round(count / x.numel() / 2, 2) for _, count in passes if count] == [3, 3, *gradients]


@pytest.mark.interpret
def test_frozen_norms_need_no_statistics(passes):
    spec = paper_unit(16, groups=4)
    branches, gate = random_unit(spec, torch.float16, training=False)
    x = torch.randn(2, 16, 7, 7).half().to(memory_format=torch.channels_last)
    with use_backend("triton"), save_for_backward("input"):
        functional.sk_conv(x, branches, gate, spec)
    assert [round(count / x.numel() / 2, 2) for _, count in passes if count] == [1, 2]


@pytest.mark.parametrize(
    ("unit", "size", "dtype", "stored", "folded"),
    [
        pytest.param(paper_unit(128), 56, torch.float16, 8, 4, id="stage 1"),
        pytest.param(paper_unit(512), 14, torch.bfloat16, 8, 4, id="stage 3", marks=needs_narrow_products),
        pytest.param(classic_unit(128), 56, torch.float16, 6, 3, id="classic"),
        pytest.param(paper_unit(1024), 7, torch.float16, 8, 8, id="stage 4"),
        pytest.param(paper_unit(128), 56, torch.float32, 8, 8, id="fp32"),
        pytest.param(paper_unit(256, groups=1), 28, torch.float16, 15, 15, id="library"),
    ],
)
def test_planned_passes(unit, size, dtype, stored, folded):
    work = Workload(unit, 128, size, size, dtype, CHIPS["sm_90"])
    assert plan_training(work, "branches").passes == stored
    plan = plan_training(work, "input")
    assert plan.passes == folded
    assert [launch.task for launch in plan.folded_launches] == (
        ["measure", "pool", "select"] if folded < stored else []
    )
    assert folded < stored or dict(plan.rejected)["recompute"]


def test_many_tiles_are_pooled_by_a_pass_of_their_own(monkeypatch):
    """The gate adds the sums of tiles one after the other."""
    work = Workload(classic_unit(128), 128, 56, 56, torch.float16, CHIPS["sm_90"])
    plan = make_training_plan(work, "branches")
    assert plan.pools
    monkeypatch.setattr(training_plan, "MAX_GATE_TILES", 1)
    assert not make_training_plan(work, "branches").pools
    assert make_training_plan(work, "branches").passes == plan.passes + 2
    assert not make_training_plan(replace(work, spec=paper_unit(128)), "branches").pools
