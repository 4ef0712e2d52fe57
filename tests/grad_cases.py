"""Backward passes of branch convolutions, what runs them and what they are held to."""

import math

import torch
import torch.nn.functional as F

from sk_triton.kernels.config import GradStreamConfig, GradWideConfig
from sk_triton.kernels.geometry import ConvShape
from sk_triton.kernels.grad_geometry import partial_shape

from .packed import pack_grad_weights
from .tolerances import assert_errs_like_eager
from .watched import run_watched

STREAM = GradStreamConfig(RUN_H=4, TILES_PER_PROGRAM=2)
WIDE = GradWideConfig(RUN_H=3, TILES_PER_PROGRAM=2)

# name: (branches, config, N, H, W)
CASES = {
    "stream": (ConvShape(8, 8, 2, (3, 3), (1, 2)), STREAM, 2, 5, 7),
    "stream, two tiles, even rows": (ConvShape(12, 12, 3, (3,), (2,)), GradStreamConfig(3, 1), 1, 3, 30),
    "stream, one pixel": (ConvShape(8, 8, 2, (3, 3), (2, 1)), STREAM, 2, 1, 1),
    "stream, one branch": (ConvShape(16, 16, 8, (3,), (2,)), GradStreamConfig(3, 4), 1, 4, 5),
    "stream, 8 channels per group": (ConvShape(16, 16, 2, (3, 3), (1, 2)), GradStreamConfig(2, 3), 2, 3, 5),
    "stream, 3 channels per group": (ConvShape(9, 9, 3, (3,), (1,)), STREAM, 1, 5, 5),
    "stream, channel multiplier": (ConvShape(12, 24, 6, (3, 3), (2, 1)), GradStreamConfig(1, 4), 1, 5, 5),
    "stream, depthwise": (ConvShape(12, 12, 12, (3, 3), (1, 2)), GradStreamConfig(2, 1), 1, 3, 6),
    "stream, two warps": (ConvShape(16, 16, 4, (3, 3), (1, 2)), GradStreamConfig(4, 2, 2), 2, 5, 7),
    "stream, two warps, 8 a group": (
        ConvShape(16, 16, 2, (3, 3), (1, 2)),
        GradStreamConfig(2, 3, 2),
        1,
        3,
        5,
    ),
    "stream, two warps, 3 a group": (ConvShape(12, 12, 4, (3,), (2,)), GradStreamConfig(3, 1, 2), 1, 3, 30),
    "stream, two warps, last half full": (
        ConvShape(12, 12, 12, (3,), (1,)),
        GradStreamConfig(2, 1, 2),
        1,
        3,
        6,
    ),
    "stream, four warps": (ConvShape(32, 32, 8, (3, 3), (1, 2)), GradStreamConfig(2, 1, 4), 1, 3, 6),
    "stream, strips of several tiles": (
        ConvShape(8, 8, 2, (3, 3), (1, 2)),
        GradStreamConfig(2, 2),
        1,
        5,
        60,
    ),
    "stream, dilations of 1": (ConvShape(8, 8, 2, (3, 3), (1, 1)), GradStreamConfig(1, 2), 1, 4, 30),
    "stream, dilations of 2": (ConvShape(8, 8, 2, (3, 3), (2, 2)), GradStreamConfig(1, 2), 1, 4, 5),
    "wide, 16 channels per group": (ConvShape(32, 32, 2, (3, 3), (1, 2)), WIDE, 2, 4, 3),
    "wide, whole images": (ConvShape(16, 16, 1, (3, 3), (1, 2)), GradWideConfig(4, 2), 2, 4, 5),
    "wide, data in higher tiles": (ConvShape(16, 16, 1, (3, 3), (1, 2)), GradWideConfig(2, 2, 5), 1, 6, 4),
    "wide, 32 channels per group": (ConvShape(32, 32, 1, (3,), (1,)), WIDE, 1, 2, 5),
    "wide, dense, more outputs": (ConvShape(20, 40, 1, (3,), (2,)), WIDE, 1, 2, 18),
    "wide, three branches": (ConvShape(16, 16, 4, (3, 5, 1), (1, 1, 1)), WIDE, 1, 4, 6),
    "wide, 7x7 and dilation 3": (ConvShape(12, 12, 4, (7, 3), (1, 3)), WIDE, 1, 2, 17),
    "wide, halos of each branch": (ConvShape(16, 16, 4, (3, 5), (1, 1)), GradWideConfig(4, 2), 1, 5, 30),
    "wide, one pixel": (ConvShape(32, 32, 2, (3,), (2,)), WIDE, 1, 1, 1),
}
# Bfloat16 takes the same way through a kernel as float16, but for how it is rounded: a few cases of each.
IN_BFLOAT16 = (
    "stream", "stream, one branch", "stream, 3 channels per group", "stream, 8 channels per group", "stream, two warps",
    "stream, four warps", "wide, 16 channels per group", "wide, dense, more outputs", "wide, three branches",
    "wide, halos of each branch",
)  # fmt: skip


def make(shape, n, h, w, dtype):
    """x, dv `[N, C, H, W]`, y `[M, N, H, W, C]`, weights, attention `[N, M, C]`, g `[N, C]`, statistics `[6, M, C]`."""
    m, c = len(shape.kernels), shape.c_out
    x, dv = (
        torch.randn(n, channels, h, w).to(dtype).to(memory_format=torch.channels_last)
        for channels in (shape.c_in, c)
    )
    y = (torch.randn(m, n, h, w, c) + 0.5).to(dtype)
    fan_in = shape.c_in // shape.groups
    weights = [(torch.randn(c, fan_in, k, k) / (k * math.sqrt(fan_in))).to(dtype) for k in shape.kernels]
    mean, weight, bias, dbias, dweight = torch.randn(5, m, c) * 0.3
    statistics = torch.stack([mean, torch.rand(m, c) + 0.5, weight + 1, bias, dbias, dweight])
    return x, dv, y, weights, torch.randn(n, m, c).softmax(1), torch.randn(n, c) * 0.1, statistics


def terms_of(attention, g, statistics, *, has_norm):
    """What `branch_grad` takes, by "Gradients of the branches" in kernels/README.md."""
    lift = g[:, None].expand_as(attention)
    if not has_norm:
        return torch.stack([attention, lift], -1)
    mean, rstd, weight, bias, dbias, dweight = statistics
    scale = weight * rstd
    slope = -scale * rstd * dweight
    norm = (scale, bias - mean * scale, slope, -scale * dbias - slope * mean)
    return torch.stack([scale * attention, scale * lift, *(t.expand_as(attention) for t in norm)], -1)


def run(x, dv, y, weights, terms, shape, config, *, has_relu):
    """dx and the weight gradients, from launches into NaN-filled buffers with guards around dx."""
    from sk_triton.kernels.branch_grad import branch_grad, reduce_weight_grad

    n, c, h, w = x.shape
    guarded = torch.full((n + 2, c, h + 2, w + 2), math.nan, dtype=x.dtype).to(
        memory_format=torch.channels_last
    )
    dx = guarded[1:-1, :, 1:-1, 1:-1]
    partial = torch.full(partial_shape(shape, config, n, h, w), math.nan)
    formats = [torch.contiguous_format, torch.channels_last]
    dw = [
        torch.full(weight.shape, math.nan).contiguous(memory_format=formats[m % 2])
        for m, weight in enumerate(weights)
    ]
    packed = pack_grad_weights(weights, shape, config, x.dtype)
    launches = branch_grad(
        x, dv, y, terms, packed, dx, partial, shape=shape, has_relu=has_relu, config=config
    ) + reduce_weight_grad(partial, dw, shape=shape, config=config)
    for launch in launches:
        run_watched(launch)
    assert guarded.isfinite().sum() <= dx.numel(), "the kernel wrote outside of dx"
    return dx, dw


def eager(x, dv, y, weights, attention, g, statistics, shape, dtype, *, has_relu, has_norm):
    """Gradients of x and the weights by autograd in `dtype`, from the branches' own by the formula of the design."""
    gradients = []
    for m in range(len(shape.kernels)):
        conv = y[m].permute(0, 3, 1, 2).double()
        dy = attention[:, m, :, None, None].double() * dv.double() + g[..., None, None].double()
        if has_norm:
            mean, rstd, weight, bias, dbias, dweight = (t[m, :, None, None].double() for t in statistics)
            normed = (conv - mean) * rstd
            mask = weight * normed + bias > 0 if has_relu else 1.0
            dy = weight * rstd * (mask * dy - dbias - normed * dweight)
        elif has_relu:
            dy = (conv > 0) * dy
        gradients.append(dy.to(dtype))
    inputs = [x.to(dtype).requires_grad_(), *(weight.to(dtype).requires_grad_() for weight in weights)]
    branches = [
        F.conv2d(inputs[0], inputs[1 + m], None, 1, d * (k // 2), d, shape.groups)
        for m, (k, d) in enumerate(zip(shape.kernels, shape.dilations, strict=True))
    ]
    # oneDNN's weight gradients of grouped bfloat16 convolutions come out of memory that it never wrote.
    with torch.backends.mkldnn.flags(enabled=False):
        dx, *dw = torch.autograd.grad(branches, inputs, gradients)
    return dx, dw


def check(
    case, *, has_relu=True, has_norm=True, make=make, change=lambda x, dv: (x, dv), dtype=torch.float16
):
    shape, config, *size = case
    x, dv, y, weights, attention, g, statistics = make(shape, *size, dtype)
    x, dv = change(x, dv)
    terms = terms_of(attention, g, statistics, has_norm=has_norm)
    dx, dw = run(x, dv, y, weights, terms, shape, config, has_relu=has_relu)
    settings = {"has_relu": has_relu, "has_norm": has_norm}
    ours_dx, ours_dw = eager(x, dv, y, weights, attention, g, statistics, shape, dtype, **settings)
    exact_dx, exact_dw = eager(x, dv, y, weights, attention, g, statistics, shape, torch.float64, **settings)
    assert_errs_like_eager(dx, ours_dx, exact_dx)
    for kernel, ours, exact in zip(dw, ours_dw, exact_dw, strict=True):
        assert_errs_like_eager(kernel.to(dtype), ours, exact)
