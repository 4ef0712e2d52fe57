"""Correctness before time: the error rule, and what it must catch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sk_triton.bench.measuring import forms, judge, providers
from sk_triton.bench.measuring.entrant import Entrant
from sk_triton.bench.measuring.judge import LARGEST, RMS, Judge
from sk_triton.bench.measuring.providers import Provider
from sk_triton.bench.shapes import CLASSIC, INFERENCE, PAPER, TRAINING, Case, unit_shape

from .bench_fakes import FakeSource, small_case


def test_error_rule_is_twice_eagers_own_error():
    reference = torch.full((2, 3), 8.0, dtype=torch.float64)
    assert judge.allowed_error(0.01, reference, torch.float32) == 0.02
    assert judge.allowed_error(0.0, reference, torch.float16) == torch.finfo(torch.float16).eps * 8
    assert judge.allowed_error(0.0, reference, torch.float16, RMS, share=0.5) == pytest.approx(4)
    assert judge.check("random", "v", 0.02, 0.01, 0.02).passed
    assert not judge.check("random", "v", 0.0201, 0.01, 0.02).passed


@pytest.mark.parametrize("norm", [LARGEST, RMS])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_fails_the_check(bad, norm):
    reference = torch.zeros(20, 3, dtype=torch.float64)
    y = reference.clone()
    y[13, 1] = bad
    error = judge.absolute_error(y, reference, norm)
    assert error == math.inf
    for allowed in (2.0, math.inf):
        judged = judge.check("random", "v", error, 1.0, allowed)
        assert (judged.passed, judged.error) == (False, None)


@pytest.mark.parametrize("norm", [LARGEST, RMS])
def test_an_output_of_another_shape_fails_the_check(norm):
    assert judge.absolute_error(torch.zeros(2, 4), torch.zeros(2, 3), norm) == math.inf


def test_errors_are_those_of_the_whole_tensor_however_it_is_cut():
    torch.manual_seed(0)
    y, reference = torch.randn(19, 5), torch.randn(19, 5, dtype=torch.float64)
    difference = y.double() - reference
    assert judge.absolute_error(y, reference) == difference.abs().max().item()
    assert judge.absolute_error(y, reference, RMS) == pytest.approx(difference.square().mean().sqrt().item())


def judged(case, change=lambda name, tensor: tensor, dtype=torch.float32) -> dict[str, bool]:
    """Which tensors of a plain unit pass, after `change`."""
    state = providers.make_state(case, seed=0)
    x = torch.randn(case.batch, case.shape.channels, 7, 7)
    dv = torch.randn_like(x) if case.direction == TRAINING else None
    provider = Provider(FakeSource() if case.subject == PAPER else judge.yardstick(CLASSIC), forms.NCHW)
    call, read = Entrant(case, provider, provider.module(case, state, dtype, x.device)).bind(x, dv)
    outcome = {name: change(name, tensor) for name, tensor in read(call()).items()}
    checks = Judge(case, state, "random", x, dv, dtype).check(
        {k: v for k, v in outcome.items() if v is not None}
    )
    return {check.tensor: check.passed for check in checks}


def scaled(wanted: str, factor: float):
    return lambda name, tensor: tensor * factor if name == wanted else tensor


@pytest.mark.parametrize("unit", [CLASSIC, PAPER])
def test_a_plain_unit_passes_in_training(unit):
    assert judged(small_case(unit, 4, direction=TRAINING)) == {"v": True, "dx": True, "parameters": True}


@pytest.mark.parametrize(
    ("tensor", "wrong"),
    [
        ("v", "v"),
        ("dx", "dx"),
        ("parameters.paths.1.conv.weight", "parameters"),
        ("parameters.paths.0.bn.bias", "parameters"),
        ("parameters.attn.fc_select.weight", "parameters"),
    ],
)
def test_a_wrong_gradient_is_caught_and_named(tensor, wrong):
    found = judged(small_case(PAPER, 4, direction=TRAINING), scaled(tensor, 1.5))
    assert found == {name: name != wrong for name in ("v", "dx", "parameters")}


def test_where_eager_overflows_nobody_is_judged(monkeypatch):
    """An error of infinity would be allowed, and be that of an output of NaN as well."""
    case = small_case(PAPER, dtype="fp16")
    state, x = providers.make_state(case, seed=0), torch.randn(2, 32, 7, 7, dtype=torch.float16)
    eager = judge._eager
    monkeypatch.setattr(
        judge, "_eager", lambda *a: {name: tensor * math.inf for name, tensor in eager(*a).items()}
    )
    with pytest.raises(OverflowError, match=r"v on random input is not finite in torch.float16"):
        Judge(case, state, "random", x, None, torch.float16)


def test_a_check_says_how_many_samples_it_saw():
    assert judge.check("random", "v", 0.0, 0.0, 1.0, samples=3).samples == 3


def test_a_gradient_that_is_missing_fails():
    def without(name: str, tensor: Tensor) -> Tensor | None:
        return None if name == "parameters.attn.bn.weight" else tensor

    assert not judged(small_case(PAPER, 4, direction=TRAINING), without)["parameters"]


def test_an_output_off_by_one_in_ten_thousand_is_caught():
    assert not judged(small_case(PAPER), scaled("v", 1 + 1e-4))["v"]


def test_only_gradients_behind_a_relu_may_flip_and_the_less_the_more_values_there_are():
    def share(unit, channels, batch, dtype):
        case = Case("train", unit, unit_shape(unit, channels, 14), batch, "fp32", TRAINING)
        return judge.flip_share(case, batch, dtype)

    assert share(CLASSIC, 128, 4, torch.float16) == 0
    assert share(PAPER, 128, 4, torch.float32) > share(PAPER, 128, 64, torch.float32) > 0
    assert share(PAPER, 128, 4, torch.bfloat16) > share(PAPER, 128, 4, torch.float16) > 0.04
    assert share(PAPER, 128, 4, torch.bfloat16) < 0.2


def test_in_inference_nothing_may_flip():
    case = small_case(PAPER, direction=INFERENCE)
    x = torch.randn(2, 32, 7, 7)
    assert set(
        Judge(case, providers.make_state(case, 0), "random", x, None, torch.float32).shares.values()
    ) == {0}


def test_the_gate_stays_clear_of_its_threshold_in_training():
    """Roundings move its few values by far less than the least of them is away from zero."""
    case = Case("train", PAPER, unit_shape(PAPER, 128, 7), 32, "fp32", TRAINING)
    module = judge.yardstick(PAPER).module(case)
    module.load_state_dict(providers.make_state(case, seed=0))
    seen = []
    module.attn.bn.register_forward_hook(lambda norm, inputs, output: seen.append(output.detach()))
    module.train()(torch.randn(32, 128, 7, 7))
    assert seen[0].abs().min() > 0.3
    assert (seen[0] > 0).any()
    assert (seen[0] < 0).any()
