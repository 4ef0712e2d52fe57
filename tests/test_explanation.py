"""`explain(layer, x)` tells of the call that `layer(x)` would be."""

import pytest
import torch
from torch import nn

from sk_triton import SelectiveKernel, SKConv, explain, use_backend
from sk_triton.cpu.convolution import packs_weights
from sk_triton.explanation import Explanation
from sk_triton.training.plan import make_training_plan

from .tuned import UNIT, workload


def test_it_raises_what_the_call_raises():
    layer = SelectiveKernel(8, groups=2, split_input=False).eval()
    for call in (layer, lambda x: explain(layer, x)):
        with pytest.raises(TypeError, match="must have the dtype of x"):
            call(torch.randn(1, 8, 5, 4, dtype=torch.float64))
        with pytest.raises(ValueError, match="x must have in_channels"):
            call(torch.randn(1, 4, 5, 4))


def test_another_layer_is_refused():
    with pytest.raises(TypeError, match="layer must be an SKConv or a SelectiveKernel, got Conv2d"):
        explain(nn.Conv2d(8, 8, 3), torch.randn(1, 8, 5, 4))


def test_packed_weights_are_told():
    layer, x = (
        SKConv(8, 2, 2, 2).eval(),
        torch.randn(1, 8, 25, 24).contiguous(memory_format=torch.channels_last),
    )
    with torch.no_grad():
        found, plain = explain(layer, x), explain(layer, x.contiguous())
    told = "weights   laid out for oneDNN once"
    assert (told in str(found)) == found.plan.is_packed == packs_weights(x.dtype)
    assert told not in str(plain)


def test_an_empty_batch_takes_the_reference():
    found = explain(SKConv(8, 2, 2, 2), torch.randn(0, 8, 5, 4))
    assert found.plan.backend == "reference"
    assert "not triton: x holds no samples" in str(found)


def test_why_a_cpu_does_not_train_a_unit():
    layer, x = SelectiveKernel(8, groups=2), torch.randn(2, 8, 5, 4)
    assert "; for training, the branches have norms" in str(explain(layer, x))
    with use_backend("torch"), pytest.raises(RuntimeError, match="; for training, the branches have norms"):
        layer(x)


def test_what_stands_in_both_ways_is_said_once():
    layer, x = SelectiveKernel(8, groups=2, act_layer=nn.SiLU), torch.randn(2, 8, 5, 4)
    with use_backend("torch"), pytest.raises(RuntimeError) as raised:
        layer(x)
    assert str(raised.value).count("branch_act is SiLU") == 1


@pytest.mark.parametrize("save", ["branches", "input"])
def test_a_training_step_is_shown_whole(save):
    text = str(Explanation(make_training_plan(workload(), save), UNIT, save=save))
    assert f"saves     {save}\n" in text
    assert "over one activation tensor, forward (predicted)" in text
    assert "reduce    ReductionConfig(" in text
    assert "gradient  Grad" in text or "gradient  by the library" in text
    assert ("select    SelectConfig(" in text) == (save == "branches" or "gradient  by the library" in text)
