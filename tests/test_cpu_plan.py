"""Who gets the CPU's schedules, how many samples at a time, and what they hold in memory."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from sk_triton import BranchSpec, SelectiveKernel, SKConv, dispatch, explain, use_backend
from sk_triton.cpu import choice as cpu
from sk_triton.replay.watch import Watch

from .tolerances import assert_errs_like_eager, assert_same
from .units import CLASSIC, PAPER


def paper_layer(channels=16, **kwargs):
    return SelectiveKernel(channels, groups=4, split_input=False, **kwargs).eval()


def ran(monkeypatch):
    """The schedules that ran, in order."""
    names = []

    def noting(name, prepare):
        def prepare_noted(*args):
            compute = prepare(*args)
            return lambda x: names.append(name) or compute(x)

        return prepare_noted

    for name, prepare in dispatch._CPU_PREPARE.items():
        monkeypatch.setitem(dispatch._CPU_PREPARE, name, noting(name, prepare))
    return names


def test_auto_takes_the_schedules_for_inference_only(monkeypatch):
    names, x = ran(monkeypatch), torch.randn(2, 16, 5, 4)
    layer = paper_layer()
    layer(x)
    layer.train()
    with torch.no_grad():
        layer(x)
        layer.eval()
        with use_backend("reference"):
            layer(x)
    assert names == []
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            layer(x)
    with torch.no_grad():
        SKConv(32, M=2, G=8, r=2)(torch.randn(4, 32, 96, 96))
    assert names == ["folded", "folded", "merged"]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda: paper_layer().train(),
            r"branches\[0\].norm uses batch statistics; the CPU's schedules are for",
        ),
        (lambda: paper_layer(act_layer=nn.SiLU), "branch_act is SiLU; the CPU's schedules compute relu"),
        (lambda: paper_layer(norm_layer=nn.GroupNorm, channels=32), r"branches\[0\].norm is a GroupNorm"),
        (lambda: paper_layer(aa_layer=nn.AvgPool2d, stride=2), r"branches\[0\].aa is set"),
    ],
)
def test_an_explicit_request_raises_with_the_reason_and_auto_tells_it(make, why):
    layer = make()
    x = torch.randn(2, layer.in_channels, 6, 4)
    with torch.no_grad():
        plan = explain(layer, x).plan
        assert plan.backend == "reference"
        assert [name for name, _ in plan.rejected] == ["triton", "torch"]
        with (
            use_backend("torch"),
            pytest.raises(RuntimeError, match=f'use_backend\\("torch"\\) cannot run here: .*{why}'),
        ):
            layer(x)
    with use_backend("torch"), pytest.raises(RuntimeError, match="gradients are enabled"):
        paper_layer()(torch.randn(2, 16, 6, 4))
    with torch.no_grad(), use_backend("torch"), pytest.raises(RuntimeError, match='x is on "meta"'):
        paper_layer().to("meta")(torch.randn(2, 16, 6, 4, device="meta"))


def test_compiled_and_transformed_layers_take_the_reference(monkeypatch):
    names, x = ran(monkeypatch), torch.randn(2, 16, 5, 4)
    layer = paper_layer()
    torch.compiler.reset()
    with torch.no_grad():
        expected = layer(x)
        names.clear()
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        for batch in (x, x.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(torch.vmap(layer)(batch[None])[0], expected)
    assert names == []


def test_a_traced_graph_follows_the_weights():
    layer, x = paper_layer(), torch.randn(2, 16, 5, 4)
    with torch.no_grad():
        layer(x)
        traced = make_fx(layer)(x)
        for parameter in layer.parameters():
            parameter.mul_(1.5)
        torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-5)
        with use_backend("torch"), pytest.raises(RuntimeError, match="make_fx is tracing"):
            make_fx(layer)(x)


def test_a_second_call_is_not_planned_again(monkeypatch):
    layer, x = paper_layer(), torch.randn(2, 16, 5, 4)
    linear, large = SKConv(32, M=2, G=8, r=2).eval(), torch.randn(4, 32, 96, 96)
    with torch.no_grad():
        layer(x), linear(large)

        def choose(*args, **kwargs):
            raise AssertionError("planned again")

        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "choose", choose)
            other, other_large = torch.randn_like(x), torch.randn_like(large)
            found = layer(other), linear(other_large)
        with use_backend("reference"):
            assert_same(found[0], layer(other))
            assert_same(found[1], linear(other_large))
            layer.paths[1].conv.weight.mul_(2)
            changed = layer(other)
        assert_same(layer(other), changed)


def assigned(layer, conv):
    """The layer with a weight that is neither parameter nor buffer, as hypernetworks assign it."""
    weight = conv.weight.detach().clone()
    del conv.weight
    conv.weight = weight
    return layer


class Scaled(SelectiveKernel):
    factor = 1.0

    def branches(self):
        return tuple(branch._replace(weight=branch.weight * self.factor) for branch in super().branches())


class Computed(nn.BatchNorm2d):
    """Its eps is no plain attribute."""

    eps = property(lambda self: 1e-5, lambda self, eps: None)


def test_a_setting_that_is_computed_is_not_watched():
    layer = paper_layer()
    layer.attn.bn = Computed(layer.attn.bn.num_features).eval()
    for has_gradients in (False, True):
        assert not Watch(layer, has_gradients=has_gradients).is_possible
        assert Watch(paper_layer(), has_gradients=has_gradients).is_possible


def test_what_cannot_be_watched_is_planned_each_time():
    x = torch.randn(2, 16, 5, 4)
    layer = paper_layer()
    layer = assigned(layer, layer.paths[0].conv)
    scaled = Scaled(16, groups=4, split_input=False).eval()
    with torch.no_grad():
        layer(x), scaled(x)
        layer.paths[0].conv.weight.mul_(3)
        scaled.factor = 3.0
        for changed in (layer, scaled):
            with use_backend("reference"):
                expected = changed(x)
            assert_same(changed(x), expected)


def test_another_number_of_threads_is_planned_again(monkeypatch):
    layer, x = paper_layer(), torch.randn(2, 16, 5, 4)
    with torch.no_grad():
        layer(x)
        names = ran(monkeypatch)
        layer(x)
        assert names == []
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
        layer(x)
    assert names == ["folded"]


def test_large_images_merge_and_small_ones_do_not():
    layer = SKConv(128, M=2, G=32, r=16).eval()
    with torch.no_grad():
        large, small = explain(layer, torch.randn(8, 128, 56, 56)), explain(layer, torch.randn(8, 128, 7, 7))
    assert "schedule  merged" in str(large)
    assert "merged    5x5 g32" in str(large)
    assert "not folded: predicted cost per output, in multiply-adds: " in str(large)
    assert "schedule  folded" in str(small)
    assert "not merged: predicted cost per output, in multiply-adds: " in str(small)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"branch_act": "relu"}, "branch_act is relu; only linear branches merge"),
        ({"branches": (BranchSpec(3, groups=4),)}, "there is one branch"),
        (
            {"branches": (BranchSpec(3, groups=16), BranchSpec(5, groups=16))},
            "oneDNN's depthwise convolutions are too fast for merging to pay",
        ),
        (
            {"branches": (BranchSpec(3, groups=4), BranchSpec(7, groups=4))},
            "a sum over 7x7 taps may err more than twice as much as one over 3x3",
        ),
        ({"branches": (BranchSpec(3, groups=4), BranchSpec(5, groups=2))}, "the branches differ in groups"),
        ({"in_channels": 64, "split_input": True}, "split_input: the branches read different channels"),
    ],
)
def test_why_branches_do_not_merge(change, why):
    spec = dataclasses.replace(CLASSIC, **change)
    plan = cpu.plan(torch.randn(1, spec.in_channels, 96, 96), spec)
    assert dict(plan.rejected)["merged"] == why


def test_large_batches_are_computed_in_parts_and_small_ones_whole():
    x = torch.empty(8, 16, 5, 4)
    assert cpu.plan(x, PAPER).samples == 8
    threads = torch.get_num_threads()

    def samples(size, threads):
        return cpu._plan(PAPER, 8, size, size, torch.float32, False, False, threads, False).samples

    assert samples(256, threads) < 8
    assert samples(256, 64 * threads) == 8
    assert samples(4096, threads) == 1


def test_autocast():
    linear = SKConv(32, M=2, G=8, r=2).eval()
    calls = [(paper_layer(), torch.randn(2, 16, 9, 8)), (linear, torch.randn(4, 32, 96, 96))]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for module, x in calls:
            v = module(x)
            with use_backend("reference"):
                eager = module(x)
            with torch.autocast("cpu", enabled=False), use_backend("reference"):
                exact = copy.deepcopy(module).double()(x.double())
            assert_errs_like_eager(v, eager, exact)


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operators returned and that live at the same time, at most."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.live[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize("make", [lambda: SKConv(64, 2, 16, 16), lambda: SelectiveKernel(64, groups=16)])
@pytest.mark.parametrize("size", [64, 7])
def test_peak_memory_is_little_above_two_passes(make, size, memory_format):
    """The result, the branches of a part of the batch, and small tensors."""
    layer = make().eval()
    x = torch.randn(16, 64, size, size).contiguous(memory_format=memory_format)
    with torch.no_grad():
        layer(x)  # packs the weights
        with PeakMemory() as memory:
            v = layer(x)
        small = 200_000
        assert v.nbytes <= memory.peak <= 2.2 * v.nbytes + small
