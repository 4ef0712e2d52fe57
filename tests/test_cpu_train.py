"""The CPU's training schedules: gradients against float64, and what autograd expects of an operator."""

import copy
import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sk_triton import BranchSpec, SelectiveKernel, SKConv, dispatch, explain, functional, use_backend
from sk_triton.cpu import choice as cpu
from sk_triton.cpu.merging import add_to_windows
from sk_triton.params import Gate
from sk_triton.schedules import cpu_train_merged

from .tolerances import assert_typical_errors_like_eager
from .units import CLASSIC, mergeable, random_unit, sizes, specs

formats = st.sampled_from([torch.contiguous_format, torch.channels_last])


@pytest.fixture(params=["train", "train_merged"], autouse=True, scope="module")
def schedule(request):
    """Every test runs with both schedules, whatever would pay: as far as branches merge."""
    with pytest.MonkeyPatch.context() as patch:
        pays = request.param == "train_merged"
        patch.setattr(cpu, "_merge_balance", lambda *args: (pays, "set by a test"))
        cpu._plan.cache_clear()
        yield request.param
    cpu._plan.cache_clear()


def gradients(layer, x, dv, backend):
    """The output and the gradients of the input and of every parameter."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    with use_backend(backend):
        v = layer(x)
    v.backward(dv.to(v.dtype))
    return [v.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("stride", "size"), [(1, (7, 6)), (2, (7, 6)), (1, (48, 48))], ids=str)
@pytest.mark.parametrize("M", [1, 2, 3])
def test_gradients_err_like_eager(M, stride, size, dtype, memory_format):
    """Those of the gate inherit the rounding of sums over whole images."""
    samples = []
    for _ in range(4):
        layer = SKConv(16, M, 2, 2, stride=stride).to(dtype)
        x = torch.randn(2, 16, *size).to(dtype).to(memory_format=memory_format)
        dv = torch.randn(2, 16, *layer.spec.output_size(*size)).to(dtype)
        ours, eager = (gradients(layer, x, dv, backend) for backend in ("torch", "reference"))
        exact = gradients(copy.deepcopy(layer).double(), x.double(), dv.double(), "reference")
        assert ours[0].stride() == eager[0].stride()
        samples.append(list(zip(ours, eager, exact, strict=True)))
    for of_one_tensor in zip(*samples, strict=True):
        assert_typical_errors_like_eager(of_one_tensor)


def test_outputs_may_be_changed_in_place(memory_format):
    layer, x = SKConv(16, 2, 2, 2), torch.randn(1, 16, 8, 8).to(memory_format=memory_format)
    weight, results = torch.ones((), requires_grad=True), []
    for backend in ("torch", "reference"):
        inner = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with use_backend(backend):
            v = layer(inner)
            with torch.no_grad():
                inferred = layer(x)
        v.relu_().sum().backward()
        inferred.mul_(weight)
        results.append((inner.grad, inferred))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_strides_of_axes_of_one_element_do_not_matter():
    """PyTorch's gradients of grouped convolutions in float64 depend on them."""
    layer = SKConv(8, 2, 2, 2).double()
    x = torch.randn(2, 5, 8, 1, dtype=torch.float64).permute(0, 2, 1, 3)
    assert x.stride() == (40, 1, 8, 1)
    dv = torch.randn(2, 8, 5, 1, dtype=torch.float64)
    found, expected = gradients(layer, x, dv, "torch"), gradients(layer, x.contiguous(), dv, "reference")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_gradient_of_window_sums(memory_format):
    for kernel, stride, size in [(5, 1, (9, 8)), (3, 2, (7, 4)), (7, 3, (2, 5)), (5, 2, (1, 1))]:
        for dilation in (1, 2):
            branch = BranchSpec(kernel, dilation)
            x = torch.randn(2, 3, *size, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
            columns = F.unfold(x, kernel, dilation, branch.padding, stride)
            sums = columns.sum(-1).view(2, 3, kernel, kernel)
            grad = torch.randn_like(sums)
            (expected,) = torch.autograd.grad(sums, x, grad)
            dx = torch.ones_like(expected).contiguous(memory_format=memory_format)
            add_to_windows(dx, grad, branch, stride)
            torch.testing.assert_close(dx, 1 + expected)


@settings(max_examples=25)
@given(specs(linear=True).map(mergeable), sizes, st.integers(1, 3), formats, st.sampled_from([1, 7, 512]))
def test_any_linear_unit(spec, size, samples, memory_format, longest_sum):
    spec = dataclasses.replace(
        spec, gate_norm=False, gate_act=spec.gate_act if spec.gate_act == "relu" else "identity"
    )
    n, h, w = size
    branches, gate = random_unit(spec, torch.float64)
    x = torch.randn(n, spec.in_channels, h, w, dtype=torch.float64).contiguous(memory_format=memory_format)
    leaves = [x, *(b.weight for b in branches), gate.reduce_weight, *gate.select_weight]
    leaves += [
        t for t in (*(b.bias for b in branches), gate.reduce_bias, *(gate.select_bias or ())) if t is not None
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    found = []
    for backend in ("torch", "reference"):
        with use_backend(backend), pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "_part_samples", lambda *args: samples)
            patch.setattr(cpu_train_merged, "LONGEST_SUM", longest_sum)
            cpu._plan.cache_clear()
            v = functional.sk_conv(x, branches, gate, spec)
            dv = torch.randn(v.shape, generator=torch.Generator().manual_seed(0)).to(v.dtype)
            found.append(torch.autograd.grad(v, leaves, dv))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_auto_takes_it_for_linear_units_and_says_why_not_for_others(schedule):
    x = torch.randn(2, 8, 5, 4)
    layer = SKConv(8, 2, 2, 2)
    assert f"schedule  {schedule}\n" in str(explain(layer, x))
    normed = SelectiveKernel(8)
    plan = dispatch.choose(x, normed.branches(), normed.gate(), normed.spec, backend="auto")
    assert plan.backend == "reference"
    assert "uses batch statistics" in dict(plan.rejected)["torch"]
    with use_backend("torch"), pytest.raises(RuntimeError, match="uses batch statistics"):
        normed(x)


class Convolutions(TorchDispatchMode):
    """Which gradients of convolutions were computed: (by x, by the weights)."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1][:2]))
        return func(*args, **(kwargs or {}))


def test_gradients_that_nobody_wants_are_not_computed():
    layer, x = SKConv(8, 2, 2, 2), torch.randn(2, 8, 5, 4)
    layer.convs[0].weight.requires_grad_(False)
    with Convolutions() as found:
        layer(x).sum().backward()
    assert not any(by_x for by_x, _ in found.masks)
    assert layer.convs[0].weight.grad is None
    assert layer.convs[0].bias.grad is not None
    frozen = SKConv(8, 2, 2, 2).requires_grad_(False)
    with Convolutions() as found:
        (dx,) = torch.autograd.grad(frozen(x.requires_grad_()).sum(), x)
    assert any(by_x for by_x, _ in found.masks)
    assert dx.shape == x.shape


def test_backward_under_autocast_computes_as_forward_did():
    layer, x = SKConv(8, 2, 2, 2), torch.randn(2, 8, 5, 4)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    v = layer(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(v, list(layer.parameters()))
    for ours, plain in zip(found, expected, strict=True):
        assert torch.equal(ours, plain)


def test_a_single_output_channel(memory_format):
    spec = dataclasses.replace(
        CLASSIC,
        in_channels=4,
        out_channels=1,
        branches=(BranchSpec(3), BranchSpec(5)),
        gate_width=2,
        gate_norm=False,
    )
    branches, gate = random_unit(spec, torch.float64)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64).contiguous(memory_format=memory_format)
    leaves = [b.weight.requires_grad_() for b in branches]
    found = []
    for backend in ("torch", "reference"):
        with use_backend(backend):
            found.append(torch.autograd.grad(functional.sk_conv(x, branches, gate, spec).sum(), leaves))
    torch.testing.assert_close(*found)


def test_a_second_backward_needs_and_honours_retain_graph():
    layer, x = SKConv(8, 2, 2, 2), torch.randn(2, 8, 5, 4)
    v = layer(x).sum()
    v.backward(retain_graph=True)
    once = layer.convs[1].weight.grad.clone()
    v.backward()
    torch.testing.assert_close(layer.convs[1].weight.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        v.backward()


SECOND = pytest.mark.parametrize(
    ("make", "size"),
    [(lambda: SKConv(8, 2, 2, 2), 5), (lambda: SKConv(8, 3, 2, 2), 5), (lambda: SKConv(8, 2, 2, 2), 40)],
    ids=["two branches", "three branches", "large"],
)


def in_both(make, size, compute):
    """What `compute` gives of a layer and an input, through the unit's own function and through the reference."""
    layer, x = make().double(), torch.randn(2, 8, size, size, dtype=torch.float64)
    found = []
    for backend in ("torch", "reference"):
        with use_backend(backend):
            found.append(compute(layer, x.clone()))
    return found


@SECOND
def test_gradients_of_gradients(make, size):
    """A penalty on the gradient, linear and squared outputs, every parameter and the input."""

    def penalized(layer, x):
        x.requires_grad_()
        grads = []
        for loss in (layer(x).sum(), layer(x).square().sum()):
            (dx,) = torch.autograd.grad(loss, x, create_graph=True)
            inputs = [x, *layer.parameters()]
            grads += torch.autograd.grad(dx.square().sum(), inputs, allow_unused=True)
        return [grad if grad is None else grad.detach() for grad in grads]

    ours, expected = in_both(make, size, penalized)
    assert any(grad is not None and grad.abs().max() > 1e-3 for grad in expected)
    for own, grad in zip(ours, expected, strict=True):
        # Autograd knows of a gradient that is zero whatever the input in one formula and not in the other.
        own, grad = (torch.zeros(()) if g is None or not g.any() else g for g in (own, grad))
        torch.testing.assert_close(own, grad, rtol=1e-7, atol=1e-9)


@SECOND
def test_batched_gradients(make, size):
    def jacobian(layer, x):
        v = layer(x.requires_grad_())
        chosen = torch.arange(0, v.numel(), max(1, v.numel() // 7))[:, None]
        some = (torch.arange(v.numel()) == chosen).to(v.dtype).reshape(-1, *v.shape)
        return torch.autograd.grad(v, [x, *layer.parameters()], some, is_grads_batched=True)

    for own, grad in zip(*in_both(make, size, jacobian), strict=True):
        torch.testing.assert_close(own, grad, rtol=1e-7, atol=1e-9)


def test_a_hessian_is_not_zero():
    layer, x = SKConv(8, 2, 2, 2).double(), torch.randn(1, 8, 2, 2, dtype=torch.float64)

    def hessian():
        return torch.autograd.functional.hessian(lambda t: layer(t).square().sum(), x)

    ours = hessian()
    with use_backend("reference"):
        torch.testing.assert_close(ours, hessian())
    assert ours.any()


def test_a_gate_parameter_changed_between_the_passes_is_noticed():
    layer, x = SKConv(8, 2, 2, 2), torch.randn(2, 8, 5, 4)
    v = layer(x).sum()
    with torch.no_grad():
        layer.fc.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        v.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_a_checkpoint(use_reentrant):
    layer, x = SKConv(8, 2, 2, 2), torch.randn(2, 8, 5, 4, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    calls = []
    layer.register_forward_pre_hook(lambda *args: calls.append(1))
    v = checkpoint(layer, x, use_reentrant=use_reentrant).sum()
    v.backward()
    assert len(calls) == 2
    for grad, tensor in zip(expected, [x, *layer.parameters()], strict=True):
        torch.testing.assert_close(tensor.grad, grad)


def test_under_a_checkpoint_that_keeps_convolutions():
    """What it keeps must not be written over: the reference."""
    layer, x = SKConv(8, M=2, G=2, r=2, L=4), torch.randn(2, 8, 5, 5, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
    kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    v = checkpoint(layer, x, use_reentrant=False, context_fn=kept)
    found = torch.autograd.grad(v.square().sum(), (x, *layer.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_autocast_gives_gradients_in_the_parameters_dtype():
    layer, x = SKConv(8, 2, 2, 2), torch.randn(2, 8, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        v = layer(x)
    assert v.dtype == torch.bfloat16
    v.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_expanded_gradients():
    layer, x = SKConv(8, 2, 2, 2), torch.randn(2, 8, 5, 4)
    dv = torch.randn(1, 8, 1, 1).expand(2, 8, 5, 4)
    ours = gradients(layer, x, dv, "torch")
    dense = gradients(layer, x, dv.contiguous(), "torch")
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b)


def test_without_biases():
    from sk_triton import BranchSpec, SKSpec
    from sk_triton.params import Branch

    spec = SKSpec(
        4, 4, (BranchSpec(3, 1, 2), BranchSpec(1, 1, 2)), gate_width=3, branch_bias=False, branch_norm=False,
        branch_act="identity", gate_bias=False, gate_norm=False, gate_act="identity", select_bias=False,
    )  # fmt: skip
    branches = [Branch(torch.randn(shape, requires_grad=True)) for shape in spec.weight_shapes]
    gate = Gate(torch.randn(3, 4, requires_grad=True), None, None, None, (torch.randn(8, 3),))
    x = torch.randn(2, 4, 5, 5)
    found = []
    for backend in ("torch", "reference"):
        with use_backend(backend):
            v = functional.sk_conv(x, branches, gate, spec)
        found.append(torch.autograd.grad(v.square().sum(), [branches[0].weight, gate.reduce_weight]))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
