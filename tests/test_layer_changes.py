"""Changes made to a built layer that its functional path would not see: refused, not ignored."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sk_triton import SelectiveKernel, SKConv


@pytest.fixture(
    params=[lambda: SKConv(16, M=2, G=4, r=4), lambda: SelectiveKernel(16)], ids=["SKConv", "SelectiveKernel"]
)
def make(request):
    return request.param


def test_changed_convolution_settings_are_refused(make):
    layer = make()
    conv = next(m for m in layer.modules() if isinstance(m, nn.Conv2d))
    conv.stride = (2, 2) if conv.stride == (1, 1) else (1, 1)
    with pytest.raises(
        ValueError, match=r"stride, padding, .* must stay as built, \(\(., .\), .*, got \(\(., .\), "
    ):
        layer(torch.randn(2, 16, 5, 5))


def test_weights_that_hooks_would_compute_are_refused(make):
    layer = make()
    conv = next(m for m in layer.modules() if isinstance(m, nn.Conv2d))
    prune.l1_unstructured(conv, "weight", 0.5)
    with pytest.raises(RuntimeError, match="L1Unstructured recomputes a weight in a forward hook"):
        layer(torch.randn(2, 16, 5, 5))
    prune.remove(conv, "weight")
    layer(torch.randn(2, 16, 5, 5))
