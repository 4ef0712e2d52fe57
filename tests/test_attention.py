"""The attention that a layer pays to its branches."""

import pytest
import torch
from timm.layers import SelectiveKernel as TimmSelectiveKernel

from sk_triton import SelectiveKernel, SKConv

from .units import randomize_norms


def test_it_is_what_timms_gate_returns():
    ours, theirs = SelectiveKernel(16, groups=2).eval(), TimmSelectiveKernel(16, groups=2).eval()
    randomize_norms(ours)
    theirs.load_state_dict(ours.state_dict())
    found = []
    theirs.attn.register_forward_hook(lambda module, inputs, output: found.append(output.flatten(2)))
    x = torch.randn(3, 16, 7, 5)
    v = theirs(x)
    a = ours.attention(x)
    torch.testing.assert_close(a, found[0])
    assert a.shape == (3, 2, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: SelectiveKernel(16, kernel_size=[3, 5, 7], split_input=False),
        lambda: SKConv(16, M=3, G=4, r=2),
    ],
    ids=["paper", "classic"],
)
def test_it_sums_to_one_and_has_gradients(layer):
    layer, x = layer(), torch.randn(2, 16, 6, 6, requires_grad=True)
    a = layer.attention(x)
    torch.testing.assert_close(a.sum(1), torch.ones(2, 16))
    a[:, 0].sum().backward()
    assert x.grad.abs().sum() > 0


def test_it_weighs_the_branches_of_the_output():
    layer, x = SKConv(8, M=2, G=2, r=2, L=4), torch.randn(2, 8, 5, 5)
    us = torch.stack([conv(x) for conv in layer.convs], 1)
    torch.testing.assert_close(
        (layer.attention(x)[..., None, None] * us).sum(1), layer(x), rtol=1e-4, atol=1e-5
    )


def test_a_fused_layer_and_autocast():
    layer, x = SelectiveKernel(16).eval(), torch.randn(2, 16, 5, 5)
    randomize_norms(layer)
    expected = layer.attention(x)
    torch.testing.assert_close(layer.fuse().attention(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.attention(x).float(), expected, rtol=0, atol=0.02)


def test_bad_input_is_refused():
    layer = SelectiveKernel(16)
    with pytest.raises(ValueError, match="x must have in_channels = 16 channels, got 8"):
        layer.attention(torch.randn(2, 8, 5, 5))
    with pytest.raises(TypeError, match=r"branches\[0\]\.weight must have the dtype of x"):
        layer.attention(torch.randn(2, 16, 5, 5).double())
