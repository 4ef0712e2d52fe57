"""Changes made to a built layer that its functional path would not see: refused or noticed, not ignored."""

import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

from sk_triton import BranchSpec, SelectiveKernel, SKConv, SKSpec, use_backend
from sk_triton.checks import act_name
from sk_triton.functional import run, sk_conv
from sk_triton.pack_cache import PackCache
from sk_triton.params import Branch, Gate


@pytest.fixture(
    params=[lambda: SKConv(16, M=2, G=4, r=4), lambda: SelectiveKernel(16)], ids=["SKConv", "SelectiveKernel"]
)
def make(request):
    return request.param


def test_changed_convolution_settings_are_refused(make):
    layer = make()
    conv = next(m for m in layer.modules() if isinstance(m, nn.Conv2d))
    conv.stride = (2, 2) if conv.stride == (1, 1) else (1, 1)
    with pytest.raises(
        ValueError, match=r"stride, padding, .* must stay as built, \(\(., .\), .*, got \(\(., .\), "
    ):
        layer(torch.randn(2, 16, 5, 5))


def test_weights_that_hooks_would_compute_are_refused(make):
    layer = make()
    conv = next(m for m in layer.modules() if isinstance(m, nn.Conv2d))
    prune.l1_unstructured(conv, "weight", 0.5)
    with pytest.raises(RuntimeError, match="L1Unstructured recomputes a weight in a forward hook"):
        layer(torch.randn(2, 16, 5, 5))
    prune.remove(conv, "weight")
    layer(torch.randn(2, 16, 5, 5))


class Adapter(nn.Module):
    """As LoRA's layers are: the base layer's weight, and something added to what it computes."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.ones(()))

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) * self.scale


class DoublingConv2d(nn.Conv2d):
    def _conv_forward(self, *args):
        return 2 * super()._conv_forward(*args)


def test_layers_that_compute_something_else_are_refused(make):
    layer = make()
    conv = next(m for m in layer.modules() if isinstance(m, nn.Conv2d))
    conv.__class__ = DoublingConv2d
    with pytest.raises(RuntimeError, match="DoublingConv2d stands where a Conv2d or a Linear was built"):
        layer(torch.randn(2, 16, 5, 5))
    linear = SKConv(16, M=2, G=4, r=4)
    linear.fc = Adapter(linear.fc)
    with pytest.raises(RuntimeError, match="fc: Adapter stands where"):
        linear(torch.randn(2, 16, 5, 5))
    linear = SKConv(16, M=2, G=4, r=4)
    linear.convs[1] = Adapter(linear.convs[1])
    with pytest.raises(RuntimeError, match=r"convs\.1: Adapter stands where"):
        linear(torch.randn(2, 16, 5, 5))
    wrapped = SelectiveKernel(16)
    wrapped.paths[1].conv = Adapter(wrapped.paths[1].conv)
    with pytest.raises(RuntimeError, match=r"paths\.1\.conv: Adapter stands where"):
        wrapped(torch.randn(2, 16, 5, 5))


def test_replaced_forwards_are_refused_where_they_would_not_run(make):
    """As adapters, quantizers and offloading attach themselves."""
    layer, x = make(), torch.randn(2, 16, 5, 5)
    conv = next(m for m in layer.modules() if isinstance(m, nn.Conv2d))
    conv.forward = lambda x: 2 * type(conv).forward(conv, x)
    with pytest.raises(RuntimeError, match="the forward of a Conv2d has been replaced"):
        layer(x)


@pytest.mark.parametrize("part", ["paths.0.bn", "paths.0.act", "paths.0.drop", "attn.act"])
def test_replaced_forwards_run_in_the_reference(part):
    layer, x = SelectiveKernel(16, drop_layer=nn.Dropout2d).eval(), torch.randn(2, 16, 5, 5)
    module = layer.get_submodule(part)
    with torch.no_grad():
        for _ in range(2):
            before = layer(x)
        module.forward = lambda x: 2 * type(module).forward(module, x)
        assert not torch.allclose(layer(x), before)
        with use_backend("torch"), pytest.raises(RuntimeError, match="has had its forward replaced"):
            layer(x)


@pytest.mark.parametrize("name", ["paths.0", "paths.0.conv", "attn", "attn.fc_select"])
def test_hooks_that_never_run_are_warned_of(name):
    layer, x = SelectiveKernel(16).eval(), torch.randn(2, 16, 5, 5)
    part = layer.get_submodule(name)
    part.register_forward_hook(lambda *_: pytest.fail("ran"))
    with pytest.warns(RuntimeWarning, match=f"hooks of {name}, a {type(part).__name__}, never run"):
        layer(x)
    with torch.no_grad():
        torch.compile(layer, fullgraph=True, backend="eager")(x)  # which has no warnings


class relu(nn.Module):  # noqa: N801
    def forward(self, x):
        return nn.functional.leaky_relu(x)


def identity(x):
    return 2 * x


def test_activations_are_not_told_by_their_names():
    assert act_name(relu()) == f"{__name__}.relu"
    assert act_name(identity) == f"{__name__}.identity"
    assert act_name(nn.ReLU()) == act_name(torch.relu) == act_name(nn.functional.relu) == "relu"
    layer, x = SelectiveKernel(16, act_layer=relu).eval(), torch.randn(2, 16, 5, 5)
    with torch.no_grad(), use_backend("reference"):
        expected = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


class CountingNorm(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("steps", torch.zeros(()))


def test_norms_of_ones_own_may_hold_what_they_like():
    SelectiveKernel(16, norm_layer=CountingNorm)(torch.randn(2, 16, 5, 5))


def norms_of(layer):
    return [m for m in layer.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.interpret
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("size", [5, 7], ids=["same size", "another size"])
def test_statistics_that_the_norms_alone_take_anew_are_noticed(backend, size):
    """PyTorch's batch norm updates running statistics without counting it: their counters tell."""
    layer = SelectiveKernel(8, groups=2, split_input=False).eval()
    x, others = torch.randn(2, 8, 5, 5), 3 * torch.randn(4, 8, size, size) + 1
    with torch.no_grad():
        for _ in range(3):
            with use_backend(backend):
                before = layer(x)
        for norm in norms_of(layer):
            norm.train()
        with use_backend("reference"):
            for _ in range(9):
                layer(others)
        for norm in norms_of(layer):
            norm.eval()
        with use_backend("reference"):
            expected = layer(x)
        for _ in range(3):
            with use_backend(backend):
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_norms_of_another_size_are_refused(size):
    for place in ("branches[1]", "gate"):
        layer = SelectiveKernel(8, groups=2, split_input=False, rd_channels=8)
        if place == "gate":
            layer.attn.bn = nn.BatchNorm2d(size)
        else:
            layer.paths[1].bn = nn.BatchNorm2d(size)
        complaint = f"{place}.norm.weight must have shape [8], got [{size}]"
        with pytest.raises(ValueError, match=re.escape(complaint)):
            layer(torch.randn(2, 8, 5, 5))


def replica(module):
    """As ``nn.DataParallel`` makes them: parameters are plain attributes."""
    made = module._replicate_for_data_parallel()
    made._modules = {name: replica(child) for name, child in module._modules.items()}
    for name, parameter in module._parameters.items():
        if parameter is None:
            made._parameters[name] = None
        else:
            setattr(made, name, parameter.view_as(parameter))
    return made


def test_a_replicas_norms_are_trained():
    layer = SelectiveKernel(8, groups=2, split_input=False).eval().requires_grad_(False)
    layer.paths[0].bn.weight.requires_grad_()
    assert replica(layer)(torch.randn(2, 8, 5, 5)).requires_grad


def test_what_a_mode_makes_of_weights_is_not_kept():
    layer, x = SelectiveKernel(8, groups=2, split_input=False).eval(), torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            layer(x)
        assert type(layer(x)) is torch.Tensor


@pytest.mark.parametrize("parent", ["paths.0", "paths.0.bn"])
def test_an_activation_that_a_part_gets_is_noticed(parent):
    layer, x = SelectiveKernel(8, split_input=False, act_layer=None).eval(), torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        layer.get_submodule(parent).add_module("act", nn.ReLU())
        with pytest.raises(ValueError, match="act must be"):
            layer(x)


def test_one_cache_serves_units_of_several_specs():
    branches = tuple(Branch(torch.randn(8, 8, 3, 3)) for _ in range(2))
    gate = Gate(torch.randn(4, 8), None, None, None, (torch.randn(16, 4),))
    x, cache = torch.randn(1, 8, 9, 9), PackCache()
    settings = {"branch_norm": False, "branch_act": "identity", "gate_norm": False, "gate_act": "identity"}
    for dilation, stride in ((1, 1), (2, 1), (1, 2)):
        kinds = (BranchSpec(3, dilation), BranchSpec(3, dilation + 1))
        spec = SKSpec(8, 8, kinds, stride=stride, gate_width=4, **settings)
        with torch.no_grad():
            v = run(x, branches, gate, spec, cache=cache)
            with use_backend("reference"):
                torch.testing.assert_close(v, sk_conv(x, branches, gate, spec), rtol=1e-4, atol=1e-4)


def test_parts_that_are_no_tensors_are_named():
    layer = SKConv(16, M=2, G=4, r=4)
    layer.fcs[0].bias = None
    with pytest.raises(TypeError, match=r"gate.select_bias\[0\] must be a torch.Tensor, got NoneType"):
        layer(torch.randn(2, 16, 5, 5))
