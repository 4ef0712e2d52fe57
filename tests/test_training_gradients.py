"""Which way the branches' gradients go, and that both ways lead to the same."""

import dataclasses

import pytest
import torch
from torch import nn

from sk_triton import SelectiveKernel, use_backend
from sk_triton.bench.grid import paper_unit
from sk_triton.chips import CHIPS
from sk_triton.kernels.config import GradStreamConfig, GradWideConfig
from sk_triton.training.plan import plan_training
from sk_triton.workload import Workload

from .units import randomize_norms
from .versions import needs_narrow_products


def config_of(spec, size, dtype=torch.float16):
    return plan_training(Workload(spec, 128, size, size, dtype, CHIPS["sm_90"]), "branches").gradient


@needs_narrow_products
def test_kernels_take_what_memory_binds_and_the_library_the_rest():
    assert isinstance(config_of(paper_unit(128), 56), GradStreamConfig)
    assert isinstance(config_of(paper_unit(512), 14), GradWideConfig)
    for spec, size, dtype in (
        (paper_unit(1024), 7, torch.float16),  # 32 channels per group
        (paper_unit(128), 56, torch.float32),
        (paper_unit(256, stride=2), 56, torch.float16),
        (dataclasses.replace(paper_unit(128), split_input=True), 56, torch.float16),
        (paper_unit(128, groups=1), 28, torch.float16),
    ):
        assert config_of(spec, size, dtype) is None


@pytest.mark.interpret
@needs_narrow_products
@pytest.mark.parametrize("groups", [4, 1], ids=["narrow", "wide"])
@pytest.mark.parametrize("act_layer", [nn.ReLU, None], ids=["relu", "linear"])
def test_both_ways_agree(groups, act_layer, monkeypatch):
    layer = SelectiveKernel(16, groups=groups, split_input=False, act_layer=act_layer).half()
    randomize_norms(layer)
    x = torch.randn(3, 16, 6, 5).half().requires_grad_()
    dv = torch.randn(3, 16, 6, 5).half()

    def gradients():
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
        with use_backend("triton"):
            layer(x).backward(dv)
        return {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}

    by_kernels = gradients()
    ran = []
    from sk_triton.training import gradients as training_gradients

    library = training_gradients._through_library

    def through_library(*args):
        ran.append(1)
        return library(*args)

    monkeypatch.setattr(training_gradients, "_through_kernels", through_library)
    by_library = gradients()
    assert ran, "the kernels were to compute these gradients"
    for name, expected in by_library.items():
        # The library reads branch gradients that were rounded once more.
        scale = expected.float().abs().max().clamp(min=1e-3)
        assert (by_kernels[name].float() - expected.float()).abs().max() <= 4e-3 * scale, name


@pytest.mark.interpret
def test_gradients_that_nobody_wants_are_left_out():
    layer = SelectiveKernel(16, groups=4, split_input=False).half()
    layer.paths[0].conv.weight.requires_grad_(False)
    x = torch.randn(2, 16, 5, 4).half()
    with use_backend("triton"):
        layer(x).sum().backward()
    assert layer.paths[0].conv.weight.grad is None
    assert layer.paths[1].conv.weight.grad.isfinite().all()
