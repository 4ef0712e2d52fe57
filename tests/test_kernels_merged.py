"""The kernels of schedule "merged", interpreted, against float64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sk_triton.kernels.config import BorderConfig, MergedConfig, WindowConfig
from sk_triton.kernels.geometry import ConvShape, cdiv
from sk_triton.kernels.merging import (
    branch_blocks,
    column_sections,
    lattice_taps,
    merged_shape,
    row_parts,
    sections,
    strips,
    widen_kernel,
)

from .branch_cases import in_dtypes
from .packed import pack_branch_weights, sum_by_sections
from .tolerances import assert_errs_like_eager
from .watched import run_watched

pytestmark = pytest.mark.interpret

CLASSIC = ConvShape(16, 16, 4, (3, 5), (1, 1))
PAIRS = MergedConfig(8, 8, BLOCK_H=2, BLOCK_W=4, RUN_H=2, RUN_W=2, TILES_PER_PROGRAM=3)
WIDE = MergedConfig(16, 16, BLOCK_H=2, BLOCK_W=8, RUN_H=2, RUN_W=1, TILES_PER_PROGRAM=2)
WHOLE = MergedConfig(16, 16, BLOCK_H=1, BLOCK_W=8, RUN_H=6, RUN_W=1, TILES_PER_PROGRAM=2)
WINDOW = WindowConfig(16, 16, BLOCK_H=2, BLOCK_W=4, RUN_H=3, RUN_W=2)
PAIRS_WHOLE = MergedConfig(8, 8, BLOCK_H=1, BLOCK_W=8, RUN_H=4, RUN_W=2)
BORDER = BorderConfig(BLOCK_C=16, BLOCK_W=8, ROWS=3, STRIPS_PER_PROGRAM=2)

# name: (branches, config of the convolution, N, H, W)
CASES = {
    "3 and 5": (CLASSIC, PAIRS, 2, 9, 11),
    "even tiles": (CLASSIC, MergedConfig(8, 8, 2, 4, RUN_H=4, RUN_W=2), 1, 8, 16),
    "dilations 1 and 2": (ConvShape(16, 16, 4, (3, 3), (1, 2)), PAIRS, 2, 9, 7),
    "dilations 2 and 4": (ConvShape(16, 16, 4, (3, 3), (2, 4)), PAIRS, 1, 9, 10),
    "dilation 3": (ConvShape(16, 16, 4, (3,), (3,)), PAIRS, 1, 8, 9),
    "1, 3, 5 and 7": (ConvShape(16, 16, 4, (1, 3, 5, 7), (1, 1, 1, 1)), PAIRS, 1, 8, 5),
    "columns as high as the image": (ConvShape(32, 32, 2, (3, 5), (1, 1)), WHOLE, 2, 6, 9),
    "pairs as high as the image": (CLASSIC, MergedConfig(8, 8, 1, 8, RUN_H=5, RUN_W=2), 2, 5, 7),
    "as high as the image, dilation 2": (ConvShape(16, 16, 4, (3, 3), (2, 4)), PAIRS_WHOLE, 1, 4, 10),
    "1x1 alone": (ConvShape(16, 16, 4, (1, 1), (1, 1)), PAIRS, 2, 7, 5),
    "one pixel": (CLASSIC, PAIRS, 2, 1, 1),
    "smaller than the reach": (ConvShape(16, 16, 4, (7, 3), (1, 3)), PAIRS, 2, 2, 3),
    "one row": (CLASSIC, PAIRS, 1, 1, 9),
    "depthwise": (ConvShape(20, 20, 20, (3, 5), (1, 1)), PAIRS, 2, 7, 5),
    "dense": (ConvShape(8, 8, 1, (3, 5), (1, 1)), PAIRS, 2, 7, 5),
    "3 channels per group": (ConvShape(15, 15, 5, (3, 5), (1, 1)), PAIRS, 2, 7, 5),
    "channel multiplier": (ConvShape(8, 16, 4, (3, 5), (1, 1)), PAIRS, 2, 7, 6),
    "16 channels per group": (ConvShape(32, 32, 2, (3, 5), (1, 1)), WIDE, 2, 7, 9),
    "12 channels per group": (ConvShape(24, 24, 2, (3, 3), (1, 1)), WIDE, 1, 7, 9),
    "stride 2": (ConvShape(16, 32, 4, (3, 5), (1, 1), stride=2), WIDE, 2, 9, 6),
    "stride 2, dilation 2": (ConvShape(16, 16, 4, (3, 1), (2, 1), stride=2), PAIRS, 1, 9, 13),
    "window": (CLASSIC, WINDOW, 2, 9, 11),
    "window, two warps": (CLASSIC, WindowConfig(16, 16, 2, 4, RUN_H=3, RUN_W=3, num_warps=2), 2, 7, 11),
    "window, sparse": (CLASSIC, replace(WINDOW, SPARSE=True), 2, 7, 11),
    "window, sparse, groups of 8": (
        ConvShape(48, 48, 6, (3, 5), (1, 1)),
        replace(WINDOW, SPARSE=True),
        2,
        7,
        11,
    ),
    "window, sparse, groups of 2, dilation 2, two warps, even": (
        ConvShape(32, 32, 16, (3, 3), (1, 2)),
        WindowConfig(16, 16, 1, 8, RUN_H=4, RUN_W=5, SPARSE=True, num_warps=2),
        *(1, 8, 40),
    ),
    "window, even": (CLASSIC, WindowConfig(16, 16, 1, 8, RUN_H=4, RUN_W=3), 1, 8, 24),
    "window, dilations 1 and 2": (ConvShape(32, 32, 4, (3, 3), (1, 2)), WINDOW, 2, 7, 9),
    "window, 1x1 and dilation 3": (ConvShape(32, 32, 2, (1, 3), (1, 3)), WINDOW, 1, 5, 7),
    "window, one pixel": (CLASSIC, WINDOW, 2, 1, 1),
    "window, 3 channels per group": (ConvShape(21, 21, 7, (3, 5), (1, 1)), WINDOW, 1, 7, 5),
    "window, channel multiplier": (ConvShape(8, 16, 4, (3, 5), (1, 1)), WINDOW, 2, 7, 6),
    "stride 3, 1x1": (ConvShape(16, 16, 4, (1, 1), (1, 1), stride=3), WIDE, 1, 8, 7),
}
# Bfloat16 and float32 take the same way through a kernel as float16, but for their products: a few cases of each.
IN_BFLOAT16 = (
    "3 and 5", "1, 3, 5 and 7", "depthwise", "16 channels per group", "stride 2", "window", "window, two warps",
    "window, sparse", "window, sparse, groups of 8", "window, channel multiplier",
)  # fmt: skip
IN_FLOAT32 = (
    "3 and 5", "dilations 2 and 4", "1, 3, 5 and 7", "columns as high as the image", "depthwise", "dense",
    "3 channels per group", "channel multiplier", "16 channels per group", "stride 2", "stride 3, 1x1",
)  # fmt: skip


def make(shape, n, h, w, dtype):
    x = torch.randn(n, shape.c_in, h, w).to(dtype).to(memory_format=torch.channels_last)
    fan_in, m = shape.c_in // shape.groups, len(shape.kernels)
    weights = [
        (torch.randn(shape.c_out, fan_in, k, k) / (k * math.sqrt(fan_in))).to(dtype) for k in shape.kernels
    ]
    scale, shift = torch.rand(m, shape.c_out) + 0.5, torch.randn(m, shape.c_out)
    return x, weights, scale, shift, torch.randn(n, m, shape.c_out).softmax(1)


def pool(x, weights, scale, shift, shape, config=BORDER):
    """Pooled sums `[N, C]` from a launch into NaN-filled memory with guards around it."""
    from sk_triton.kernels.border_sums import border_sums_fwd

    n, _, h, w = x.shape
    merged = merged_shape(shape)
    table = torch.tensor(strips(merged, h, config.ROWS), dtype=torch.int32)
    tiles = cdiv(len(table), config.STRIPS_PER_PROGRAM) * cdiv(w, config.BLOCK_W)
    partial = torch.full((n + 2, tiles + 2, shape.c_out), math.nan)
    launch = border_sums_fwd(
        x, sum_by_sections(weights, scale, shape, h, w), shift.sum(0), table,
        torch.tensor(column_sections(merged, w), dtype=torch.int32), partial[1:-1, 1:-1],
        shape=merged, pixels=math.prod(shape.output_size(h, w)), config=config,
    )  # fmt: skip
    run_watched(launch)
    assert partial.isfinite().sum() <= partial[1:-1, 1:-1].numel(), "the kernel wrote outside of its output"
    return partial[1:-1, 1:-1].sum(1)


def convolve(x, weights, scale, shift, attention, shape, config, memory_format=torch.channels_last):
    """`v [N, C, H, W]` from a launch into NaN-filled memory with guards around it."""
    from sk_triton.kernels.merged_conv import merged_conv_fwd

    n, c = x.shape[0], shape.c_out
    h, w = shape.output_size(*x.shape[2:])
    guarded = torch.full((n + 2, c, h + 2, w + 2), math.nan, dtype=x.dtype).contiguous(
        memory_format=memory_format
    )
    v = guarded[1:-1, :, 1:-1, 1:-1]
    packed = pack_branch_weights(weights, shape, config, x.dtype)
    launch = merged_conv_fwd(
        x, packed, scale, shift, attention, v, branches=shape, allow_tf32=True, config=config
    )
    run_watched(launch)
    assert guarded.isfinite().sum() <= v.numel(), "the kernel wrote outside of its output"
    return v


def branches(x, weights, scale, shift, shape):
    """`u [M, N, C, H, W]` as eager computes it in x's dtype."""
    us = []
    for m, (weight, dilation) in enumerate(zip(weights, shape.dilations, strict=True)):
        padding = dilation * (shape.kernels[m] // 2)
        u = F.conv2d(x, weight, None, shape.stride, padding, dilation, shape.groups)
        us.append(u * scale[m].to(u.dtype)[:, None, None] + shift[m].to(u.dtype)[:, None, None])
    return torch.stack(us)


def double(x, weights, scale, shift):
    return x.double(), [w.double() for w in weights], scale.double(), shift.double()


def check_pool(arguments, shape, config=BORDER):
    sums = pool(*arguments, shape, config)
    eager = branches(*arguments, shape).sum(0).mean((2, 3))
    exact = branches(*double(*arguments), shape).sum(0).mean((2, 3))
    assert_errs_like_eager(
        (sums / math.prod(shape.output_size(*arguments[0].shape[2:]))).to(eager.dtype), eager, exact
    )


def check_conv(arguments, attention, shape, config, memory_format=torch.channels_last):
    v = convolve(*arguments, attention, shape, config, memory_format)
    eager = torch.einsum("mnchw,nmc->nchw", branches(*arguments, shape), attention.to(v.dtype))
    exact = torch.einsum("mnchw,nmc->nchw", branches(*double(*arguments), shape), attention.double())
    assert_errs_like_eager(v, eager, exact)


# Pooled sums know of no config: cases that differ by it alone are one.
SUMMED = list({(shape, *size): name for name, (shape, _, *size) in reversed(CASES.items())}.values())


@pytest.mark.parametrize(("name", "dtype"), in_dtypes(SUMMED, IN_BFLOAT16, IN_FLOAT32), ids=str)
def test_pooled_sums(name, dtype):
    shape, _, *size = CASES[name]
    *arguments, _ = make(shape, *size, dtype)
    check_pool(arguments, shape)


@pytest.mark.parametrize(("name", "dtype"), in_dtypes(CASES, IN_BFLOAT16, IN_FLOAT32), ids=str)
def test_convolution(name, dtype):
    shape, config, *size = CASES[name]
    *arguments, attention = make(shape, *size, dtype)
    check_conv(arguments, attention, shape, config)


@pytest.mark.parametrize("name", ["3 and 5", "16 channels per group", "stride 2", "window"])
def test_output_strides(name):
    shape, config, *size = CASES[name]
    *arguments, attention = make(shape, *size, torch.float16)
    check_conv(arguments, attention, shape, config, torch.contiguous_format)


@pytest.mark.parametrize("has_scale", [False, True])
def test_without_shift(has_scale):
    shape, config, *size = CASES["3 and 5"]
    x, weights, scale, shift, attention = make(shape, *size, torch.float32)
    if not has_scale:
        scale = torch.ones_like(scale)
    v = convolve(x, weights, scale if has_scale else None, None, attention, shape, config)
    us = branches(x, weights, scale, torch.zeros_like(shift), shape)
    exact = branches(*double(x, weights, scale, torch.zeros_like(shift)), shape)
    assert_errs_like_eager(
        v,
        torch.einsum("mnchw,nmc->nchw", us, attention),
        torch.einsum("mnchw,nmc->nchw", exact, attention.double()),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e3, 3e4])
@pytest.mark.parametrize("name", ["3 and 5", "window"])
def test_scales_keep_their_digits(name, size, dtype):
    """A norm's scale may be far from 1 and differ between branches; gains in 16 bits are relative to the largest."""
    shape, config, *sizes = CASES[name]
    x, weights, scale, shift, attention = make(shape, *sizes, dtype)
    scale[0] *= size
    scale[1, 1] = 0.0
    if size < 1:
        scale[1] = -scale[0] / 7  # a gain of either sign, and both zero where one is
        shift *= size
    weights = [weight / max(1.0, size) for weight in weights]
    check_conv([x, weights, scale, shift], attention, shape, config)


def test_which_blocks_hold_taps_of_which_branch():
    def blocks(shape, config):
        found = branch_blocks(shape, config, torch.float16)
        m = len(shape.kernels)
        return ["".join("x" if has else "." for has in found[i::m]) for i in range(m)]

    # Five rows of parts (points 0 to 3, 4 and 5): the 3x3 meets the three rows in the middle.
    assert blocks(CLASSIC, PAIRS) == ["..xxxxxx..", "xxxxxxxxxx"]
    # Parts of points 0 and 1, 2 and 3, 4: its columns are 1 to 3.
    assert blocks(ConvShape(32, 32, 2, (3, 5), (1, 1)), WIDE) == ["...xx.xx.xx....", "x" * 15]
    # Dilation 2 on the same lattice: every other row, and columns 0, 2 and 4.
    assert blocks(ConvShape(32, 32, 2, (3, 3), (1, 2)), WIDE) == ["...xx.xx.xx....", "xxx...xxx...xxx"]


@pytest.mark.parametrize("name", ["3 and 5", "16 channels per group", "window, dilations 1 and 2"])
def test_bad_weights_stay_in_their_channel_block(name):
    """A product with a diagonal matrix spreads them over the block, and no further; a window multiplies one by one."""
    shape, config, *sizes = CASES[name]
    x, weights, scale, shift, attention = make(shape, *sizes, torch.float16)
    clean = convolve(x, weights, scale, shift, attention, shape, config)
    weights[0][config.BLOCK_CO] = math.nan
    v = convolve(x, weights, scale, shift, attention, shape, config)
    block = slice(config.BLOCK_CO, 2 * config.BLOCK_CO)
    assert v[:, config.BLOCK_CO].isnan().all()
    assert torch.equal(v[:, : config.BLOCK_CO], clean[:, : config.BLOCK_CO])
    if isinstance(config, WindowConfig):
        others = slice(config.BLOCK_CO + 1, None)
        assert torch.equal(v[:, others], clean[:, others])
    else:
        assert not v[:, block].isfinite().any()


@pytest.mark.parametrize("view", ["crop", "channels", "every other pixel", "misaligned", "broadcast"])
def test_strided_input(view):
    shape, config, n, *_ = CASES["3 and 5"]
    x, *rest, attention = make(shape, n, 9, 10, torch.float16)
    channels = x.shape[1]
    if view == "crop":
        x = x[:, :, 1:-1, 2:]
    elif view == "every other pixel":
        x = x[:, :, ::2, ::2]
    elif view == "channels":
        x = torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, 3 : channels + 3]
    elif view == "misaligned":
        x = torch.randn(x.numel() + 1).half()[1:].as_strided(x.shape, x.stride())
    else:
        x = x[:1].expand(n, -1, -1, -1)
    assert x.stride(1) == 1
    check_pool([x, *rest], shape)
    check_conv([x, *rest], attention, shape, config)


@pytest.mark.usefixtures("overflow_is_an_error")
@pytest.mark.parametrize("axis", [0, 2, 3], ids=["N", "H", "W"])
def test_strides_beyond_31_bits(axis):
    """A view that spans more than 2^31 elements of a buffer of which little is ever touched."""
    shape, config, *_ = CASES["3 and 5"]
    small, *rest, attention = make(shape, 2, 3, 2, torch.float16)
    strides = list(small.stride())
    strides[axis] = 2**31 + 16
    last = sum((size - 1) * stride for size, stride in zip(small.shape, strides, strict=True))
    x = torch.empty(last + 1, dtype=torch.float16).as_strided(small.shape, strides)
    x.copy_(small)
    check_pool([x, *rest], shape)
    check_conv([x, *rest], attention, shape, config)


@pytest.mark.parametrize("name", ["3 and 5", "16 channels per group", "stride 2", "window"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_stay_in_their_sample(name, value):
    shape, config, n, h, w = CASES[name]
    *arguments, attention = make(shape, n, h, w, torch.float16)
    clean_v, clean_sums = convolve(*arguments, attention, shape, config), pool(*arguments, shape)
    arguments[0][1, 0, h // 2, w // 2] = value
    v, sums = convolve(*arguments, attention, shape, config), pool(*arguments, shape)
    assert torch.equal(v[0], clean_v[0])
    assert torch.equal(sums[0], clean_sums[0])
    affected = ~branches(*double(*arguments), shape).isfinite().all(0)
    assert affected.any()
    assert not v[affected].isfinite().any()
    assert not sums[1, : shape.c_out // shape.groups].isfinite().any()


def test_partial_of_another_size_is_refused():
    shape, _, *size = CASES["3 and 5"]
    from sk_triton.kernels.border_sums import border_sums_fwd

    x, *_ = make(shape, *size, torch.float32)
    with pytest.raises(ValueError, match=r"partial must have 8 tiles, got shape \(2, 3, 16\)"):
        border_sums_fwd(
            x, torch.empty(5, 5, 4, 16), None, torch.empty(7, 3), torch.empty(17), torch.empty(2, 3, 16),
            shape=merged_shape(shape), pixels=1, config=BORDER,
        )  # fmt: skip


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize(
    ("kernels", "dilations"), [((3, 5), (1, 1)), ((3, 7), (2, 1)), ((1, 1), (1, 1)), ((3,), (4,))]
)
def test_sections_cover_what_the_taps_meet(kernels, dilations, size, stride):
    """Each row is in the section of just the taps that meet it, and a section's rows are `stride` apart."""
    shape = merged_shape(ConvShape(8, 8, 2, kernels, dilations, stride))
    kernel, pitch = shape.kernels[0], shape.dilations[0]
    taps_of = {}
    for section in sections(shape, size):
        for i in range(section.size):
            row = section.start + i * stride
            assert row not in taps_of
            taps_of[row] = set(section.taps)
    outputs, _ = shape.output_size(size, size)
    for row in range(size):
        met = {
            t for t in range(kernel) for y in range(outputs) if y * stride + (t - kernel // 2) * pitch == row
        }
        assert taps_of.get(row, set()) == met
    assert [i for i, s in enumerate(column_sections(shape, size)) if s >= 0] == sorted(taps_of)
    rows = [y + i * stride for y, count, _ in strips(shape, size, 2) for i in range(count)]
    assert sorted(rows) == sorted(taps_of)


def test_branches_widen_to_their_common_lattice():
    assert merged_shape(ConvShape(8, 8, 2, (3, 3, 1), (2, 4, 1))) == ConvShape(8, 8, 2, (5, 5, 5), (2, 2, 2))
    assert merged_shape(ConvShape(8, 8, 2, (1, 1), (1, 3), stride=2)) == ConvShape(8, 8, 2, (1, 1), (1, 1), 2)
    assert lattice_taps(ConvShape(8, 8, 2, (3, 3, 1), (2, 4, 1))) == ((1, 2, 3), (0, 2, 4), (2,))
    weight = torch.arange(1.0, 10).reshape(1, 1, 3, 3)
    wide = widen_kernel(weight, (0, 2, 4), 5)
    assert torch.equal(wide[0, 0, ::2, ::2], weight[0, 0])
    assert wide.count_nonzero() == 9


@pytest.mark.parametrize(
    ("kernel", "config", "dtype", "parts"),
    [
        (3, PAIRS, torch.float16, (0, 4)),
        (5, PAIRS, torch.float16, (0, 4, 6)),
        (7, PAIRS, torch.float16, (0, 4, 8)),
        (5, PAIRS, torch.float32, (0, 2, 4, 6)),
        (5, WIDE, torch.bfloat16, (0, 2, 4, 5)),
        (3, WIDE, torch.float32, (0, 1, 2, 3)),
    ],
)
def test_row_parts(kernel, config, dtype, parts):
    assert row_parts(ConvShape(16, 16, 4, (kernel,), (1,)), config, dtype) == parts
