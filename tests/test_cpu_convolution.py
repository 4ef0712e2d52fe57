"""Weights laid out for oneDNN once give what PyTorch's convolution gives, and are taken where they should be."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sk_triton import BranchSpec, SelectiveKernel, SKConv, dispatch, use_backend
from sk_triton.cpu import choice as cpu
from sk_triton.cpu.convolution import _has_operators, convolution, packs_weights

from .tolerances import assert_errs_like_eager, assert_same, assert_typical_errors_like_eager

needs_packing = pytest.mark.skipif(not _has_operators(), reason="needs oneDNN on an x86 processor")
LAST = torch.channels_last


@needs_packing
@pytest.mark.parametrize("has_relu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("branch", "stride"),
    [(BranchSpec(3, 2, 4), 1), (BranchSpec(5, 1, 8), 2), (BranchSpec(1), 1), (BranchSpec(3, 1, 32), 3)],
)
@pytest.mark.parametrize("size", [(1, 7, 7), (3, 12, 5)], ids=str)
def test_both_convolve_alike(size, branch, stride, has_bias, has_relu):
    n, h, w = size
    weight = torch.randn(32, 32 // branch.groups, *[branch.kernel_size] * 2)
    bias = torch.randn(32) if has_bias else None
    plain, packed, exact = (
        convolution(*parameters, branch, stride, has_relu, is_packed)
        for parameters, is_packed in (
            ((weight, bias), False),
            ((weight, bias), True),
            ((weight.double(), None if bias is None else bias.double()), False),
        )
    )
    whole = torch.randn(n, 64, h, w).contiguous(memory_format=LAST)
    for x in (whole[:, :32], whole[:, 32:], torch.randn(n, 32, h, w).contiguous(memory_format=LAST)):
        found, expected = packed(x), plain(x)
        assert_same(found, expected)
        assert_errs_like_eager(found, expected, exact(x.double()))


@pytest.mark.parametrize("layout", ["columns", "expanded"])
def test_biases_of_any_strides(layout):
    layer = SKConv(8, M=2, G=2, r=2, L=4)
    table = torch.randn(8, 2)
    for i, conv in enumerate(layer.convs):
        conv.bias = nn.Parameter(table[:, i] if layout == "columns" else torch.tensor(0.5 + i).expand(8))
        assert not conv.bias.is_contiguous()
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        with use_backend("reference"):
            expected = layer(x)
        assert_same(layer(x), expected)


@needs_packing
def test_where_weights_are_packed():
    assert packs_weights(torch.float32)
    assert not packs_weights(torch.bfloat16)
    assert not packs_weights(torch.float64)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not packs_weights(torch.float32)
    with FlopCounterMode(display=False):
        assert not packs_weights(torch.float32)


@needs_packing
@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("size", [(4, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("make", [SelectiveKernel, lambda c: SKConv(c, 3, 1, 16)], ids=["timm", "classic"])
@torch.no_grad()
def test_few_pixels_under_many_weights_are_converted(make, size, samples, monkeypatch):
    monkeypatch.setattr(cpu, "_part_samples", lambda *args: samples)
    cpu._plan.cache_clear()
    found = []
    for _ in range(4):
        module, x = make(64).eval(), torch.randn(3, 64, *size)
        plan = dispatch.choose(x, module.branches(), module.gate(), module.spec, backend="torch")
        assert (plan.schedule, plan.is_packed) == ("folded", True)
        v = module(x)
        assert torch.equal(module(x), v)
        with use_backend("reference"):
            eager, exact = module(x), copy.deepcopy(module).double()(x.double())
        assert v.stride() == eager.stride()
        found.append((v, eager, exact))
    assert_typical_errors_like_eager(found)
    many = torch.randn(3, 64, 64, 64)
    plan = dispatch.choose(many, module.branches(), module.gate(), module.spec, backend="torch")
    assert not plan.is_packed
    cpu._plan.cache_clear()


def layer():
    return SelectiveKernel(16, groups=4, split_input=False).eval()


def image():
    return torch.randn(2, 16, 9, 8).contiguous(memory_format=LAST)


@torch.no_grad()
def test_a_recorded_call_follows_the_library_and_the_counters():
    """Operations of both branches and of the gate are counted, though the call has been recorded before."""
    module, x = layer(), image()
    v = module(x)
    with FlopCounterMode(display=False) as counter:
        assert_same(module(x), v)
    convolutions = 2 * 2 * x.numel() * 4 * 9
    assert counter.get_total_flops() > convolutions
    with torch.backends.mkldnn.flags(enabled=False):
        assert_same(module(x), v)


@torch.no_grad()
def test_packed_weights_follow_the_parameters_and_are_left_out_of_copies():
    module, x = layer(), image()
    module(x)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), module(x))
    module.paths[0].conv.weight.mul_(2)
    with use_backend("reference"):
        expected = module(x)
    assert_same(module(x), expected)
