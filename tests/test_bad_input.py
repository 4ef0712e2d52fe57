"""Bad input: the type of the error, and a message with the argument, its value and what is allowed."""

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

from sk_triton import BranchSpec, SelectiveKernel, SKConv, SKSpec, reference, use_backend
from sk_triton.functional import sk_conv

from .units import random_unit

LAYERS = {
    "SKConv": lambda: SKConv(8, 2, 2, 2, L=4),
    "SelectiveKernel": lambda: SelectiveKernel(8),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def layer(request):
    return request.param()


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fails the test if anything is computed before the check."""

    def refuse(*args, **kwargs):
        raise AssertionError("computed before the check")

    monkeypatch.setattr(F, "conv2d", refuse)
    monkeypatch.setattr(reference, "sk_conv", refuse)


def real(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


INPUT = [
    (lambda: None, TypeError, "x must be a torch.Tensor, got NoneType"),
    (lambda: [[1.0]], TypeError, "x must be a torch.Tensor, got list"),
    (lambda: real(8), ValueError, r"x must be 4-D \[N, C, H, W\], got 1-D of shape \[8\]"),
    (lambda: real(8, 5, 5), ValueError, r"x must be 4-D \[N, C, H, W\], got 3-D of shape \[8, 5, 5\]"),
    (lambda: real(1, 8, 5, 5, 5), ValueError, r"x must be 4-D .* got 5-D of shape \[1, 8, 5, 5, 5\]"),
    (lambda: real(2, 7, 5, 5), ValueError, r"x must have in_channels = 8 channels, got 7: \[2, 7, 5, 5\]"),
    (lambda: real(2, 5, 5, 8), ValueError, r"x must have in_channels = 8 channels, got 5: \[2, 5, 5, 8\]"),
    (lambda: real(2, 0, 5, 5), ValueError, r"x must have in_channels = 8 channels, got 0: \[2, 0, 5, 5\]"),
    (lambda: real(2, 8, 0, 5), ValueError, r"height and width >= 1, got .*\[2, 8, 0, 5\]: output size 0x5"),
    (lambda: real(2, 8, 5, 0), ValueError, r"height and width >= 1, got .*\[2, 8, 5, 0\]: output size 5x0"),
    (lambda: real(0, 8, 0, 5), ValueError, r"height and width >= 1, got .*\[0, 8, 0, 5\]: output size 0x5"),
    *(
        (
            lambda dtype=dtype: real(2, 8, 5, 5, dtype=dtype),
            TypeError,
            f"x must have dtype float16, bfloat16, float32 or float64, got {dtype}",
        )
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2)
    ),
    (
        lambda: real(2, 8, 5, 5, dtype=torch.float64),
        TypeError,
        r"weight must have the dtype of x, torch\.float64, got torch\.float32",
    ),
    (
        lambda: real(2, 8, 5, 5, dtype=torch.float16),
        TypeError,
        r"weight must have the dtype of x, torch\.float16, got torch\.float32",
    ),
    (
        lambda: real(2, 8, 5, 5, device="meta"),
        ValueError,
        r"branches\[0\]\.weight must be on the device of x, meta, got cpu",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), INPUT, ids=[m[:60] for _, _, m in INPUT])
@pytest.mark.usefixtures("nothing_runs")
def test_input(layer, make, error, message):
    with pytest.raises(error, match=message):
        layer(make())


@pytest.mark.usefixtures("nothing_runs")
def test_float64_under_autocast_is_refused_as_by_conv2d(layer):
    """Autocast leaves float64 alone, so float64 input does not meet float32 weights."""
    with (
        torch.autocast("cpu"),
        pytest.raises(TypeError, match=r"the dtype of x, torch\.float64, got torch\.float32"),
    ):
        layer(real(2, 8, 5, 5, dtype=torch.float64))
    with (
        torch.autocast("cpu"),
        pytest.raises(TypeError, match=r"the dtype of x, torch\.float32, got torch\.float64"),
    ):
        layer.double()(real(2, 8, 5, 5))


@pytest.mark.usefixtures("nothing_runs")
def test_triton_that_cannot_run(layer, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r'use_backend.*cannot run.*"cpu"'):
        layer(real(2, 8, 5, 5))


def spec_and_unit(**change):
    settings = {"branch_bias": True, "gate_bias": True, "select_bias": True, "gate_width": 4, **change}
    spec = SKSpec(8, 8, (BranchSpec(3, groups=2), BranchSpec(3, 2)), **settings)
    return spec, *random_unit(spec, torch.float32)


def first(branches, **change):
    return branches[0]._replace(**change), *branches[1:]


PARTS = [
    (lambda b, g: (b[:1], g), ValueError, r"branches must hold M = 2 \(spec\.branches\), got 1"),
    (lambda b, g: ((*b, b[0]), g), ValueError, r"branches must hold M = 2 \(spec\.branches\), got 3"),
    (lambda b, g: ((), g), ValueError, r"branches must hold M = 2 \(spec\.branches\), got 0"),
    (
        lambda b, g: (first(b, weight=real(8, 8, 3, 3)), g),
        ValueError,
        r"branches\[0\]\.weight must have shape \[8, 4, 3, 3\], got \[8, 8, 3, 3\]",
    ),
    (
        lambda b, g: (b[::-1], g),
        ValueError,
        r"branches\[0\]\.weight must have shape \[8, 4, 3, 3\], got \[8, 8, 3, 3\]",
    ),
    (
        lambda b, g: (first(b, bias=real(4)), g),
        ValueError,
        r"branches\[0\]\.bias must have shape \[8\], got \[4\]",
    ),
    (
        lambda b, g: (first(b, bias=None), g),
        ValueError,
        r"branches\[0\]\.bias must not be None as spec\.branch_bias is True, got None",
    ),
    (
        lambda b, g: (first(b, norm=None), g),
        ValueError,
        r"branches\[0\]\.norm must not be None as spec\.branch_norm is True, got None",
    ),
    (
        lambda b, g: (first(b, act=None), g),
        ValueError,
        r"branches\[0\]\.act must be 'relu' as spec\.branch_act says, got 'identity'",
    ),
    (
        lambda b, g: (first(b, act=nn.GELU()), g),
        ValueError,
        r"branches\[0\]\.act must be 'relu' as spec\.branch_act says, got 'GELU'",
    ),
    (
        lambda b, g: (first(b, act=torch.tanh), g),
        ValueError,
        r"branches\[0\]\.act must be 'relu' as spec\.branch_act says, got 'tanh'",
    ),
    (
        lambda b, g: (first(b, weight=b[0].weight.double()), g),
        TypeError,
        r"branches\[0\]\.weight must have the dtype of x, torch\.float32, got torch\.float64",
    ),
    (
        lambda b, g: (first(b, bias=b[0].bias.half()), g),
        TypeError,
        r"branches\[0\]\.bias must have the dtype of x, torch\.float32, got torch\.float16",
    ),
    (
        lambda b, g: (first(b, bias=b[0].bias.to("meta")), g),
        ValueError,
        r"branches\[0\]\.bias must be on the device of x, cpu, got meta",
    ),
    (
        lambda b, g: (b, g._replace(reduce_weight=real(8, 4))),
        ValueError,
        r"gate\.reduce_weight must have shape \[4, 8\] or \[4, 8, 1, 1\], got \[8, 4\]",
    ),
    (
        lambda b, g: (b, g._replace(reduce_bias=real(8))),
        ValueError,
        r"gate\.reduce_bias must have shape \[4\], got \[8\]",
    ),
    (
        lambda b, g: (b, g._replace(reduce_bias=None)),
        ValueError,
        r"gate\.reduce_bias must not be None as spec\.gate_bias is True, got None",
    ),
    (
        lambda b, g: (b, g._replace(norm=None)),
        ValueError,
        r"gate\.norm must not be None as spec\.gate_norm is True, got None",
    ),
    (
        lambda b, g: (b, g._replace(act=nn.Sigmoid())),
        ValueError,
        r"gate\.act must be 'relu' as spec\.gate_act says, got 'Sigmoid'",
    ),
    (
        lambda b, g: (b, g._replace(select_weight=g.select_weight[:1])),
        ValueError,
        r"gate\.select_weight must have M \* C = 2 \* 8 rows in all, got 8",
    ),
    (
        lambda b, g: (b, g._replace(select_weight=(real(16, 5),))),
        ValueError,
        r"gate\.select_weight\[0\] must have shape \[16, 4\] or \[16, 4, 1, 1\], got \[16, 5\]",
    ),
    (
        lambda b, g: (b, g._replace(select_weight=(g.select_weight[0], g.select_weight[1].double()))),
        TypeError,
        r"gate\.select_weight\[1\] must have the dtype of x, torch\.float32, got torch\.float64",
    ),
    (
        lambda b, g: (b, g._replace(select_bias=(real(8),))),
        ValueError,
        r"gate\.select_bias must have M \* C = 2 \* 8 rows in all, got 8",
    ),
    (
        lambda b, g: (b, g._replace(select_bias=None)),
        ValueError,
        r"gate\.select_bias must not be None as spec\.select_bias is True, got None",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), PARTS, ids=[m[:60] for _, _, m in PARTS])
@pytest.mark.usefixtures("nothing_runs")
def test_parts(change, error, message):
    spec, branches, gate = spec_and_unit()
    branches, gate = change(branches, gate)
    with pytest.raises(error, match=message):
        sk_conv(real(2, 8, 5, 5), branches, gate, spec)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("branch_bias", r"branches\[0\]\.bias must be None as spec\.branch_bias is False, got a Tensor"),
        ("branch_norm", r"branches\[0\]\.norm must be None as spec\.branch_norm is False, got a BatchNorm2d"),
        ("gate_bias", r"gate\.reduce_bias must be None as spec\.gate_bias is False, got a Tensor"),
        ("gate_norm", r"gate\.norm must be None as spec\.gate_norm is False, got a BatchNorm2d"),
        ("select_bias", r"gate\.select_bias must be None as spec\.select_bias is False, got a tuple"),
    ],
)
def test_parts_that_the_spec_does_not_know(setting, message):
    _, branches, gate = spec_and_unit()
    spec, _, _ = spec_and_unit(**{setting: False})
    with pytest.raises(ValueError, match=message):
        sk_conv(real(2, 8, 5, 5), branches, gate, spec)


SKCONV = [
    ({"features": 0}, ValueError, "features must be an int >= 1, got 0"),
    ({"features": 8.0}, TypeError, r"features must be an int >= 1, got 8\.0 of type float"),
    ({"M": 0}, ValueError, "M must be an int >= 1, got 0"),
    ({"M": -2}, ValueError, "M must be an int >= 1, got -2"),
    ({"M": 32}, ValueError, r"M must be at most 8 .*, got 32: other classes of this name take WH"),
    ({"M": 2.0}, TypeError, r"M must be an int >= 1, got 2\.0 of type float"),
    ({"G": 0}, ValueError, "G must be an int >= 1, got 0"),
    ({"G": 3}, ValueError, "G must divide features = 8, got 3"),
    ({"G": 16}, ValueError, "G must divide features = 8, got 16"),
    ({"r": 0}, ValueError, "r must be a finite number > 0, got 0"),
    ({"r": -1}, ValueError, "r must be a finite number > 0, got -1"),
    ({"r": "2"}, TypeError, "r must be a finite number > 0, got '2'"),
    ({"stride": 0}, ValueError, "stride must be an int >= 1, got 0"),
    ({"L": 0}, ValueError, "L must be an int >= 1, got 0"),
    ({"gate_width": 0}, ValueError, "gate_width must be an int >= 1, got 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), SKCONV, ids=[m[:60] for _, _, m in SKCONV])
def test_skconv(change, error, message):
    with pytest.raises(error, match=message):
        SKConv(**{"features": 8, "M": 2, "G": 2, "r": 2, **change})


TIMM = [
    ({"in_channels": 0}, ValueError, "in_channels must be an int >= 1, got 0"),
    ({"in_channels": "8"}, TypeError, "in_channels must be an int >= 1, got '8' of type str"),
    ({"in_channels": 9}, ValueError, "branches .* must divide in_channels = 9, got 2"),
    ({"out_channels": 0}, ValueError, "out_channels must be an int >= 1, got 0"),
    (
        {"kernel_size": 1},
        ValueError,
        r"kernel_size must be odd and >= 3 .* got \(1, 1\): a 1x1 branch has no",
    ),
    (
        {"kernel_size": (3, 1)},
        ValueError,
        r"kernel_size must be odd and >= 3 .* got \(3, 1\): a 1x1 branch has no",
    ),
    ({"kernel_size": 4}, ValueError, "kernel_size must be odd .* got 4: the padding .* ambiguous"),
    ({"kernel_size": [3, 6]}, ValueError, "kernel_size must be odd .* got 6: the padding .* ambiguous"),
    ({"kernel_size": -3}, ValueError, "kernel_size must be an int >= 3, got -3"),
    ({"kernel_size": []}, ValueError, r"kernel_size must hold at least one kernel, got \[\]"),
    ({"kernel_size": 3.0}, TypeError, r"kernel_size must be an int or a list or tuple of ints, got 3\.0"),
    ({"kernel_size": [(3, 3)]}, TypeError, r"kernel_size must be an int >= 3, got \(3, 3\)"),
    ({"stride": 0}, ValueError, "stride must be an int >= 1, got 0"),
    ({"stride": 3}, ValueError, "stride must be 1 or 2, or more together with aa_layer, got 3"),
    ({"dilation": 0}, ValueError, "dilation must be an int >= 1, got 0"),
    ({"groups": 0}, ValueError, "groups must be an int >= 1, got 0"),
    ({"groups": 8}, ValueError, "groups must divide in_channels / number of branches = 4, got 8"),
    ({"out_channels": 6, "groups": 4}, ValueError, "groups must divide out_channels = 6, got 4"),
    ({"rd_ratio": 0}, ValueError, "rd_ratio must be a finite number > 0, got 0"),
    ({"rd_channels": 0}, ValueError, "rd_channels must be an int >= 1, got 0"),
    ({"rd_divisor": 0}, ValueError, "rd_divisor must be an int >= 1, got 0"),
    ({"gate_width": -1}, ValueError, "gate_width must be an int >= 1, got -1"),
    ({"min_channels": 1.5}, TypeError, r"min_channels must be an int >= 1, got 1\.5"),
    (
        {"gate_width": 4, "rd_channels": 4},
        ValueError,
        r"at most one of rd_channels, gate_width and min_channels may be given, got .*'rd_channels': 4",
    ),
    ({"split_input": 1}, TypeError, "split_input must be a bool, got 1"),
    ({"norm_layer": None}, TypeError, "norm_layer must be a callable that returns an nn.Module, got None"),
    ({"norm_layer": "batchnorm2d"}, TypeError, "norm_layer must be a callable .* got 'batchnorm2d'"),
    ({"norm_layer": lambda c: c}, TypeError, "norm_layer must be a callable .* got .*, which returns int"),
    (
        {"norm_layer": timm.layers.BatchNormAct2d},
        ValueError,
        "norm_layer must return a norm without a 'act' of its own, got BatchNormAct2d",
    ),
    ({"act_layer": "relu"}, TypeError, "act_layer must be a callable .* got 'relu'"),
    (
        {"act_layer": lambda inplace: 1},
        TypeError,
        "act_layer must be a callable .* got .*, which returns int",
    ),
    ({"aa_layer": "blur", "stride": 2}, TypeError, "aa_layer must be a callable .* got 'blur'"),
    ({"drop_layer": 0.5}, TypeError, r"drop_layer must be a callable .* got 0\.5"),
]


@pytest.mark.parametrize(("change", "error", "message"), TIMM, ids=[m[:60] for _, _, m in TIMM])
def test_selective_kernel(change, error, message):
    with pytest.raises(error, match=message):
        SelectiveKernel(**{"in_channels": 8, **change})


@pytest.mark.parametrize("shape", [(0, 8, 5, 4), (0, 8, 1, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_gives_an_empty_result(layer, shape, training, memory_format):
    layer.train(training)
    x = real(*shape, requires_grad=True)
    v = layer(x.contiguous(memory_format=memory_format))
    expected = nn.Conv2d(8, 8, 3, padding=1)(x)
    assert v.shape == expected.shape
    assert v.dtype == expected.dtype
    v.sum().backward()
    assert x.grad.shape == shape
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())
    assert all(b.isfinite().all() for b in layer.buffers())


def test_batch_norm_of_one_value_raises_pytorchs_own_error():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as own:
        nn.BatchNorm2d(8)(real(1, 8, 1, 1))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as ours:
        SelectiveKernel(8)(real(1, 8, 5, 5))
    assert str(ours.value) == str(own.value)
    assert SelectiveKernel(8).eval()(real(1, 8, 5, 5)).shape == (1, 8, 5, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_propagate_as_in_eager(layer, value):
    layer.eval()
    x = torch.randn(2, 8, 5, 5)
    x[0, 3, 2, 2] = value
    v = layer(x)
    expected = reference.sk_conv(x, layer.branches(), layer.gate(), layer.spec)
    torch.testing.assert_close(v, expected, equal_nan=True)
    assert not v[0].isfinite().all()
    assert v[1].isfinite().all()


def test_a_norm_replaced_by_one_without_the_activation_is_noticed():
    """An activation with parameters stands below its norm; better an error than a unit without one."""
    layer = SelectiveKernel(8, act_layer=nn.PReLU)
    layer.paths[0].bn = nn.BatchNorm2d(8)
    with pytest.raises(ValueError, match=r"branches\[0\]\.act must be 'PReLU' .* got 'identity'"):
        layer(real(2, 8, 5, 5))
