"""What training keeps for the backward pass, as the benchmark reports it."""

import gc
import json

import pytest
import torch
from rich.console import Console

from sk_triton import SelectiveKernel, save_for_backward, use_backend
from sk_triton.bench import plots, results, table
from sk_triton.bench.measuring import memory
from sk_triton.bench.measuring.providers import competitors
from sk_triton.bench.measuring.sources import Ours
from sk_triton.bench.results import SAVING_INPUT
from sk_triton.bench.shapes import INFERENCE, TRAINING

from .bench_fakes import CPU, FakeSource, run_small, small_case
from .synthetic_results import some_results


class Products(torch.nn.Module):
    """Keeps the first product, besides its input and parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(torch.randn(7, 7)) for _ in range(2))

    def forward(self, x):
        return x @ self.first @ self.second


def test_the_peak_is_what_lives_at_once():
    x = torch.randn(1000)

    def call():
        y = x + 1
        y = y * 2  # two of three alive
        return y.sum()

    assert memory.measure_memory(call, CPU, [x], sees_saved=False).peak_bytes == pytest.approx(8000, abs=64)


def test_the_peak_is_that_of_the_calls_of_users():
    """Weights that a layer has put into oneDNN's layout: a mode that counts would make it leave them alone."""
    layer = SelectiveKernel(512, groups=32, split_input=False).eval()
    x = torch.randn(2, 512, 4, 4).to(memory_format=torch.channels_last)
    with torch.no_grad():
        layer(x)
        layer(x)
        peak = memory.measure_memory(lambda: layer(x), CPU, [x], sees_saved=False).peak_bytes
    weights = max(p.nbytes for p in layer.parameters())
    assert x.nbytes < peak < weights, "a call has put weights into another layout"


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_what_is_kept_is_counted_to_the_byte(is_compiled):
    module, x = Products(), torch.randn(5, 7, requires_grad=True)
    given = [x, *module.parameters()]
    if is_compiled:
        torch._dynamo.reset()
        v = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
        kept = memory.kept_for_backward(v, given)
    else:
        kept = memory.measure_memory(lambda: module(x), CPU, given).saved_bytes
    assert kept == x.numel() * 4


def test_a_compiled_layer_keeps_what_its_backward_pass_reads():
    layer = SelectiveKernel(8, groups=2, split_input=False)
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    torch._dynamo.reset()
    v = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    given = [x, *layer.parameters(), *layer.buffers()]
    tensors = memory.kept_for_backward(v, given) / (x.numel() * 4)
    assert 4 <= tensors <= 12  # outputs of convolutions, norms or ReLUs, and products
    v.sum().backward()


@pytest.mark.interpret
def test_both_policies_in_activation_tensors():
    layer = SelectiveKernel(16, groups=4, split_input=False).half()
    # Large enough for weights, which are packed at every call, to be small beside it.
    x = torch.randn(2, 16, 24, 24).half().to(memory_format=torch.channels_last).requires_grad_()
    given = [x, *layer.parameters(), *layer.buffers()]
    found = {}
    for save in ("branches", "input"):
        gc.collect()  # what an earlier call left would be freed in this one
        with use_backend("triton"), save_for_backward(save):
            found[save] = memory.measure_memory(lambda: layer(x), CPU, given)
    tensor = x.numel() * 2
    # Sums by sample and channel are all that the gradient needs besides.
    assert 2 * tensor < found["branches"].saved_bytes < 2.2 * tensor
    assert 0 < found["input"].saved_bytes < 0.2 * tensor
    assert found["input"].peak_bytes < found["branches"].peak_bytes - tensor


@pytest.mark.interpret
def test_a_run_reports_every_policy():
    ours = [
        Ours(backend="triton", save="branches"),
        Ours(SAVING_INPUT, "sk_triton", backend="triton", save="input"),
    ]
    records = run_small(*ours, FakeSource(), direction=TRAINING)
    saved = {source: records[source].memory.saved_bytes for source in ("ours", SAVING_INPUT, "fake")}
    assert 0 < saved[SAVING_INPUT] < saved["ours"] < saved["fake"]
    assert all(record.status == results.OK for record in records.values())


def test_json_table_and_plot_show_what_saving_the_input_keeps():
    run = some_results("train", stages=(1,), batches=(8,))
    (own, *_) = [r for r in run.records if r.source == SAVING_INPUT and r.memory]
    entries = json.loads(run.to_json())["records"]
    assert own.memory.saved_bytes in [
        e["memory"]["saved_bytes"] for e in entries if e["source"] == SAVING_INPUT
    ]
    console = Console(record=True, width=200)
    table.show(run, console)
    text = console.export_text()
    assert "saved" in text
    assert 'save="input"' in text
    figure = plots.pictures(run)[f"memory-{own.case.subject}-{own.case.dtype}"]()
    heights = {round(patch.get_height(), 3) for patch in figure.axes[0].patches}
    assert round(own.memory.saved_bytes / own.case.tensor_bytes, 3) in heights


def test_on_a_gpu_training_is_measured_under_both_policies():
    def sources(direction, device_type="cuda"):
        case = small_case(dtype="fp16", direction=direction)
        return {provider.source.key for provider in competitors(case, device_type, quick=False)}

    assert SAVING_INPUT in sources(TRAINING)
    assert SAVING_INPUT not in sources(INFERENCE)
    assert SAVING_INPUT not in sources(TRAINING, "cpu")  # there the branches are always saved
