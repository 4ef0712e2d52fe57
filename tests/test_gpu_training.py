"""Training through the compiled kernels on a GPU."""

import copy

import pytest
import torch

from sk_triton import SelectiveKernel, SKConv, save_for_backward, use_backend

from .tolerances import assert_typical_errors_like_eager
from .units import randomize_norms

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("without_tf32")]
SAVES = pytest.mark.parametrize("save", ["branches", "input"])


def unit(channels=64, dtype=torch.float16, group_channels=4):
    layer = SelectiveKernel(channels, groups=channels // group_channels, split_input=False).cuda().to(dtype)
    randomize_norms(layer)
    return layer


def random(*size, dtype=torch.float16):
    return torch.randn(*size, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)


def step(layer, x, dv, backend, save="branches"):
    """Output and gradients of one step."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    with use_backend(backend), save_for_backward(save):
        v = layer(x)
    v.backward(dv.to(v.dtype))
    return [v.detach(), x.grad, *(p.grad for p in layer.parameters())]


@SAVES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("channels", "size", "n"), [(128, 56, 2), (256, 28, 2), (512, 14, 4), (1024, 7, 8)])
def test_sknet_stages(channels, size, n, dtype, save):
    """Fewer of large images: float64 takes most of the time, on a GPU half a minute for eight."""
    paper = SelectiveKernel(channels, groups=32, split_input=False)
    randomize_norms(paper)
    for layer in (paper, SKConv(channels, M=2, G=32, r=16)):
        layer = layer.cuda().to(dtype)
        x, dv = random(n, channels, size, size, dtype=dtype), random(n, channels, size, size, dtype=dtype)
        exact = step(copy.deepcopy(layer).double(), x.double(), dv, "reference")
        eager = step(copy.deepcopy(layer), x, dv, "reference")
        ours = step(copy.deepcopy(layer), x, dv, "triton", save)
        assert_typical_errors_like_eager(list(zip(ours, eager, exact, strict=True)))


@SAVES
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("group_channels", [4, 32], ids=["by kernels", "by the library"])
def test_recorded_steps(save, autocast, group_channels, monkeypatch):
    """Steps after the first start kernels directly: the same bits as planned ones, on other inputs and weights."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    layer = unit(dtype=torch.float32 if autocast else torch.float16, group_channels=group_channels)
    planned = copy.deepcopy(layer)
    for _ in range(4):
        x, dv = random(4, 64, 14, 14), random(4, 64, 14, 14)
        planned._replays.clear()
        with torch.autocast("cuda", torch.float16, enabled=autocast):
            found, expected = (step(module, x, dv, "triton", save) for module in (layer, planned))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        for one, other in zip(layer.buffers(), planned.buffers(), strict=True):
            assert torch.equal(one, other)
        with torch.no_grad():
            for ours, theirs in zip(layer.parameters(), planned.parameters(), strict=True):
                ours.sub_(ours.grad, alpha=0.01)
                theirs.sub_(theirs.grad, alpha=0.01)
    ((_, start),) = layer._replays._recordings.values()
    assert len(start.__self__.backwards) == 1


@SAVES
def test_a_step_in_a_cuda_graph(save):
    layer, x, dv = unit(), random(4, 64, 14, 14), random(4, 64, 14, 14)
    expected = step(copy.deepcopy(layer), x, dv, "triton", save)
    x.requires_grad_()

    def run():
        x.grad = None
        layer.zero_grad(set_to_none=True)
        v = layer(x)
        v.backward(dv)
        return v

    with use_backend("triton"), save_for_backward(save):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            v = run()
    found = [v.detach(), x.grad, *(p.grad for p in layer.parameters())]
    counted = layer.attn.bn.num_batches_tracked.clone()
    for _ in range(2):
        for tensor in found:
            tensor.fill_(float("nan"))
        graph.replay()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    assert layer.attn.bn.num_batches_tracked == counted + 2


@SAVES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_with_scaled_gradients(dtype, save):
    start, x = unit(dtype=torch.float32), random(4, 64, 14, 14, dtype=torch.float32)
    stepped = {}
    for backend in ("triton", "reference"):
        layer = copy.deepcopy(start)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, enabled=dtype == torch.float16)
        with use_backend(backend), save_for_backward(save), torch.autocast("cuda", dtype):
            v = layer(x)
        assert v.dtype == dtype
        scaler.scale(v.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        stepped[backend] = list(layer.parameters())
    for ours, eager in zip(*stepped.values(), strict=True):
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-3)


@SAVES
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_without_breaks(mode, save):
    layer, x, dv = unit(), random(4, 64, 14, 14), random(4, 64, 14, 14)
    expected = step(copy.deepcopy(layer), x, dv, "triton", save)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(3):  # warmed up, captured, replayed
        torch.compiler.cudagraph_mark_step_begin()
        layer.zero_grad()
        inner = x.clone().requires_grad_()
        with use_backend("triton"), save_for_backward(save):
            v = compiled(inner)
        v = v.clone()
        v.backward(dv)
        for one, other in zip([v, inner.grad, *(p.grad for p in layer.parameters())], expected, strict=True):
            assert torch.equal(one, other)


@SAVES
def test_gradients_are_deterministic(save):
    layer, x, dv = unit(128), random(16, 128, 56, 56), random(16, 128, 56, 56)
    first = step(layer, x, dv, "triton", save)
    for one, other in zip(step(layer, x, dv, "triton", save), first, strict=True):
        assert torch.equal(one, other)


def test_saving_the_input_keeps_a_tenth_of_a_tensor():
    layer, x = unit(128), random(16, 128, 56, 56).requires_grad_()
    kept = {}
    for save in ("branches", "input"):
        with use_backend("triton"), save_for_backward(save):
            layer(x)
            before = torch.cuda.memory_allocated()
            v = layer(x)
            kept[save] = (torch.cuda.memory_allocated() - before) / (v.numel() * 2) - 1
            del v
    assert 2 <= kept["branches"] < 2.1
    assert kept["input"] < 0.1
