"""The layer in timm's networks, as timm builds, freezes and traces them."""

import pytest
import timm
import torch

from sk_triton import SelectiveKernel

from .units import randomize_norms


@pytest.fixture
def ours(monkeypatch):
    """timm's networks with our layer, on 32 x 32 pixels."""
    monkeypatch.setattr("timm.models.sknet.SelectiveKernel", SelectiveKernel)
    return lambda **settings: timm.create_model("skresnet18", pretrained=False, **settings).eval()


@pytest.mark.parametrize("freeze", [timm.utils.freeze, timm.utils.model.freeze_batch_norm_2d])
def test_timm_freezes_a_network(ours, freeze):
    """It puts another norm in the place of each, and leaves out what is below a plain one."""
    model, x = ours(num_classes=3), torch.randn(1, 3, 32, 32)
    randomize_norms(model)
    with torch.no_grad():
        expected = model(x)
        freeze(model)
        assert not any(type(m) is torch.nn.BatchNorm2d for m in model.modules())
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_a_tracer_meets_the_layer_as_one_module(ours):
    x = torch.randn(1, 3, 32, 32)
    features = ours(features_only=True, feature_cls="fx")
    assert [f.shape[1] for f in features(x)] == [64, 64, 128, 256, 512]
    model = ours(num_classes=3)
    traced = torch.fx.symbolic_trace(model)
    called = [traced.get_submodule(n.target) for n in traced.graph.nodes if n.op == "call_module"]
    count = sum(isinstance(m, SelectiveKernel) for m in model.modules())
    assert sum(isinstance(m, SelectiveKernel) for m in called) == count > 0
    torch.testing.assert_close(traced(x), model(x))


def test_what_a_tracer_would_get_wrong_is_refused():
    layer = SelectiveKernel(16)
    with pytest.raises(RuntimeError, match=r"torch\.fx traces the layer itself, not a network of it"):
        torch.fx.symbolic_trace(layer)
    layer.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match=r"torch\.fx traces a layer with hooks, which would run twice"):
        torch.fx.symbolic_trace(torch.nn.Sequential(layer))
