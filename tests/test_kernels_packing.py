"""The order of packed weights, by PyTorch's operators and by launches; and what a launch makes of norms."""

import math
from dataclasses import replace

import pytest
import torch

from sk_triton.folding import fold_norm
from sk_triton.kernels.config import (
    DepthwiseConfig,
    GradStreamConfig,
    GradWideConfig,
    StreamConfig,
    TapConfig,
    WindowConfig,
)
from sk_triton.kernels.geometry import ConvShape, blocking
from sk_triton.kernels.grad_geometry import grad_weight_order
from sk_triton.kernels.merging import merged_shape
from sk_triton.kernels.weight_orders import branch_weight_order

from .packed import pack_branch_weights, pack_grad_weights, sum_by_sections
from .units import random_norm

PACKED = pytest.mark.parametrize(
    ("shape", "config"),
    [
        (
            ConvShape(15, 15, 5, (1, 3), (1, 2)),
            StreamConfig(8, 8, 2, 8, RUN_H=4, RUN_W=2, BLOCKS_PER_PROGRAM=2),
        ),
        (ConvShape(16, 32, 2, (3, 5), (1, 1)), TapConfig(16, 8, 4, 4)),
        (ConvShape(40, 24, 1, (3,), (1,)), TapConfig(16, 16, 4, 4, RUN_W=2)),
        (ConvShape(9, 9, 9, (3, 5), (1, 1)), DepthwiseConfig(4, 2, 2)),
    ],
    ids=str,
)


@PACKED
def test_every_weight_is_packed_once_per_run_position(shape, config):
    fan_in = shape.c_in // shape.groups
    weights = [torch.rand(shape.c_out, fan_in, k, k) + 1 for k in shape.kernels]
    packed = pack_branch_weights(weights, shape, config, torch.float64)
    copies = 1 if isinstance(config, DepthwiseConfig) else config.RUN_W
    assert packed.sum().item() == pytest.approx(copies * sum(w.double().sum().item() for w in weights))
    assert packed.count_nonzero() == copies * sum(w.numel() for w in weights)
    if not isinstance(config, DepthwiseConfig):
        layout = blocking(shape, config)
        assert packed.numel() == layout.blocks * layout.offsets[-1]


@pytest.mark.interpret
@PACKED
@pytest.mark.parametrize("has_scale", [False, True])
def test_a_launch_packs_the_same(shape, config, has_scale):
    """From weights as they lie in memory, of either memory format, scaled or not."""
    from sk_triton.kernels.gather import branch_weight_launch

    fan_in = shape.c_in // shape.groups
    formats = [torch.channels_last, torch.contiguous_format]
    weights = [
        torch.randn(shape.c_out, fan_in, k, k).half().contiguous(memory_format=formats[m % 2])
        for m, k in enumerate(shape.kernels)
    ]
    scale = torch.randn(len(weights), shape.c_out) if has_scale else None
    packed, launch = branch_weight_launch(weights, shape, config, torch.float32, scale)
    launch()
    factors = torch.ones(len(weights), shape.c_out) if scale is None else scale
    scaled = [w.float() * factor[:, None, None, None] for w, factor in zip(weights, factors, strict=True)]
    assert torch.equal(packed, pack_branch_weights(scaled, shape, config, torch.float32))


@pytest.mark.interpret
@pytest.mark.parametrize("config", [GradStreamConfig(1, 4), GradWideConfig(4, 2)], ids=str)
def test_a_launch_packs_the_same_for_gradients(config):
    from sk_triton.kernels.gather import grad_weight_launch

    shape = ConvShape(16, 16, 4, (3, 3), (1, 2))
    weights = [
        torch.randn(16, 4, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(16, 4, 3, 3),
    ]
    packed, launch = grad_weight_launch(weights, shape, config, torch.float16)
    launch()
    assert torch.equal(packed, pack_grad_weights(weights, shape, config, torch.float16))


def test_one_table_serves_all_configs_of_one_order():
    """A CUDA graph of another batch, whose packed weights were there already, needs no table that is not."""
    shape, config = ConvShape(16, 16, 4, (3, 3), (1, 2)), WindowConfig(16, 16, 1, 8, RUN_H=4, RUN_W=7)

    def table(config):
        return branch_weight_order(shape, config, torch.half, torch.half, torch.device("cpu"))

    assert table(replace(config, RUN_H=8, BLOCK_H=2, BLOCK_W=4)) is table(config)
    assert table(replace(config, RUN_W=5)) is table(config)
    assert table(replace(config, SPARSE=True)) is not table(config)
    assert table(replace(config, num_warps=4)) is not table(config)  # three more blocks to fill its programs


@pytest.mark.parametrize("config", [GradStreamConfig(1, 4), GradWideConfig(4, 2)], ids=str)
def test_one_table_of_gradient_weights_serves_all_batches(config):
    shape = ConvShape(16, 16, 4, (3, 3), (1, 2))
    first, other = (
        grad_weight_order(shape, own, torch.half, torch.device("cpu"))
        for own in (config, replace(config, RUN_H=8, TILES_PER_PROGRAM=3))
    )
    assert first is other


def test_weights_with_gaps_are_not_packed_where_they_lie():
    from sk_triton.kernels.weight_orders import in_memory

    with pytest.raises(
        ValueError, match=r"weights must be contiguous or channels_last, got strides \(36, 9, 3, 1\)"
    ):
        in_memory([torch.randn(8, 4, 3, 3)[:, :2]])


@pytest.mark.interpret
def test_vectors_are_stacked_and_norms_folded():
    from sk_triton.kernels.norm_params import norm_scale_shift, stack_vectors

    beta, bias = torch.randn(200).half(), torch.randn(200)
    stacked = torch.full((4, 200), math.nan)
    stack_vectors([beta, None, bias, None], [0.0, 1.0, 0.0, 0.5], stacked)()
    expected = torch.stack([beta.float(), torch.ones(200), bias, torch.full((200,), 0.5)])
    assert torch.equal(stacked, expected)

    mean, rstd, affine, biases = (
        torch.randn(3, 50),
        torch.rand(3, 50),
        torch.randn(2, 3, 50),
        torch.randn(3, 50),
    )
    conv = torch.randn(3, 50)
    for own, moved in ((None, conv), (biases, conv + biases)):
        scale, shift = torch.full((3, 50), math.nan), torch.full((3, 50), math.nan)
        norm_scale_shift(mean, rstd, affine, own, scale, shift)()
        torch.testing.assert_close(scale * conv + shift, affine[1] * (moved - mean) * rstd + affine[0])


@pytest.mark.interpret
@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.float16])
def test_norms_and_biases_are_folded_as_in_float64(norm_dtype):
    """Maps of other widths, with and without each part, at places of their own."""
    from sk_triton.kernels.norm_params import Affine, fold_norms

    def map_of(width, has_bias, has_norm, is_affine):
        bias = torch.randn(width).half() if has_bias else None
        if not has_norm:
            return Affine(width, bias), None
        norm = random_norm(width, norm_dtype)
        if not is_affine:
            norm.weight = norm.bias = None
        vectors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return Affine(width, bias, *vectors, norm.eps), norm

    cases = [(200, True, True, True), (200, False, True, True), (33, True, True, False), (7, True, False, False),
             (130, False, False, False)]  # fmt: skip
    maps, norms = zip(*(map_of(*case) for case in cases), strict=True)
    starts = [0, 200, 404, 440, 500]
    scale, shift = torch.full((2, 632), math.nan).unbind(0)
    fold_norms(maps, starts, scale[:-2], shift[:-2])()
    assert scale[630:].isnan().all()
    assert shift[630:].isnan().all()
    belongs = torch.zeros(630, dtype=torch.bool)
    for own, norm, start in zip(maps, norms, starts, strict=True):
        place = slice(start, start + own.width)
        belongs[place] = True
        expected = fold_norm(norm, own.bias, own.width, torch.empty(0))
        torch.testing.assert_close(torch.stack([scale[place], shift[place]]), torch.stack(expected))
    assert (scale[:630][~belongs] == 1).all()
    assert (shift[:630][~belongs] == 0).all()


@pytest.mark.interpret
@pytest.mark.parametrize("has_scale", [False, True])
@pytest.mark.parametrize(
    ("branches", "h", "w"),
    [
        (ConvShape(16, 16, 4, (3, 5), (1, 1)), 7, 5),
        (ConvShape(16, 24, 4, (3, 3), (1, 2)), 1, 9),
        (ConvShape(15, 10, 5, (1, 3), (3, 2), stride=2), 8, 6),
        (ConvShape(40, 40, 40, (7, 3, 5), (1, 1, 1)), 6, 3),
    ],
    ids=str,
)
def test_weights_are_summed_by_sections(branches, h, w, has_scale):
    from sk_triton.kernels.merging import met_taps
    from sk_triton.kernels.section_weights import section_weights

    fan_in = branches.c_in // branches.groups
    weights = [torch.randn(branches.c_out, fan_in, k, k) for k in branches.kernels]
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    scale = torch.randn(len(weights), branches.c_out) if has_scale else None
    shape = merged_shape(branches)
    met_h, met_w = (torch.tensor(met_taps(shape, size), dtype=torch.int32) for size in (h, w))
    out = torch.full((len(met_h), len(met_w), branches.c_out // branches.groups, branches.c_in), math.nan)
    section_weights(weights, scale, met_h, met_w, out, branches=branches)()
    factors = torch.ones(len(weights), branches.c_out) if scale is None else scale
    torch.testing.assert_close(out, sum_by_sections(weights, factors, branches, h, w))


def test_a_lattice_that_no_word_holds_is_refused():
    from sk_triton.kernels.section_weights import section_weights

    branches, met = ConvShape(8, 8, 8, (3, 3), (1, 16)), torch.zeros(1, dtype=torch.int32)
    weights = [torch.empty(8, 1, 3, 3)] * 2
    with pytest.raises(
        ValueError, match="branches: taps must stand on a lattice of at most 31 points an axis, got 33"
    ):
        section_weights(weights, None, met, met, torch.empty(1, 1, 1, 8), branches=branches)
