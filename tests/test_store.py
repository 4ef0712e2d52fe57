"""Whole units through schedule "store", interpreted, against float64, the classic class and timm's module."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings

from sk_triton import SelectiveKernel, SKConv, dispatch, steps, use_backend
from sk_triton.bench.measuring.peers import ClassicSKConv
from sk_triton.kernels.config import SelectConfig

from .tolerances import assert_errs_like_eager, assert_same
from .units import randomize_norms, sizes, specs
from .whole_units import LAYERS, VIEWS, compare, compare_bad_value, compare_unit

pytestmark = pytest.mark.interpret

NAMES = (
    "classic",
    "classic, three branches, stride 2",
    "classic, one branch",
    "paper",
    "paper, stride 2",
    "timm's default",
    "split, groups",
    "out of in",
    "true 5x5",
    "dilation 2",
    "depthwise",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_layers(name, dtype, memory_format):
    compare(
        LAYERS[name]().to(dtype),
        torch.randn(2, LAYERS[name]().spec.in_channels, 7, 5)
        .to(dtype)
        .contiguous(memory_format=memory_format),
    )


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 13, 17), (3, 1, 4)], ids=str)
@pytest.mark.parametrize("name", ["classic", "paper"])
def test_sizes(name, size):
    n, h, w = size
    compare(LAYERS[name](), torch.randn(n, 16, h, w))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view):
    compare(LAYERS["paper"]().half(), view(torch.randn(2, 16, 6, 5).half()))


@settings(max_examples=25)
@given(specs(acts=("relu", "identity")), sizes)
def test_any_unit(spec, size):
    compare_unit(spec, size, "store")


def test_classic_state_dict():
    peer, x = ClassicSKConv(16, M=2, G=4, r=4).eval(), torch.randn(2, 16, 7, 5)
    layer = SKConv(16, M=2, G=4, r=4).eval()
    layer.load_state_dict(peer.state_dict())
    with torch.no_grad():
        assert_same(layer(x), peer(x))
        with use_backend("triton", schedule="store"):
            assert_same(layer(x), peer(x))


@pytest.mark.parametrize(
    "settings", [{}, {"groups": 4}, {"groups": 4, "split_input": False, "stride": 2}], ids=str
)
def test_timm_state_dict(settings):
    timm_layers = pytest.importorskip("timm.layers")
    timm, x = timm_layers.SelectiveKernel(16, **settings).eval(), torch.randn(2, 16, 7, 5)
    randomize_norms(timm)
    layer = SelectiveKernel(16, **settings).eval()
    layer.load_state_dict(timm.state_dict())
    with torch.no_grad():
        assert_same(layer(x), timm(x))
        with use_backend("triton", schedule="store"):
            assert_same(layer(x), timm(x))


def test_autocast():
    layer, x = LAYERS["paper"]().eval(), torch.randn(2, 16, 7, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        with use_backend("triton", schedule="store"):
            ours = layer(x)
        with use_backend("reference"):
            eager = layer(x)
    assert ours.dtype == torch.float16
    assert_errs_like_eager(ours, eager, copy.deepcopy(layer).double()(x.double()).detach())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_propagate_as_in_eager(value):
    compare_bad_value(LAYERS["paper"](), value, "store")


def test_many_tiles_are_reduced_before_the_gate(monkeypatch):
    monkeypatch.setattr(steps, "MAX_GATE_TILES", 1)
    compare(LAYERS["paper"](), torch.randn(2, 16, 20, 9))


def test_empty_batch():
    with torch.no_grad(), use_backend("triton", schedule="store"):
        assert LAYERS["paper"]().eval()(torch.empty(0, 16, 7, 5)).shape == (0, 16, 7, 5)


def test_every_output_element_is_written(nan_in_new_memory):
    for name in ("paper, stride 2", "classic", "depthwise"):
        compare(LAYERS[name](), torch.randn(2, 16, 7, 5))


def test_select_config_covers_any_size():
    from sk_triton.analytic.pixelwise import select_config

    assert select_config(1, 1) == SelectConfig(BLOCK_P=1, BLOCK_C=1)
    assert select_config(49, 1024).BLOCK_C == 128


def test_run_refuses_other_plans():
    layer, x = LAYERS["paper"](), torch.randn(1, 16, 7, 5)
    plan = dispatch.choose(x, layer.branches(), layer.gate(), layer.spec, backend="reference")
    with pytest.raises(ValueError, match="plan must have backend 'triton' or 'torch', got 'reference'"):
        dispatch.run(plan, x, layer.branches(), layer.gate(), layer.spec, None)
