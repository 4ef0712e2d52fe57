"""`layer.fuse()`: the same results without norms, and a layer that goes on being one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torchvision.ops.misc import FrozenBatchNorm2d

from sk_triton import SelectiveKernel, SKConv, explain, reference, use_backend

from .tolerances import assert_errs_like_eager, assert_same
from .units import randomize_norms


def make(**kwargs):
    layer = SelectiveKernel(16, groups=4, split_input=False, **kwargs)
    randomize_norms(layer)
    return layer.eval()


def exact(layer, x):
    layer = copy.deepcopy(layer).double()
    with torch.no_grad():
        return reference.sk_conv(x.double(), layer.branches(), layer.gate(), layer.spec)


def eager(layer, x):
    with torch.no_grad(), use_backend("reference"):
        return layer(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "kwargs", [{}, {"act_layer": nn.PReLU, "drop_layer": nn.Dropout}, {"act_layer": None}]
)
def test_results_stay_the_same_up_to_rounding(dtype, kwargs, memory_format):
    layer, x = make(**kwargs).to(dtype), torch.randn(4, 16, 13, 9).to(dtype)
    x = x.contiguous(memory_format=memory_format)
    before, expected = eager(layer, x), exact(layer, x)
    assert layer.fuse() is layer
    assert_errs_like_eager(eager(layer, x), before, expected)
    with torch.no_grad():
        assert_errs_like_eager(layer(x), before, expected)


def test_folding_is_exact_to_rounding_in_float64():
    layer, x = make().double(), torch.randn(2, 16, 9, 8, dtype=torch.float64)
    before = eager(layer, x)
    torch.testing.assert_close(eager(layer.fuse(), x), before, rtol=1e-12, atol=1e-13)


def test_no_norm_is_left_and_every_folded_convolution_has_a_bias():
    layer = make(act_layer=nn.PReLU).fuse()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in layer.modules())
    assert sorted(layer.state_dict()) == [
        "attn.fc_reduce.bias", "attn.fc_reduce.weight", "attn.fc_select.weight",
        "paths.0.bn.act.weight", "paths.0.conv.bias", "paths.0.conv.weight",
        "paths.1.bn.act.weight", "paths.1.conv.bias", "paths.1.conv.weight",
    ]  # fmt: skip
    spec = layer.spec
    assert (spec.branch_norm, spec.branch_bias, spec.gate_norm, spec.gate_bias) == (False, True, False, True)


def test_fusing_twice_is_fusing_once():
    layer = make().fuse()
    once = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.fuse()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, once[name])


def test_a_layer_without_norms_stays_as_it_is():
    layer = SKConv(16, M=2, G=4, r=4).eval()
    tensors = dict(layer.named_parameters())
    assert layer.fuse() is layer
    assert dict(layer.named_parameters()) == tensors


def test_training_mode_is_refused_and_nothing_is_changed():
    for layer in (make().train(), SKConv(16, M=2, G=4, r=4)):
        with pytest.raises(RuntimeError, match=r"fuse\(\) is for inference: call layer.eval\(\) first"):
            layer.fuse()
    layer = make()
    layer.attn.bn.train()
    keys = list(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"the norm of attn.fc_reduce is in training mode"):
        layer.fuse()
    assert list(layer.state_dict()) == keys


def parametrized():
    layer = make()
    parametrize.register_parametrization(layer.paths[1].conv, "weight", nn.Identity())
    return layer


def shared(part):
    def build():
        layer = make()
        if part == "path":
            layer.paths[1] = layer.paths[0]
        else:
            layer.paths[1].conv = layer.paths[0].conv
        return layer

    return build


def frozen():
    """As timm's `freeze_batch_norm_2d` leaves it: in training mode, which means nothing to such norms."""
    layer = make()
    layer.paths[0].bn = FrozenBatchNorm2d(layer.paths[0].bn.num_features)
    return layer


def hooked():
    layer = make()
    layer.paths[1].bn.register_forward_hook(lambda *args: None)
    return layer


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: make(norm_layer=nn.InstanceNorm2d), "the norm of paths.0.conv is a InstanceNorm2d; fuse"),
        (
            parametrized,
            "paths.1.conv is parametrized: call torch.nn.utils.parametrize.remove_parametrizations",
        ),
        (frozen, "the norm of paths.0.conv is a FrozenBatchNorm2d; fuse"),
        (hooked, "paths.1.conv or its norm has forward or backward hooks"),
        (shared("conv"), "branches share a convolution, but not what their norms make of it"),
        (shared("path"), "branches share a convolution"),
    ],
)
def test_what_does_not_fold_is_refused_and_nothing_is_changed(build, why):
    layer = build()
    keys = list(layer.state_dict())
    with pytest.raises(ValueError, match=f"cannot fuse: {why}"):
        layer.fuse()
    assert list(layer.state_dict()) == keys


def test_a_state_dict_goes_round_fused_layers_only():
    layer, x = make(), torch.randn(2, 16, 5, 4)
    unfused = copy.deepcopy(layer.state_dict())
    layer.fuse()
    other = make().fuse()
    other.load_state_dict(layer.state_dict())
    assert_same(eager(other, x), eager(layer, x))
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"the layer is fused, the state_dict is not: load it first"):
            layer.load_state_dict(unfused, strict=strict)
        with pytest.raises(
            RuntimeError, match=r"the state_dict is of a fused layer: call layer.eval\(\).fuse"
        ):
            make().load_state_dict(layer.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match="0: the state_dict is of a fused layer"):
        nn.Sequential(make()).load_state_dict(nn.Sequential(layer).state_dict())


def test_copies_and_casts():
    layer, x = make().fuse(), torch.randn(2, 16, 5, 4)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), expected)
        assert torch.equal(layer.half()(x.half()), copy.deepcopy(layer)(x.half()))


def test_weights_packed_before_are_forgotten():
    layer, x = make(), torch.randn(2, 16, 5, 4)
    with torch.no_grad():
        before = layer(x)
        assert_same(layer.fuse()(x), before)
        layer.paths[0].conv.bias.add_(1)
        assert not torch.allclose(layer(x), before)
        assert_same(layer(x), eager(layer, x))


def test_fused_layers_train_without_norms():
    layer = make().requires_grad_(True)
    layer.paths[0].conv.weight.requires_grad_(False)
    layer.fuse().train()
    assert not layer.paths[0].conv.bias.requires_grad
    layer(torch.randn(1, 16, 1, 1)).sum().backward()  # one value per channel: batch norm would refuse
    assert layer.paths[1].conv.bias.grad is not None
    assert layer.attn.fc_reduce.bias.grad is not None


def test_explain_and_export():
    layer, x = make().fuse(), torch.randn(2, 16, 5, 4)
    with torch.no_grad():
        assert explain(layer, x).plan.schedule == "folded"
        exported = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(exported(x), layer(x))
    assert not any("batch_norm" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.interpret
def test_the_kernels_run_a_fused_layer():
    layer, x = make().fuse(), torch.randn(2, 16, 5, 4)
    with torch.no_grad(), use_backend("triton"):
        assert_same(layer(x), eager(layer, x))
