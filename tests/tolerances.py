"""The one tolerance table, and the error rule for kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# For two implementations of the same formula in the same dtype; only the order of summation differs.
SAME_FORMULA = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}

# A kernel may err by at most this multiple of eager's own error against float64, on the same input.
ERROR_FACTOR = 2.0
# Where every error is chance: of the geometric mean over a few inputs of one result. Of 500 random units' worst results
# it was 4.3 at most, 1.1 in the middle; over all results of a unit, which ERROR_FACTOR bounds, 1.9 and 1.0.
CHANCE_FACTOR = 8.0


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the order of summation; dtype, shape and device must be equal outright."""
    torch.testing.assert_close(actual, expected, **SAME_FORMULA[expected.dtype], equal_nan=True)


def assert_errs_like_eager(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The error rule: ``actual`` errs from ``exact`` (float64) by at most twice what ``eager`` does.

    The error is the largest absolute one, and one unit in the last place of the largest value is granted.
    """
    _assert_comparable(actual, eager, exact)
    if not exact.numel():
        return
    ulp = exact.abs().max().item() * torch.finfo(actual.dtype).eps
    allowed = ERROR_FACTOR * max((eager.double() - exact).abs().max().item(), ulp)
    error = (actual.double() - exact).abs().max().item()
    assert error <= allowed, f"error {error:.3e} above {allowed:.3e} in {actual.dtype}"


def assert_typical_errors_like_eager(
    samples: list[tuple[Tensor, Tensor, Tensor]], granted: float = 1.0
) -> None:
    """The error rule on the root mean square over many results: where a norm over a handful of samples amplifies every
    rounding, the largest error of any one tensor is a matter of chance. A wrong gradient is wrong by far more.

    Each sample is ``(actual, eager, exact)``, and counts in units of its largest exact value; `granted` are units in
    the last place of that.
    """
    sums, size = [0.0, 0.0], 0
    for actual, eager, exact in samples:
        _assert_comparable(actual, eager, exact)
        scale = max(exact.abs().max().item(), torch.finfo(actual.dtype).tiny)
        for i, value in enumerate((actual, eager)):
            sums[i] += ((value.double() - exact) / scale).square().sum().item()
        size += exact.numel()
    error, allowed = ((total / size) ** 0.5 for total in sums)
    allowed = ERROR_FACTOR * max(allowed, granted * torch.finfo(samples[0][0].dtype).eps)
    assert error <= allowed, f"typical error {error:.3e} above {allowed:.3e} in {samples[0][0].dtype}"


def assert_errors_in_proportion(results: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]]) -> None:
    """The error rule on geometric means, where norms over a few samples may amplify any rounding of any input: a root
    mean square would be that of the worst input alone, and there a matter of chance.

    `results` hold for each result of a unit, and of each input, ``(actual, eager, exact, natural)``. Errors count in
    units of the largest value of ``natural``: the exact result's size had nothing cancelled in it, as a norm's gradient
    does of a bias before it. One unit in the last place is granted.
    """
    logs = []
    for of_one_result in results:
        total = 0.0
        for actual, eager, exact, natural in of_one_result:
            _assert_comparable(actual, eager, exact)
            info = torch.finfo(actual.dtype)
            largest = max(exact.abs().max().item(), natural.abs().max().item())
            granted = max(largest * info.eps, info.tiny)
            error, allowed = (
                max((value.double() - exact).square().mean().sqrt().item(), granted)
                for value in (actual, eager)
            )
            total += math.log(error / allowed)
        logs.append(total / len(of_one_result))
    worst, mean = math.exp(max(logs)), math.exp(sum(logs) / len(logs))
    assert worst <= CHANCE_FACTOR, f"result {logs.index(max(logs))} errs {worst:.3g} times as much as eager's"
    assert mean <= ERROR_FACTOR, f"all results err {mean:.3g} times as much as eager's"


def _assert_comparable(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    assert actual.dtype == eager.dtype
    assert exact.dtype == torch.float64
    assert actual.shape == eager.shape == exact.shape
    assert torch.equal(actual.isfinite(), exact.isfinite()), "finite where float64 is not, or the reverse"
