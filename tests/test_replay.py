"""Calls started again from a recording give what planned calls give, and only while the layer is as it was."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from sk_triton import SelectiveKernel, SKConv, launching, use_backend
from sk_triton.replay.calls import call_kind
from sk_triton.replay.recording import MAX_RECORDINGS
from sk_triton.replay.watch import Watch

from .versions import needs_unhoisted_loops

pytestmark = pytest.mark.interpret


@pytest.fixture
def direct(started_directly):
    """The kernels that calls without gradients started directly."""
    with torch.no_grad(), use_backend("triton"):
        yield started_directly


def paper_layer(channels=8, **settings):
    layer = SelectiveKernel(channels, groups=2, split_input=False, **settings).eval()
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    return layer


def image(*shape, channels=8):
    return torch.randn(*shape[:1], channels, *shape[1:])


RESIDENT = pytest.param("resident", 1, marks=needs_unhoisted_loops)
SCHEDULES = [("store", 3), ("gated", 2), ("recompute", 3), RESIDENT]


def expected(layer, x):
    """By a planned call: without a layer's memory of earlier ones."""
    from sk_triton.functional import sk_conv

    return sk_conv(x, layer.branches(), layer.gate(), layer.spec)


@pytest.mark.parametrize(
    ("layer", "memory_format"),
    [
        pytest.param(paper_layer(), torch.channels_last, id="paper"),
        pytest.param(paper_layer(), torch.contiguous_format, id="paper, nchw"),
        pytest.param(SKConv(8, 2, 2, 2), torch.channels_last, id="linear"),
        pytest.param(paper_layer(stride=2), torch.channels_last, id="stride 2"),
        pytest.param(paper_layer(out_channels=16), torch.channels_last, id="more outputs"),
    ],
)
@pytest.mark.parametrize(("schedule", "launches"), SCHEDULES)
def test_a_second_call_starts_the_same_kernels_on_its_own_tensors(
    layer, memory_format, schedule, launches, direct
):
    layer = copy.deepcopy(layer).half()
    with use_backend("triton", schedule=schedule):
        layer(image(2, 5, 6).half().to(memory_format=memory_format))
        assert not direct
        for _ in range(2):
            x = image(2, 5, 6).half().to(memory_format=memory_format)
            v = layer(x)
            assert len(direct) == launches
            direct.clear()
            planned = expected(layer, x)
            assert torch.equal(v, planned)
            assert v.stride() == planned.stride()


def test_schedule_merged_is_started_again(direct):
    layer = SKConv(8, 2, 2, 2).half()
    with use_backend("triton", schedule="merged"):
        layer(image(2, 6, 6).half())
        x = image(2, 6, 6).half()
        assert torch.equal(layer(x), expected(layer, x))
    assert len(direct) == 3


def replaced_data(layer):
    layer.paths[0].conv.weight.data = torch.randn_like(layer.paths[0].conv.weight)


def replaced_vector(layer):
    norm = layer.paths[1].bn
    norm.running_var.data = norm.running_var + 1


def transposed_data(layer):
    weight = layer.attn.fc_reduce.weight
    weight.data = weight.data.transpose(0, 1)


def another_dtype(layer):
    bias = layer.paths[0].bn.bias
    bias.data = bias.data.view(torch.int32)


def replaced_module(layer):
    layer.paths[0].conv = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)


CHANGES = {
    "an in-place update": lambda layer: layer.paths[0].conv.weight.mul_(2),
    "an update of a buffer": lambda layer: layer.paths[1].bn.running_mean.add_(1),
    "another parameter": lambda layer: setattr(layer.paths[0].bn, "bias", nn.Parameter(torch.randn(8))),
    "other data": replaced_data,
    "other data of a vector": replaced_vector,
    "the same data, transposed": transposed_data,
    "another eps": lambda layer: setattr(layer.attn.bn, "eps", 0.5),
    "another module": lambda layer: setattr(
        layer.paths[0], "conv", nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
    ),
    "a state_dict": lambda layer: layer.load_state_dict(paper_layer(rd_channels=8).state_dict()),
    "fused norms": lambda layer: layer.fuse(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_layer_is_seen(change, direct):
    layer, x = paper_layer(rd_channels=8), image(2, 5, 5)
    before = layer(x)
    change(layer)
    after = layer(x)
    assert not direct
    assert torch.equal(after, expected(layer, x))
    assert not torch.equal(after, before) or layer.paths[0].conv.bias is not None
    layer(x)
    assert direct, "the changed layer is recorded anew"


def test_another_dtype_of_the_same_memory_is_seen():
    for has_gradients in (False, True):
        layer = paper_layer().requires_grad_(False)
        watch = Watch(layer, has_gradients=has_gradients)
        assert watch.holds()
        another_dtype(layer)
        assert not watch.holds()


class Opaque(torch.Tensor):
    """Refuses every operator once it is made."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


def test_a_tensor_of_another_kind_in_a_parameters_place_is_asked_nothing():
    layer = paper_layer()
    watch = Watch(layer, has_gradients=False)
    conv = layer.paths[0].conv
    opaque = torch.Tensor._make_subclass(Opaque, conv.weight.detach())
    conv._parameters["weight"] = opaque
    assert not watch.holds()


def test_a_parameter_that_changes_during_the_first_call_is_seen_in_the_next(direct, monkeypatch):
    """By another thread, while the first call compiles its kernels."""
    layer, x = paper_layer(), image(2, 5, 5)
    prepare = launching.prepare

    def change(*args):
        monkeypatch.setattr(launching, "prepare", prepare)
        layer.paths[0].conv.weight.mul_(2)
        return prepare(*args)

    monkeypatch.setattr(launching, "prepare", change)
    before = layer(x)
    for _ in range(3):
        after = layer(x)
        assert torch.equal(after, expected(layer, x))
    assert not torch.equal(after, before)
    assert direct


def test_a_fused_step_is_a_change_also_of_what_is_frozen_before_and_after():
    layer, other = paper_layer().requires_grad_(False), nn.Parameter(torch.ones(1))
    watch = Watch(layer, has_gradients=False)
    other.grad = torch.ones(1)
    torch.optim.SGD([other], fused=True).step()
    assert watch.holds()
    weight = layer.paths[0].conv.weight.requires_grad_()
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], fused=True).step()
    layer.requires_grad_(False)
    assert not watch.holds()


def test_changes_that_no_kernel_runs_raise_as_in_a_planned_call(direct):
    for change, error, reason in (
        (
            lambda layer: layer.paths[0].bn.register_forward_hook(print),
            RuntimeError,
            "forward or backward hooks",
        ),
        (
            lambda layer: setattr(layer.paths[0].bn, "forward", print),
            RuntimeError,
            "has had its forward replaced",
        ),
        (lambda layer: setattr(layer.paths[0].conv, "dilation", (2, 2)), ValueError, "must stay as built"),
        (lambda layer: delattr(layer.attn.fc_reduce, "weight"), AttributeError, "weight"),
    ):
        layer, x = paper_layer(), image(2, 5, 5)
        layer(x)
        change(layer)
        with pytest.raises(error, match=reason):
            layer(x)


def test_a_kind_of_call_is_of_one_dtype(direct):
    x = image(2, 5, 5)
    kinds = [
        call_kind(x.to(dtype)) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    ]
    assert len(set(kinds)) == len(kinds)
    layer = paper_layer()
    layer(x)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=r"dtype|Half|type"):
        layer(x.half())
    assert not direct


def test_another_kind_of_call_is_planned(direct):
    layer = paper_layer()
    layer(image(2, 5, 5))
    buffer = torch.randn(2 * 8 * 5 * 5 + 1)
    others = [
        image(1, 5, 5),
        image(2, 6, 5),
        image(2, 5, 5).to(memory_format=torch.channels_last),
        image(2, 5, 5).requires_grad_(),
        buffer[1:].view(2, 8, 5, 5),
        torch.stack([image(2, 5, 5)] * 2, -1)[..., 0],
    ]
    for x in others[:3] + others[4:]:
        assert torch.equal(layer(x), expected(layer, x))
    assert not direct
    layer(others[3])
    assert direct, "whether x wants a gradient does not matter without one"


def test_another_schedule_and_another_backend_are_another_kind(direct):
    layer, x = paper_layer(), image(2, 5, 5)
    layer(x)
    with use_backend("triton", schedule="recompute"):
        layer(x)
    with use_backend("reference"):
        layer(x)
    assert not direct


def test_layers_share_memory_in_turns(direct):
    layers = paper_layer(), paper_layer(out_channels=64)
    for _ in range(3):
        for layer in layers:
            x = image(2, 5, 5)
            assert torch.equal(layer(x), expected(layer, x))
    assert direct


def test_new_views_of_the_same_parameters_are_no_change(direct):
    """FSDP and `torch.func.functional_call` put them in place at every call."""
    layer, x = paper_layer(), image(2, 5, 5)
    v = layer(x)
    for _ in range(2):
        views = {name: t.detach() for name, t in layer.state_dict().items()}
        assert torch.equal(torch.func.functional_call(layer, views, x), v)
    assert direct
    others = {name: t.clone() for name, t in layer.state_dict().items()}
    direct.clear()
    assert torch.equal(torch.func.functional_call(layer, others, x), v)
    assert not direct


@pytest.mark.parametrize("name", ["running_mean", "bias"])
def test_an_inference_tensor_in_a_parameters_place_is_planned(name, direct):
    layer, x = paper_layer(), image(2, 5, 5)
    layer(x)
    norm = layer.paths[0].bn
    with torch.inference_mode():
        inferred = torch.full_like(getattr(norm, name), 3.0)
    own = norm._buffers if name in norm._buffers else norm._parameters
    own[name] = inferred
    for _ in range(2):
        assert torch.equal(layer(x), expected(layer, x))
    assert not direct


def test_a_tensor_that_becomes_an_inference_tensor_is_planned(direct):
    layer, x = paper_layer(), image(2, 5, 5)
    layer(x)
    mean = layer.paths[0].bn.running_mean
    with torch.inference_mode():
        inferred = torch.full_like(mean, 3.0)
    torch.utils.swap_tensors(mean, inferred)
    assert torch.equal(layer(x), expected(layer, x))
    assert not direct


def test_bad_input_raises_though_a_good_one_was_recorded(direct):
    layer = paper_layer()
    layer(image(2, 5, 5))
    with pytest.raises(ValueError, match="x must have in_channels"):
        layer(image(2, 5, 5, channels=4))
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        layer(None)


def test_training_is_planned(direct):
    layer, x = paper_layer(), image(2, 5, 5)
    inferred = layer(x)
    with torch.enable_grad():
        assert layer(x).requires_grad
    layer.paths[0].bn.train()
    assert not torch.equal(layer(x), inferred)
    assert not direct


def test_a_shape_out_of_a_parameter_is_checked(direct):
    layer, x = paper_layer(), image(2, 5, 5)
    layer(x)
    weight = layer.paths[0].conv.weight
    weight.data = weight.data[:4]
    with pytest.raises(ValueError, match="must have shape"):
        layer(x)


def test_a_step_outside_the_kernels_is_planned_each_time(direct, monkeypatch):
    monkeypatch.setattr("sk_triton.steps.MAX_GATE_TILES", 0)
    layer, x = paper_layer(), image(2, 5, 5)
    with use_backend("triton", schedule="store"):
        assert torch.equal(layer(x), layer(x))
    assert not direct


def test_the_librarys_convolutions_are_planned_each_time(direct):
    """They run whatever the library chooses, and hand over memory of their own."""
    layer = paper_layer()
    with use_backend("triton", schedule="library"):
        layer(image(2, 5, 5))
        x = image(2, 5, 5)
        assert torch.equal(layer(x), expected(layer, x))
    assert not direct
    assert not layer._replays._recordings


def test_parametrized_and_inference_parameters_are_planned_each_time(direct):
    parametrized = SKConv(8, 2, 2, 2)
    nn.utils.parametrizations.weight_norm(parametrized.fc)
    with torch.inference_mode():
        inferred = SKConv(8, 2, 2, 2)
    x = image(2, 5, 5)
    for layer in (parametrized, inferred):
        for _ in range(2):
            layer(x)
    assert not direct


def test_many_sizes_do_not_fill_the_memory(direct, monkeypatch):
    monkeypatch.setattr("sk_triton.replay.calls.MAX_RECORDINGS", 2)
    layer = paper_layer()
    for size in (3, 4, 5):
        layer(image(1, size, size))
    assert len(layer._replays._recordings) == 1
    assert MAX_RECORDINGS > 2


def test_copies_and_replicas_record_for_themselves(direct):
    layer, x = paper_layer(), image(2, 5, 5)
    layer(x)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        layer._replicate_for_data_parallel(),
    ):
        other(x)
    assert not direct


def test_workspaces_of_a_call_do_not_overlap_and_are_aligned(direct):
    layer = paper_layer()
    with use_backend("triton", schedule="store"):
        layer(image(2, 5, 5))
    ((_, start),) = layer._replays._recordings.values()
    call = start.__self__
    offsets = {offset for start in call.recording.starts for _, base, offset in start.pointers if base == 2}
    assert len(offsets) == 3  # the branches, their pooled sums, the attention
    assert all(offset % 256 == 0 for offset in offsets)
    branches = 2 * math.prod((2, 8, 5, 5)) * 4
    assert call.recording.workspace_bytes >= branches + 2 * 8 * 4 + 2 * 2 * 8 * 4
