"""The description of a unit: derived values, equality, refusal of what makes no sense."""

import copy
import dataclasses
import pickle

import pytest
import timm.layers
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from sk_triton.spec import BranchSpec, SKSpec, gate_width, make_divisible

from .units import specs


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_padding_keeps_the_size(kernel, dilation):
    branch = BranchSpec(kernel, dilation)
    conv = nn.Conv2d(1, 1, kernel, dilation=dilation, padding="same")
    assert branch.padding * 2 == sum(conv._reversed_padding_repeated_twice[:2])


@given(specs(), st.integers(1, 40), st.integers(1, 40))
def test_output_size_is_the_convolutions(spec, height, width):
    for branch in spec.branches:
        extent = branch.dilation * (branch.kernel_size - 1) + 1
        expected = tuple((n + 2 * branch.padding - extent) // spec.stride + 1 for n in (height, width))
        assert spec.output_size(height, width) == expected


@given(specs())
def test_weight_shapes_are_the_convolutions(spec):
    for branch, shape in zip(spec.branches, spec.weight_shapes, strict=True):
        conv = nn.Conv2d(
            spec.branch_in_channels,
            spec.out_channels,
            branch.kernel_size,
            groups=branch.groups,
            device="meta",
        )
        assert tuple(conv.weight.shape) == shape


@given(specs())
def test_equal_specs_are_one_key(spec):
    for twin in (copy.deepcopy(spec), pickle.loads(pickle.dumps(spec)), dataclasses.replace(spec)):
        assert twin == spec
        assert hash(twin) == hash(spec)
        assert twin.weight_shapes == spec.weight_shapes
    assert dataclasses.replace(spec, gate_width=spec.gate_width + 1) != spec


def test_replace_derives_anew():
    spec = SKSpec(8, 8, (BranchSpec(3), BranchSpec(3, 2)), gate_width=4)
    assert dataclasses.replace(spec, split_input=True).branch_in_channels == 4
    assert dataclasses.replace(spec.branches[0], dilation=3).padding == 3


def test_frozen():
    spec = SKSpec(8, 8, (BranchSpec(3),), gate_width=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.stride = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.branches[0].dilation = 2


def test_a_list_of_branches_becomes_a_tuple():
    assert SKSpec(8, 8, [BranchSpec(3)], gate_width=4) == SKSpec(8, 8, (BranchSpec(3),), gate_width=4)


@pytest.mark.parametrize(
    ("norm", "act", "linear"),
    [(False, "identity", True), (True, "identity", False), (False, "relu", False), (True, "relu", False)],
)
def test_is_linear(norm, act, linear):
    assert SKSpec(8, 8, (BranchSpec(3),), branch_norm=norm, branch_act=act, gate_width=4).is_linear is linear


def test_branch_str():
    assert str(BranchSpec(5)) == "5x5"
    assert str(BranchSpec(3, 2, 32)) == "3x3 d2 g32"


@pytest.mark.parametrize(
    ("channels", "r", "L", "expected"),
    [(128, 16, 32, 32), (1024, 16, 32, 64), (100, 16, 4, 6), (64, 0.5, 32, 128)],
)
def test_gate_width_is_equation_4(channels, r, L, expected):
    assert gate_width(channels, r, L) == expected


@example(9.5, 8)
@example(8.8, 8)
@given(st.floats(0.1, 5000) | st.floats(0.1, 99), st.sampled_from([1, 4, 8, 16, 32]))
def test_make_divisible_is_timms(value, divisor):
    width = make_divisible(value, divisor)
    assert width == timm.layers.make_divisible(value, divisor)
    assert width % divisor == 0
    assert width >= 0.9 * value


BRANCHES = (BranchSpec(3, groups=2), BranchSpec(3, 2, 2))
BAD = [
    ({"in_channels": 0}, ValueError, "in_channels must be an int >= 1, got 0"),
    ({"in_channels": 8.0}, TypeError, r"in_channels must be an int >= 1, got 8\.0 of type float"),
    ({"out_channels": -4}, ValueError, "out_channels must be an int >= 1, got -4"),
    ({"out_channels": True}, TypeError, "out_channels must be an int >= 1, got True of type bool"),
    ({"stride": 0}, ValueError, "stride must be an int >= 1, got 0"),
    ({"stride": (1, 2)}, TypeError, r"stride must be an int >= 1, got \(1, 2\)"),
    ({"gate_width": 0}, ValueError, "gate_width must be an int >= 1, got 0"),
    ({"branches": ()}, ValueError, "branches must hold M >= 1 BranchSpec, got an empty tuple"),
    ({"branches": (3, 5)}, TypeError, r"branches must be a tuple of BranchSpec, got \(3, 5\)"),
    ({"branches": BranchSpec(3)}, TypeError, "branches must be a tuple of BranchSpec, got BranchSpec"),
    ({"split_input": 1}, TypeError, "split_input must be a bool, got 1"),
    ({"gate_norm": None}, TypeError, "gate_norm must be a bool, got None"),
    ({"branch_act": nn.ReLU}, TypeError, "branch_act must be the name of an activation .*got <class"),
    ({"gate_act": ""}, TypeError, "gate_act must be the name of an activation .* got ''"),
    ({"in_channels": 9, "split_input": True}, ValueError, "branches must divide in_channels = 9, got 2"),
    ({"in_channels": 6, "split_input": True}, ValueError, r"\[0\].groups must divide .*channels = 3, got 2"),
    ({"out_channels": 7}, ValueError, r"branches\[0\]\.groups must divide out_channels = 7, got 2"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(sorted(c)) for c, _, _ in BAD])
def test_bad_spec(change, error, message):
    good = {"in_channels": 8, "out_channels": 8, "branches": BRANCHES, "gate_width": 4}
    SKSpec(**good)
    with pytest.raises(error, match=message):
        SKSpec(**{**good, **change})


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((4,), ValueError, r"kernel_size must be odd and >= 1, got 4: .* even kernel is ambiguous"),
        ((0,), ValueError, "kernel_size must be an int >= 1, got 0"),
        ((-3,), ValueError, "kernel_size must be an int >= 1, got -3"),
        (((3, 3),), TypeError, r"kernel_size must be an int >= 1, got \(3, 3\)"),
        ((3, 0), ValueError, "dilation must be an int >= 1, got 0"),
        ((3, 1.5), TypeError, r"dilation must be an int >= 1, got 1\.5"),
        ((3, 1, 0), ValueError, "groups must be an int >= 1, got 0"),
    ],
)
def test_bad_branch(args, error, message):
    with pytest.raises(error, match=message):
        BranchSpec(*args)


@pytest.mark.parametrize("r", [0, -1, float("nan")])
def test_bad_reduction(r):
    with pytest.raises(ValueError, match=f"reduction must be a finite number > 0, got {r}"):
        gate_width(64, r)
