"""What a training step runs besides kernels: small operators, each of which costs the host and the GPU a launch."""

import pytest
import torch

import sk_triton
from sk_triton import SelectiveKernel, SKConv, use_backend
from sk_triton.bench.measuring.host import stubbed_launches
from sk_triton.training import call

from .counting import Counting
from .versions import HAS_NARROW_PRODUCTS

pytestmark = pytest.mark.interpret

# A layer, what it saves, and the operators of a step at most: two update the running statistics, from which four casts
# lead to fp16; the rest is the library's convolution.
LAYERS = {
    "paper": (lambda: SelectiveKernel(16, groups=4, split_input=False), "branches", 6),
    "paper, input saved": (lambda: SelectiveKernel(16, groups=4, split_input=False), "input", 6),
    "timm's default, stride 2": (lambda: SelectiveKernel(16, stride=2), "branches", 11),
    "classic": (lambda: SKConv(16, M=2, G=4, r=4, L=8), "branches", 0),
}


def test_operators_of_eager():
    """What the README compares with: a step of the paper's unit by PyTorch's operators."""
    layer = LAYERS["paper"][0]().train()
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    counting = Counting()
    with use_backend("reference"):
        with counting:
            v = layer(x)
        dv = torch.ones_like(v)
        with counting:
            v.backward(dv)
    # In torch 2.8 the gradients of slices are six operators more.
    assert counting.counts.total() in (46, 52), counting.counts.most_common()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "autocast"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_runs_few_small_operators(name, dtype, monkeypatch):
    make, save, most = LAYERS[name]
    layer = make().train().to(dtype)
    layer.save = save
    x = torch.randn(2, 16, 8, 8).half().to(memory_format=torch.channels_last).requires_grad_()
    counting = Counting()

    def step():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float32):
            v = layer(x)
        v.backward(torch.ones_like(v))

    # Else the counting mode itself would send the call through the operators.
    monkeypatch.setattr(call, "is_watched", lambda tensor: False)
    with stubbed_launches(sk_triton) as started, use_backend("triton"):
        step()  # plans and packs
        started.clear()
        with counting:
            step()
    assert started
    counting.counts.subtract(ones_like=1)
    if not HAS_NARROW_PRODUCTS:  # the library computes the branches' gradients, adds and copies them
        most = max(most, 11)
    assert counting.counts.total() <= most, counting.counts.most_common()
