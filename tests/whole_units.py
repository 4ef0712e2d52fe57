"""Layers to run through a whole schedule, and how their results are judged."""

import copy

import torch

from sk_triton import SelectiveKernel, SKConv, functional, use_backend

from .tolerances import assert_errs_like_eager, assert_same
from .units import random_unit, randomize_norms

LAYERS = {
    "classic": lambda: SKConv(16, M=2, G=4, r=4, L=8),
    "classic, one branch": lambda: SKConv(16, M=1, G=4, r=4, L=8),
    "classic, three branches, stride 2": lambda: SKConv(16, M=3, G=4, r=4, stride=2, L=8),
    "classic, odd channels": lambda: SKConv(15, M=1, G=3, r=4, L=6),
    "paper": lambda: SelectiveKernel(16, groups=4, split_input=False),
    "paper, stride 2": lambda: SelectiveKernel(16, groups=4, split_input=False, stride=2),
    "timm's default": lambda: SelectiveKernel(16),
    "split, groups": lambda: SelectiveKernel(16, groups=4),
    "out of in": lambda: SelectiveKernel(16, 24, groups=2, split_input=False),
    "three branches": lambda: SelectiveKernel(16, kernel_size=[3, 5, 3], groups=4, split_input=False),
    "true 5x5": lambda: SelectiveKernel(16, groups=4, keep_3x3=False, split_input=False),
    "dilation 2": lambda: SelectiveKernel(16, groups=4, dilation=2, split_input=False),
    "16 channels per group": lambda: SelectiveKernel(32, groups=2, split_input=False),
    "odd channels": lambda: SelectiveKernel(24, groups=8, split_input=False),
    "depthwise": lambda: SelectiveKernel(16, groups=16, split_input=False),
}

VIEWS = {
    "crop": lambda x: x[:, :, 1:, ::2],
    "crop, channels_last": lambda x: x.to(memory_format=torch.channels_last)[:, :, 1:, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "broadcast": lambda x: x[:1].expand(2, -1, -1, -1),
    "misaligned": lambda x: x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x),
}
"""Inputs that are not contiguous, made of one that is."""


def compare(layer, x, schedule="store"):
    """The error rule on a layer and an input, and the memory format."""
    layer.eval()
    randomize_norms(layer)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(x.double())
        with use_backend("reference"):
            eager = layer(x)
        with use_backend("triton", schedule=schedule):
            ours = layer(x)
    assert ours.stride() == eager.stride()
    assert_errs_like_eager(ours, eager, exact)


def compare_unit(spec, size, schedule):
    """A random unit in fp32 against the reference; `size` is `[N, H, W]`."""
    n, h, w = size
    branches, gate = random_unit(spec, torch.float32)
    x = torch.randn(n, spec.in_channels, h, w)
    with torch.no_grad():
        with use_backend("triton", schedule=schedule):
            ours = functional.sk_conv(x, branches, gate, spec)
        with use_backend("reference"):
            assert_same(ours, functional.sk_conv(x, branches, gate, spec))


def compare_bad_value(layer, value, schedule):
    """A NaN or an infinity in one sample of a layer of 16 channels ends as NaN where it does in eager."""
    layer, x = layer.eval(), torch.randn(3, 16, 7, 5)
    x[1, 2, 3, 4] = value
    with torch.no_grad():
        with use_backend("triton", schedule=schedule):
            ours = layer(x)
        with use_backend("reference"):
            eager = layer(x)
    assert ours[1].isnan().any()
    assert torch.equal(ours.isnan(), eager.isnan())


def image(layer, *sizes):
    """A random input of a layer, ``[N, H, W]`` in size, in the dtype of its parameters."""
    n, h, w = sizes
    return torch.randn(n, layer.spec.in_channels, h, w).to(next(layer.parameters()).dtype)
