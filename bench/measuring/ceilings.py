"""The machine's own limits, measured: bandwidth of a copy and rate of a matrix product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from sk_triton.precision import allows_tf32

from .. import results
from . import protocol
from .competition import DTYPES

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
"""Well beyond every cache."""
MATRIX_SIZE = {"cuda": 8192, "cpu": 1024}
WARM_UPS = 3
REPEATS = 15


def measure_ceilings(device: torch.device, dtypes: Sequence[str]) -> results.Ceilings:
    """The fastest of several runs of a large copy, reading and writing counted, and of a square matrix product in each
    dtype ("fp16", …) on random numbers, in TF32 where convolutions may use it."""
    timer = protocol.timer_for(device)
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy_seconds = _least_seconds(timer, lambda: target.copy_(source))
    rates = {}
    size = MATRIX_SIZE[device.type]
    for name in dtypes:
        a, b = (torch.randn(size, size, device=device).to(DTYPES[name]) for _ in range(2))
        out = torch.empty_like(a)
        with _products_like_convolutions():
            seconds = _least_seconds(timer, partial(torch.mm, a, b, out=out))
        rates[name] = 2 * size**3 / seconds
    return results.Ceilings(2 * source.numel() / copy_seconds, rates)


@contextmanager
def _products_like_convolutions() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allows_tf32() else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _least_seconds(timer: protocol.Timer, call: protocol.Call) -> float:
    for _ in range(WARM_UPS):
        call()
    return min(timer.sample(call)[protocol.COLD] for _ in range(REPEATS)) / 1e3
