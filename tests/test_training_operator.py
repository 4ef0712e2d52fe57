"""The training operator as a citizen of PyTorch: compilation, autocast, checkpoints, subsets of gradients, refusals."""

import copy
import os
import pickle
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sk_triton import SelectiveKernel, SKConv, dispatch, save_for_backward, use_backend
from sk_triton.training import run as training

from .interpreter import exact_bfloat16
from .tolerances import assert_same
from .units import randomize_norms

pytestmark = pytest.mark.interpret


def paper():
    return SelectiveKernel(8, groups=2, split_input=False)


def gradients(layer, run, x, backend="triton"):
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    with use_backend(backend):
        v = run(x)
        v.square().sum().backward()
    return [v.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def assert_all_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("save", ["branches", "input"])
@pytest.mark.parametrize("make", [paper, lambda: SKConv(8, M=2, G=2, r=2, L=4)], ids=["paper", "classic"])
def test_opcheck(make, save):
    from sk_triton.training.operators import unit_fwd

    layer = make()
    branches, gate = layer.branches(), layer.gate()
    norms = [*(branch.norm for branch in branches), gate.norm]
    tensors = training.unit_tensors(branches, gate).flat()
    arguments = (
        torch.randn(2, 8, 4, 3, requires_grad=True),
        [t.detach().clone().requires_grad_() for t in tensors if t is not None],
        [],
        [t is not None for t in tensors],
        layer.spec.encoded,
        *training.norm_settings(norms),
        save,
    )
    torch.library.opcheck(unit_fwd, arguments)


needs_cpp = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler on a CPU"
)


@pytest.mark.parametrize(
    ("make", "backend"),
    [
        pytest.param(paper, "aot_eager", id="paper"),
        pytest.param(lambda: SKConv(8, M=2, G=2, r=2, L=4), "aot_eager", id="classic"),
        pytest.param(paper, "inductor", id="paper, inductor", marks=needs_cpp),
    ],
)
def test_compiles_without_breaks(make, backend):
    layer, x = make(), torch.randn(2, 8, 5, 4)
    compiled = copy.deepcopy(layer)
    torch._dynamo.reset()
    function = torch.compile(compiled, fullgraph=True, backend=backend)
    expected = gradients(layer, layer, x)
    assert_all_same(gradients(compiled, function, x), expected)
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(compiled.get_buffer(name), buffer)


def test_a_schedule_of_inference_is_refused_by_compiled_training():
    layer, x = paper(), torch.randn(2, 8, 5, 4)
    torch._dynamo.reset()
    function = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients(layer, function, x)
    with (
        use_backend("triton", schedule="store"),
        pytest.raises(RuntimeError, match="'store' is for inference"),
    ):
        function(x)


@pytest.mark.parametrize("save", ["branches", "input"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2e-2), (torch.bfloat16, 0.15)], ids=["fp16", "bf16"]
)
def test_autocast(dtype, tolerance, save, monkeypatch):
    if dtype == torch.bfloat16:  # refused where interpreted; right under `exact_bfloat16`
        monkeypatch.setattr(dispatch, "_device_reason", lambda device, dtype: "")
    layer, x = paper(), torch.randn(4, 8, 5, 4)
    found = []
    for backend in ("triton", "reference"):
        module = copy.deepcopy(layer)
        with torch.autocast("cpu", dtype), save_for_backward(save), exact_bfloat16():
            found.append(gradients(module, module, x, backend))
    for ours, eager in zip(*found, strict=True):
        assert ours.dtype == eager.dtype
        torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance * eager.abs().max().item())


@pytest.mark.parametrize("save", ["branches", "input"])
def test_scaled_gradients(save):
    """A step with finite gradients is taken, one with an overflow is left out and lowers the scale."""
    start, x = paper(), torch.randn(4, 8, 5, 4)
    stepped = {}
    for backend in ("triton", "reference"):
        layer = copy.deepcopy(start)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for factor in (1e-2, 1e6):
            optimizer.zero_grad()
            before = [p.detach().clone() for p in layer.parameters()]
            with use_backend(backend), save_for_backward(save), torch.autocast("cpu", torch.float16):
                v = layer(x)
            scaler.scale(v.float().square().mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            is_same = [torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True)]
            assert all(is_same) if factor > 1 else not any(is_same)
        assert scaler.get_scale() == 2.0**7
        stepped[backend] = list(layer.parameters())
    for ours, eager in zip(*stepped.values(), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-3)


def test_the_backward_pass_ignores_autocast():
    layer, x = paper(), torch.randn(4, 8, 5, 4)
    expected = gradients(layer, layer, x)
    inner = x.clone().requires_grad_()
    layer.zero_grad()
    with use_backend("triton"):
        loss = layer(inner).square().sum()
    with torch.autocast("cpu", torch.float16):
        loss.backward()
    assert torch.equal(inner.grad, expected[1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("is_own", [False, True], ids=["a block inside", "the layer's own choice"])
def test_checkpoint_of_a_layer_that_saves_its_input(reentrant, is_own):
    layer, x = paper(), torch.randn(2, 8, 5, 4)

    def saving(x):
        with save_for_backward("input"):
            return layer(x)

    expected = gradients(layer, saving, x)
    if is_own:
        layer.save = "input"
    run = layer if is_own else saving
    assert_all_same(gradients(layer, lambda x: checkpoint(run, x, use_reentrant=reentrant), x), expected)


def test_batches_of_gradients_are_refused():
    layer, x = paper(), torch.randn(2, 8, 5, 4, requires_grad=True)
    with use_backend("triton"):
        v = layer(x)
    with pytest.raises(RuntimeError, match="the kernels take no batch of gradients"):
        torch.autograd.grad(v, x, torch.ones(3, *v.shape), is_grads_batched=True)


def test_saving_the_input_updates_the_running_statistics_once():
    layer, x = paper(), torch.randn(2, 8, 5, 4)
    other = copy.deepcopy(layer)
    gradients(layer, layer, x)
    with save_for_backward("input"):
        gradients(other, other, x)
    assert other.attn.bn.num_batches_tracked == 1
    torch.testing.assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kept", ["x", "paths.1.conv.weight", "paths.0.bn.bias", "attn.fc_select.weight"])
def test_any_subset_of_gradients(kept):
    layer, x = paper(), torch.randn(2, 8, 5, 4)
    whole = gradients(layer, layer, x)
    names = ["v", "x", *(name for name, _ in layer.named_parameters())]
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == kept)
    layer.zero_grad()
    inner = x.clone().requires_grad_(kept == "x")
    with use_backend("triton"):
        layer(inner).square().sum().backward()
    grads = {"x": inner.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert [name for name, grad in grads.items() if grad is not None] == [kept]
    assert_same(grads[kept], whole[names.index(kept)])


@pytest.mark.parametrize(
    "spread",
    [
        lambda dv: dv,
        lambda dv: dv.contiguous(memory_format=torch.channels_last),
        lambda dv: dv.transpose(2, 3).contiguous().transpose(2, 3),
        lambda dv: torch.cat([dv, dv], 1)[:, ::2],
        lambda dv: dv[:1, :1, :1, :1].expand_as(dv),
        lambda dv: dv.contiguous(memory_format=torch.channels_last)[:, :, :1].expand_as(dv),
        lambda dv: torch.cat([dv, dv], 3).contiguous(memory_format=torch.channels_last)[..., : dv.shape[3]],
    ],
    ids=["nchw", "channels_last", "transposed", "strided", "broadcast", "broadcast rows", "crop"],
)
def test_incoming_gradients_of_any_layout(spread):
    layer, x = paper(), torch.randn(2, 8, 5, 4)
    dv = spread(torch.randn(2, 8, 5, 4))
    found = []
    for gradient in (dv, dv.clone(memory_format=torch.contiguous_format)):
        inner = x.clone().requires_grad_()
        with use_backend("triton"):
            found.append(torch.autograd.grad(layer(inner), [inner, *layer.parameters()], gradient))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "view", [lambda x: x[:, :, 1:, ::2], lambda x: x[:1].expand(2, -1, -1, -1), lambda x: x.transpose(2, 3)]
)
def test_views_of_the_input(view):
    layer, x = paper(), torch.randn(2, 8, 6, 5)
    found = gradients(layer, lambda x: layer(view(x)), x)
    copied = gradients(layer, lambda x: layer(view(x).contiguous()), x)
    assert_all_same(found, copied)


@pytest.mark.parametrize("loss", [torch.sum, lambda v: v.square().sum()], ids=["linear", "squares"])
def test_second_derivatives_are_refused(loss):
    layer, x = paper(), torch.randn(2, 8, 5, 4, requires_grad=True)
    with use_backend("triton"):
        (dx,) = torch.autograd.grad(loss(layer(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives of a unit"):
        dx.sum().backward()


class Seen(TorchDispatchMode):
    """The operators of ours that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sk_triton":
            self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_call_that_nobody_watches_goes_past_the_operators():
    layer, x = paper(), torch.randn(2, 8, 5, 4, requires_grad=True)
    with use_backend("triton"):
        v = layer(x)
        assert v.grad_fn.name() == "UnitFunctionBackward"
        with Seen() as seen:
            v.sum().backward()
        assert seen.names == {"unit_bwd"}
        with Seen() as seen:
            assert layer(x).grad_fn.name() != "UnitFunctionBackward"
        assert seen.names == {"unit_fwd"}


def test_transformations_are_refused():
    layer, x = paper(), torch.randn(2, 8, 5, 4)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"torch.func transformation is active"):
        torch.func.grad(lambda x: layer(x).sum())(x)


def test_deterministic_algorithms():
    layer, x = paper(), torch.randn(2, 8, 5, 4)
    expected = gradients(layer, layer, x)
    torch.use_deterministic_algorithms(True)
    try:
        found = gradients(layer, layer, x)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_train_alike(copied):
    layer, x = paper(), torch.randn(2, 8, 5, 4)
    randomize_norms(layer)
    layer.save = "input"
    other = copied(layer)
    assert other.save == "input"
    assert_all_same(gradients(other, other, x), gradients(layer, layer, x))


def test_a_drop_layer_in_training_is_refused_with_the_reason():
    layer = SelectiveKernel(8, groups=2, split_input=False, drop_layer=torch.nn.Dropout)
    with use_backend("triton"), pytest.raises(RuntimeError, match="drop is active"):
        layer(torch.randn(2, 8, 5, 4))
