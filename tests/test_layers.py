"""The two layers: what a user of ``nn.Module`` expects of them."""

import copy
import functools
import io
import pickle

import pytest
import torch
from timm.layers.selective_kernel import SelectiveKernel as TimmSelectiveKernel
from torch import nn
from torch.nn.utils import parametrizations

from sk_triton import BranchSpec, SelectiveKernel, SKConv, pack_cache, use_backend
from sk_triton.bench.measuring.peers import ClassicSKConv
from sk_triton.pack_cache import PackCache

from .peers import NormedClassicSKConv, WrappedClassicSKConv
from .tolerances import assert_same
from .units import randomize_norms

LAYERS = {
    "SKConv": lambda **kw: SKConv(16, 2, 4, 4, L=8, **kw),
    "SelectiveKernel": lambda **kw: SelectiveKernel(16, groups=4, **kw),
    "SelectiveKernel-whole": lambda **kw: SelectiveKernel(16, 24, split_input=False, stride=2, **kw),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def make(request):
    return request.param


def test_seeds_signature_and_spec():
    layer = SKConv(128, 2, 32, 16)
    assert layer.spec.branches == (BranchSpec(3, groups=32), BranchSpec(5, groups=32))
    assert layer.spec.is_linear
    assert layer.spec.gate_width == 32
    assert SKConv(128, M=3, G=32, r=2, stride=2, L=8).spec.gate_width == 64
    assert SKConv(128, M=3, G=32, r=2, gate_width=5).fc.weight.shape == (5, 128)


def test_seeds_initialisation():
    torch.manual_seed(7)
    peer = ClassicSKConv(16, 3, 4, 4, 2, 8)
    torch.manual_seed(7)
    ours = SKConv(16, 3, 4, 4, 2, 8)
    assert_same_state(ours, peer)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"out_channels": 24, "stride": 2, "groups": 4},
        {"kernel_size": [3, 5, 7, 9], "keep_3x3": False},
        {"split_input": False, "dilation": 2},
        {"act_layer": nn.PReLU},
    ],
)
def test_timms_initialisation(settings):
    torch.manual_seed(7)
    peer = TimmSelectiveKernel(16, **settings)
    torch.manual_seed(7)
    ours = SelectiveKernel(16, **settings)
    assert_same_state(ours, peer)


def assert_same_state(ours, peer):
    ours, peer = ours.state_dict(), peer.state_dict()
    assert list(ours) == list(peer)
    for name, value in ours.items():
        assert value.dtype == peer[name].dtype
        assert torch.equal(value, peer[name]), name


def test_timms_keys_in_words():
    path = [
        "conv.weight",
        "bn.weight",
        "bn.bias",
        "bn.running_mean",
        "bn.running_var",
        "bn.num_batches_tracked",
    ]
    gate = ["fc_reduce.weight", *path[1:], "fc_select.weight"]
    expected = [f"paths.{i}.{key}" for i in range(2) for key in path] + [f"attn.{key}" for key in gate]
    state = SelectiveKernel(16, rd_channels=4).state_dict()
    assert list(state) == expected
    assert state["attn.fc_reduce.weight"].shape == (4, 16, 1, 1)
    assert state["attn.fc_select.weight"].shape == (32, 4, 1, 1)


def test_seeds_keys_in_words():
    state = SKConv(16, 2, 4, 4, L=8).state_dict()
    assert list(state) == [
        *(f"convs.{i}.{name}" for i in range(2) for name in ("weight", "bias")),
        *(f"fc.{name}" for name in ("weight", "bias")),
        *(f"fcs.{i}.{name}" for i in range(2) for name in ("weight", "bias")),
    ]
    assert state["fc.weight"].shape == (8, 16)


def test_timms_defaults():
    layer = SelectiveKernel(64)
    spec = layer.spec
    assert (spec.in_channels, spec.out_channels, spec.stride, spec.split_input) == (64, 64, 1, True)
    assert spec.branches == (BranchSpec(3), BranchSpec(3, 2))
    assert (spec.branch_norm, spec.branch_act, spec.branch_bias) == (True, "relu", False)
    assert (spec.gate_norm, spec.gate_act, spec.gate_bias, spec.select_bias) == (True, "relu", False, False)
    assert spec.gate_width == 8
    assert (layer.num_paths, layer.attn.fc_reduce.in_channels) == (2, 64)


def test_timms_gate_ignores_norm_and_act():
    layer = SelectiveKernel(64, norm_layer=nn.GroupNorm, act_layer=nn.SiLU)
    assert type(layer.attn.bn) is nn.BatchNorm2d
    assert layer.spec.gate_act == "relu"
    assert layer.spec.branch_act == "SiLU"


@pytest.mark.parametrize(
    ("kernel_size", "keep_3x3", "expected"),
    [
        (None, True, (BranchSpec(3), BranchSpec(3, 2))),
        (5, True, (BranchSpec(3, 2), BranchSpec(3, 2))),
        ((3, 5), True, (BranchSpec(3), BranchSpec(3, 2))),
        ((3, 5), False, (BranchSpec(3), BranchSpec(5))),
        ([3, 7], True, (BranchSpec(3), BranchSpec(3, 3))),
        ((7,), False, (BranchSpec(7),)),
    ],
)
def test_kernel_sizes(kernel_size, keep_3x3, expected):
    assert SelectiveKernel(16, kernel_size=kernel_size, keep_3x3=keep_3x3).spec.branches == expected


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ({"rd_ratio": 1 / 8}, 16),
        ({"rd_divisor": 32}, 32),
        ({"rd_channels": 5}, 5),
        ({"gate_width": 5}, 5),
        ({"min_channels": 32}, 32),
        ({"min_channels": 4}, 8),
        ({"min_channels": 4, "rd_ratio": 1 / 10}, 12),
    ],
)
def test_gate_width(settings, width):
    layer = SelectiveKernel(128, **settings)
    assert layer.spec.gate_width == width
    assert layer.attn.fc_reduce.out_channels == width


def test_any_norm_callable():
    layer = SelectiveKernel(16, norm_layer=lambda channels: nn.GroupNorm(2, channels, affine=False))
    layer(torch.randn(2, 16, 5, 5))
    assert list(layer.paths[0].state_dict()) == ["conv.weight"]


def test_extra_repr():
    assert SKConv(128, M=2, G=32, r=16, stride=2).extra_repr() == (
        "128, M=2, G=32, r=16, stride=2, L=32, gate_width=32"
    )
    assert SelectiveKernel(128, 64, groups=32, split_input=False, min_channels=32).extra_repr() == (
        "128, 64, branches=(3x3 g32, 3x3 d2 g32), stride=1, split_input=False, gate_width=32"
    )


def test_repr_holds_extra_repr(make):
    layer = make()
    assert layer.extra_repr() in repr(layer)


@pytest.mark.parametrize("training", [True, False])
def test_memory_format(make, memory_format, training):
    layer = make().train(training)
    x = torch.randn(2, 16, 6, 5).contiguous(memory_format=memory_format)
    v = layer(x)
    assert v.is_contiguous(memory_format=memory_format)
    assert_same(v.contiguous(), copy.deepcopy(layer)(x.contiguous()))


def test_memory_format_follows_the_input_and_not_the_weights(make, memory_format):
    layer = make().to(memory_format=torch.channels_last)
    v = layer(torch.randn(2, 16, 6, 5).contiguous(memory_format=memory_format))
    assert v.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_autocast_is_that_of_conv2d(make, dtype, low, training):
    """The same result dtype as ``nn.Conv2d`` with parameters of float32, or of float64 for float64 input."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer, conv = make(dtype=wide).train(training), nn.Conv2d(16, 16, 3, dtype=wide)
    x = torch.randn(2, 16, 5, 5, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=low):
        v, y = layer(x), conv(x)
    assert v.dtype == y.dtype
    v.float().sum().backward()
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == wide for p in layer.parameters())


class Float32Norm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.float())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_on_a_gpu_is_that_of_conv2d(make, memory_format, training, backend):
    layer, conv = make(device="cuda").train(training), nn.Conv2d(16, 16, 3, device="cuda")
    x = torch.randn(2, 16, 6, 5, device="cuda").contiguous(memory_format=memory_format)
    with torch.autocast("cuda", dtype=torch.float16), use_backend(backend):
        v = layer(x)
        assert v.dtype == conv(x).dtype
    assert v.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "norm_layer", [nn.BatchNorm2d, Float32Norm, functools.partial(nn.GroupNorm, num_groups=2)]
)
def test_autocast_is_near_float32(norm_layer):
    layer = SelectiveKernel(16, norm_layer=norm_layer)
    x = torch.randn(4, 16, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = layer(x)
    assert v.dtype == torch.bfloat16
    torch.testing.assert_close(v.float(), copy.deepcopy(layer)(x), rtol=0.1, atol=0.1)


def test_disabled_autocast_changes_nothing(make):
    layer, x = make().eval(), torch.randn(2, 16, 5, 5)
    expected = layer(x)
    with torch.autocast("cpu", enabled=False):
        found = layer(x)
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32


def test_meta_device(make):
    with torch.device("meta"):
        layer = make()
    v = layer(torch.empty(2, 16, 6, 5, device="meta"))
    assert v.is_meta
    assert v.shape == make()(torch.randn(2, 16, 6, 5)).shape
    layer.to_empty(device="cpu").load_state_dict(make().state_dict())


@pytest.mark.parametrize("device", [None, "cpu", "meta"])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_factory_arguments(make, device, dtype):
    layer = make(device=device, dtype=dtype)
    tensors = [*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())]
    assert all(t.device.type == (device or "cpu") and t.dtype == (dtype or torch.float32) for t in tensors)


def test_a_device_goes_before_the_default_one(make):
    with torch.device("meta"):
        layer = make(device="cpu")
    assert not any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))


def test_deepcopy_and_pickle(make):
    layer = make().eval()
    randomize_norms(layer)
    x = torch.randn(2, 16, 5, 5)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    for twin in twins:
        assert torch.equal(twin(x), expected)
        assert twin.spec == layer.spec
        assert twin._cache is not layer._cache
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("mode", [True, False])
def test_a_change_of_mode_clears_the_cache(make, mode, monkeypatch):
    layer, cleared = make().train(not mode), []
    monkeypatch.setattr(pack_cache, "_shared", {})  # which other tests filled
    monkeypatch.setattr(PackCache, "clear", lambda self: cleared.append(self))
    assert nn.Sequential(layer).train(mode)[0].training is mode
    assert cleared == [layer._cache]
    assert layer.train(mode) is layer
    assert cleared == [layer._cache]


def test_the_cache_is_no_part_of_the_state(make):
    layer = make()
    assert not any("cache" in key for key in layer.state_dict())
    assert not any("cache" in name for name, _ in layer.named_modules())


def test_state_dict_round_trip(make):
    layer, other, x = make().eval(), make().eval(), torch.randn(2, 16, 5, 5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    other = make(device="meta").eval()
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other(x), layer(x))


def test_wrapped_branches_load():
    """compat: ports keep each convolution in a container, ``convs.{i}.0``."""
    peer, x = WrappedClassicSKConv(16, 3, 4, 4, L=8), torch.randn(2, 16, 6, 5)
    state = peer.state_dict()
    keys = list(state)
    assert "convs.2.0.bias" in keys
    ours = SKConv(16, 3, 4, 4, L=8)
    ours.load_state_dict(state)
    assert list(state) == keys, "the caller's dict changed"
    assert_same(ours(x), peer(x))


def test_a_wrapped_branch_beside_a_plain_one_is_unexpected():
    ours = SKConv(16, 2, 4, 4, L=8)
    state = ours.state_dict()
    state["convs.0.0.weight"] = state["convs.0.weight"] + 1
    with pytest.raises(RuntimeError, match=r'Unexpected key.* "convs\.0\.0\.weight"'):
        ours.load_state_dict(state)


def test_wrapped_branches_load_inside_a_model():
    peer, ours = (nn.Sequential(nn.ReLU(), cls(16, 2, 4, 4, L=8)) for cls in (WrappedClassicSKConv, SKConv))
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(2, 16, 6, 5)
    assert_same(ours(x), peer(x))


@pytest.mark.parametrize("strict", [True, False])
def test_normed_branches_do_not_load(strict):
    ours = SKConv(16, 2, 4, 4, L=8)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(
        RuntimeError, match=r"SKConv has no batch norm, but the state_dict has 'convs\.0\.1\."
    ):
        ours.load_state_dict(NormedClassicSKConv(16, 2, 4, 4, L=8).state_dict(), strict=strict)
    assert torch.equal(ours.convs[0].weight, before["convs.0.weight"])


def test_a_missing_branch_is_an_error():
    state = WrappedClassicSKConv(16, 2, 4, 4, L=8).state_dict()
    del state["convs.1.0.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*convs\.1\.bias"):
        SKConv(16, 2, 4, 4, L=8).load_state_dict(state)


def test_parametrised_weights_take_part():
    layer, x = SKConv(16, 2, 4, 4, L=8), torch.randn(2, 16, 5, 5)
    expected = layer(x)
    parametrizations.weight_norm(layer.convs[0])
    parametrizations.weight_norm(layer.fc)
    assert_same(layer(x), expected)
    with torch.no_grad():
        layer.convs[0].parametrizations.weight.original0.mul_(2)
    assert not torch.allclose(layer(x), expected)


def test_functional_call_takes_part(make):
    layer, other, x = make().eval(), make().eval(), torch.randn(2, 16, 5, 5)
    with use_backend("reference"):
        assert torch.equal(torch.func.functional_call(layer, other.state_dict(), x), other(x))
    with torch.no_grad():
        layer(x)  # what is packed for its own parameters must not serve the other's
        assert torch.equal(torch.func.functional_call(layer, other.state_dict(), x), other(x))


def test_synchronised_batch_norm_keeps_the_activation():
    layer = SelectiveKernel(16).eval()
    randomize_norms(layer)
    x = torch.randn(2, 16, 5, 5)
    expected = layer(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert type(converted.paths[0].bn) is nn.SyncBatchNorm
    assert torch.equal(converted.eval()(x), expected)


def test_running_statistics_move_in_training_only():
    layer, x = SelectiveKernel(16), torch.randn(4, 16, 5, 5)
    layer.eval()(x)
    assert layer.paths[0].bn.num_batches_tracked == layer.attn.bn.num_batches_tracked == 0
    layer.train()(x)
    assert layer.paths[0].bn.num_batches_tracked == layer.attn.bn.num_batches_tracked == 1
    assert layer.attn.bn.running_mean.abs().sum() > 0
