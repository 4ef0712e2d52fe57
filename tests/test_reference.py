"""The oracle: its derivatives, and equality with the classic class and timm's module."""

import itertools
import math
from functools import partial

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.selective_kernel import SelectiveKernel as TimmSelectiveKernel
from torch import nn

from sk_triton import BranchSpec, SelectiveKernel, SKConv, SKSpec, reference
from sk_triton.bench.measuring.peers import ClassicSKConv
from sk_triton.functional import sk_conv

from .tolerances import assert_same
from .units import random_unit, randomize_norms, specs, tensors


def rebuilt(spec, branches, gate, values):
    """The unit with its own tensors replaced by ``values``, in the order of ``own_tensors``."""
    values = iter(values)
    branches = tuple(
        b._replace(weight=next(values), bias=None if b.bias is None else next(values)) for b in branches
    )
    gate = gate._replace(
        reduce_weight=next(values),
        reduce_bias=None if gate.reduce_bias is None else next(values),
        select_weight=tuple(next(values) for _ in gate.select_weight),
        select_bias=None if gate.select_bias is None else tuple(next(values) for _ in gate.select_bias),
    )
    return branches, gate


def own_tensors(branches, gate):
    found = [t for b in branches for t in (b.weight, b.bias)] + [gate.reduce_weight, gate.reduce_bias]
    found += [*gate.select_weight, *(gate.select_bias or ())]
    return [t for t in found if t is not None]


@settings(max_examples=60)
@given(specs(), st.integers(1, 2), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**16))
def test_gradcheck(spec, n, h, w, seed):
    torch.manual_seed(seed)
    branches, gate = random_unit(spec)
    x = torch.randn(n, spec.in_channels, h, w, dtype=torch.float64, requires_grad=True)

    def unit(x, *values):
        return sk_conv(x, *rebuilt(spec, branches, gate, values), spec)

    assert torch.autograd.gradcheck(unit, (x, *own_tensors(branches, gate)), fast_mode=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("split_input", [False, True])
def test_gradcheck_of_every_element_and_norm(training, split_input):
    branches = (BranchSpec(3, 1, 2), BranchSpec(3, 2, 2))
    spec = SKSpec(4, 4, branches, gate_width=2, split_input=split_input, gate_bias=True, select_bias=True)
    branches, gate = random_unit(spec, training=training)
    x = torch.randn(3, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    norms = [p for part in (*branches, gate) for p in part.norm.parameters()]

    def unit(x, *values):
        return sk_conv(x, *rebuilt(spec, branches, gate, values), spec)

    inputs = (x, *own_tensors(branches, gate))
    assert torch.autograd.gradcheck(unit, inputs)
    # gradcheck perturbs in place, so the norms' own parameters serve as inputs that the unit need not take.
    assert torch.autograd.gradcheck(lambda *_: unit(*inputs), norms)


def test_gradgradcheck():
    spec = SKSpec(2, 2, (BranchSpec(3), BranchSpec(3, 2)), gate_width=2, branch_act="SiLU", gate_act="SiLU")
    branches, gate = random_unit(spec)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: sk_conv(x, branches, gate, spec), (x,), fast_mode=True)


@settings(max_examples=30)
@given(specs(acts=("relu", "identity")), st.integers(0, 2**16))
def test_every_parameter_takes_part(spec, seed):
    torch.manual_seed(seed)
    branches, gate = random_unit(spec)
    x = torch.randn(2, spec.in_channels, 6, 5, dtype=torch.float64, requires_grad=True)
    parameters = [x, *tensors(branches, gate)]
    grads = torch.autograd.grad(sk_conv(x, branches, gate, spec).square().sum(), parameters)
    assert all(g.isfinite().all() for g in grads)


def test_equations_by_hand():
    """One output value of a two-branch unit, from the paper's equations and plain Python arithmetic."""
    branches = (BranchSpec(1), BranchSpec(3))
    spec = SKSpec(1, 1, branches, branch_norm=False, gate_width=1, gate_norm=False)
    x = torch.tensor([[[[1.0, 2.0], [3.0, -4.0]]]], dtype=torch.float64)
    branches, gate = random_unit(spec)
    with torch.no_grad():
        branches[0].weight.fill_(2)
        branches[1].weight.fill_(1)
        gate.reduce_weight.fill_(0.5)
        gate.select_weight[0].fill_(0.25)
        gate.select_weight[1].fill_(-0.5)
    tilde = [2.0, 4.0, 6.0, 0.0]
    hat = [2.0, 2.0, 2.0, 2.0]  # each 3x3 window covers the whole image: 1 + 2 + 3 - 4
    s = sum(t + h for t, h in zip(tilde, hat, strict=True)) / 4
    z = max(0.5 * s, 0)
    a = math.exp(0.25 * z) / (math.exp(0.25 * z) + math.exp(-0.5 * z))
    expected = [a * t + (1 - a) * h for t, h in zip(tilde, hat, strict=True)]
    v = reference.sk_conv(x, branches, gate, spec)
    assert v.flatten().tolist() == pytest.approx(expected, rel=1e-14)


SEED_GRID = [
    pytest.param(features, M, G, r, stride, L, id=f"{features}-M{M}-G{G}-r{r}-s{stride}-L{L}")
    for (features, G), M, stride, (r, L) in itertools.product(
        [(8, 1), (8, 2), (8, 8), (12, 4)], [1, 2, 3, 4], [1, 2, 3], [(2, 4), (2.5, 1)]
    )
]


@pytest.mark.parametrize(("features", "M", "G", "r", "stride", "L"), SEED_GRID)
def test_equals_the_seeds_class(features, M, G, r, stride, L):
    peer = ClassicSKConv(features, M, G, r, stride, L).double()
    ours = SKConv(features, M, G, r, stride, L, dtype=torch.float64)
    ours.load_state_dict(peer.state_dict())
    assert_equal_modules(ours, peer, (3, features, 7, 6))
    assert list(ours.state_dict()) == list(peer.state_dict())
    torch.nn.init.normal_(ours.fcs[-1].weight)
    peer.load_state_dict(ours.state_dict())
    x = torch.randn(2, features, 5, 5, dtype=torch.float64)
    assert_same(ours(x), peer(x))


def assert_equal_modules(ours, peer, shape, dtype=torch.float64):
    """Equal results, input gradients, parameter gradients and buffers."""
    x = torch.randn(shape, dtype=dtype)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    torch.manual_seed(1)
    v = ours(xs[0])
    torch.manual_seed(1)
    expected = peer(xs[1])
    assert_same(v, expected)
    direction = torch.randn_like(expected)
    v.backward(direction)
    expected.backward(direction)
    assert_same(xs[0].grad, xs[1].grad)
    peers = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_same(parameter.grad, peers[name].grad)
    peers = dict(peer.named_buffers())
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, peers[name])


TIMM_GRID = [
    {"in_channels": 16},
    {"in_channels": 16, "out_channels": 24},
    {"in_channels": 16, "out_channels": 8, "stride": 2},
    {"in_channels": 16, "split_input": False},
    {"in_channels": 16, "split_input": False, "groups": 4},
    {"in_channels": 16, "split_input": False, "groups": 16},
    {"in_channels": 16, "groups": 8, "stride": 2},
    {"in_channels": 16, "out_channels": 4, "split_input": False, "groups": 16},  # min(4, 16)
    {"in_channels": 16, "keep_3x3": False},
    {"in_channels": 16, "keep_3x3": False, "dilation": 2, "stride": 2},
    {"in_channels": 16, "dilation": 2},
    {"in_channels": 16, "kernel_size": 3},
    {"in_channels": 16, "kernel_size": 5, "keep_3x3": False, "groups": 2},
    {"in_channels": 12, "kernel_size": [3, 5, 7]},
    {"in_channels": 12, "kernel_size": [7, 3, 5], "keep_3x3": False, "split_input": False, "stride": 2},
    {"in_channels": 16, "kernel_size": [5]},
    {"in_channels": 16, "rd_ratio": 0.5},
    {"in_channels": 40, "rd_ratio": 1 / 3, "rd_divisor": 4},
    {"in_channels": 16, "rd_channels": 5},
    {"in_channels": 48, "rd_ratio": 1 / 8, "rd_divisor": 16},
    {"in_channels": 16, "act_layer": nn.SiLU},
    {"in_channels": 16, "act_layer": nn.PReLU},
    {"in_channels": 16, "act_layer": nn.Tanh, "stride": 2},
    {"in_channels": 16, "act_layer": None},
    {"in_channels": 16, "act_layer": nn.Identity},
    {"in_channels": 64, "norm_layer": nn.GroupNorm},
    {"in_channels": 16, "norm_layer": partial(nn.GroupNorm, num_groups=4, eps=1e-3)},
    {"in_channels": 16, "norm_layer": partial(nn.BatchNorm2d, momentum=0.3, eps=1e-3)},
    {"in_channels": 16, "norm_layer": partial(nn.BatchNorm2d, affine=False), "groups": 2},
    # timm swaps a norm for its own with an activation, whose default eps is 1e-5 whatever the norm's.
    {"in_channels": 16, "norm_layer": partial(timm.layers.LayerNorm2d, eps=1e-5)},
    {"in_channels": 16, "drop_layer": nn.Dropout2d},
    {"in_channels": 16, "drop_layer": nn.Dropout2d, "act_layer": nn.PReLU},
    {"in_channels": 16, "aa_layer": nn.AvgPool2d, "stride": 2},
    {"in_channels": 16, "aa_layer": timm.layers.BlurPool2d, "stride": 2, "split_input": False},
    {"in_channels": 16, "aa_layer": timm.layers.BlurPool2d},  # timm: no anti-aliasing at stride 1
    {"in_channels": 16, "aa_layer": nn.AvgPool2d, "stride": 3},
]


def label(settings):
    return "-".join(
        f"{name}={getattr(value, '__name__', value)}"
        for name, value in settings.items()
        if not isinstance(value, partial)
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("settings", TIMM_GRID, ids=label)
def test_equals_timm(settings, training):
    peer = TimmSelectiveKernel(**settings).double()
    randomize_norms(peer)
    ours = SelectiveKernel(**settings, dtype=torch.float64)
    assert list(ours.state_dict()) == list(peer.state_dict())
    ours.load_state_dict(peer.state_dict())
    assert_equal_modules(ours.train(training), peer.train(training), (3, settings["in_channels"], 9, 7))
    again = TimmSelectiveKernel(**settings).double()
    again.load_state_dict(ours.state_dict())
    x = torch.randn(2, settings["in_channels"], 5, 5, dtype=torch.float64)
    assert_same(ours.eval()(x), again.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_near_float64(dtype):
    layer = SelectiveKernel(16, groups=4, split_input=False, dtype=torch.float64)
    randomize_norms(layer)
    x = torch.randn(2, 16, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        exact = layer.eval()(x)
        low = layer.to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    assert (low.double() - exact).abs().max() < 16 * torch.finfo(dtype).eps * exact.abs().max()


def test_four_dimensional_gate_weights_are_the_same():
    spec = SKSpec(8, 8, (BranchSpec(3), BranchSpec(5)), gate_width=3)
    branches, gate = random_unit(spec)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    stacked = gate._replace(
        reduce_weight=gate.reduce_weight[:, :, None, None],
        select_weight=(torch.cat(gate.select_weight)[:, :, None, None],),
    )
    assert torch.equal(sk_conv(x, branches, gate, spec), sk_conv(x, branches, stacked, spec))


def test_functional_takes_plain_functions():
    spec = SKSpec(4, 4, (BranchSpec(3),), branch_norm=False, gate_norm=False, gate_width=2)
    branches, gate = random_unit(spec)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    plain = [b._replace(act=F.relu) for b in branches]
    assert torch.equal(
        sk_conv(x, plain, gate._replace(act=torch.relu), spec), sk_conv(x, branches, gate, spec)
    )
