"""Training operators start again what came twice: calls of no layer, known by their arguments."""

import copy
from itertools import product

import pytest
import torch

from sk_triton.training import call, operator_replay

from .training_steps import BY_LIBRARY, LAYERS, assert_equal, image, paper, step
from .versions import needs_narrow_products

pytestmark = pytest.mark.interpret


@pytest.fixture
def through_operators(monkeypatch):
    """As compiled code calls a unit; while the list that is handed out is not empty."""
    switch = [True]
    monkeypatch.setattr(call, "is_watched", lambda tensor: bool(switch))
    monkeypatch.setattr("sk_triton.replay.calls.call_kind", lambda x, save=None: None)
    operator_replay.forget()
    yield switch
    operator_replay.forget()


@needs_narrow_products
@pytest.mark.parametrize(
    ("name", "memory_format"),
    [
        *product(["paper", "input saved", *BY_LIBRARY], [torch.channels_last]),
        ("stride 2", torch.contiguous_format),
    ],
    ids=str,
)
def test_operators_start_again_what_came_twice(
    name, memory_format, through_operators, started_directly, started
):
    """From the third call on."""
    layer = {**LAYERS, **BY_LIBRARY}[name]().half()
    planned, counts = copy.deepcopy(layer), []
    for _ in range(3):
        x = image(layer.spec.in_channels, memory_format=memory_format)
        through_operators.clear()
        started.clear()
        expected, launches = step(planned, x), sum(started.values())
        through_operators.append(True)
        assert_equal(step(layer, x), expected)
        torch.testing.assert_close(layer.state_dict(), planned.state_dict(), rtol=2e-3, atol=1e-3)
        counts.append(len(started_directly))
    assert counts == [0, 0, launches]


@needs_narrow_products
def test_operators_plan_what_has_moved(through_operators, started_directly):
    moving = paper().half()
    for _ in range(3):
        for parameter in moving.parameters():
            parameter.data = parameter.data.clone()
        step(moving, image())
    assert not started_directly
