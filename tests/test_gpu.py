"""The compiled kernels on a GPU."""

import copy

import pytest
import torch

from sk_triton import SelectiveKernel, SKConv, cli, dispatch, explain, use_backend
from sk_triton.bench.grid import GRID_UNITS

from .tolerances import assert_errs_like_eager
from .units import random_unit, randomize_norms

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("without_tf32")]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def compare(layer, x):
    layer = layer.to(x.device, x.dtype).eval()
    randomize_norms(layer)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()
        with use_backend("reference"):
            eager, exact = layer(x), exact(x.double())
        with use_backend("triton"):
            ours = layer(x)
    assert ours.stride() == eager.stride()
    assert_errs_like_eager(ours, eager, exact)


# One sample takes other schedules than eight.
@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "size"), [(128, 56), (256, 28), (512, 14), (1024, 7)])
def test_sknet_stages(channels, size, dtype, n, memory_format):
    x = torch.randn(n, channels, size, size, device="cuda", dtype=dtype).contiguous(
        memory_format=memory_format
    )
    compare(SelectiveKernel(channels, groups=32, split_input=False), x)
    compare(SKConv(channels, M=2, G=32, r=16), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", GRID_UNITS, ids=lambda unit: unit[0])
def test_support_grid(unit, dtype):
    from sk_triton import functional

    _, spec, _, size = unit
    branches, gate = random_unit(spec, torch.float64)

    def run(dtype, backend):
        def to(value):
            if isinstance(value, torch.nn.Module):
                return copy.deepcopy(value).to("cuda", dtype)
            if isinstance(value, tuple):
                return tuple(to(v) for v in value)
            return value.to("cuda", dtype) if isinstance(value, torch.Tensor) else value

        moved = tuple(type(b)(*map(to, b)) for b in branches)
        with torch.no_grad(), use_backend(backend):
            return functional.sk_conv(x.to(dtype), moved, type(gate)(*map(to, gate)), spec)

    x = torch.randn(3, spec.in_channels, size, size, device="cuda", dtype=dtype).to(
        memory_format=torch.channels_last
    )
    assert_errs_like_eager(run(dtype, "triton"), run(dtype, "reference"), run(torch.float64, "reference"))


def test_auto_takes_the_kernels():
    layer, x = SelectiveKernel(64, groups=16).cuda().eval(), torch.randn(2, 64, 14, 14, device="cuda")
    with torch.no_grad():
        assert "backend   triton" in str(explain(layer, x))
    assert "schedule  train" in str(explain(layer, x))


def test_tf32_is_used_where_pytorch_allows_it(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    layer, x = SelectiveKernel(64, groups=16).cuda().eval(), torch.randn(2, 64, 14, 14, device="cuda")
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(x.double())
        ours = layer(x)
    error = (ours.double() - exact).abs().max() / exact.abs().max()
    assert 1e-6 < error < 3e-3


@pytest.mark.parametrize("schedule", ["store", "gated", "library", "recompute", "merged"])
def test_cuda_graph_replays_the_result(schedule):
    paper = SelectiveKernel(64, groups=16, split_input=False)
    layer = (SKConv(64, M=2, G=16, r=16) if schedule == "merged" else paper).cuda().half().eval()
    x = torch.randn(2, 64, 14, 14, device="cuda", dtype=torch.half).to(memory_format=torch.channels_last)
    with torch.no_grad(), use_backend("triton", schedule=schedule):
        expected = layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            v = layer(x)
        v.fill_(float("nan"))
        graph.replay()
    torch.testing.assert_close(v, expected, rtol=0, atol=0)


def test_results_are_deterministic():
    layer = SelectiveKernel(128, groups=32).cuda().half().eval()
    x = torch.randn(16, 128, 56, 56, device="cuda", dtype=torch.half)
    with torch.no_grad():
        first = layer(x)
        assert all(torch.equal(first, layer(x)) for _ in range(3))


def test_more_than_two_to_the_31_elements():
    """Two samples, each of 2^30 elements and more: checked against the same samples alone."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    layer = SKConv(16, M=2, G=4, r=4).cuda().half().eval()
    x = torch.randn(2, 16, 8192, 8200, device="cuda", dtype=torch.half).to(memory_format=torch.channels_last)
    with torch.no_grad(), use_backend("triton"):
        both = layer(x)
        for i in range(2):
            torch.testing.assert_close(both[i : i + 1], layer(x[i : i + 1]), rtol=1e-2, atol=1e-2)


def test_device_is_supported():
    from sk_triton.chips import chip_of

    assert chip_of(torch.device("cuda")) is not None
    assert dispatch.has_triton()


def resident_unit(channels=128):
    layer = SelectiveKernel(channels, groups=32, split_input=False).cuda().half().eval()
    randomize_norms(layer)
    return layer


@pytest.mark.parametrize(("channels", "size"), [(128, 56), (256, 28), (512, 14)])
@pytest.mark.parametrize("n", [1, 3, 128])
def test_resident_equals_itself_and_errs_like_eager(channels, size, n):
    layer = resident_unit(channels)
    x = torch.randn(n, channels, size, size, device="cuda", dtype=torch.half).to(
        memory_format=torch.channels_last
    )
    with torch.no_grad():
        with use_backend("triton", schedule="resident"):
            first = layer(x)
            # Calls after the first start the recorded kernel again.
            assert all(torch.equal(first, layer(x)) for _ in range(200))
        with use_backend("reference"):
            assert_errs_like_eager(first, layer(x), copy.deepcopy(layer).double()(x.double()))


def test_resident_on_two_streams_at_once():
    layer = resident_unit()
    x = torch.randn(32, 128, 56, 56, device="cuda", dtype=torch.half).to(memory_format=torch.channels_last)
    with torch.no_grad(), use_backend("triton", schedule="resident"):
        expected = layer(x)
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        found = []
        for _ in range(20):
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append(layer(x))
        torch.cuda.synchronize()
    assert all(torch.equal(v, expected) for v in found)


def test_resident_under_a_cuda_graph():
    layer = resident_unit()
    x = torch.randn(4, 128, 56, 56, device="cuda", dtype=torch.half).to(memory_format=torch.channels_last)
    with torch.no_grad(), use_backend("triton", schedule="resident"):
        expected = layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            v = layer(x)
        for _ in range(3):
            v.fill_(float("nan"))
            graph.replay()
            assert torch.equal(v, expected)


def test_a_tuned_unit_says_so_and_computes_the_same(folder):
    """Rivals are few and the unit is small: this tests the way there, not the gain."""
    options = ("--shape", "8,64,14,14", "--candidates", "3", "--budget", "120s")
    assert cli.main(["tune", *options]) == 0
    layer = SelectiveKernel(64, groups=32, split_input=False, rd_channels=32).cuda().half().eval()
    x = torch.randn(8, 64, 14, 14, device="cuda", dtype=torch.half).to(memory_format=torch.channels_last)
    with torch.no_grad():
        found = explain(layer, x)
    assert "launches are tuned for it" in found.gpu
    texts = [source.text for source in found.plan.sources]
    assert all("tuned for" in text or "confirmed on" in text for text in texts), texts
    compare(layer, x)


def test_the_benchmark_takes_the_gpu_by_itself(tmp_path):
    options = ("--quick", "--stage", "4", "--batch", "2", "--output", str(tmp_path))
    assert cli.main(["bench", *options]) == 0
    assert (tmp_path / "layer-cuda.json").exists()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_without_breaks(mode):
    """What one call keeps for the next must not lie in the memory of the compiler's CUDA graphs, and these pack weights
    as they are at every replay."""
    layers = [SelectiveKernel(64, groups=16, split_input=False), SKConv(64, M=2, G=16, r=16)]
    network = torch.nn.Sequential(*layers).cuda().half().eval()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(network, fullgraph=True, dynamic=False, mode=mode)
    with torch.no_grad():
        for n in (4, 4, 4, 4, 64, 64, 64):
            x = torch.randn(n, 64, 14, 14, device="cuda", dtype=torch.half)
            found = compiled(x).clone()
            torch.testing.assert_close(found, network(x), rtol=0, atol=0)
            for parameter in network.parameters():
                parameter.mul_(1.01)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
