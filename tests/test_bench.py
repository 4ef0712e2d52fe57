"""Who competes in the benchmark, on what inputs, with what weights, in which forms."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from types import SimpleNamespace

import pytest
import torch

from sk_triton import use_backend
from sk_triton.backend import SCHEDULES
from sk_triton.bench import results
from sk_triton.bench.measuring import forms, inputs, providers
from sk_triton.bench.measuring.peers import ClassicSKConv, ClassicUnit, PaperUnit, SKNet50
from sk_triton.bench.measuring.providers import competitors
from sk_triton.bench.measuring.sources import Ours, yardstick
from sk_triton.bench.shapes import (
    CLASSIC,
    NETWORKS,
    PAPER,
    SKNET50,
    SKRESNEXT50,
    STAGES,
    TRAINING,
    UNITS,
    Case,
    network_shape,
    stage_shape,
    unit_shape,
)

from .bench_fakes import CPU, small_case

SMALL = unit_shape(PAPER, 64, 9)


def keys(chosen):
    return {(provider.source.key, provider.form.key) for provider in chosen}


@pytest.mark.parametrize("unit", [CLASSIC, PAPER])
@pytest.mark.parametrize("axis", [None, "branches"])
@pytest.mark.parametrize("quick", [False, True])
def test_on_a_gpu_peers_get_every_form_that_sk_triton_gets_and_compilation(unit, axis, quick):
    chosen = competitors(dataclasses.replace(small_case(unit), axis=axis, value=2), "cuda", quick=quick)
    assert len(keys(chosen)) == len(chosen)
    ours = {p.form.key for p in chosen if p.source.key == "ours"}
    if quick:
        compiled = forms.COMPILED_GRAPHS[1:]
    else:
        compiled = (*forms.COMPILED, *(forms.COMPILED_GRAPHS[1:] if axis else forms.COMPILED_GRAPHS))
    peers = {p.source.key for p in chosen if p.source.role == results.PEER}
    assert peers == ({"classic", "plain-classic"} if unit == CLASSIC else {"timm", "paper"})
    for peer in peers:
        own = {p.form.key for p in chosen if p.source.key == peer}
        assert ours < own
        assert {form.key for form in compiled} < own


def test_networks_with_our_units_are_compiled_too():
    chosen = competitors(Case("model", SKNET50, network_shape(64), 1, "fp16"), "cuda", quick=False)
    ours = {p.form.key for p in chosen if p.source.key == "ours"}
    assert {"compile-channels_last", "graph-compile-channels_last"} < ours
    peers = {p.source.key for p in chosen if p.source.role == results.PEER}
    assert peers
    for peer in peers:
        assert ours < {p.form.key for p in chosen if p.source.key == peer}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_in_a_hurry_every_peer_competes_and_compiles_once(device_type):
    for unit in UNITS:
        quick, full = (competitors(small_case(unit), device_type, quick=hurry) for hurry in (True, False))
        peers = [{p.source.key for p in chosen if p.source.role == results.PEER} for chosen in (quick, full)]
        assert peers[0] == peers[1]
        for peer in peers[0]:
            compiled = [p for p in quick if p.source.key == peer and p.form.is_compiled]
            assert len(compiled) == (device_type == "cuda")


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_the_plain_classic_unit_is_the_class_without_its_copies(branches):
    torch.manual_seed(0)
    original, plain = (kind(16, branches, 4, 2) for kind in (ClassicSKConv, ClassicUnit))
    plain.load_state_dict(original.state_dict())
    x = torch.randn(2, 16, 9, 7, requires_grad=True)
    results_and_gradients = []
    for unit in (original, plain):
        v = unit(x)
        results_and_gradients.append((v, *torch.autograd.grad(v.square().sum(), (x, *unit.parameters()))))
    torch.testing.assert_close(*results_and_gradients)
    copies = [
        [node for node in torch.fx.symbolic_trace(unit).graph.nodes if node.target is torch.cat]
        for unit in (original, plain)
    ]
    assert [len(nodes) for nodes in copies] == [2, 0], "the branches and the gate's vectors"


def test_every_form_adds_the_slowest_to_compile():
    for device_type in ("cpu", "cuda"):
        chosen = competitors(small_case(), device_type, quick=False, every_form=True)
        assert ("timm", forms.MAX_AUTOTUNED[0].key) in keys(chosen)


def test_a_forced_schedule_competes_for_units_in_inference_only():
    def sources(case):
        return {p.source.key for p in competitors(case, "cuda", quick=False)}

    forced = {f"ours-{schedule}" for schedule in SCHEDULES}
    assert forced < sources(small_case())
    assert not forced & sources(small_case(direction=TRAINING))
    assert not forced & sources(Case("model", SKNET50, network_shape(64), 1, "fp16"))


@pytest.mark.parametrize("subject", [*UNITS, *NETWORKS])
def test_all_providers_of_a_case_load_the_same_weights(subject):
    is_network = subject in NETWORKS
    shape = network_shape(32) if is_network else unit_shape(subject, 32, 7)
    case = Case("any", subject, shape, 1, "fp32")
    state = yardstick(subject).module(case).state_dict()
    for provider in competitors(case, "cpu", quick=False):
        module = provider.module(case, state, torch.float32, CPU)
        assert not module.training
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_no_weight_of_a_case_is_at_its_initial_value():
    for unit in UNITS:
        case = small_case(unit)
        state = providers.make_state(case, seed=0)
        assert all(value.float().std() > 0 for value in state.values() if value.numel() > 1)
        again = providers.make_state(case, seed=0)
        assert all(torch.equal(state[name], again[name]) for name in state)


def test_weights_and_input_are_different_random_numbers():
    case = small_case()
    state = providers.make_state(case, seed=0)
    weight = next(value for value in state.values() if value.dim() == 4).flatten()[:200]
    x = inputs.make_input(inputs.RANDOM, 1, case.shape, torch.float32, CPU, seed=0).flatten()
    assert torch.corrcoef(torch.stack((weight, x[:200])))[0, 1].abs() < 0.3


def test_ours_replaces_every_unit_of_a_network_and_counts_what_runs():
    case = Case("model", SKRESNEXT50, network_shape(32), 1, "fp32")
    ours = Ours()
    network = ours.module(case).eval()
    units = [unit for unit in network.modules() if isinstance(unit, ours.package.SelectiveKernel)]
    assert len(units) == 16

    class Mixed:
        SKConv, SelectiveKernel = ours.package.SKConv, ours.package.SelectiveKernel

        @staticmethod
        def explain(unit, x):
            schedule = "store" if unit is units[0] else "eager"
            return SimpleNamespace(plan=SimpleNamespace(backend="any", schedule=schedule))

    x = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        assert ours.runs(network, x).startswith("torch/")
        with use_backend("reference"):
            assert ours.runs(network, x) == "reference/eager"
        assert Ours(package=Mixed).runs(network, x) == "15 any/eager, 1 any/store"


def test_peers_are_the_documents_formulas():
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    classic = ClassicSKConv(8, M=3, G=2, r=2, L=4).double()
    us = torch.stack([conv(x) for conv in classic.convs])
    z = classic.fc(us.sum(0).mean((2, 3)))
    a = torch.stack([fc(z) for fc in classic.fcs]).softmax(0)
    torch.testing.assert_close(classic(x), (us * a[..., None, None]).sum(0))
    assert [tuple(conv.kernel_size) for conv in classic.convs] == [(3, 3), (5, 5), (7, 7)]

    paper = PaperUnit(8, (3, 3, 3), (1, 2, 3), groups=2, gate_width=4).double().eval()
    us = torch.stack([path(x) for path in paper.paths])
    a = paper.attn(us.sum(0).mean((2, 3))).transpose(0, 1)
    torch.testing.assert_close(paper(x), (us * a[..., None, None]).sum(0))
    assert [path.conv.dilation[0] for path in paper.paths] == [1, 2, 3]


def test_the_papers_network_has_its_size():
    network = SKNet50(lambda shape: PaperUnit(shape.channels, groups=32, gate_width=shape.gate_width))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == pytest.approx(27.5e6, rel=0.005)


def test_the_stages_are_those_of_sknet50():
    assert [stage_shape(PAPER, stage).name for stage in STAGES] == [
        "128@56²",
        "256@28²",
        "512@14²",
        "1024@7²",
    ]


@pytest.mark.parametrize("kind", inputs.KINDS)
def test_inputs_are_repeatable_and_every_sample_is_another(kind):
    def make(seed):
        return inputs.make_input(kind, 5, SMALL, torch.float16, CPU, seed)

    x = make(1)
    assert (x.shape, x.dtype) == ((5, 64, 9, 9), torch.float16)
    assert torch.equal(x, make(1))
    assert not torch.equal(x, make(2))
    assert torch.unique(x.flatten(1), dim=0).shape[0] == 5


def test_photograph_activations_are_those_of_a_photograph():
    x, noise = (
        torch.relu(inputs.make_input(kind, 2, stage_shape(PAPER, 2), torch.float32, CPU, 0))
        for kind in (inputs.PHOTO, inputs.RANDOM)
    )

    def neighbour_correlation(x):
        left, right = x[..., :-1] - x.mean((2, 3), keepdim=True), x[..., 1:] - x.mean((2, 3), keepdim=True)
        return ((left * right).mean() / x.var()).item()

    assert x.min() == 0
    assert x.std().item() == pytest.approx(1, rel=1e-3)
    assert neighbour_correlation(x) > 0.25
    assert abs(neighbour_correlation(noise)) < 0.05


def test_an_unknown_input_is_named_in_the_error():
    with pytest.raises(ValueError, match=r"kind must be one of .*got 'sound'"):
        inputs.make_input("sound", 1, SMALL, torch.float32, CPU, 0)


def test_every_form_runs_with_cudnns_own_tuning_and_puts_the_switch_back():
    for form in forms.EVERY.values():
        with form.scope():
            assert torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.benchmark


def test_forms_without_it_run_in_one_thread_of_their_own():
    """PyTorch remembers algorithms by thread, whether cuDNN timed them or not."""
    used = set()
    for form in forms.HEURISTIC:
        with form.scope():
            assert not form.run(lambda: torch.backends.cudnn.benchmark)
            used.add(form.run(threading.get_ident))
    assert len(used) == 1
    assert threading.get_ident() not in used
    assert {form.run(threading.get_ident) for form in forms.EVERY.values()} == {threading.get_ident()}


def test_they_are_the_eager_and_captured_forms_of_inference_on_nvidias_gpus(monkeypatch):
    wanted = {("timm", form.key) for form in forms.HEURISTIC}
    assert [(form.memory_format, form.is_graph) for form in forms.HEURISTIC] == [
        (form.memory_format, form.is_graph) for form in (*forms.EAGER, *forms.GRAPHS)
    ]
    assert wanted < keys(competitors(small_case(), "cuda", quick=False))
    # Autograd's own thread runs the gradients of all forms.
    assert not wanted & keys(competitors(small_case(direction=TRAINING), "cuda", quick=False))
    assert not wanted & keys(competitors(small_case(), "cpu", quick=False))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not wanted & keys(competitors(small_case(), "cuda", quick=False))


@pytest.fixture
def fake_capture(monkeypatch):
    """CUDA streams and graphs that write down what happens."""
    log: list[str] = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def on_stream(stream):
        log.append(f"enter {stream.name}")
        yield
        log.append(f"leave {stream.name}")

    @contextlib.contextmanager
    def capture(graph, stream):
        log.append(f"capture on {stream.name}")
        yield
        log.append("captured")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return log


@pytest.mark.parametrize("algorithms", ["timed", "untimed"])
def test_a_graph_warms_up_on_the_stream_that_it_captures_and_then_only_replays(algorithms, fake_capture):
    def call():
        fake_capture.append("call")
        return torch.ones(1)

    form = {"timed": forms.GRAPHS[0], "untimed": forms.HEURISTIC[2]}[algorithms]
    bound = form.bind(call)
    assert fake_capture == [
        *("side waits for main", "enter side", "call", "call", "call", "leave side", "main waits for side"),
        *("enter main", "capture on side", "call", "captured", "leave main"),
    ]
    fake_capture.clear()
    assert bound().item() == 1
    assert fake_capture == ["replay"]
