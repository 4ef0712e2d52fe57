"""Whole units through schedule "gated", interpreted, its selecting kernel alone, and when it is taken."""

import math

import pytest
import torch
from hypothesis import given, settings

from sk_triton import preference
from sk_triton.analytic import gated as analytic_gated
from sk_triton.bench.grid import classic_unit, paper_unit
from sk_triton.chips import CHIPS
from sk_triton.kernels.config import GatedSelectConfig
from sk_triton.workload import Workload

from .units import sizes, specs
from .versions import needs_narrow_products
from .whole_units import LAYERS, VIEWS, compare, compare_bad_value, compare_unit, image


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, dtype, memory_format):
    layer = LAYERS[name]().to(dtype)
    compare(layer, image(layer, 2, 7, 5).contiguous(memory_format=memory_format), "gated")


@pytest.mark.interpret
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view):
    compare(LAYERS["paper"]().half(), view(torch.randn(2, 16, 6, 5).half()), "gated")


@pytest.mark.interpret
@settings(max_examples=15)
@given(specs(acts=("relu", "identity")), sizes)
def test_any_unit(spec, size):
    compare_unit(spec, size, "gated")


@pytest.mark.interpret
def test_every_output_element_is_written(nan_in_new_memory):
    for name in ("paper, stride 2", "classic", "depthwise"):
        layer = LAYERS[name]().half()
        compare(layer, image(layer, 2, 7, 5), "gated")


@pytest.mark.interpret
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_propagate_as_in_eager(value):
    compare_bad_value(LAYERS["paper"](), value, "gated")


@pytest.mark.interpret
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("m", "c", "d", "pixels", "tiles"), [(2, 40, 20, 33, 5), (1, 8, 3, 4, 1), (3, 24, 32, 65, 2)], ids=str
)
def test_the_kernel_takes_its_sizes_in_any_blocks(m, c, d, pixels, tiles, has_bias, nan_in_new_memory):
    from sk_triton.kernels.gated_select import gated_select_fwd

    n = 2
    u, partial = torch.randn(m, n, pixels, 1, c), torch.randn(n, tiles, c)
    reduce_weight, select_weight = torch.randn(d, c), torch.randn(m, c, d)
    scale, shift = torch.randn(d), torch.randn(d)
    bias = torch.randn(m, c) if has_bias else None
    v = torch.empty(n, c, pixels, 1)
    config = GatedSelectConfig(BLOCK_P=16, BLOCK_C=16, BLOCK_S=16, BLOCK_D=16, BLOCK_T=2)
    gated_select_fwd(
        u, partial, reduce_weight, scale, shift, select_weight, bias, v, has_relu=True, config=config
    )()
    s = partial.double().sum(1) / pixels
    z = torch.relu(s @ reduce_weight.double().T * scale + shift)
    logits = torch.einsum("mcd,nd->nmc", select_weight.double(), z)
    attention = (logits if bias is None else logits + bias).softmax(1)
    expected = torch.einsum("nmc,mnpqc->ncpq", attention, u.double())
    torch.testing.assert_close(v.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.interpret
def test_what_the_kernel_does_not_take_is_refused():
    from sk_triton.kernels.gated_select import gated_select_fwd

    u, partial = torch.randn(2, 1, 2, 3, 16), torch.randn(1, 1, 16)
    weights = torch.randn(20, 16), torch.ones(20), torch.zeros(20), torch.randn(2, 16, 20), None
    config = GatedSelectConfig(BLOCK_P=16, BLOCK_C=16, BLOCK_S=16, BLOCK_D=16)
    with pytest.raises(ValueError, match=r"v must have equally spaced pixels, got strides \(128, 8, 4, 1\)"):
        gated_select_fwd(
            u, partial, *weights, torch.empty(1, 16, 2, 4)[..., :3], has_relu=True, config=config
        )


def plan(spec, n, size, dtype=torch.float16, chip="sm_90"):
    return preference.fastest_plan(Workload(spec, n, size, size, dtype, CHIPS[chip]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("channels", "size"),
    [(128, 56), (256, 28), (512, 14), pytest.param(1024, 7, marks=needs_narrow_products)],
)
def test_one_sample_of_every_stage_takes_two_launches(channels, size, dtype):
    for spec in (paper_unit(channels), classic_unit(channels)):
        found = plan(spec, 1, size, dtype)
        assert found.schedule == "gated"
        assert dict(found.rejected).keys() == {
            "reference",
            "store",
            "recompute",
            "merged",
            "resident",
            "library",
        }
        assert all(dict(found.rejected).values())


def test_large_batches_take_other_schedules_and_the_plan_says_why():
    assert "do not run at once" in dict(plan(paper_unit(128), 2, 56).rejected)["gated"]
    many = plan(paper_unit(2048), 1, 14)
    assert "MiB more of weights and sums" in dict(many.rejected)["gated"]


def test_configs_cover_any_size():
    def config(spec, size):
        work = Workload(spec, 1, size, size, torch.float16, CHIPS["sm_90"])
        return analytic_gated.gated_select_config(work)

    tiny, stage1 = config(paper_unit(1, groups=1), 1), config(paper_unit(128), 56)
    assert (tiny.BLOCK_P, tiny.BLOCK_C) == (1, 16)
    assert (stage1.BLOCK_P, stage1.BLOCK_C) == (64, 64)


@needs_narrow_products
@pytest.mark.parametrize(
    ("channels", "size", "most"), [(128, 56, 1), (256, 28, 2), (512, 14, 4), (1024, 7, 8)]
)
def test_how_many_samples_an_h100_takes_in_16_bits(channels, size, most):
    taken = [n for n in range(1, 17) if plan(paper_unit(channels), n, size).schedule == "gated"]
    assert taken == list(range(1, most + 1))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("channels", "size"), [(128, 56), (256, 28), (512, 14), (1024, 7)])
def test_it_is_taken_up_to_some_batch_and_never_above(channels, size, chip):
    for spec in (paper_unit(channels), classic_unit(channels)):
        for dtype in (torch.float16, torch.float32):
            batches = (1, 2, 4, 16)
            taken = [plan(spec, n, size, dtype, chip).schedule == "gated" for n in batches]
            assert taken == sorted(taken, reverse=True)
            # Of the classic class in the last stage the library convolves; sm_86 has 84 processors for 98 programs.
            if spec.branch_act == "relu" and (chip, channels) != ("sm_86", 128):
                assert taken[0]
