"""Running statistics that a launch brings up to date."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Running(NamedTuple):
    """Those of one `nn.BatchNorm2d`: `mean` and `var` `[C]`, contiguous, of any dtype; `counter`, int64, of the batches
    so far."""

    mean: torch.Tensor
    var: torch.Tensor
    counter: torch.Tensor
    momentum: float


def pointers_of(
    running: Sequence[Running | None], unused: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], ...]:
    """Means, variances and counters, `unused` where there are none."""
    means, variances, counters = zip(
        *((unused,) * 3 if own is None else own[:3] for own in running), strict=True
    )
    return means, variances, counters


def running_tensors(running: Sequence[Running | None]) -> list[torch.Tensor]:
    """All tensors of those that are there."""
    return [tensor for own in running if own is not None for tensor in own[:3]]


def momentum_of(running: Sequence[Running | None]) -> float:
    """The momentum of all of them.

    Raises:
        ValueError: they differ.
    """
    momenta = {own.momentum for own in running if own is not None}
    if len(momenta) > 1:
        raise ValueError(f"running must have one momentum in a launch, got {sorted(momenta)}")
    return float(momenta.pop()) if momenta else 0.0
