"""The inference operator: one graph under torch.compile, packed once, and never stale."""

import dataclasses
import gc
import os
import shutil

import pytest
import torch

from sk_triton import SelectiveKernel, inference_op, launching, pack_cache, packing, use_backend
from sk_triton.functional import sk_conv
from sk_triton.inference_op import unit_inference
from sk_triton.kernels import lasting as kernels_lasting
from sk_triton.kernels.lasting import lasting

from .played_graph import PlayedGraph
from .units import randomize_norms
from .versions import needs_narrow_products
from .whole_units import LAYERS

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("error:Dynamo detected a call to a")]


needs_cpp = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler on a CPU"
)


def paper(**kwargs):
    layer = SelectiveKernel(8, groups=2, split_input=False, **kwargs).eval()
    randomize_norms(layer)
    return layer


def compiled(layer, **options):
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, **{"backend": "aot_eager"} | options)


@pytest.fixture
def x():
    return torch.randn(2, 8, 5, 4)


@pytest.fixture
def packs(monkeypatch):
    """A list with an entry for each time that parameters are packed."""
    found, prepare = [], packing.prepare_packed
    monkeypatch.setattr(packing, "prepare_packed", lambda *args: found.append(None) or prepare(*args))
    return found


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["paper", "classic", "classic, three branches, stride 2", "split, groups"])
def test_opcheck(name, memory_format, monkeypatch):
    layer, arguments = LAYERS[name]().eval(), []
    monkeypatch.setattr(inference_op, "unit_inference", lambda *args: arguments.extend(args))
    x = torch.randn(2, 16, 5, 4).to(memory_format=memory_format)
    with torch.no_grad():
        inference_op.run_inference_op(x, layer.branches(), layer.gate(), layer.spec)
        torch.library.opcheck(unit_inference, arguments)


@pytest.mark.parametrize("name", LAYERS)
def test_compiles_without_breaks(name):
    layer = LAYERS[name]().eval()
    randomize_norms(layer)
    x = torch.randn(2, layer.spec.in_channels, 5, 4)
    with torch.no_grad(), use_backend("triton"):
        v, expected = compiled(layer)(x), layer(x)
    assert torch.equal(v, expected)
    assert v.stride() == expected.stride()


@pytest.mark.parametrize("schedule", ["store", "library", "recompute"])
def test_the_schedule_that_is_asked_for_runs(schedule, x, monkeypatch):
    layer, ran = paper().half(), []
    run = launching.run_packed
    monkeypatch.setattr(
        launching, "run_packed", lambda plan, *args: ran.append(plan.schedule) or run(plan, *args)
    )
    with torch.no_grad(), use_backend("triton", schedule=schedule):
        compiled(layer)(x.half())
    assert ran == [schedule]


def test_a_schedule_that_cannot_run_is_refused(x):
    layer = compiled(paper())
    with (
        torch.no_grad(),
        use_backend("triton", schedule="merged"),
        pytest.raises(RuntimeError, match="branch_act"),
    ):
        layer(x)


@pytest.mark.parametrize("change", ["in place", "loaded", "swapped", "assigned", "uncounted"])
def test_changed_parameters_are_noticed(change, x, packs):
    layer = paper()
    function = compiled(layer)
    conv, norm = layer.paths[1].conv, layer.paths[0].bn
    with torch.no_grad(), use_backend("triton"):
        function(x), function(x)
        assert len(packs) == 1
        if change == "in place":
            conv.weight.mul_(2)
            norm.running_var.add_(1)
        elif change == "loaded":
            layer.load_state_dict({name: t + 1 for name, t in layer.state_dict().items()})
        elif change == "uncounted":  # as documented: train() and back
            conv.weight.data.mul_(2)
            layer.train().eval()
        elif change == "swapped":
            conv.weight.data = torch.randn_like(conv.weight)
        else:
            conv.weight = torch.nn.Parameter(torch.randn_like(conv.weight))
        changed = function(x)
        assert len(packs) == 2
        assert torch.equal(changed, layer(x))


@needs_cpp
@pytest.mark.parametrize("name", ["paths.1.conv.weight", "paths.0.bn.weight"])
def test_weights_that_compiled_code_computes_are_packed_at_every_call(name, x):
    """Inductor computes one weight in the memory of another, and counts no version."""
    layer = paper()
    weight = layer.get_parameter(name).detach()

    def chain(x, weight):
        u = torch.func.functional_call(layer, {name: weight * 2}, x)
        return torch.func.functional_call(layer, {name: weight * (u.mean() + 2)}, u)

    with torch.no_grad(), use_backend("triton"):
        torch.testing.assert_close(compiled(chain, backend="inductor")(x, weight), chain(x, weight))


@needs_cpp
def test_weights_that_compiled_code_changes_are_noticed(x):
    layer, other = paper(), paper()
    other.load_state_dict(layer.state_dict())

    def step(layer, x):
        u = layer(x)
        layer.paths[1].conv.weight.mul_(u.mean() + 2)
        return layer(u)

    with torch.no_grad(), use_backend("triton"):
        function = compiled(step, backend="inductor")
        for _ in range(3):
            torch.testing.assert_close(function(layer, x), step(other, x))


PACKING = {
    ("paper", "gated"): ["fold_norms", "gather"],
    ("paper", "store"): ["fold_norms", "gather"],
    ("paper", "recompute"): ["fold_norms", "gather"],
    ("paper", "library"): ["fold_norms", "mul.out", "mul.out"],
    ("classic", "gated"): ["cat.default", "fold_norms", "gather"],
    ("classic", "merged"): ["cat.default", "fold_norms", "gather", "section_weights", "sum.IntList_out"],
    ("classic", "library"): ["cat.default", "fold_norms", "copy_.default", "copy_.default"],
    ("16 channels per group", "recompute"): ["fold_norms", "gather"],
    ("split, groups", "store"): ["fold_norms", "gather"],
    ("depthwise", "gated"): ["fold_norms", "gather"],
}
"""What packs the parameters of a layer in a schedule."""
COMPUTING = ("branch_conv", "border_sums", "convolution")
"""How the names begin of what computes first, from the input."""


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        pytest.param(*key, marks=needs_narrow_products if key[0] == "16 channels per group" else ())
        for key in PACKING
    ],
)
def test_a_cuda_graph_of_the_compiler_packs_anew_at_every_replay(name, schedule, monkeypatch):
    """By what a graph can hold: few kernels, nothing from the host, all of it from the parameters as they are then."""
    layer = LAYERS[name]().eval().half()
    randomize_norms(layer)
    x = torch.randn(2, layer.spec.in_channels, 9, 8).half().to(memory_format=torch.channels_last)

    def call():
        return inference_op.run_inference_op(x, layer.branches(), layer.gate(), layer.spec)

    with torch.no_grad(), use_backend("triton", schedule=schedule):
        expected = call()  # as the compiler warms up
        with monkeypatch.context() as capturing, PlayedGraph(monkeypatch) as graph:
            for module in (inference_op, kernels_lasting):  # refuses what would come from the host
                capturing.setattr(module, "is_capturing", lambda device: True)
            capturing.setattr(inference_op, "unit_inference", unit_inference._init_fn)
            v = call()
        assert torch.equal(v, expected)
        for tensor in (x, *layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor))
        graph.replay()
        changed = layer(x)
    assert torch.equal(v, changed)
    assert not torch.allclose(changed, expected)
    computes = next(i for i, kernel in enumerate(graph.kernels) if kernel.startswith(COMPUTING))
    assert sorted(graph.kernels[:computes]) == sorted(PACKING[name, schedule])


def test_alike_layers_share_a_graph_and_nothing_else(x, packs):
    first, second = paper(), paper()
    functions = [compiled(first), torch.compile(second, fullgraph=True, backend="aot_eager")]
    with torch.no_grad(), use_backend("triton"):
        for _ in range(2):
            for layer, function in zip((first, second), functions, strict=True):
                assert torch.equal(function(x), layer(x))
    assert len(packs) == 4  # each of the layers once for its calls and once for the operator


def test_one_graph_for_every_batch(x, packs):
    function = compiled(paper(), dynamic=True)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad(), use_backend("triton"):
        for n in (2, 3, 5):
            assert function(torch.randn(n, 8, 5, 4)).shape == (n, 8, 5, 4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(packs) == 1


def test_a_second_call_starts_the_kernels_directly(started_directly):
    layer = paper().half()
    strided = dataclasses.replace(layer.spec, stride=2)

    def directly(spec=layer.spec):
        """How many kernels a call starts directly; its result is a planned call's."""
        x = torch.randn(2, 8, 5, 4).half()
        started_directly.clear()
        with use_backend("triton"), torch.no_grad():
            found = inference_op.run_inference_op(x, layer.branches(), layer.gate(), spec)
            count = len(started_directly)
            assert torch.equal(found, sk_conv(x, layer.branches(), layer.gate(), spec))
        return count

    assert [directly(), directly(), directly()] == [0, 2, 2]
    assert [directly(strided), directly(strided), directly()] == [0, 2, 2]
    with torch.no_grad():
        layer.paths[0].conv.weight.mul_(2)
    assert [directly(), directly()] == [0, 2]


def test_autocast(x):
    layer = paper()
    with torch.no_grad(), use_backend("triton"), torch.autocast("cpu", torch.float16):
        v, expected = compiled(layer)(x), layer(x)
    assert v.dtype == torch.float16
    assert torch.equal(v, expected)


@needs_cpp
def test_inside_a_network(x):
    """Inductor decides on the strides of what the operator gets, and counts on those that its fake kernel tells."""
    network = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1), paper(), torch.nn.BatchNorm2d(8), paper()).eval()
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad(), use_backend("triton"):
        found = compiled(network, backend="inductor")(x)
        torch.testing.assert_close(found, network(x), rtol=1e-5, atol=1e-5)


def test_packed_weights_go_after_their_parameters(x):
    def ran(layer):
        with torch.no_grad(), use_backend("triton"):
            compiled(layer)(x)

    pack_cache._shared.clear()
    layer = paper()
    ran(layer)
    (kept,) = pack_cache._shared
    del layer
    torch._dynamo.reset()
    gc.collect()
    ran(paper())
    assert kept not in pack_cache._shared
    assert len(pack_cache._shared) == 1


def test_a_training_layer_and_gradients_take_the_training_operator(x):
    layer = paper()
    with use_backend("triton"):
        v = compiled(layer)(x)
    assert v.requires_grad
    assert "unit_fwd" in str(v.grad_fn) or "Compiled" in str(v.grad_fn)


def test_exported_programs_do_not_need_this_package(x):
    layer = paper()
    with torch.no_grad():
        exported = torch.export.export(layer, (x,))
        with use_backend("triton"), pytest.raises(RuntimeError, match=r"torch.export is tracing"):
            torch.export.export(layer, (x,))
    assert not any("sk_triton" in str(node.target) for node in exported.graph.nodes)


def test_transformations_inside_of_compiled_code_are_refused(x):
    layer = paper()
    mapped = compiled(lambda x: torch.vmap(lambda x: layer(x))(x))
    # Dynamo of torch 2.8 keeps the message to itself.
    reason = r"torch.func transformation is|ExceptionVariable\(<class 'RuntimeError'>\)"
    with torch.no_grad(), use_backend("triton"), pytest.raises(RuntimeError, match=reason):
        mapped(x[None])


def test_what_is_kept_is_no_inference_tensor():
    with torch.inference_mode():
        assert torch.zeros(1).is_inference()
        assert not lasting(lambda: torch.zeros(1), torch.device("cpu")).is_inference()


def test_a_layer_trains_after_inference_mode(x):
    layer = paper()
    with use_backend("triton"):
        with torch.inference_mode():
            compiled(layer)(x)
        layer.train()(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_eager_calls_of_other_shapes_do_not_compile_anew():
    layer, compilations = SelectiveKernel(8, groups=2, split_input=False).eval(), []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, dynamic=False)
    with torch.no_grad():
        for size in range(3, 8):
            compiled(torch.randn(1, 8, 9, 9))
            layer(torch.randn(1, 8, size, size))
    assert len(compilations) == 1


def test_statistics_that_the_norms_alone_take_anew_are_noticed():
    layer, x = paper(), torch.randn(2, 8, 5, 5)
    norms = [m for m in layer.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    compiled = torch.compile(layer, backend="eager")
    with torch.no_grad():
        with use_backend("triton"):
            for _ in range(2):
                before = compiled(x)
        for norm in norms:
            norm.train()
        with use_backend("reference"):
            for _ in range(9):
                layer(3 * torch.randn(4, 8, 5, 5) + 1)
        for norm in norms:
            norm.eval()
        with use_backend("reference"):
            expected = layer(x)
        with use_backend("triton"):
            found = compiled(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)
