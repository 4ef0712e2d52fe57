"""Schedule "library": PyTorch's own convolution, then the kernels, interpreted; and when it is taken."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from sk_triton import SelectiveKernel, SKConv, explain, planning, preference, steps, use_backend
from sk_triton.bench.compiled.planned import prepared_steps
from sk_triton.bench.grid import classic_unit, paper_unit
from sk_triton.chips import CHIPS
from sk_triton.library import Convolution, without_memory
from sk_triton.spec import BranchSpec
from sk_triton.training.plan import make_training_plan
from sk_triton.workload import Workload

from .interpreter import exact_bfloat16
from .tolerances import assert_errs_like_eager, assert_same
from .units import randomize_norms, sizes, specs
from .versions import needs_narrow_products
from .whole_units import LAYERS, VIEWS, compare, compare_bad_value, compare_unit

DENSE = {
    "dense": lambda: SelectiveKernel(16, split_input=False),
    "dense, one branch": lambda: SelectiveKernel(16, kernel_size=3, split_input=False),
    "dense, linear": lambda: SKConv(16, M=2, G=1, r=4, L=8),
    **{
        name: LAYERS[name]
        for name in (
            "timm's default",
            "classic, three branches, stride 2",
            "paper, stride 2",
            "out of in",
            "dilation 2",
            "depthwise",
        )
    },
}


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_layers(name, dtype, memory_format):
    layer = DENSE[name]().to(dtype)
    x = torch.randn(2, layer.spec.in_channels, 7, 5).to(dtype).contiguous(memory_format=memory_format)
    compare(layer, x, "library")


@pytest.mark.interpret
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 13, 17), (3, 1, 4), (3, 4, 1)], ids=str)
@pytest.mark.parametrize("name", ["dense", "timm's default"])
def test_sizes(name, size):
    n, h, w = size
    compare(DENSE[name](), torch.randn(n, 16, h, w), "library")


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["dense", "timm's default"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view, name):
    compare(DENSE[name]().half(), view(torch.randn(2, 16, 6, 5).half()), "library")


@pytest.mark.interpret
@settings(max_examples=20)
@given(specs(acts=("relu", "identity")), sizes)
def test_any_unit(spec, size):
    compare_unit(spec, size, "library")


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["dense", "timm's default"])
def test_bfloat16(name):
    """By the plan's steps: the dispatcher does not trust the interpreter with bfloat16, which is mended here."""
    layer = DENSE[name]().eval().bfloat16()
    randomize_norms(layer)
    x = torch.randn(2, 16, 7, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    plan = planning.plan_schedule("library", Workload(layer.spec, 2, 7, 5, torch.bfloat16, CHIPS["sm_90"]))
    with torch.no_grad(), exact_bfloat16():
        planned, v = prepared_steps(plan, x, list(layer.branches()), layer.gate(), layer.spec)
        v.fill_(math.nan)
        for step in planned:
            step()
        eager, exact = layer(x), copy.deepcopy(layer).double()(x.double())
    assert_errs_like_eager(v, eager, exact)


@pytest.mark.interpret
def test_every_output_element_is_written(nan_in_new_memory):
    """A branch's memory is what the library hands over."""
    for name in ("dense", "paper, stride 2"):
        compare(DENSE[name](), torch.randn(2, 16, 7, 5), "library")


@pytest.mark.interpret
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_propagate_as_in_eager(value):
    compare_bad_value(DENSE["dense"](), value, "library")


@pytest.mark.interpret
def test_many_tiles_are_reduced_before_the_gate(monkeypatch):
    monkeypatch.setattr(steps, "MAX_GATE_TILES", 1)
    compare(DENSE["dense"](), torch.randn(2, 16, 40, 31), "library")


@pytest.mark.interpret
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_any_grad_mode(mode):
    layer, x = DENSE["dense"]().eval().requires_grad_(False), torch.randn(2, 16, 5, 6)
    with mode():
        with use_backend("triton", schedule="library"):
            ours = layer(x)
        assert_same(ours, layer(x))
    assert not ours.requires_grad


@pytest.mark.interpret
def test_schedules_of_one_layer_pack_their_own_weights():
    layer, x = DENSE["dense"]().eval(), torch.randn(2, 16, 5, 6)
    randomize_norms(layer)
    found = []
    with torch.no_grad():
        for schedule in ("store", "library", "store", "library"):
            with use_backend("triton", schedule=schedule):
                found.append(layer(x))
        for v in found:
            assert_same(v, layer(x))
        layer.paths[0].bn.running_mean.add_(1)
        with use_backend("triton", schedule="library"):
            changed = layer(x)
        assert_same(changed, layer(x))
        assert not torch.allclose(changed, found[1])


@pytest.mark.parametrize("branch", [BranchSpec(3), BranchSpec(3, 2), BranchSpec(5, groups=4)], ids=str)
def test_a_branch_lives_in_the_memory_that_the_library_wrote(branch, monkeypatch):
    """No copy: an extra pass to write and one to read."""
    convolve, results = F.conv2d, []
    monkeypatch.setattr(F, "conv2d", lambda *args: results.append(convolve(*args)) or results[-1])
    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 8 // branch.groups, branch.kernel_size, branch.kernel_size)
    y = without_memory(x, (2, 6, 5, 16))
    assert y.untyped_storage().nbytes() == 0
    step = Convolution(x, weight.contiguous(memory_format=torch.channels_last), y, branch, stride=1)
    for _ in range(2):
        step()
        assert y.data_ptr() == results[-1].data_ptr()
        assert_same(y, results[-1].permute(0, 2, 3, 1))
    assert step.multiplies == y.numel() * 8 // branch.groups * branch.kernel_size**2


def test_a_slice_of_the_input_is_copied():
    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4, 4, 3, 3)

    def copied(x_m):
        return Convolution(x_m, weight, x.new_empty(2, 6, 5, 4), BranchSpec(3), 1).copied_bytes

    assert copied(x[:, :4]) == 2 * x.numel() // 2 * 4
    assert copied(x[:, :4].contiguous(memory_format=torch.channels_last)) == 0


def expected(spec, dtype=torch.float16, **changes):
    return preference.expected_plan(Workload(spec, 128, 14, 14, dtype, CHIPS["sm_90"], **changes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_wide_groups_take_it_and_narrow_ones_do_not(chip, dtype):
    for channels, groups, is_wide in ((128, 1, True), (1024, 8, True), (512, 8, False), (128, 32, False)):
        plan = preference.expected_plan(Workload(paper_unit(channels, groups), 32, 14, 14, dtype, chip))
        assert (plan.schedule == "library") is is_wide
        others = {name for name, _ in plan.rejected}
        assert others >= ({"store", "recompute", "merged", "resident"} if is_wide else {"library"})


def test_large_kernels_that_go_tap_by_tap_take_it():
    largest = classic_unit(1024, num_branches=3)  # 7x7, which columns do not take
    for unit in (largest, classic_unit(1024, groups=16)):
        assert expected(unit).schedule == "library"
        assert "tap by tap" in dict(expected(unit).rejected)["store"]
    for unit in (paper_unit(1024), classic_unit(512), paper_unit(512, groups=8)):
        assert expected(unit).schedule != "library"
    assert expected(largest, torch.float32).schedule == "store"
    work = Workload(largest, 128, 7, 7, torch.float16, CHIPS["sm_90"])
    assert not make_training_plan(work, "branches").branch_launches


@needs_narrow_products
def test_5x5_branches_in_groups_of_32_go_by_columns():
    assert expected(classic_unit(1024)).schedule == "store"
    work = Workload(classic_unit(1024), 128, 7, 7, torch.float16, CHIPS["sm_90"])
    assert make_training_plan(work, "branches").branch_launches


def test_reasons_and_passes():
    plan = expected(paper_unit(128, groups=1))
    assert plan.passes == 9
    assert dict(plan.rejected)["store"] == (
        "a branch has 128 channels per group; above 64 the library's convolution is expected to be faster"
    )
    assert expected(classic_unit(128, groups=1, num_branches=3)).passes == 13
    assert expected(paper_unit(128, groups=1), is_converted=True).passes == 11
    # Slices of half the input each: written, read, and read before.
    assert expected(paper_unit(256, groups=1, split_input=True)).passes == 10
    assert dict(expected(paper_unit(128)).rejected)["library"] == (
        "9 passes over memory, against 3: it fuses no convolution"
    )


def test_small_batches_pool_in_shorter_programs():
    def steps_for(n):
        work = Workload(paper_unit(128, groups=1), n, 56, 56, torch.float16, CHIPS["sm_90"])
        return planning.plan_schedule("library", work).reduction.STEPS

    assert 1 < steps_for(1) < steps_for(128)


@pytest.mark.interpret
def test_explain_says_in_words_who_convolves():
    layer = DENSE["dense"]().eval()
    with torch.no_grad(), use_backend("triton", schedule="library"):
        text = str(explain(layer, torch.randn(1, 16, 5, 4)))
    assert "schedule  library" in text
    assert "convolve  by the library: 3x3, 3x3 d2" in text
    assert "pool      ReductionConfig(" in text
    assert "source    pooled_sums: analytic (sm_90)" in text
