"""Recorded training steps in which the library computes a part: gradients that it makes anew at every step."""

import copy

import pytest
import torch
from torch.profiler import profile

from sk_triton import use_backend
from sk_triton.training import passes as training_passes

from .training_steps import BY_LIBRARY, assert_equal, image, paper, step, steps_alike

pytestmark = pytest.mark.interpret


@pytest.fixture
def direct(started_directly):
    return started_directly


@pytest.fixture
def planned(monkeypatch):
    """The passes that were planned."""
    found = []
    plan = training_passes.plan_training

    def noted(*args):
        found.append(args)
        return plan(*args)

    monkeypatch.setattr(training_passes, "plan_training", noted)
    return found


def all_but_a_weight(name):
    return name != "paths.0.conv.weight"


NEEDS = {
    "all": lambda name: True,
    "x alone": lambda name: name == "x",
    "not x": lambda name: name != "x",
    "all but a weight": all_but_a_weight,
    "a weight": lambda name: name == "paths.1.conv.weight",
    "no weight of a convolution": lambda name: "conv" not in name,
    "neither x nor such a weight": lambda name: name != "x" and "conv" not in name,
}


def accumulate(layer, x, dv, needs_dx):
    """The output, and gradients added to those that are there, the layer's copied."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(needs_dx)
    with use_backend("triton"):
        v = layer(x)
    v.backward(dv)
    grads = [None if p.grad is None else p.grad.clone() for p in layer.parameters()]
    return [v.detach(), x.grad, *grads]


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        *(pytest.param("stride 2", needs, id=f"stride 2, {name}") for name, needs in NEEDS.items()),
        *(
            pytest.param("split_input", NEEDS[name], id=f"split_input, {name}")
            for name in ("all", "not x", "a weight")
        ),
    ],
)
def test_gradients_that_are_wanted_add_up(needs, name, direct, planned):
    layer = BY_LIBRARY[name]().half()
    for parameter_name, parameter in layer.named_parameters():
        parameter.requires_grad_(needs(parameter_name))
    anew = copy.deepcopy(layer)
    size = 2, *layer.spec.output_size(3, 3)
    for i, set_to_none in enumerate([None, None, None, True, False]):
        x, dv = image(), image(size=size)
        anew._replays.clear()
        if set_to_none is not None:
            layer.zero_grad(set_to_none=set_to_none)
            anew.zero_grad(set_to_none=set_to_none)
        expected = accumulate(anew, x, dv, needs("x"))
        planned.clear()
        found = accumulate(layer, x, dv, needs("x"))
        assert bool(planned) == (i < 2)
        assert_equal(found, expected)
        assert_equal(layer.state_dict().values(), anew.state_dict().values())
    assert direct


@pytest.mark.parametrize("name", BY_LIBRARY)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_single_precision(name, channels_last, direct, started):
    layer = BY_LIBRARY[name]()
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    counts = steps_alike(layer, 3, direct, started, dtype=torch.float32)
    assert counts[2][0] == counts[2][1] > 0


def test_branches_that_are_convolved_again(direct, started):
    """With the input alone saved, the library convolves in the backward pass too."""
    layer = BY_LIBRARY["wide groups"]().half()
    layer.save = "input"
    counts = steps_alike(layer, 3, direct, started)
    assert counts[2][0] == counts[2][1] > 0


def third_step(layer, dtype=torch.float16):
    """The names of the operators that run in a layer's third step."""
    for _ in range(2):
        step(layer, image(layer.spec.in_channels).to(dtype))
    x = image(layer.spec.in_channels).to(dtype).requires_grad_()
    with use_backend("triton"):
        v = layer(x)
        dv = torch.ones_like(v)
        layer.zero_grad()
        with profile() as profiler:
            v.backward(dv)
    return [event.name for event in profiler.events()]


def test_the_library_is_asked_at_every_step(direct):
    """So that its switches, such as that for deterministic algorithms, hold as they are by then."""
    found = third_step(BY_LIBRARY["stride 2"]().half())
    assert found.count("aten::convolution_backward") == 2


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_gradients_that_lie_as_their_weights_do_are_handed_over(channels_last, direct):
    """The library's are channels_last, as x is. Autograd copies none."""
    layer = paper(16, 1, stride=2)
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    found = third_step(layer, torch.float32)
    assert found.count("aten::_foreach_copy_") == (not channels_last)
    assert found.count("aten::add_") == 1, "the gradients of x, of two branches"
    assert {"aten::add", "aten::clone", "aten::copy_"}.isdisjoint(found[found.index("aten::add_") :])


def test_weights_that_a_hook_hands_over_are_those_that_are_read(direct):
    """Hooks on a node's saved tensors may give others, elsewhere."""
    layer = BY_LIBRARY["stride 2"]().half()
    size, found = layer.paths[0].conv.weight.shape, []
    for _ in range(2):
        step(layer, image())
    anew = copy.deepcopy(layer)
    x = image()
    for module in (layer, layer, anew):
        inner = x.clone(memory_format=torch.preserve_format).requires_grad_()
        module.zero_grad()
        with use_backend("triton"):
            v = module(inner)
        for saved in v.grad_fn._raw_saved_tensors:
            saved.register_hooks(lambda tensor: tensor, lambda t: t * 2 if t.shape == size else t)
        v.backward(torch.ones_like(v))
        found.append([inner.grad, *(p.grad for p in module.parameters())])
    assert_equal(found[0], found[2])
    assert_equal(found[1], found[2])
    inner.grad = None
    with use_backend("triton"):
        anew(inner).sum().backward()
    assert not torch.equal(inner.grad, found[2][0])
