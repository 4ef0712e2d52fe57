"""Layers to train, steps of them, and comparisons of what two of them gave."""

import copy
from contextlib import nullcontext

import torch
from torch import nn

from sk_triton import SelectiveKernel, SKConv, use_backend

from .units import randomize_norms


def paper(channels=8, groups=2, **settings):
    layer = SelectiveKernel(channels, groups=groups, split_input=False, **settings)
    if "norm_layer" not in settings:
        randomize_norms(layer)
    return layer


def without_affine(channels):
    return nn.BatchNorm2d(channels, affine=False, momentum=0.3)


def untracked(channels):
    return nn.BatchNorm2d(channels, track_running_stats=False)


def saving_input():
    layer = paper()
    layer.save = "input"
    return layer


def channels_last_weights():
    return paper(16, 2).to(memory_format=torch.channels_last)


def of_different_epsilons():
    layer = paper()
    layer.paths[1].bn.eps = 0.1
    return layer


LAYERS = {
    "paper": paper,
    "classic": lambda: SKConv(8, M=2, G=2, r=2, L=4),
    "classic, one branch": lambda: SKConv(8, M=1, G=2, r=2, L=4),
    "16 channels a group": lambda: paper(16, 1),
    "input saved": saving_input,
    "channels_last weights": channels_last_weights,
    "norms without parameters": lambda: paper(norm_layer=without_affine),
    "norms that keep nothing": lambda: paper(norm_layer=untracked),
    "epsilons of their own": of_different_epsilons,
    "more outputs": lambda: paper(out_channels=16),
    "no activation": lambda: paper(act_layer=None),
}
# The library computes these gradients, and of wide groups the convolutions.
BY_LIBRARY = {
    "stride 2": lambda: paper(stride=2),
    "split_input": lambda: SelectiveKernel(8, groups=2),
    "wide groups": lambda: paper(72, 1),
    "wide groups with biases": lambda: SKConv(72, M=3, G=1, r=4, L=4),
}


def image(channels=8, size=(2, 3, 3), memory_format=torch.channels_last):
    return torch.randn(size[0], channels, *size[1:]).half().to(memory_format=memory_format)


def step(layer, x, dv=None, autocast=False):
    """Output, gradients of x and of the parameters; the parameters then change."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    with use_backend("triton"):
        with torch.autocast("cpu", torch.float16) if autocast else nullcontext():
            v = layer(x)
        v.backward(torch.full_like(v, 0.5) if dv is None else dv)
    found = [v.detach(), x.grad, *(p.grad for p in layer.parameters())]
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.05)
    return found


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one, other)
            assert one.stride() == other.stride()


def steps_alike(layer, steps, direct, started, **settings):
    """`steps` steps of the layer, and of a copy that forgets its recordings each time.

    Returns how many kernels each step of the layer started directly, and how many launches it takes.
    """
    planned = copy.deepcopy(layer)
    counts = []
    for _ in range(steps):
        x = image(layer.spec.in_channels, **settings.get("image", {})).to(settings.get("dtype", torch.half))
        planned._replays.clear()
        started.clear()
        expected = step(planned, x, autocast=settings.get("autocast", False))
        launches = sum(started.values())
        direct.clear()
        found = step(layer, x, autocast=settings.get("autocast", False))
        assert_equal(found, expected)
        assert_equal(layer.state_dict().values(), planned.state_dict().values())
        counts.append((len(direct), launches))
    return counts
