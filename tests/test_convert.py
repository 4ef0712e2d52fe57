"""timm's layers replaced in a network, around the same parameters."""

import copy
import functools

import pytest
import timm
import torch
from timm.layers import BlurPool2d, SyncBatchNormAct, convert_sync_batchnorm
from timm.layers import SelectiveKernel as TimmSelectiveKernel
from torch import nn

from sk_triton import SelectiveKernel, convert

from .units import randomize_norms

SETTINGS = {
    "default": {},
    "paper": {"groups": 4, "split_input": False},
    "stride 2": {"groups": 2, "stride": 2},
    "other outputs": {"out_channels": 24, "rd_channels": 5},
    "dilation 2": {"dilation": 2},
    "three true kernels": {"kernel_size": [3, 5, 7], "keep_3x3": False, "split_input": False},
    "true kernels, dilation 2": {"kernel_size": [5, 3], "keep_3x3": False, "dilation": 2},
    "equal branches": {"kernel_size": 5},
    "anti-aliased": {"aa_layer": BlurPool2d, "stride": 2},
    "anti-aliased, unused": {"aa_layer": BlurPool2d},
    "dropping": {"drop_layer": nn.Identity},
    "no activation": {"act_layer": None},
    "activation with weights": {"act_layer": nn.PReLU},
    "norms without parameters": {"norm_layer": functools.partial(nn.BatchNorm2d, affine=False)},
}


def step(layer, x):
    """What a training step computes and changes."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    v = layer(x)
    v.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"v": v.detach(), "x": x.grad, **gradients, **dict(layer.named_buffers())}


def assert_alike(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def timms():
    def make(**settings):
        # In float64: a gate's norm over few samples amplifies rounding.
        layer = TimmSelectiveKernel(16, **settings).double()
        randomize_norms(layer)
        return layer

    return make


@pytest.mark.parametrize("name", SETTINGS)
def test_a_layer_computes_and_trains_as_timms(timms, name):
    theirs = timms(**SETTINGS[name])
    ours = convert(copy.deepcopy(theirs))
    assert type(ours) is SelectiveKernel
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(3, 16, 7, 6).double()
    assert_alike(step(ours, x), step(theirs, x))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-7, atol=1e-9)


def test_an_active_drop_is_kept(timms):
    class Half(nn.Module):
        def forward(self, x):
            return x * 0.5 if self.training else x

    theirs = timms(drop_layer=Half)
    ours = convert(copy.deepcopy(theirs))
    x = torch.randn(3, 16, 5, 5).double()
    assert_alike(step(ours, x), step(theirs, x))


def test_a_network_keeps_its_parameters_and_its_optimizer():
    model = timm.create_model("skresnet18", pretrained=False, num_classes=3).double()
    randomize_norms(model)
    expected = copy.deepcopy(model)
    tensors = [id(tensor) for tensor in model.state_dict(keep_vars=True).values()]
    keys, random = list(model.state_dict()), torch.get_rng_state()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    assert convert(model) is model
    assert not any(isinstance(module, TimmSelectiveKernel) for module in model.modules())
    assert sum(isinstance(module, SelectiveKernel) for module in model.modules()) == 8
    assert list(model.state_dict()) == keys
    assert [id(tensor) for tensor in model.state_dict(keep_vars=True).values()] == tensors
    assert torch.equal(torch.get_rng_state(), random)

    x = torch.randn(2, 3, 64, 64).double()
    model(x).sum().backward()
    optimizer.step()
    other = torch.optim.SGD(expected.parameters(), lr=1e-4)
    expected(x).sum().backward()
    other.step()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected.eval()(x), rtol=1e-6, atol=1e-6)


def test_modes_and_frozen_parameters_stay(timms):
    model = nn.Sequential(timms(), timms())
    model[0].eval()
    model[1].paths[1].bn.eval()
    model[1].attn.fc_reduce.requires_grad_(False)
    modes = {
        name: module.training
        for name, module in model.named_modules()
        if not name.endswith((".drop", ".act"))
    }
    convert(model)
    found = dict(model.named_modules())
    assert {name: found[name].training for name in modes} == modes
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["1.attn.fc_reduce.weight"]


def test_a_layer_in_two_places_stays_one(timms):
    shared = timms()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    convert(model)
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is SelectiveKernel


def test_converting_twice_is_converting_once(timms):
    model = convert(nn.Sequential(timms()))
    layer = model[0]
    assert convert(model)[0] is layer
    assert convert(layer) is layer


def test_synchronized_norms_are_kept(timms):
    theirs = convert_sync_batchnorm(timms())
    assert type(theirs.paths[0].bn) is SyncBatchNormAct
    theirs.eval()
    ours = convert(copy.deepcopy(theirs))
    assert {type(path.bn) for path in ours.paths} == {type(ours.attn.bn)} == {nn.SyncBatchNorm}
    x = torch.randn(3, 16, 5, 5).double()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-7, atol=1e-9)


class Subclass(TimmSelectiveKernel):
    def forward(self, x):
        return 2 * super().forward(x)


def with_hook(layer):
    layer.paths[0].conv.register_forward_hook(lambda *args: None)


def with_forward(layer):
    layer.attn.forward = lambda x: x


def with_state_hook(layer):
    layer.paths[0].register_load_state_dict_post_hook(lambda *args: None)


def with_tensors_of_its_own(layer):
    layer.register_buffer("steps", torch.zeros(()))
    layer.paths[0].scale = nn.Parameter(torch.ones(()))


def with_group_norm(layer):
    layer.paths[1].bn = nn.GroupNorm(4, 16)


def with_other_padding(layer):
    layer.paths[1].conv.padding = (1, 1)


def with_another_convolution(layer):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    conv = layer.paths[0].conv
    layer.paths[0].conv = Doubled(8, 16, 3, padding=conv.padding, bias=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_hook, r"1: paths\.0\.conv has hooks or a replaced forward"),
        (with_forward, r"1: attn has hooks or a replaced forward"),
        (with_state_hook, r"1: paths\.0 has hooks on its state_dict"),
        (with_tensors_of_its_own, r"1: paths\.0\.scale, steps: not of timm's layer"),
        (with_group_norm, r"1: paths\.1\.bn: its norm must be timm's BatchNormAct2d or .*, got a GroupNorm"),
        (with_other_padding, r"1: paths\.1\.conv: stride, padding, .* must be .*\(2, 2\).*, got .*\(1, 1\)"),
        (with_another_convolution, r"1: paths\.0\.conv: Doubled stands where a Conv2d"),
    ],
)
def test_what_is_not_timms_is_refused_and_nothing_changed(timms, change, message):
    model = nn.Sequential(timms(), timms())
    change(model[1])
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        convert(model)
    assert list(model.modules()) == before


def test_statistics_that_are_not_kept_stay_so(timms):
    model = nn.Sequential(timms())
    norm = model[0].paths[0].bn
    mean = norm.running_mean
    del norm.running_mean
    norm.register_buffer("running_mean", mean, persistent=False)
    keys = list(model.state_dict())
    assert set(convert(model).state_dict()) == set(keys)


def test_models_without_one_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        convert("skresnet18")
    with pytest.raises(
        ValueError, match=r"model must hold a SelectiveKernel of timm's, got a Linear without"
    ):
        convert(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model: a Subclass is a subclass"):
        convert(Subclass(16))
    with pytest.raises(ValueError, match=r"0: stride must be 1 or 2, .*got 3"):
        convert(nn.Sequential(TimmSelectiveKernel(16, stride=3)))
