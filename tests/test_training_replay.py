"""Training steps started again from a recording give what planned steps give, and only while the layer is as it was."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

import sk_triton
from sk_triton import SKConv, use_backend
from sk_triton.bench.measuring.host import stubbed_launches
from sk_triton.library import LibraryCall
from sk_triton.training import call as training_call
from sk_triton.training.tape import Tape

from .counting import Counting
from .training_steps import BY_LIBRARY, LAYERS, assert_equal, image, paper, step, steps_alike
from .versions import needs_narrow_products

pytestmark = pytest.mark.interpret


@pytest.fixture
def direct(started_directly):
    return started_directly


@needs_narrow_products
@pytest.mark.parametrize("name", [*LAYERS, *BY_LIBRARY])
def test_a_step_is_started_again(name, direct, started):
    """The forward pass from its second call on, the backward pass from the third on."""
    layer = {**LAYERS, **BY_LIBRARY}[name]().half()
    (first, _), (second, _), (third, launches) = steps_alike(layer, 3, direct, started)
    assert first == 0
    assert 0 < second < third == launches


@needs_narrow_products
@pytest.mark.parametrize(
    ("name", "memory_format", "autocast"),
    [
        ("paper", torch.channels_last, True),
        ("paper", torch.contiguous_format, False),
        *((name, torch.contiguous_format, True) for name in ("paper", *BY_LIBRARY)),
    ],
    ids=str,
)
def test_memory_formats_and_autocast(name, memory_format, autocast, direct, started):
    layer = {**LAYERS, **BY_LIBRARY}[name]()
    layer = layer if autocast else layer.half()
    settings = {"autocast": autocast, "image": {"memory_format": memory_format}}
    counts = steps_alike(layer, 3, direct, started, **settings)
    assert counts[2][0] == counts[2][1] > 0


@pytest.fixture(params=["paper", "stride 2"])
def recorded(request, direct):
    """A layer whose steps are started again, and its copy. Of one the library computes a part."""
    layer = {**LAYERS, **BY_LIBRARY}[request.param]().half()
    for _ in range(2):
        step(layer, image())
    direct.clear()
    return layer, copy.deepcopy(layer)


def frozen(layer):
    layer.paths[0].conv.weight.requires_grad_(False)


def replaced_parameter(layer):
    weight = layer.attn.fc_reduce.weight
    layer.attn.fc_reduce.weight = nn.Parameter(weight.detach().clone())


def another_momentum(layer):
    layer.paths[0].bn.momentum = layer.paths[1].bn.momentum = 0.7


def cumulative_average(layer):
    layer.attn.bn.momentum = None


def norm_in_eval_mode(layer):
    layer.paths[1].bn.eval()


def moved_statistics(layer):
    layer.paths[1].bn.running_mean.data = torch.randn(8).half()


CHANGES = [
    frozen, replaced_parameter, another_momentum, cumulative_average, norm_in_eval_mode, moved_statistics,
]  # fmt: skip


@needs_narrow_products
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_planned_anew(change, recorded, direct):
    layer, planned = recorded
    for module in recorded:
        torch.manual_seed(1)
        change(module)
    x = image()
    found = step(layer, x)
    assert not direct
    assert_equal(found, step(planned, x))
    assert_equal(layer.state_dict().values(), planned.state_dict().values())


@needs_narrow_products
def test_a_parameter_that_takes_anothers_memory_gets_its_gradient(recorded, direct):
    layer, planned = recorded
    old = layer.paths[0].conv.weight
    layer.paths[0].conv.weight = nn.Parameter(old.detach())
    x = image()
    old.grad = None
    found = step(layer, x)
    assert direct
    assert old.grad is None
    assert_equal(found, step(planned, x))


@needs_narrow_products
def test_parameters_that_move_before_the_backward_pass(recorded, direct):
    layer, planned = recorded
    found = []
    for module, moves in ((layer, True), (planned, False)):
        torch.manual_seed(2)
        x = image().requires_grad_()
        module.zero_grad()
        with use_backend("triton"):
            v = module(x)
            if moves:
                count = len(direct)
                for parameter in module.parameters():
                    parameter.data = parameter.data.clone()
            v.sum().backward()
        if moves:
            assert len(direct) == count > 0
        found.append([v.detach(), x.grad, *(p.grad for p in module.parameters())])
    assert_equal(*found)


@needs_narrow_products
@pytest.mark.parametrize(
    "spread",
    [
        lambda dv: dv.contiguous(),
        lambda dv: torch.cat([dv, dv], 1).contiguous(memory_format=torch.channels_last)[:, 3:11],
        lambda dv: dv[:1, :1, :1, :1].expand_as(dv),
    ],
    ids=["nchw", "slice", "broadcast"],
)
def test_gradients_of_another_layout(spread, recorded, direct):
    layer, planned = recorded
    size = 2, *layer.spec.output_size(3, 3)
    for _ in range(2):
        x, dv = image(), spread(image(size=size))
        direct.clear()
        found = step(layer, x, dv)
        planned._replays.clear()
        assert_equal(found, step(planned, x, dv))
    assert len(direct) > 10


@needs_narrow_products
def test_saved_tensors_that_come_back_elsewhere_in_another_layout(recorded, direct, monkeypatch):
    """As hooks on a node's own saved tensors may hand them over: clones, slices of a buffer, contiguous copies, vectors
    with gaps."""
    monkeypatch.setattr("sk_triton.training.replay.MAX_RECORDINGS", 2)
    layer, planned = recorded

    def in_a_buffer(tensor):
        buffer = tensor.new_empty(tensor.numel() + 64)
        return buffer[64:].view(tensor.shape).copy_(tensor) if tensor.dim() == 1 else tensor.clone()

    def with_gaps(tensor):
        return tensor.repeat_interleave(2)[::2] if tensor.dim() == 1 else tensor.clone()

    for unpack in (torch.clone, in_a_buffer, torch.Tensor.contiguous, with_gaps) * 2:
        x = image()
        inner = x.clone(memory_format=torch.preserve_format).requires_grad_()
        layer.zero_grad()
        with use_backend("triton"):
            v = layer(inner)
        for saved in v.grad_fn._raw_saved_tensors:
            saved.register_hooks(lambda tensor: tensor, unpack)
        v.backward(torch.full_like(v, 0.5))
        found = [inner.grad, *(p.grad for p in layer.parameters())]
        planned.load_state_dict(layer.state_dict())
        planned._replays.clear()
        expected = step(planned, x)[1:]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    assert direct
    (_, start), *_ = layer._replays._recordings.values()
    assert 0 < len(start.__self__.backwards) <= 2


@needs_narrow_products
def test_hooks_on_all_saved_tensors_meet_planned_calls(recorded, direct):
    layer, planned = recorded
    for _ in range(2):
        x = image()
        direct.clear()
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            found = step(layer, x)
        assert not direct
        assert_equal(found, step(planned, x))


@needs_narrow_products
@pytest.mark.parametrize("watching", [nullcontext, Counting], ids=["function", "operator"])
@pytest.mark.parametrize("save", ["branches", "input"])
def test_saved_tensors_that_come_back_in_column_major_order(save, watching):
    def in_columns(tensor):
        axes = tuple(reversed(range(tensor.dim())))
        return tensor.permute(axes).contiguous().permute(axes)

    layer, x = paper().half(), image()
    layer.save = save
    expected = step(copy.deepcopy(layer), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, in_columns), watching():
        found = step(layer, x)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@needs_narrow_products
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, direct):
    layer = paper().half()
    planned = copy.deepcopy(layer)
    for _ in range(3):
        x = image()
        found = []
        for module, run in (
            (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)),
            (planned, planned),
        ):
            inner = x.clone(memory_format=torch.preserve_format).requires_grad_()
            module.zero_grad()
            with use_backend("triton"):
                run(inner).sum().backward()
            found.append([inner.grad, *(p.grad for p in module.parameters())])
        assert_equal(*found)


@needs_narrow_products
def test_memory_that_was_freed_and_allocated_again(recorded, direct):
    """As FSDP does between the passes: the storage is the same one, elsewhere."""
    layer, planned = recorded
    weight = layer.paths[0].conv.weight.data
    values, storage = weight.clone(), weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    keeps_it_away = [torch.zeros(size, dtype=torch.uint8) for _ in range(8)]
    storage.resize_(size)
    weight.copy_(values)
    x = image()
    assert_equal(step(layer, x), step(planned, x))
    del keeps_it_away


def test_calls_with_and_without_gradients_are_kept_side_by_side(direct):
    layer = SKConv(8, M=2, G=2, r=2, L=4).half()
    x = image()
    counts = []
    for _ in range(4):
        direct.clear()
        with use_backend("triton"), torch.no_grad():
            layer(x)
        inferred = len(direct)
        with use_backend("triton"):
            layer(x)
        counts.append((inferred, len(direct) - inferred))
    assert counts[0] == (0, 0)
    assert counts[1] == counts[3]
    assert all(counts[1])


@pytest.mark.parametrize("train", [True, False])
def test_a_moved_layer_keeps_no_old_memory(train, direct):
    layer = paper().half().train(train)
    for _ in range(2):
        with use_backend("triton"):
            layer(image())
    old = [StorageWeakRef(t.untyped_storage()) for t in (*layer.parameters(), *layer.buffers())]
    layer.double()
    gc.collect()
    assert sum(not reference.expired() for reference in old) == 3  # the counters, which stay as they are


@needs_narrow_products
def test_second_derivatives_are_refused(recorded, direct):
    layer, _ = recorded
    x = image().requires_grad_()
    with use_backend("triton"):
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    assert direct
    with pytest.raises(RuntimeError, match="no second derivatives of a unit"):
        dx.sum().backward()


@needs_narrow_products
def test_an_inference_call_in_between_sees_what_was_learned(recorded, direct):
    """Kernels bring the running statistics up to date, and say so by the counters of batches."""
    layer, _ = recorded
    counters = [t for name, t in layer.named_buffers() if name.endswith("num_batches_tracked")]
    versions = [t._version for t in counters]
    step(layer, image())
    assert all(t._version > old for t, old in zip(counters, versions, strict=True))
    x = image()
    with torch.no_grad(), use_backend("triton"):
        inferred = copy.deepcopy(layer).eval()(x)
        for norm in layer.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
        assert torch.equal(layer(x), inferred)


@needs_narrow_products
def test_a_step_spoils_no_graph_that_saved_the_statistics(recorded, direct):
    """PyTorch's norm, too, changes them without a word."""
    layer, other = recorded
    other.paths[0].bn._buffers.update(layer.paths[0].bn._buffers)
    with use_backend("reference"):
        before = other.train()(image().requires_grad_())
    direct.clear()
    step(layer, image())
    assert direct
    before.sum().backward()


def test_shared_and_synchronized_norms_are_planned_each_time(direct):
    shared = paper().half()
    shared.paths[1].bn = shared.paths[0].bn
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(paper().half())
    for layer in (shared, synchronized):
        for _ in range(3):
            step(layer, image())
    assert not direct


def test_a_watched_call_goes_through_the_operator(recorded, direct):
    layer, _ = recorded
    with Counting() as counting, use_backend("triton"):
        layer(image())
    assert not direct
    assert counting.counts


@needs_narrow_products
@pytest.mark.parametrize("name", [*LAYERS, *BY_LIBRARY])
def test_what_is_recorded_is_all_that_was_computed(name, monkeypatch):
    """No operator that writes runs beside the steps on a tape that is whole."""
    layer = {**LAYERS, **BY_LIBRARY}[name]().half()
    tapes, passes = [], {}
    monkeypatch.setattr(training_call, "is_watched", lambda tensor: False)
    init = Tape.__init__

    def kept(tape):
        init(tape)
        tapes.append(tape)

    call = LibraryCall.__call__

    def uncounted(step):
        with _disable_current_modes():
            return call(step)

    monkeypatch.setattr(Tape, "__init__", kept)
    monkeypatch.setattr(LibraryCall, "__call__", uncounted)
    x = image(layer.spec.in_channels).requires_grad_()
    with stubbed_launches(sk_triton), use_backend("triton"):
        layer(x).sum().backward()  # makes what is kept
        with Counting() as counting:
            v = layer(x)
        passes["forward"] = tapes[-1].is_whole, counting.counts.copy()
        dv = torch.ones_like(v)
        with Counting() as counting:
            (v.grad_fn).apply(dv)
        passes["backward"] = tapes[-1].is_whole, counting.counts.copy()
    for is_whole, counts in passes.values():
        assert is_whole
        assert not counts
