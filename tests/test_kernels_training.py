"""The training kernels, interpreted, against float64."""

import math

import pytest
import torch

from sk_triton.kernels.config import ReductionConfig, SelectConfig
from sk_triton.kernels.geometry import tiles
from sk_triton.kernels.running import Running

from .branch_cases import CASES, make
from .packed import pack_branch_weights
from .tolerances import assert_same
from .watched import nans, run_allowing

pytestmark = pytest.mark.interpret

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
SHAPES = pytest.mark.parametrize("shape", [(2, 3, 5, 7, 20), (3, 1, 1, 9, 1)], ids=str)
# A thread loads more pixels at a time than it has sums.
CONFIG = ReductionConfig(BLOCK_P=8, BLOCK_C=64, STEPS=3, num_warps=1)
EPSILON = 1e-5


def norm_tensors(m, c):
    return {
        "mean": torch.randn(m, c), "rstd": torch.rand(m, c) + 0.5, "gamma": torch.randn(m, c),
        "beta": torch.randn(m, c),
    }  # fmt: skip


def y_hat_and_mask(y, norm, has_norm, has_relu):
    """In float64, `[M, N, H, W, C]`."""
    y = y.double()
    mean, rstd, gamma, beta = (t.double()[:, None, None, None] for t in norm.values())
    y_hat = (y - mean) * rstd if has_norm else y
    u = y_hat * gamma + beta if has_norm else y
    return y_hat, (u > 0 if has_relu else torch.ones_like(u, dtype=torch.bool)).double(), u


FLAGS = pytest.mark.parametrize(
    ("has_norm", "has_relu"), [(True, True), (True, False), (False, True), (False, False)]
)


def statistics(y):
    from sk_triton.kernels.batch_stats import combine_moments_fwd, moment_tiles, tile_moments_fwd

    m, n, h, w, c = y.shape
    count = moment_tiles(n * h * w, CONFIG)
    moments = nans(m, 3, count, c)
    for own_y, own_moments in zip(y, moments, strict=True):
        run_allowing(tile_moments_fwd(own_y, own_moments, config=CONFIG), y=own_y, moments=own_moments)
    found = {"mean": nans(m, c), "rstd": nans(m, c), "var": nans(m, c)}
    settings = {"pixels": n * h * w, "epsilon": EPSILON, "is_unbiased": False}
    run_allowing(
        combine_moments_fwd(moments, *found.values(), [None] * m, **settings), moments=moments, **found
    )
    return found["mean"], found["var"], found["rstd"]


@DTYPES
@SHAPES
@pytest.mark.parametrize("offset", [0, 1000])
def test_batch_statistics(shape, dtype, offset):
    """A large mean costs no more of the variance than it takes to say the mean in fp32."""
    y = (offset + torch.randn(shape)).to(dtype)
    mean, var, rstd = statistics(y)
    exact_var, exact_mean = torch.var_mean(y.double(), (1, 2, 3), correction=0)
    torch.testing.assert_close(rstd.double(), (var.double() + EPSILON).rsqrt(), rtol=3e-7, atol=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), exact_var, rtol=6e-5 if offset else 2e-6, atol=1e-12)


def test_statistics_of_many_tiles():
    """More tiles than are combined at a time; channel 1 has an outlier in the first, channel 2 has it infinite."""
    from sk_triton.kernels.batch_stats import combine_moments_fwd

    count, mean, m2 = torch.full((1, 1100, 3), 8.0), 30 + torch.randn(1, 1100, 3), torch.rand(1, 1100, 3)
    mean[0, 0, 1], mean[0, 0, 2] = 1e4, math.inf
    moments, found, rstd, var = torch.stack([count, mean, m2], 1), nans(1, 3), nans(1, 3), nans(1, 3)
    settings = {"pixels": 8800, "epsilon": 0.0, "is_unbiased": True}
    before = torch.randn(3), torch.rand(3).half(), torch.tensor(4)
    running = Running(*(t.clone() for t in before), momentum=0.3)
    combine = combine_moments_fwd(moments, found, rstd, var, [running], **settings)
    own = {f"running {i}": tensor for i, tensor in enumerate(running[:3])}
    run_allowing(combine, moments=moments, mean=found, rstd=rstd, var=var, **own)
    assert running.counter == 5
    torch.testing.assert_close(running.mean, torch.lerp(before[0], found[0], 0.3))
    updated = torch.lerp(before[1].float(), var[0], 0.3).half()
    torch.testing.assert_close(running.var, updated, equal_nan=True)
    torch.testing.assert_close(rstd, (var * (8799 / 8800)).rsqrt(), equal_nan=True)
    exact = mean.double().mean(1)
    exact_var = (m2.double() / 8 + (mean.double() - exact[:, None]) ** 2).mean(1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    exact_var *= 8800 / 8799
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0, equal_nan=True)


def test_statistics_of_a_channel_with_a_bad_value():
    y = torch.randn(1, 2, 3, 4, 3)
    y[0, 1, 2, 3, 1] = math.nan
    y[0, 0, 0, 0, 2] = math.inf
    mean, var, _ = statistics(y)
    assert mean.isfinite().tolist() == var.isfinite().tolist() == [[True, False, False]]


@DTYPES
@SHAPES
@FLAGS
def test_pooled_moments(shape, dtype, has_norm, has_relu):
    from sk_triton.kernels.pooled_moments import pooled_moments_fwd

    m, n, h, w, c = shape
    y, norm = torch.randn(shape).to(dtype), norm_tensors(m, c)
    count = math.ceil(h * w / (CONFIG.BLOCK_P * CONFIG.STEPS))
    active, pooled = nans(count, n, m, c), nans(count, n, m, c)
    run_allowing(
        pooled_moments_fwd(y, *norm.values(), active, pooled, has_norm=has_norm, has_relu=has_relu, config=CONFIG),
        y=y, active=active, pooled=pooled, **norm,
    )  # fmt: skip
    y_hat, mask, _ = y_hat_and_mask(y, norm, has_norm, has_relu)
    assert_same(active.sum(0), mask.sum((2, 3)).transpose(0, 1).float())
    assert_same(pooled.sum(0), (mask * y_hat).sum((2, 3)).transpose(0, 1).float())


@DTYPES
@SHAPES
@FLAGS
def test_select_of_unnormalized_branches(shape, dtype, has_norm, has_relu, memory_format):
    from sk_triton.kernels.select import select_fwd

    m, n, h, w, c = shape
    y, norm, attention = torch.randn(shape).to(dtype), norm_tensors(m, c), torch.rand(n, m, c)
    v = nans(n, c, h, w).to(dtype).contiguous(memory_format=memory_format)
    run_allowing(
        select_fwd(
            y, attention, v, norm=tuple(norm.values()) if has_norm else None, has_relu=has_relu,
            config=SelectConfig(16, 16),
        ),
        y=y, attention=attention, v=v, **norm,
    )  # fmt: skip
    _, mask, u = y_hat_and_mask(y, norm, has_norm, has_relu)
    assert_same(v, torch.einsum("nmc,mnhwc->nchw", attention.double(), mask * u).to(dtype))


def gradient(shape, dtype):
    """`dv [N, C, H, W]` with adjacent channels, of a wider tensor."""
    _, n, h, w, c = shape
    dv = torch.randn(n, c + 3, h, w).to(dtype).contiguous(memory_format=torch.channels_last)
    return dv[:, 3:]


@DTYPES
@SHAPES
@FLAGS
def test_backward_sums_and_gradients(shape, dtype, has_norm, has_relu):
    from sk_triton.kernels.norm_bwd import norm_bwd
    from sk_triton.kernels.pooled_moments import pooled_moments_fwd
    from sk_triton.kernels.select_bwd import select_bwd

    m, n, h, w, c = shape
    y, norm, dv = torch.randn(shape).to(dtype), norm_tensors(m, c), gradient(shape, dtype)
    count = math.ceil(h * w / (CONFIG.BLOCK_P * CONFIG.STEPS))
    grad, scaled = nans(count, n, m, c), nans(count, n, m, c)
    flags = {"has_norm": has_norm, "has_relu": has_relu}
    run_allowing(
        select_bwd(dv, y, *norm.values(), grad, scaled, **flags, config=CONFIG),
        dv=dv, y=y, grad=grad, scaled=scaled, **norm,
    )  # fmt: skip
    y_hat, mask, _ = y_hat_and_mask(y, norm, has_norm, has_relu)
    exact_dv = dv.double().permute(0, 2, 3, 1)[None]
    assert_same(grad.sum(0), (mask * exact_dv).sum((2, 3)).transpose(0, 1).float())
    assert_same(scaled.sum(0), (mask * exact_dv * y_hat).sum((2, 3)).transpose(0, 1).float())
    with_pooled = [nans(count, n, m, c) for _ in range(4)]
    run_allowing(
        select_bwd(dv, y, *norm.values(), *with_pooled, **flags, config=CONFIG),
        dv=dv, y=y, **norm, **{str(i): sums for i, sums in enumerate(with_pooled)},
    )  # fmt: skip
    forward = [nans(count, n, m, c) for _ in range(2)]
    pooled_moments_fwd(y, *norm.values(), *forward, **flags, config=CONFIG)()
    for found, expected in zip(with_pooled, (grad, scaled, *forward), strict=True):
        assert torch.equal(found, expected)

    attention, g, dbeta, dgamma = torch.rand(n, m, c), torch.randn(n, c), torch.randn(m, c), torch.randn(m, c)
    dy = torch.full_like(y, math.nan)
    run_allowing(
        norm_bwd(
            dv, y, attention, g, *norm.values(), dbeta, dgamma, dy, **flags, config=SelectConfig(16, 16)
        ),
        dv=dv, y=y, attention=attention, g=g, dbeta=dbeta, dgamma=dgamma, dy=dy, **norm,
    )  # fmt: skip
    a = attention.double().transpose(0, 1)[:, :, None, None]
    exact = mask * (a * exact_dv + g.double()[None, :, None, None])
    if has_norm:
        scale, db, dg = ((norm["gamma"] * norm["rstd"]).double(), dbeta.double(), dgamma.double())
        scale, db, dg = (t[:, None, None, None] for t in (scale, db, dg))
        exact = scale * (exact - db - y_hat * dg)
    assert_same(dy, exact.to(dtype))


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("c", [1, 130])
def test_terms_of_the_gradients(c, has_norm):
    from sk_triton.kernels.grad_terms import grad_terms

    m, n = 3, 2
    norm, names = norm_tensors(m, c), ("attention", "g", "dbeta", "dgamma")
    attention, g, dbeta, dgamma = torch.rand(n, m, c), torch.randn(n, c), torch.randn(m, c), torch.randn(m, c)
    terms = nans(n, m, c, 6 if has_norm else 2)
    run_allowing(
        grad_terms(attention, g, *norm.values(), dbeta, dgamma, terms, has_norm=has_norm),
        terms=terms, **norm, **dict(zip(names, (attention, g, dbeta, dgamma), strict=True)),
    )  # fmt: skip
    dv, y = torch.randn(n, 1, c).double(), torch.randn(n, m, c).double()
    gain, lift, *others = terms.double().unbind(-1)
    found = gain * dv + lift
    exact = attention * dv + g[:, None].double()
    if has_norm:
        scale, shift, slope, level = others
        mean, rstd, gamma, beta = (norm[name].double() for name in ("mean", "rstd", "gamma", "beta"))
        y_hat = (y - mean) * rstd
        assert_same((scale * y + shift).float(), (gamma * y_hat + beta).float())
        found = found + slope * y + level
        exact = gamma * rstd * (exact - dbeta - y_hat * dgamma)
    assert_same(found.float(), exact.float())


def test_unequally_spaced_gradients_are_refused():
    from sk_triton.kernels.select_bwd import gradient_pixel_stride

    with pytest.raises(ValueError, match="adjacent channels and equally spaced pixels"):
        gradient_pixel_stride(torch.empty(2, 4, 3, 3))


MEASURED = [
    "stream", "stream, two samples per tile", "stream, 1x1 and dilation 3", "stream, split input", "stream, stride 2",
    "column", "column, whole height", "column, two samples per tile", "column, half a group, two samples",
    "column, parts of a group", "tap, 3 to 7 with runs", "tap, wide groups",
]  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_convolutions_take_the_moments_of_what_they_store(name):
    from sk_triton.kernels.batch_stats import combine_moments_fwd
    from sk_triton.kernels.branch_conv import branch_conv_fwd, branch_measure_fwd, branch_train_fwd
    from sk_triton.kernels.config import TapConfig

    shape, config, n, h_in, w_in = CASES[name]
    dtype = torch.float16
    x, weights, _ = make(shape, n, h_in, w_in, dtype)
    shift = 30 + torch.randn(len(shape.kernels), shape.c_out)
    (h, w), m, c = shape.output_size(h_in, w_in), len(shape.kernels), shape.c_out
    packed = pack_branch_weights(weights, shape, config, dtype)
    count = math.prod(tiles(shape, config, h, w))
    stored, y = nans(m, n, h, w, c).to(dtype), nans(m, n, h, w, c).to(dtype)
    partial = nans(n, count, c)
    moments = nans(m, 3, -(-n // config.BLOCK_N) * count, c)
    settings = {"shape": shape, "allow_tf32": False, "config": config}
    branch_conv_fwd(x, packed, shift, stored, partial, has_relu=False, **settings)()
    run_allowing(
        branch_train_fwd(x, packed, shift, y, moments, **settings),
        x=x, packed=packed, shift=shift, y=y, moments=moments,
    )  # fmt: skip
    assert torch.equal(y, stored)
    assert (moments[:, 0].sum(1) == n * h * w).all()
    mean, rstd, var = nans(m, c), nans(m, c), nans(m, c)
    combine_moments_fwd(
        moments, mean, rstd, var, [None] * m, pixels=n * h * w, epsilon=EPSILON, is_unbiased=False
    )()
    exact_var, exact_mean = torch.var_mean(y.double(), (1, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=1e-11)
    alone = torch.full_like(moments, math.nan)
    if not isinstance(config, TapConfig):
        run_allowing(
            branch_measure_fwd(x, packed, shift, alone, **settings),
            x=x,
            packed=packed,
            shift=shift,
            alone=alone,
        )
        assert torch.equal(alone, moments)
