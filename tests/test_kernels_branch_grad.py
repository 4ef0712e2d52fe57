"""The backward kernels of the branches, interpreted, against float64 autograd."""

import math

import pytest
import torch
import torch.nn.functional as F

from sk_triton.bench.interpreted.meter import Meter
from sk_triton.kernels.config import GradStreamConfig
from sk_triton.kernels.geometry import ConvShape
from sk_triton.kernels.grad_geometry import grad_programs, grad_refusal, partial_shape

from .branch_cases import in_dtypes
from .grad_cases import CASES, IN_BFLOAT16, STREAM, WIDE, check, make, run, terms_of
from .packed import pack_grad_weights

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize(("name", "dtype"), in_dtypes(CASES, IN_BFLOAT16, ()), ids=str)
def test_matches_float64(name, dtype):
    check(CASES[name], dtype=dtype)


@pytest.mark.parametrize("name", ["stream", "wide, 16 channels per group"])
@pytest.mark.parametrize(("has_relu", "has_norm"), [(True, False), (False, True), (False, False)])
def test_linear_branches_and_branches_without_norm(name, has_relu, has_norm):
    check(CASES[name], has_relu=has_relu, has_norm=has_norm)


@pytest.mark.parametrize("name", ["stream, 8 channels per group", "wide, 16 channels per group"])
@pytest.mark.parametrize("view", ["crop", "every other pixel", "channels", "broadcast"])
def test_strided_inputs(name, view):
    shape, config, n, h, w = CASES[name]

    def change(x, dv):
        if view == "crop":
            return tuple(F.pad(t, (1, 2, 1, 1), value=math.nan)[:, :, 1:-1, 1:-2] for t in (x, dv))
        if view == "every other pixel":
            doubled = (t.repeat_interleave(2, 2).repeat_interleave(2, 3) for t in (x, dv))
            return tuple(t.to(memory_format=torch.channels_last)[:, :, ::2, ::2] for t in doubled)
        if view == "channels":
            wider = (torch.cat([t, t], 1).to(memory_format=torch.channels_last) for t in (x, dv))
            return tuple(t[:, 3 : 3 + x.shape[1]] for t in wider)
        return x[:1].expand(n, -1, -1, -1), dv[:, :, :1, :1].expand(-1, -1, h, w)

    check((shape, config, n, h, w), change=change)


@pytest.mark.usefixtures("overflow_is_an_error")
@pytest.mark.parametrize("name", ["stream, 8 channels per group", "wide, 16 channels per group"])
@pytest.mark.parametrize("axis", [0, 2, 3], ids=["N", "H", "W"])
def test_strides_beyond_31_bits(name, axis):
    """A view that spans more than 2^31 elements of a buffer of which little is ever touched."""
    shape, config, *_ = CASES[name]

    def change(x, dv):
        strides = list(dv.stride())
        strides[axis] = 2**31 + 16
        last = sum((size - 1) * stride for size, stride in zip(dv.shape, strides, strict=True))
        far = torch.empty(last + 1, dtype=dv.dtype).as_strided(dv.shape, strides)
        return x, far.copy_(dv)

    check((shape, config, 2, 3, 2), change=change)


@pytest.mark.usefixtures("overflow_is_an_error")
def test_branches_beyond_31_bits():
    """The third of three branches that lie 2^30 elements apart."""
    shape, config, n, h, w = CASES["wide, three branches"]
    x, dv, y, weights, *rest = make(shape, n, h, w, torch.float16)
    terms = terms_of(*rest, has_norm=True)
    strides = (2**30 + 16, *y.stride()[1:])
    last = sum((size - 1) * stride for size, stride in zip(y.shape, strides, strict=True))
    far = torch.empty(last + 1, dtype=y.dtype).as_strided(y.shape, strides).copy_(y)
    near_dx, near_dw = run(x, dv, y, weights, terms, shape, config, has_relu=True)
    far_dx, far_dw = run(x, dv, far, weights, terms, shape, config, has_relu=True)
    assert torch.equal(far_dx, near_dx)
    assert all(torch.equal(a, b) for a, b in zip(far_dw, near_dw, strict=True))


@pytest.mark.parametrize("name", ["stream", "wide, 16 channels per group"])
def test_repeated_runs_are_equal_to_the_bit(name):
    shape, config, *size = CASES[name]
    x, dv, y, weights, *rest = make(shape, *size, torch.float16)
    terms = terms_of(*rest, has_norm=True)
    first, second = (run(x, dv, y, weights, terms, shape, config, has_relu=True) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("name", ["stream", "wide, halos of each branch"])
def test_more_tiles_than_a_grid_has_rows(name, monkeypatch):
    shape, config, *size = CASES[name]
    x, dv, y, weights, *rest = make(shape, *size, torch.float16)
    terms = terms_of(*rest, has_norm=True)
    expected, expected_dw = run(x, dv, y, weights, terms, shape, config, has_relu=True)
    for most in (1, 2, 3):
        for module in ("branch_grad", "grad_geometry"):
            monkeypatch.setattr(f"sk_triton.kernels.{module}.MAX_GRID_Y", most)
        assert grad_programs(shape, config, *size)[0] <= most
        dx, dw = run(x, dv, y, weights, terms, shape, config, has_relu=True)
        assert torch.equal(dx, expected)
        for found, whole in zip(dw, expected_dw, strict=True):
            torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("name", ["stream", "wide, 16 channels per group"])
def test_a_bad_gradient_stays_in_its_sample(name):
    shape, config, *size = CASES[name]
    x, dv, y, weights, *rest = make(shape, *size, torch.float16)
    terms = terms_of(*rest, has_norm=True)
    clean, _ = run(x, dv, y, weights, terms, shape, config, has_relu=True)
    dv[1, 0, 2, 2] = math.nan
    y[:, 1, 2, 2, 0] = 9
    dx, dw = run(x, dv, y, weights, terms, shape, config, has_relu=True)
    assert torch.equal(dx[0], clean[0])
    assert dx[1].isnan().any()
    assert all(gradient.isnan().any() for gradient in dw)


@pytest.mark.parametrize(
    ("name", "x", "dv", "others"),
    [("stream", 1, 1, 3), ("stream, one branch", 1, 1, 2), ("wide, whole images", 2, 3, 5)],
)
def test_passes_over_memory(name, x, dv, others):
    """Distinct bytes of each launch in units of one activation: `others` are the convolutions' outputs and dx."""
    from sk_triton.kernels.branch_grad import branch_grad

    shape, config, n, h, w = CASES[name]
    tensors = make(shape, n, h, w, torch.float16)
    packed = pack_grad_weights(tensors[3], shape, config, torch.float16)
    dx, partial = torch.empty_like(tensors[0]), torch.empty(partial_shape(shape, config, n, h, w))
    terms = terms_of(*tensors[4:], has_norm=True)
    launches = branch_grad(
        *tensors[:3], terms, packed, dx, partial, shape=shape, has_relu=True, config=config
    )
    found = {"x": 0.0, "dv": 0.0, "y": 0.0, "dx": 0.0}
    for launch in launches:
        with Meter(
            dict(zip(found, (*tensors[:3], dx), strict=True)) | _rest(launch, (*tensors[:3], dx))
        ).watch() as rows:
            launch()
        for row in rows:
            if row.tensor in found:
                found[row.tensor] += row.touched / (dx.numel() * 2)
    assert (found["x"], found["dv"], found["y"] + found["dx"]) == (x, dv, others)


def _rest(launch, tensors):
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    others = [t for t in launch.arguments if isinstance(t, torch.Tensor)]
    return {str(i): t for i, t in enumerate(others) if t.untyped_storage().data_ptr() not in storages}


@pytest.mark.parametrize(
    ("shape", "dtype", "config", "w", "reason"),
    [
        (ConvShape(16, 16, 4, (3,), (1,)), torch.float32, STREAM, 8, "x is torch.float32"),
        (ConvShape(16, 16, 4, (3,), (1,), stride=2), torch.float16, WIDE, 8, "the stride is 2"),
        (ConvShape(16, 16, 4, (3,), (1,), is_split=True), torch.float16, WIDE, 8, "split_input"),
        (ConvShape(32, 32, 2, (3,), (1,)), torch.float16, STREAM, 8, "a group has 16 channels"),
        (ConvShape(16, 16, 4, (5,), (1,)), torch.float16, STREAM, 8, "3x3 kernels of dilation 1 or 2"),
        (ConvShape(16, 16, 4, (3, 3, 3), (1, 2, 1)), torch.float16, STREAM, 8, "3 branches"),
        (
            ConvShape(24, 24, 6, (3,), (1,)),
            torch.float16,
            GradStreamConfig(4, 2, 2),
            8,
            "there are 3 channel blocks",
        ),
        (ConvShape(16, 16, 4, (3,), (8,)), torch.float16, WIDE, 17, "reads 8 columns beyond a pixel"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(shape, dtype, config, w, reason):
    from sk_triton.kernels.branch_grad import branch_grad

    assert reason in grad_refusal(shape, dtype, config, w)
    x = torch.empty(1, 16, 2, w, dtype=dtype)
    with pytest.raises(ValueError, match=f"shape: .*{reason}"):
        branch_grad(x, x, x, x, x, x, x, shape=shape, has_relu=True, config=config)


@pytest.mark.parametrize("name", ["x", "dv", "y"])
def test_channels_that_are_not_adjacent_are_refused(name):
    from sk_triton.kernels.branch_grad import branch_grad

    shape, config, *size = CASES["stream"]
    tensors = dict(zip(("x", "dv", "y"), make(shape, *size, torch.float16)[:3], strict=True))
    if name == "y":
        tensors["y"] = tensors["y"].permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    else:
        tensors[name] = tensors[name].contiguous()
    unused = tensors["x"]
    with pytest.raises(ValueError, match=f"{name} must have adjacent channels"):
        branch_grad(
            **tensors,
            terms=unused,
            w=unused,
            dx=unused,
            partial=unused,
            shape=shape,
            has_relu=True,
            config=config,
        )
