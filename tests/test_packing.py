"""Packed weights: the right entries, and never stale ones."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from sk_triton import SelectiveKernel, SKConv, optimizer_steps, packing, preference, use_backend
from sk_triton.folding import fold_norm
from sk_triton.kernels import lasting as kernels_lasting
from sk_triton.kernels.config import StreamConfig
from sk_triton.pack_cache import PackCache
from sk_triton.tuning.lookup import Found, Source

from .units import random_norm, randomize_norms


def classic_layer():
    return SKConv(8, M=2, G=4, r=2, L=4).eval()


def paper_layer():
    layer = SelectiveKernel(8, groups=4, split_input=False).eval()
    randomize_norms(layer)
    return layer


def in_place(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)


def optimizer_step(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def fused_optimizer_step(layer):
    """Of which PyTorch counts no version."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def load_state_dict(layer):
    layer.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in layer.state_dict().items()})


def swapped_data(layer):
    for parameter in layer.parameters():
        parameter.data = parameter.data * 2


def swapped_data_twice(layer):
    # The second tensor may land at the first one's old address.
    for parameter in layer.parameters():
        shape = parameter.shape
        parameter.data = torch.zeros(1)
        parameter.data = torch.rand(shape)


def swapped_parameter(layer):
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() * 2))


def running_statistics(layer):
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.add_(0.5)
            module.running_var.mul_(2)


def epsilon(layer):
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.5


def uncounted_write_then_train(layer):
    layer.train()
    for parameter in layer.parameters():
        parameter.data.mul_(1.5)
    layer.eval()


CHANGES = [
    in_place, optimizer_step, fused_optimizer_step, load_state_dict, swapped_data, swapped_data_twice,
    swapped_parameter, running_statistics, epsilon, uncounted_write_then_train,
]  # fmt: skip


def outputs(layer, x):
    with torch.no_grad():
        with use_backend("triton"):
            ours = layer(x)
        with use_backend("reference"):
            return ours, layer(x)


@pytest.mark.interpret
@pytest.mark.parametrize("make", [classic_layer, paper_layer])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_is_seen(make, change):
    layer, x = make(), torch.randn(1, 8, 5, 4)
    before, _ = outputs(layer, x)
    again, _ = outputs(layer, x)
    assert torch.equal(before, again)
    change(layer)
    after, expected = outputs(layer, x)
    if any(isinstance(m, nn.BatchNorm2d) for m in layer.modules()) or change not in (
        running_statistics,
        epsilon,
    ):
        assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected)


@pytest.mark.interpret
@pytest.mark.parametrize(
    "move", [lambda m: m.half(), lambda m: m.to(torch.float16), lambda m: m.half().float()]
)
def test_to_is_seen(move):
    layer, x = paper_layer(), torch.randn(1, 8, 5, 4)
    outputs(layer, x)
    layer = move(layer)
    ours, expected = outputs(layer, x.to(layer.paths[0].conv.weight.dtype))
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.interpret
def test_copies_share_nothing():
    layer, x = paper_layer(), torch.randn(1, 8, 5, 4)
    before, _ = outputs(layer, x)
    for twin in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._cache is not layer._cache
        assert twin._replays is not layer._replays
        if (
            twin._modules is layer._modules
        ):  # a shallow copy is a layer of its own once it has modules of its own
            twin._modules = copy.deepcopy(layer._modules)
        in_place(twin)
        after, expected = outputs(twin, x)
        torch.testing.assert_close(after, expected)
        assert torch.equal(outputs(layer, x)[0], before)


def test_unchanged_parameters_are_packed_once():
    cache, sources, built = PackCache(), [torch.ones(2), torch.zeros(3)], []

    def build():
        built.append(object())
        return built[-1]

    first = cache.get("plan", sources, build)
    assert cache.get("plan", sources, build) is first
    assert cache.get("another plan", sources, build) is not first
    assert cache.get("plan", sources, build) is first
    sources[0].add_(1)
    assert cache.get("plan", sources, build) is not first
    assert len(built) == 3
    cache.clear()
    cache.get("plan", sources, build)
    assert len(built) == 4


@pytest.mark.interpret
@pytest.mark.parametrize("make", [classic_layer, paper_layer])
def test_what_is_kept_is_not_the_parameters_themselves(make, monkeypatch):
    """A CUDA graph of a layer's call keeps the weights that it was captured with, all of them."""
    layer, found = make(), []
    remember = packing.remember
    monkeypatch.setattr(packing, "remember", lambda *args: found.append(remember(*args)) or found[-1])
    outputs(layer, torch.randn(1, 8, 5, 4))
    (packed,) = found
    before = [tensor.clone() for tensor in packed.tensors()]
    in_place(layer)
    assert all(map(torch.equal, packed.tensors(), before))


@pytest.mark.interpret
def test_another_batch_or_image_size_packs_nothing_new(monkeypatch):
    layer, packed = paper_layer(), []

    def config(workload, shape, task):
        width = 2 if workload.w_in < 6 else 8
        chosen = StreamConfig(8, 8, BLOCK_H=16 // width, BLOCK_W=width, RUN_H=workload.n, RUN_W=2)
        return Found(chosen, Source(f"branch_{task}", "a test", "a key"))

    prepare = packing.prepare_packed
    monkeypatch.setattr(packing, "prepare_packed", lambda *args: packed.append(args) or prepare(*args))
    monkeypatch.setattr("sk_triton.tuning.launches.branch_config", config)
    preference.fastest_plan.cache_clear()
    for size in ((1, 8, 5, 4), (2, 8, 5, 4), (1, 8, 5, 7)):
        ours, expected = outputs(layer, torch.randn(size))
        torch.testing.assert_close(ours, expected)
    preference.fastest_plan.cache_clear()
    assert len(packed) == 1


def test_an_address_is_not_reused_while_it_is_a_key():
    packed = object()
    for _ in range(20):  # without the cache the allocator reuses it about every other time
        cache, source = PackCache(), torch.rand(1000)
        address = source.data_ptr()
        cache.get("plan", [source], lambda: packed)
        source.data = torch.zeros(1)
        others = [torch.rand(1000) for _ in range(100)]
        assert address not in [t.data_ptr() for t in others]


def test_a_capture_takes_what_is_packed_and_packs_nothing(monkeypatch):
    cache, source, packed = PackCache(), torch.ones(2), object()
    monkeypatch.setattr(kernels_lasting, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="call the layer once on such an input before the capture"):
        cache.get("plan", [source], lambda: packed)
    monkeypatch.setattr(kernels_lasting, "is_capturing", lambda device: False)
    cache.get("plan", [source], lambda: packed)
    monkeypatch.setattr(kernels_lasting, "is_capturing", lambda device: True)
    assert cache.get("plan", [source], lambda: pytest.fail("packed during a capture")) is packed


class ForeignOptimizer(torch.optim.Optimizer):
    """As those of other packages, whose kernels write through pointers."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1)


@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.SGD, fused=True), torch.optim.SGD, ForeignOptimizer]
)
def test_a_step_of_any_optimizer_is_a_change_of_what_it_steps(optimizer):
    changed, other, built = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), []
    changed.grad = torch.ones(2)
    caches = [(changed, PackCache()), (other, PackCache())]
    step = optimizer([changed, other]).step
    for _ in range(2):
        for source, cache in caches:
            cache.get("plan", [source], lambda source=source: built.append(source))
        changed.requires_grad_(False)  # as where two networks train in turns
        step()
        changed.requires_grad_()
    assert [id(t) for t in built] == [id(changed), id(other), id(changed)]


class Freeing(torch.optim.Optimizer):
    """Gradients go as soon as they are used."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad)
                parameter.grad = None


def freed_by_a_hook(parameters):
    optimizer = torch.optim.SGD(parameters, fused=True)
    optimizer.register_step_post_hook(lambda optimizer, *args: optimizer.zero_grad())
    return optimizer


@pytest.mark.parametrize("optimizer", [Freeing, freed_by_a_hook])
def test_a_step_that_drops_gradients_is_a_change(optimizer):
    cache, source, built = PackCache(), nn.Parameter(torch.ones(2)), []
    for _ in range(2):
        cache.get("plan", [source], lambda: built.append(1))
        source.grad = torch.ones(2)
        optimizer([source]).step()
    assert source.grad is None
    assert len(built) == 2


def test_steps_count_no_versions_of_what_nobody_packed():
    """A backward pass through what a fused optimizer has changed is another model's business."""
    cache, source, foreign = PackCache(), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    cache.get("plan", [source], list)
    source.grad, foreign.grad = torch.ones(2), torch.ones(2)
    versions = [p._version for p in (source, foreign)]
    torch.optim.SGD([source, foreign], fused=True).step()
    assert [p._version - before for p, before in zip((source, foreign), versions, strict=True)] == [1, 0]


def test_what_is_watched_is_forgotten_with_its_memory():
    cache, many = PackCache(keeps_sources=False), 3 * optimizer_steps._room
    for _ in range(many):
        cache.get("plan", [nn.Parameter(torch.ones(2))], list)
    assert len(optimizer_steps._watched) < many


def test_a_step_on_sharded_parameters_is_a_change_of_all(monkeypatch):
    """Their layers' parameters are filled from them."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    cache, source, built = PackCache(), nn.Parameter(torch.ones(2)), []
    shard = nn.Parameter(torch.ones(2))
    shard.data = torch.ones(4)[:2]
    for stepped, times in ((nn.Parameter(torch.ones(2)), 1), (shard, 2)):
        cache.get("plan", [source], lambda: built.append(1))
        torch.optim.SGD([stepped]).step()
        cache.get("plan", [source], lambda: built.append(1))
        assert len(built) == times


@pytest.mark.parametrize("make", [classic_layer, paper_layer])
def test_loading_forgets_what_was_packed_before(make):
    """FSDP fills parameters again in the same memory, and counts no version."""
    layer, x = make(), torch.randn(1, 8, 5, 4)
    with torch.no_grad():
        layer(x)
        state = layer.state_dict()
        for parameter in layer.parameters():
            parameter.data.mul_(1.5)
        layer.load_state_dict(state)
        with use_backend("reference"):
            expected = layer(x)
        torch.testing.assert_close(layer(x), expected)


def test_a_tensor_is_told_by_what_it_is_for():
    layer, x = paper_layer(), torch.randn(1, 8, 5, 4)
    with torch.no_grad():
        layer(x)
        norm = layer.paths[0].bn
        norm.weight, norm.bias = None, norm.weight
        with use_backend("reference"):
            expected = layer(x)
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.interpret
def test_computed_weights_are_not_kept(monkeypatch):
    """Those of a parametrization are other tensors at every call: a capture packs them in its graph."""
    layer, x = paper_layer(), torch.randn(1, 8, 5, 4)
    parametrize.register_parametrization(layer.paths[0].conv, "weight", nn.Tanh())
    monkeypatch.setattr(PackCache, "_add", lambda *args: pytest.fail("kept"))
    ours, expected = outputs(layer, x)
    torch.testing.assert_close(ours, expected)


def test_inference_tensors_are_never_cached():
    with torch.inference_mode():
        source = torch.ones(2)
    cache, built = PackCache(), []
    for _ in range(2):
        cache.get("plan", [source], lambda: built.append(1))
    assert len(built) == 2


@pytest.mark.parametrize("affine", [True, False])
def test_fold_norm(affine):
    norm = random_norm(5, torch.float32)
    if not affine:
        norm.weight = norm.bias = None
    y, bias = torch.randn(2, 5, 3, 3), torch.randn(5)
    scale, shift = fold_norm(norm, bias, 5, y)
    folded = y * scale[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(folded, norm(y + bias[:, None, None]))
