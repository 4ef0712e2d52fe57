"""Properties of the reference over random specs and shapes."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from sk_triton import reference
from sk_triton.functional import sk_conv

from .tolerances import assert_same
from .units import random_unit, sizes, specs

seeds = st.integers(0, 2**16)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def unit_and_input(spec, size, seed, dtype=torch.float64, **kwargs):
    torch.manual_seed(seed)
    branches, gate = random_unit(spec, dtype, **kwargs)
    n, h, w = size
    return branches, gate, torch.randn(n, spec.in_channels, h, w, dtype=dtype)


@given(specs(), sizes, seeds, dtypes)
def test_shape_and_dtype(spec, size, seed, dtype):
    branches, gate, x = unit_and_input(spec, size, seed, dtype)
    v = sk_conv(x, branches, gate, spec)
    assert v.shape == (size[0], spec.out_channels, *spec.output_size(*size[1:]))
    assert v.dtype == dtype


@given(specs(), sizes, seeds)
def test_empty_batch(spec, size, seed):
    branches, gate, x = unit_and_input(spec, (0, *size[1:]), seed)
    v = sk_conv(x, branches, gate, spec)
    assert v.shape == (0, spec.out_channels, *spec.output_size(*size[1:]))
    v.sum().backward()
    assert branches[0].weight.grad.abs().sum() == 0


@given(specs(), sizes, seeds)
def test_attention_is_a_distribution_and_v_lies_between_the_branches(spec, size, seed):
    branches, gate, x = unit_and_input(spec, size, seed)
    us = reference.split(x, branches, spec)
    a = reference.attend(reference.fuse(us, gate), gate, spec.num_branches)
    assert a.shape == (size[0], spec.num_branches, spec.out_channels)
    assert (a >= 0).all()
    torch.testing.assert_close(a.sum(1), torch.ones_like(a[:, 0]))
    v = reference.select(us, a)
    stack = torch.stack(us)
    slack = 1e-12
    assert (v >= stack.amin(0) - slack).all()
    assert (v <= stack.amax(0) + slack).all()


@given(specs(), sizes, seeds)
def test_equal_branches_make_the_gate_idle(spec, size, seed):
    assume(not spec.split_input)
    spec = dataclasses.replace(spec, branches=spec.branches[:1] * spec.num_branches)
    branches, gate, x = unit_and_input(spec, size, seed)
    branches = branches[:1] * spec.num_branches
    assert_same(sk_conv(x, branches, gate, spec), reference.split(x, branches, spec)[0])


@given(specs(), sizes, seeds, st.randoms(use_true_random=False))
def test_the_order_of_branches_does_not_matter(spec, size, seed, random):
    assume(not spec.split_input)
    branches, gate, x = unit_and_input(spec, size, seed)
    order = list(range(spec.num_branches))
    random.shuffle(order)
    shuffled = gate._replace(
        select_weight=tuple(gate.select_weight[m] for m in order),
        select_bias=gate.select_bias and tuple(gate.select_bias[m] for m in order),
    )
    other = dataclasses.replace(spec, branches=tuple(spec.branches[m] for m in order))
    v = sk_conv(x, [branches[m] for m in order], shuffled, other)
    assert_same(v, sk_conv(x, branches, gate, spec))


@given(specs(), sizes, seeds)
def test_samples_are_independent_in_inference(spec, size, seed):
    branches, gate, x = unit_and_input(spec, size, seed)
    one_by_one = torch.cat([sk_conv(x[i : i + 1], branches, gate, spec) for i in range(size[0])])
    assert_same(one_by_one, sk_conv(x, branches, gate, spec))


@given(specs(linear=True), sizes, seeds)
def test_linear_branches_are_one_convolution_per_sample(spec, size, seed):
    """``v = conv(x, sum_m a_m W_m) + sum_m a_m b_m``, each kernel first spread to one dense size."""
    assert spec.is_linear
    branches, gate, x = unit_and_input(spec, size, seed)
    side = max(2 * b.padding + 1 for b in spec.branches)
    us = reference.split(x, branches, spec)
    a = reference.attend(reference.fuse(us, gate), gate, spec.num_branches)
    v = []
    for x_n, a_n in zip(x, a, strict=True):
        weight, shift = 0, 0
        for m, (branch, conv) in enumerate(zip(branches, spec.branches, strict=True)):
            dense = torch.zeros(spec.out_channels, spec.in_channels, side, side, dtype=x.dtype)
            taps = slice(side // 2 - conv.padding, side // 2 + conv.padding + 1, conv.dilation)
            group_in, group_out = branch.weight.shape[1], spec.out_channels // conv.groups
            first = m * spec.branch_in_channels if spec.split_input else 0
            for c in range(spec.out_channels):
                begin = first + c // group_out * group_in
                dense[c, begin : begin + group_in, taps, taps] = branch.weight[c].detach()
            weight = weight + a_n[m][:, None, None, None] * dense
            if branch.bias is not None:
                shift = shift + a_n[m] * branch.bias
        y = F.conv2d(x_n[None], weight, stride=spec.stride, padding=side // 2)
        v.append(y + (shift[:, None, None] if isinstance(shift, torch.Tensor) else 0))
    assert_same(sk_conv(x, branches, gate, spec), torch.cat(v))


@given(specs(), sizes, seeds, st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_memory_format_stays(spec, size, seed, memory_format):
    branches, gate, x = unit_and_input(spec, size, seed)
    v = sk_conv(x.contiguous(memory_format=memory_format), branches, gate, spec)
    # A tensor with one pixel or one channel is in both formats and may come out in either.
    one_format = spec.in_channels > 1 and size[1] * size[2] > 1
    assert v.is_contiguous(memory_format=memory_format) or not one_format
    assert_same(v.contiguous(), sk_conv(x, branches, gate, spec).contiguous())


@given(specs(), sizes, seeds, st.data())
def test_strided_views(spec, size, seed, data):
    """Crops, strided, expanded and flipped-axis views give what their copies give."""
    branches, gate, x = unit_and_input(spec, (size[0] + 1, size[1] + 2, 2 * size[2]), seed)
    x = data.draw(st.sampled_from([x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT]))
    view = data.draw(
        st.sampled_from([x[1:, :, 1:-1], x[:, :, :, ::2], x[:1].expand(2, -1, -1, -1), x[:, :1].expand_as(x)])
    )
    assert_same(
        sk_conv(view, branches, gate, spec).contiguous(),
        sk_conv(view.contiguous(), branches, gate, spec),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@given(spec=specs(), seed=seeds)
def test_nan_and_inf_stay_in_their_sample(value, spec, seed):
    branches, gate, x = unit_and_input(spec, (2, 5, 5), seed)
    clean = sk_conv(x, branches, gate, spec)
    x[1, :, 2, 2] = value
    v = sk_conv(x, branches, gate, spec)
    assert_same(v[0], clean[0])


@given(specs(), sizes, seeds)
def test_inputs_are_left_alone(spec, size, seed):
    branches, gate, x = unit_and_input(spec, size, seed)
    before = x.clone()
    sk_conv(x, branches, gate, spec)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (2, 4, 1, 6), (2, 4, 5, 1), (1, 4, 5, 6), (0, 4, 5, 6)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_of(shape, layout):
    x = torch.empty(shape).contiguous(memory_format=layout)
    assert reference.memory_format(x) is layout
    for view in (x[:, 1:], x[1:], x[:, :, :1], x[..., :1], x[:, :, ::2]):
        if view.shape[2] * view.shape[3] > 1:
            assert reference.memory_format(view) is layout


def test_memory_format_of_an_expanded_channel():
    x = torch.empty(2, 1, 5, 6)
    assert reference.memory_format(x.expand(2, 4, 5, 6)) is torch.contiguous_format


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_select_keeps_the_dtype_of_the_branches(dtype):
    """A softmax under autocast on a GPU is float32."""
    us = [torch.randn(2, 3, 4, 4, dtype=dtype) for _ in range(2)]
    assert reference.select(us, torch.full((2, 2, 3), 0.5)).dtype == dtype


@pytest.mark.parametrize("shape", [(2, 1, 5, 6), (2, 4, 1, 1)])
def test_a_tensor_in_both_formats_counts_as_contiguous(shape):
    assert reference.memory_format(torch.empty(shape)) is torch.contiguous_format
