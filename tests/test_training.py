"""Units in training through the kernels, interpreted: results, gradients and running statistics against float64."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from sk_triton import BranchSpec, SelectiveKernel, SKConv, SKSpec, functional, save_for_backward, use_backend
from sk_triton.chips import CHIPS
from sk_triton.inference_op import run_inference_op
from sk_triton.training import plan as training_plan
from sk_triton.training.norms import norm_settings, updates_by_kernels
from sk_triton.workload import Workload

from .tolerances import assert_errors_in_proportion, assert_same, assert_typical_errors_like_eager
from .units import random_unit, randomize_norms, sizes, specs, tensors
from .versions import needs_narrow_products

pytestmark = pytest.mark.interpret

LAYERS = {
    "classic": lambda: SKConv(16, M=2, G=4, r=4, L=8),
    "classic, three branches, stride 2": lambda: SKConv(16, M=3, G=4, r=4, stride=2, L=8),
    "one branch": lambda: SKConv(16, M=1, G=4, r=4, L=8),
    "paper": lambda: SelectiveKernel(16, groups=4, split_input=False),
    "paper, stride 2": lambda: SelectiveKernel(16, groups=4, split_input=False, stride=2),
    "timm's default": lambda: SelectiveKernel(16),
    "out of in, no act": lambda: SelectiveKernel(16, 24, groups=2, split_input=False, act_layer=None),
    "true 5x5 and 7x7": lambda: SelectiveKernel(8, kernel_size=(5, 7), keep_3x3=False, split_input=False),
    "depthwise": lambda: SelectiveKernel(16, groups=16, split_input=False),
    "library's convolution": lambda: SelectiveKernel(66, split_input=False),
}


def clone(layer, dtype=None):
    layer = copy.deepcopy(layer)
    return layer if dtype is None else layer.to(dtype)


def step(layer, x, backend, weight):
    """Output, gradients and buffers of one forward and backward pass."""
    x = x.detach().clone().requires_grad_()
    with use_backend(backend):
        v = layer(x)
    v.backward(weight.to(v.dtype))
    found = {"v": v.detach(), "x": x.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return found | {name: buffer for name, buffer in layer.named_buffers() if buffer.is_floating_point()}


def compare(layer, *xs, layout=torch.contiguous_format):
    """The error rule on everything that a training step computes, over steps on several inputs."""
    samples = []
    for x in xs:
        h, w = layer.spec.output_size(*x.shape[2:])
        weight = torch.randn(x.shape[0], layer.spec.out_channels, h, w).to(x.dtype)
        weight = weight.contiguous(memory_format=layout)
        exact = step(clone(layer, torch.float64), x.double(), "reference", weight)
        eager = step(clone(layer), x, "reference", weight)
        ours = step(clone(layer), x, "triton", weight)
        assert ours["v"].stride() == eager["v"].stride()
        for name, value in exact.items():
            if "running" in name:
                assert_same(ours[name], eager[name])
            else:
                samples.append((ours[name], eager[name], value))
    assert_typical_errors_like_eager(samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, dtype):
    torch.manual_seed(2)  # no rounding takes a value of the gate across the kink of its ReLU
    layer = LAYERS[name]()
    randomize_norms(layer)
    compare(layer.to(dtype), *torch.randn(2, 4, layer.spec.in_channels, 5, 3).to(dtype))


def test_more_tiles_than_the_gate_adds(monkeypatch):
    """Without norms branches are pooled while they are stored; here not."""
    monkeypatch.setattr(training_plan, "MAX_GATE_TILES", 0)
    training_plan.plan_training.cache_clear()
    try:
        compare(LAYERS["classic"](), torch.randn(4, 16, 5, 3))
    finally:
        training_plan.plan_training.cache_clear()


@pytest.mark.parametrize("name", ["paper, stride 2", "timm's default"])
def test_channels_last(name):
    layer = LAYERS[name]()
    xs = [x.contiguous(memory_format=torch.channels_last) for x in torch.randn(2, 4, 16, 5, 4)]
    compare(layer, *xs, layout=torch.channels_last)


layouts = st.sampled_from([torch.contiguous_format, torch.channels_last])
saves = st.sampled_from(["branches", "input"])
INPUTS = 4


@settings(max_examples=12)
@given(specs(acts=("relu", "identity")), sizes, layouts, saves)
def test_any_unit(spec, size, layout, save):
    compare_unit(spec, size, torch.float32, layout, save)


@needs_narrow_products
@settings(max_examples=8)
@given(specs(acts=("relu", "identity")), sizes, layouts, saves)
def test_any_unit_whose_gradients_are_computed_by_kernels(spec, size, layout, save):
    groups = spec.branches[0].groups
    branches = tuple(dataclasses.replace(branch, groups=groups) for branch in spec.branches)
    spec = dataclasses.replace(
        spec, branches=branches, split_input=False, stride=1, in_channels=spec.out_channels
    )
    workload = Workload(spec, *size, torch.float16, CHIPS["sm_90"])
    assert training_plan.plan_training(workload, save).gradient is not None
    compare_unit(spec, size, torch.float16, layout, save)


def compare_unit(spec, size, dtype, layout, save):
    """Over several inputs: where few numbers are normalized, one that rounds well in eager is no measure."""
    n, height, width = size
    h, w = spec.output_size(height, width)
    assume(n > 1 or not (spec.gate_norm or (spec.branch_norm and h * w == 1)))
    unit = random_unit(spec, dtype, training=True)

    def run(x, weight, dtype, backend, own=None):
        branches, gate = own or in_dtype(unit, dtype)
        inner = x.to(dtype).requires_grad_()
        with use_backend(backend), save_for_backward(save):
            v = functional.sk_conv(inner, branches, gate, spec)
        return [v.detach(), *torch.autograd.grad(v, [inner, *tensors(branches, gate)], weight.to(dtype))]

    samples = []
    for _ in range(INPUTS):
        x = torch.randn(n, spec.in_channels, height, width).to(dtype).contiguous(memory_format=layout)
        given = x, torch.randn(n, spec.out_channels, h, w)
        branches, gate = in_dtype(unit, torch.float64)
        norms = [part.norm for part in (*branches, gate) if part.norm is not None]
        for norm in norms:
            norm.momentum = 1.0
        exact = run(*given, torch.float64, "reference", (branches, gate))
        for norm in norms:
            norm.eval()  # by the same statistics, which are constants now
        natural = run(*given, torch.float64, "reference", (branches, gate))
        ours, eager = run(*given, dtype, "triton"), run(*given, dtype, "reference")
        samples.append(zip(ours, eager, exact, natural, strict=True))
    assert_errors_in_proportion(list(zip(*samples, strict=True)))


def in_dtype(unit, dtype):
    """A copy of a unit whose parameters are of a dtype."""
    branches, gate = copy.deepcopy(unit)
    for leaf in tensors(branches, gate):
        leaf.data = leaf.data.to(dtype)
    for part in (*branches, gate):
        if part.norm is not None:
            part.norm.to(dtype)
    return branches, gate


@pytest.mark.parametrize("biases", [(16,), (8, 8), (12, 4), (4, 4, 8)], ids=str)
@pytest.mark.parametrize("weights", [(16,), (8, 8), (12, 4), (4, 4, 8)], ids=str)
def test_a_gate_in_pieces(weights, biases):
    """Its second layer's rows may be cut anywhere."""
    kinds = (BranchSpec(3, 1, 2), BranchSpec(3, 2, 2))
    spec = SKSpec(8, 8, kinds, gate_width=4, branch_norm=False, gate_norm=False, select_bias=True)
    branches, gate = random_unit(spec, torch.float32)
    rows = torch.cat(gate.select_weight).detach(), torch.cat(gate.select_bias).detach()

    def run(backend):
        leaves = [part.clone().requires_grad_() for part in rows]
        pieces = [part.split(list(cut)) for part, cut in zip(leaves, (weights, biases), strict=True)]
        cut_gate = gate._replace(select_weight=pieces[0], select_bias=pieces[1])
        with use_backend(backend):
            v = functional.sk_conv(x, branches, cut_gate, spec)
            with torch.no_grad():
                inferred = functional.sk_conv(x, branches, cut_gate, spec)
                operator = run_inference_op(x, branches, cut_gate, spec)
        return [v, inferred, operator, *torch.autograd.grad(v.square().sum(), leaves)]

    x = torch.randn(2, 8, 5, 4)
    for ours, expected in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", ["running_mean", "num_batches_tracked"])
def test_norms_that_share_statistics_take_their_updates_in_turn(shared):
    layer = SelectiveKernel(8, groups=2, split_input=False)
    first, second = (path.bn for path in layer.paths)
    setattr(second, shared, getattr(first, shared))
    ours, eager = clone(layer), clone(layer)
    norms = [ours.paths[0].bn, ours.paths[1].bn, ours.attn.bn]
    assert updates_by_kernels(norms, norm_settings(norms)) is None
    for module, backend in ((ours, "triton"), (eager, "reference")):
        with use_backend(backend):
            module(torch.linspace(-1, 2, 2 * 8 * 4 * 3).view(2, 8, 4, 3)).sum().backward()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_a_counter_elsewhere_is_updated_by_pytorch():
    norm = nn.BatchNorm2d(4, device="meta")
    assert updates_by_kernels([norm], norm_settings([norm])) is not None
    norm.num_batches_tracked = torch.tensor(0)
    assert updates_by_kernels([norm], norm_settings([norm])) is None


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": 0.3},
        {"momentum": None},
        {"eps": 0.1},
        {"affine": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_settings_of_the_norms(change):
    layer = SelectiveKernel(
        8, groups=2, split_input=False, norm_layer=lambda channels: nn.BatchNorm2d(channels, **change)
    )
    layer.attn.bn = nn.BatchNorm2d(8, **change)
    ours, eager = clone(layer), clone(layer)
    for i in range(3):
        x = torch.randn(2, 8, 4, 3) + i
        for module, backend in ((ours, "triton"), (eager, "reference")):
            with use_backend(backend):
                module(x).sum().backward()
    assert ours.state_dict().keys() == eager.state_dict().keys()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    compare(layer, *torch.randn(2, 4, 8, 4, 3))


@pytest.mark.parametrize("frozen", ["all", "one branch", "gate"])
def test_frozen_norms(frozen):
    layer = LAYERS["paper"]()
    randomize_norms(layer)
    if frozen == "all":
        layer.eval()
    else:
        (layer.paths[1].bn if frozen == "one branch" else layer.attn.bn).eval()
    compare(layer, *torch.randn(2, 4, 16, 5, 4))


@pytest.mark.parametrize("frozen", ["all", "one branch"])
def test_norms_that_are_thawed_before_the_backward_pass(frozen):
    """One backward pass through a call with frozen norms and a later one that changes their statistics."""
    layer = LAYERS["paper"]()
    randomize_norms(layer)
    apart, (x, y) = clone(layer), torch.randn(2, 4, 16, 5, 4)
    for own in (layer, apart):
        thawed = own if frozen == "all" else own.paths[1].bn
        thawed.eval()
        with use_backend("triton"):
            v = own(x)
            if own is apart:
                v.sum().backward()
            thawed.train()
            w = own(y)
        (w if own is apart else v + w).sum().backward()
    for together, one_by_one in zip(layer.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(together.grad, one_by_one.grad)


def test_a_single_value_per_channel_is_refused_as_in_eager():
    layer = LAYERS["paper"]()
    messages = []
    for backend in ("reference", "triton"):
        with use_backend(backend), pytest.raises(ValueError, match="more than 1 value per channel") as error:
            layer(torch.randn(1, 16, 5, 4))
        messages.append(str(error.value).replace("torch.Size(", "").rstrip(")"))
    assert messages[0] == messages[1]


def test_statistics_are_taken_without_gradients_too():
    layer = LAYERS["paper"]()
    eager, x = clone(layer), torch.randn(2, 16, 5, 4)
    with torch.no_grad():
        with use_backend("triton"):
            v = layer(x)
        with use_backend("reference"):
            torch.testing.assert_close(v, eager(x))
    assert not v.requires_grad
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())


CONVOLVED_AGAIN = {
    **{
        name: LAYERS[name]
        for name in ("classic", "one branch", "paper, stride 2", "timm's default", "out of in, no act")
    },
    "depthwise": lambda: SelectiveKernel(32, groups=32, split_input=False),
    "wide groups": lambda: SelectiveKernel(16, groups=1, split_input=False),
}
WIDER = ("timm's default", "out of in, no act", "wide groups")
"""Than 8 channels per group."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=needs_narrow_products if name in WIDER else ()) for name in CONVOLVED_AGAIN],
)
def test_convolving_again_instead_of_storing_errs_like_eager(name, monkeypatch):
    from sk_triton.training import schedule as train

    monkeypatch.setattr(train, "StoredBranches", None)  # none is to be stored
    torch.manual_seed(2)
    layer = CONVOLVED_AGAIN[name]().half()
    randomize_norms(layer)
    with save_for_backward("input"):
        compare(layer, torch.randn(4, layer.spec.in_channels, 5, 3).half())


def test_folded_statistics_stand_a_large_mean():
    layer = LAYERS["paper"]().half()
    with save_for_backward("input"):
        compare(layer, (30 + torch.randn(4, 16, 5, 4)).half())


@pytest.mark.parametrize("frozen", ["all", "one branch"])
def test_frozen_norms_convolve_again_too(frozen):
    layer = LAYERS["paper"]().half()
    randomize_norms(layer)
    (layer if frozen == "all" else layer.paths[1].bn).eval()
    with save_for_backward("input"):
        compare(layer, torch.randn(4, 16, 5, 4).half())


@pytest.mark.parametrize("save", ["layer", "scope"])
def test_saving_the_input_alone_changes_no_bit_of_stored_branches(save):
    """In fp32, where the forward pass stores the branches in either case."""
    x, weight = torch.randn(2, 16, 7, 5), torch.randn(2, 16, 7, 5)
    layer = LAYERS["paper"]()
    expected = step(clone(layer), x, "triton", weight)
    if save == "layer":
        layer.save = "input"
        found = step(layer, x, "triton", weight)
    else:
        layer.save = "branches"  # the scope goes before it
        with save_for_backward("input"):
            found = step(layer, x, "triton", weight)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("save", "branches"), [("branches", 2), ("input", 0)])
def test_what_is_saved(save, branches):
    layer, x = LAYERS["paper"](), torch.randn(2, 16, 16, 16, requires_grad=True)
    sizes = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t),
        save_for_backward(save),
        use_backend("triton"),
    ):
        layer(x)
    assert sizes.count(x.numel()) == 1
    assert sum(sizes) < (1 + branches + 0.5) * x.numel()


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match="save must be one of 'branches', 'input', got 'all'"):
        save_for_backward("all")
    layer = LAYERS["paper"]()
    layer.save = "x"
    with pytest.raises(ValueError, match="save must be one of"):
        layer(torch.randn(2, 16, 5, 4))
