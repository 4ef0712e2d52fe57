"""The branch convolutions, interpreted, against float64."""

import math

import pytest
import torch

from sk_triton.kernels.config import (
    TapConfig,
    WindowConfig,
)
from sk_triton.kernels.geometry import ConvShape, tiles

from .branch_cases import (
    CASES,
    IN_NCHW,
    SELECTING,
    STREAM,
    check,
    eager,
    exact,
    in_dtypes,
    make,
    recompute,
    run,
)
from .packed import pack_branch_weights
from .tolerances import assert_errs_like_eager

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize(("name", "dtype"), in_dtypes(CASES), ids=str)
def test_matches_float64(name, dtype):
    shape, config, *size = CASES[name]
    x, weights, shift = make(shape, *size, dtype)
    check(x, weights, shift, shape, config)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("held")])
def test_held_weights_pool_what_is_stored(name):
    from sk_triton.kernels.branch_conv import branch_pool_fwd, branch_select_fwd

    shape, config, *size = CASES[name]
    x, weights, shift = make(shape, *size, torch.float16)
    _, expected = run(x, weights, shift, shape, config, has_relu=True)
    count = math.prod(tiles(shape, config, *shape.output_size(*x.shape[2:])))
    partial = torch.full((x.shape[0], count, shape.c_out), math.nan)
    packed = pack_branch_weights(weights, shape, config, x.dtype)
    settings = {"shape": shape, "has_relu": True, "allow_tf32": False, "config": config}
    branch_pool_fwd(x, packed, shift, partial, **settings)()
    torch.testing.assert_close(partial.sum(1), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="config: a HeldConfig stores and pools, asked to select"):
        branch_select_fwd(x, packed, shift, partial, x, **settings)


@pytest.mark.parametrize(("name", "dtype"), in_dtypes(SELECTING), ids=str)
def test_recomputing_matches_float64(name, dtype):
    shape, config, *size = CASES[name]
    x, weights, shift = make(shape, *size, dtype)
    m, n, c = len(shape.kernels), size[0], shape.c_out
    attention = torch.randn(n, m, c).softmax(1)
    formats = [torch.channels_last, *[torch.contiguous_format] * (name in IN_NCHW)]
    pooled, *vs = recompute(
        x, weights, shift, attention, shape, config, has_relu=True, memory_formats=formats
    )
    a = attention.transpose(0, 1)[..., None, None]
    u = exact(x, weights, shift, shape, has_relu=True)
    eager_u = eager(x, weights, shift, shape, has_relu=True)
    assert_errs_like_eager(pooled, eager_u.double().sum(0).sum((2, 3)).float(), u.sum(0).sum((2, 3)))
    for v in vs:
        assert_errs_like_eager(v, (eager_u * a.to(dtype)).sum(0), (u * a.double()).sum(0))


@pytest.mark.parametrize("name", ["stream", "window", "tap, dense", "depthwise"])
def test_without_shift_and_relu(name):
    shape, config, *size = CASES[name]
    x, weights, _ = make(shape, *size, torch.float16 if name == "window" else torch.float32)
    check(x, weights, None, shape, config, has_relu=False)


@pytest.mark.parametrize("name", ["stream", "window", "tap, dense", "depthwise"])
@pytest.mark.parametrize("view", ["crop", "channels", "every other pixel", "misaligned", "broadcast"])
def test_strided_input(name, view):
    shape, config, n, *_ = CASES[name]
    x, weights, shift = make(shape, n, 9, 10, torch.float16)
    channels = x.shape[1]
    if view == "crop":
        x = x[:, :, 1:-1, 2:]
    elif view == "every other pixel":
        x = x[:, :, ::2, ::2]
    elif view == "channels":
        x = torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, 3 : channels + 3]
    elif view == "misaligned":
        storage = torch.randn(x.numel() + 1).half()[1:]
        x = storage.as_strided(x.shape, x.stride())
    else:
        x = x[:1].expand(n, -1, -1, -1)
    assert x.stride(1) == 1
    check(x, weights, shift, shape, config)


@pytest.mark.usefixtures("overflow_is_an_error")
@pytest.mark.parametrize("name", ["stream", "window", "tap, dense", "depthwise"])
@pytest.mark.parametrize("axis", [0, 2, 3], ids=["N", "H", "W"])
def test_strides_beyond_31_bits(name, axis):
    """A view that spans more than 2^31 elements of a buffer of which little is ever touched."""
    shape, config, *_ = CASES[name]
    small, weights, shift = make(shape, 2, 3, 2, torch.float16)
    strides = list(small.stride())
    strides[axis] = 2**31 + 16
    last = sum((size - 1) * stride for size, stride in zip(small.shape, strides, strict=True))
    x = torch.empty(last + 1, dtype=torch.float16).as_strided(small.shape, strides)
    x.copy_(small)
    check(x, weights, shift, shape, config)


@pytest.mark.parametrize(
    "name",
    [
        *("stream", "stream, two samples per tile", "window", "window, four samples per tile"),
        *("tap, wide groups", "depthwise, stride 2"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_stay_in_their_sample(name, value):
    shape, config, n, h, w = CASES[name]
    x, weights, shift = make(shape, n, h, w, torch.float16)
    clean_u, clean_pooled = run(x, weights, shift, shape, config, has_relu=True)
    x[1, 0, h // 2, w // 2] = value
    u, pooled = run(x, weights, shift, shape, config, has_relu=True)
    others = [i for i in range(n) if i != 1]
    assert torch.equal(u[:, others], clean_u[:, others])
    assert torch.equal(pooled[others], clean_pooled[others])
    if math.isnan(value):
        affected = exact(x, weights, shift, shape, has_relu=True).isnan()
        assert u[affected].isnan().all(), "ReLU must hand NaN on"
        assert pooled[1].isnan().any()


def test_stream_needs_whole_groups():
    from sk_triton.kernels.geometry import blocking

    with pytest.raises(ValueError, match="8 inputs and 8 outputs cannot hold a group of 16 and 16"):
        blocking(ConvShape(32, 32, 2, (3,), (1,)), STREAM)


@pytest.mark.parametrize("size", [(7, 7), (8, 7), (7, 8), (5, 3)], ids=str)
@pytest.mark.parametrize(
    "config",
    [STREAM, TapConfig(8, 8, 8, 4, RUN_W=2), WindowConfig(16, 16, 2, 4, RUN_H=4, RUN_W=3)],
    ids=lambda c: type(c).__name__,
)
def test_overflow_beyond_the_image_stays_there(config, size):
    """Outputs that overhang see part of the image, and may exceed fp16 where no pixel of it does."""
    shape = ConvShape(8, 8, 2, (3, 3), (1, 2))
    weight = torch.zeros(8, 4, 3, 3)
    weight[:, 0, 1, 0], weight[:, 0, 1, 1] = 4, -4
    x = torch.linspace(0, 3e4, size[0] * size[1]).reshape(1, 1, *size).repeat(1, 8, 1, 1)
    x = x.half().to(memory_format=torch.channels_last)
    weights = [weight.half(), weight.half()]
    assert exact(x, weights, None, shape, has_relu=True).max() < torch.finfo(torch.float16).max
    u, pooled = run(x, weights, None, shape, config, has_relu=True)
    assert u.isfinite().all()
    assert pooled.isfinite().all()
