"""Branch convolutions of every formulation, what runs them and what they are held to."""

import math

import torch
import torch.nn.functional as F

from sk_triton.kernels.config import (
    ColumnConfig,
    DepthwiseConfig,
    HeldConfig,
    StreamConfig,
    TapConfig,
    WindowConfig,
)
from sk_triton.kernels.geometry import ConvShape, tiles

from .packed import pack_branch_weights
from .tolerances import assert_errs_like_eager
from .watched import run_watched

GROUPED = ConvShape(16, 16, 4, (3, 3), (1, 2))
STREAM = StreamConfig(8, 8, BLOCK_H=2, BLOCK_W=8, RUN_H=4, RUN_W=2, BLOCKS_PER_PROGRAM=2)
STREAM_WIDE = StreamConfig(16, 16, BLOCK_H=2, BLOCK_W=8, RUN_H=4, RUN_W=1)

# name: (branches, config, N, H, W)
CASES = {
    "stream": (GROUPED, STREAM, 2, 13, 17),
    "stream, even rows": (GROUPED, StreamConfig(8, 8, 2, 8, RUN_H=7, RUN_W=2), 1, 14, 16),
    "stream, two samples per tile": (GROUPED, StreamConfig(8, 8, 2, 4, RUN_H=4, RUN_W=2, BLOCK_N=2), 3, 7, 5),
    "stream, one pixel": (GROUPED, STREAM, 1, 1, 1),
    "stream, one row": (GROUPED, STREAM, 2, 1, 9),
    "stream, 1x1 and dilation 3": (ConvShape(24, 24, 8, (1, 3, 3), (1, 3, 1)), STREAM, 2, 13, 7),
    "stream, split input": (ConvShape(16, 16, 4, (3, 3), (1, 2), is_split=True), STREAM, 2, 7, 5),
    "stream, one branch": (ConvShape(16, 16, 4, (3,), (2,)), STREAM, 1, 7, 5),
    "stream, channel multiplier": (ConvShape(8, 16, 4, (1, 3), (1, 2), stride=2), STREAM_WIDE, 2, 13, 6),
    "stream, stride 2, runs along rows": (ConvShape(16, 16, 4, (3, 1), (2, 1), stride=2), STREAM, 2, 13, 17),
    "stream, stride 2": (ConvShape(16, 32, 4, (3, 3), (1, 2), stride=2), STREAM_WIDE, 2, 13, 17),
    "stream, stride 3": (ConvShape(16, 16, 4, (3, 5), (1, 2), stride=3), STREAM_WIDE, 1, 13, 17),
    "stream, 3 channels per group": (ConvShape(15, 15, 5, (3, 3), (1, 2)), STREAM, 2, 7, 5),
    "stream, unequal block count": (ConvShape(24, 24, 6, (3, 3), (1, 2)), STREAM, 1, 7, 5),
    "stream, 5x5": (ConvShape(16, 16, 4, (3, 5), (1, 1)), STREAM, 1, 7, 5),
    "window": (GROUPED, WindowConfig(16, 16, BLOCK_H=2, BLOCK_W=4, RUN_H=2, RUN_W=2), 2, 5, 9),
    "window, even": (GROUPED, WindowConfig(16, 16, 1, 8, RUN_H=3, RUN_W=2), 1, 6, 16),
    "window, four samples per tile": (GROUPED, WindowConfig(16, 16, 1, 2, RUN_H=4, RUN_W=3, BLOCK_N=4), 6, 4, 5),
    "window, one pixel": (GROUPED, WindowConfig(16, 16, 1, 8, RUN_H=1, RUN_W=2), 2, 1, 1),
    "window, weights read for each row": (
        ConvShape(32, 32, 4, (3, 3), (1, 2)), WindowConfig(16, 16, 4, 2, RUN_H=2, RUN_W=2, HOLD_WEIGHTS=False), 1, 5, 3,
    ),
    "window, groups of 16": (ConvShape(32, 32, 2, (3, 3), (2, 1)), WindowConfig(16, 16, 2, 4, 3, 2), 1, 6, 9),
    "window, 1x1, 5x5, dilation 3": (
        ConvShape(24, 24, 8, (1, 5, 3), (1, 1, 3)), WindowConfig(16, 16, 2, 4, RUN_H=3, RUN_W=2), 1, 5, 7,
    ),
    "window, one branch": (ConvShape(16, 16, 16, (3,), (2,)), WindowConfig(16, 16, 2, 4, RUN_H=4, RUN_W=2), 1, 7, 5),
    "window, 3 channels per group": (ConvShape(21, 21, 7, (3, 3), (1, 2)), WindowConfig(16, 16, 2, 4, 4, 2), 2, 7, 5),
    "window, two warps": (GROUPED, WindowConfig(16, 16, 2, 4, RUN_H=2, RUN_W=2, num_warps=2), 2, 5, 9),
    "window, two warps, even": (
        ConvShape(32, 32, 8, (3, 3), (1, 2)), WindowConfig(16, 16, 1, 8, RUN_H=3, RUN_W=4, num_warps=2), 1, 6, 32,
    ),
    "window, four warps": (
        ConvShape(64, 64, 16, (3, 3), (1, 2)), WindowConfig(16, 16, 2, 4, RUN_H=4, RUN_W=7, num_warps=4), 1, 6, 30,
    ),
    "window, four warps, several samples": (
        ConvShape(128, 128, 32, (3, 3), (1, 2)),
        WindowConfig(16, 16, 1, 2, RUN_H=4, RUN_W=3, BLOCK_N=4, HOLD_WEIGHTS=False, num_warps=4), 5, 4, 5,
    ),
    "window, four warps, one of them without channels": (
        ConvShape(36, 36, 12, (3, 3), (1, 2)), WindowConfig(16, 16, 2, 4, RUN_H=3, RUN_W=5, num_warps=4), 1, 5, 7,
    ),
    "window, channel multiplier": (ConvShape(8, 16, 4, (1, 3), (1, 2)), WindowConfig(16, 16, 2, 4, 4, 2), 2, 9, 6),
    "window, sparse": (GROUPED, WindowConfig(16, 16, 2, 4, RUN_H=2, RUN_W=2, SPARSE=True), 2, 5, 9),
    "window, sparse, even": (GROUPED, WindowConfig(16, 16, 1, 8, RUN_H=3, RUN_W=5, SPARSE=True), 1, 6, 40),
    "window, sparse, groups of 8": (
        ConvShape(24, 24, 3, (3, 3), (1, 2)), WindowConfig(16, 16, 2, 4, RUN_H=2, RUN_W=3, SPARSE=True), 1, 5, 7,
    ),
    "window, sparse, groups of 2, 1x1, 5x5, dilation 3": (
        ConvShape(24, 24, 12, (1, 5, 3), (1, 1, 3)), WindowConfig(16, 16, 2, 4, 3, 2, SPARSE=True), 1, 5, 7,
    ),
    "window, sparse, depthwise, dilations 2 and 4": (
        ConvShape(20, 20, 20, (3, 5), (4, 2)), WindowConfig(16, 16, 2, 4, 3, 2, SPARSE=True), 1, 5, 7,
    ),
    "window, sparse, weights read for each row, two warps": (
        ConvShape(32, 32, 8, (3, 3), (1, 2)),
        WindowConfig(16, 16, 1, 2, 3, 3, BLOCK_N=4, HOLD_WEIGHTS=False, SPARSE=True, num_warps=2), 5, 4, 5,
    ),
    "window, sparse, groups of 8, four warps": (
        ConvShape(64, 64, 8, (3, 3), (1, 2)), WindowConfig(16, 16, 2, 4, 4, 7, SPARSE=True, num_warps=4), 1, 6, 30,
    ),
    "column": (ConvShape(32, 32, 2, (3, 3), (1, 2)), ColumnConfig(16, 16, BLOCK_H=2, BLOCK_W=8, RUN_H=3), 2, 7, 9),
    "column, whole height": (ConvShape(32, 32, 2, (3, 3), (1, 2)), ColumnConfig(16, 16, 1, 8, RUN_H=7), 2, 7, 5),
    "column, unrolled, few rows at a time": (
        ConvShape(64, 64, 2, (3, 5), (2, 1)), ColumnConfig(32, 32, 1, 16, RUN_H=9, ROWS=4, UNROLL=True), 1, 9, 18,
    ),
    "column, two samples per tile": (
        ConvShape(24, 24, 2, (3, 3), (1, 3)), ColumnConfig(16, 16, 1, 8, RUN_H=4, BLOCK_N=2), 3, 6, 9,
    ),
    "column, several groups, stride 2": (
        ConvShape(32, 32, 8, (3, 3), (1, 2), stride=2), ColumnConfig(16, 16, 2, 8, RUN_H=2), 2, 11, 17,
    ),
    "column, stride 2": (ConvShape(20, 40, 2, (3, 1), (2, 1), stride=2), ColumnConfig(16, 32, 1, 16, RUN_H=3), 2, 9, 5),
    "column, split input": (
        ConvShape(32, 32, 2, (3, 3), (1, 2), is_split=True), ColumnConfig(16, 16, 2, 8, RUN_H=2), 1, 7, 5,
    ),
    "column, half a group, two samples": (
        ConvShape(64, 64, 2, (3, 5), (1, 1)), ColumnConfig(32, 16, 1, 8, RUN_H=7, BLOCK_N=2, ROWS=4), 3, 7, 7,
    ),
    "column, parts of a group": (
        ConvShape(40, 48, 2, (5, 3), (1, 2)), ColumnConfig(32, 16, 1, 16, RUN_H=4, ROWS=4), 2, 6, 9,
    ),
    "column, half a group, split input": (
        ConvShape(32, 64, 1, (3, 5), (1, 1), stride=2, is_split=True), ColumnConfig(32, 16, 2, 8, RUN_H=2), 1, 7, 5,
    ),
    "held": (ConvShape(64, 64, 2, (3, 3), (1, 2)), HeldConfig(32, 32, 1, 8, 7, 1, 2, True, 1, 1, 2, 2), 3, 7, 7),
    "held, tiles of one sample": (
        ConvShape(64, 64, 2, (3, 3), (2, 1)), HeldConfig(32, 32, 1, 8, 3, 1, 4, True, 1, 1, 1, 4), 2, 6, 9,
    ),
    "held, half a group, all columns": (
        ConvShape(32, 64, 1, (1, 3), (1, 1)), HeldConfig(32, 16, 1, 8, 4, 1, 4, True, 1, 1, 3, 3), 2, 8, 5,
    ),
    "held, split input, two samples": (
        ConvShape(24, 24, 1, (3, 3, 3), (1, 2, 3), is_split=True),
        HeldConfig(32, 32, 1, 8, 4, 2, 4, False, 1, 1, 1, 2), 5, 7, 9,
    ),
    "column, one pixel": (ConvShape(32, 32, 2, (3, 3), (1, 4)), ColumnConfig(16, 16, 1, 8, RUN_H=1), 2, 1, 1),
    "tap, 3 to 7 with runs": (ConvShape(16, 16, 4, (3, 5, 7), (1, 1, 1)), TapConfig(8, 8, 4, 4, RUN_W=4), 2, 13, 17),
    "tap, dense": (ConvShape(20, 24, 1, (3, 3), (1, 2)), TapConfig(16, 16, 8, 4), 2, 7, 5),
    "tap, wide groups": (ConvShape(40, 80, 2, (3, 3), (1, 2), stride=2), TapConfig(32, 16, 2, 8, BLOCK_N=2), 3, 7, 5),
    "tap, narrow groups": (ConvShape(12, 12, 4, (3, 5), (1, 1)), TapConfig(16, 16, 4, 4), 1, 7, 5),
    "tap, one pixel": (ConvShape(32, 32, 2, (1, 3), (1, 2)), TapConfig(16, 16, 4, 4), 1, 1, 1),
    "depthwise": (ConvShape(20, 20, 20, (3, 3), (1, 2)), DepthwiseConfig(16, 2, 4, RUN_H=2), 2, 7, 5),
    "depthwise, 13x17": (ConvShape(16, 16, 16, (3, 1), (2, 1)), DepthwiseConfig(16, 2, 4, RUN_H=4), 1, 13, 17),
    "depthwise, stride 2": (
        ConvShape(20, 20, 20, (3, 5), (1, 2), stride=2), DepthwiseConfig(16, 2, 4, BLOCK_N=2), 3, 9, 1,
    ),
    "depthwise, split input": (
        ConvShape(16, 16, 16, (3, 3), (1, 2), is_split=True), DepthwiseConfig(16, 2, 4, RUN_H=2), 1, 7, 5,
    ),
}  # fmt: skip


def make(shape, n, h, w, dtype):
    channels = shape.c_in * (len(shape.kernels) if shape.is_split else 1)
    x = torch.randn(n, channels, h, w).to(dtype).to(memory_format=torch.channels_last)
    fan_in = shape.c_in // shape.groups
    weights = [
        (torch.randn(shape.c_out, fan_in, k, k) / (k * math.sqrt(fan_in))).to(dtype) for k in shape.kernels
    ]
    return x, weights, torch.randn(len(shape.kernels), shape.c_out)


def run(x, weights, shift, shape, config, *, has_relu):
    """`u [M, N, C, H, W]` and pooled sums `[N, C]` from a launch into NaN-filled buffers with guards around them."""
    from sk_triton.kernels.branch_conv import branch_conv_fwd

    n, m, c = x.shape[0], len(shape.kernels), shape.c_out
    h, w = shape.output_size(*x.shape[2:])
    count = math.prod(tiles(shape, config, h, w))
    u = torch.full((m + 2, n + 2, h + 2, w + 2, c), math.nan, dtype=x.dtype)
    partial = torch.full((n + 2, count + 2, c), math.nan)
    inner_u, inner_partial = u[1:-1, 1:-1, 1:-1, 1:-1], partial[1:-1, 1:-1]
    packed = pack_branch_weights(weights, shape, config, x.dtype)
    launch = branch_conv_fwd(
        x, packed, shift, inner_u, inner_partial,
        shape=shape, has_relu=has_relu, allow_tf32=False, config=config,
    )  # fmt: skip
    run_watched(launch)
    written = u.isfinite().sum() + partial.isfinite().sum()
    assert written <= inner_u.numel() + inner_partial.numel(), "the kernel wrote outside of its output"
    return inner_u.permute(0, 1, 4, 2, 3), inner_partial.sum(1)


def eager(x, weights, shift, shape, *, has_relu):
    us = []
    for m, (weight, dilation) in enumerate(zip(weights, shape.dilations, strict=True)):
        x_m = x[:, m * shape.c_in : (m + 1) * shape.c_in] if shape.is_split else x
        padding = dilation * (shape.kernels[m] // 2)
        u = F.conv2d(x_m, weight, None, shape.stride, padding, dilation, shape.groups)
        if shift is not None:
            u = u + shift[m].to(u.dtype)[:, None, None]
        us.append(u.relu() if has_relu else u)
    return torch.stack(us)


def exact(x, weights, shift, shape, *, has_relu):
    double = None if shift is None else shift.double()
    return eager(x.double(), [w.double() for w in weights], double, shape, has_relu=has_relu)


def check(x, weights, shift, shape, config, *, has_relu=True):
    u, pooled = run(x, weights, shift, shape, config, has_relu=has_relu)
    ours = eager(x, weights, shift, shape, has_relu=has_relu)
    reference = exact(x, weights, shift, shape, has_relu=has_relu)
    assert_errs_like_eager(u, ours, reference)
    sums = reference.sum(0).sum((2, 3))
    # What eager pools is the branches it stored, so its own error is that of their rounding.
    assert_errs_like_eager(pooled, ours.double().sum(0).sum((2, 3)).float(), sums)


# Bfloat16 and float32 take the same way through a kernel as float16, but for their products: a few cases of each.
IN_BFLOAT16 = (
    "stream", "stream, two samples per tile", "window", "window, four warps, several samples", "window, sparse",
    "window, sparse, groups of 8", "column", "column, two samples per tile", "held", "tap, dense", "tap, one pixel",
    "depthwise",
)  # fmt: skip


IN_FLOAT32 = (
    "stream", "stream, 1x1 and dilation 3", "stream, channel multiplier", "stream, stride 3", "stream, 5x5", "column",
    "column, unrolled, few rows at a time", "column, half a group, two samples", "held",
    "held, split input, two samples", "tap, 3 to 7 with runs", "tap, dense", "tap, wide groups", "depthwise",
    "depthwise, stride 2", "depthwise, split input",
)  # fmt: skip

# Cases that select into NCHW as well.
IN_NCHW = (
    "stream", "stream, two samples per tile", "stream, stride 2", "window", "window, two warps",
    "window, four warps, several samples", "window, sparse", "column", "column, two samples per tile",
    "column, several groups, stride 2",
)  # fmt: skip


def in_dtypes(names, in_bfloat16=IN_BFLOAT16, in_float32=IN_FLOAT32):
    """`(name, dtype)` for the dtypes in which cases are run: all in float16, of the other names those among `names`."""
    chosen = {torch.float16: names, torch.bfloat16: in_bfloat16, torch.float32: in_float32}
    return [(name, dtype) for name in names for dtype, of_dtype in chosen.items() if name in of_dtype]


SELECTING = [
    name
    for name in CASES
    if name.startswith(("stream", "window", "column")) and not name.endswith("1x1 and dilation 3")
]


def recompute(
    x, weights, shift, attention, shape, config, *, has_relu, memory_formats=(torch.channels_last,)
):
    """Pooled sums `[N, C]` and `v [N, C, H, W]` in each format from the launches that do not write the branches."""
    from sk_triton.kernels.branch_conv import branch_pool_fwd, branch_select_fwd

    n, c = x.shape[0], shape.c_out
    h, w = shape.output_size(*x.shape[2:])
    packed = pack_branch_weights(weights, shape, config, x.dtype)
    count = math.prod(tiles(shape, config, h, w))
    partial = torch.full((n + 2, count + 2, c), math.nan)
    vs = [
        torch.full((n + 2, c, h + 2, w + 2), math.nan, dtype=x.dtype).to(memory_format=memory_format)
        for memory_format in memory_formats
    ]
    inner_partial, *inner_vs = partial[1:-1, 1:-1], *(v[1:-1, :, 1:-1, 1:-1] for v in vs)
    settings = {"shape": shape, "has_relu": has_relu, "allow_tf32": False, "config": config}
    for launch in (
        branch_pool_fwd(x, packed, shift, inner_partial, **settings),
        *(branch_select_fwd(x, packed, shift, attention, v, **settings) for v in inner_vs),
    ):
        run_watched(launch)
    for guarded, inner in zip((partial, *vs), (inner_partial, *inner_vs), strict=True):
        assert guarded.isfinite().sum() <= inner.numel()
    return inner_partial.sum(1), *inner_vs
