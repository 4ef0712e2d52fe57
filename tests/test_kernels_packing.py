"""The order of packed weights, by PyTorch's operators and by launches; and what a launch makes of norms."""

import math

import pytest
import torch

from sk_triton.kernels.config import (
    DepthwiseConfig,
    GradStreamConfig,
    GradWideConfig,
    StreamConfig,
    TapConfig,
)
from sk_triton.kernels.geometry import ConvShape, blocking

from .packed import pack_branch_weights, pack_grad_weights

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


def test_weights_with_gaps_are_not_packed_where_they_lie():
    from sk_triton.kernels.packing import in_memory

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
