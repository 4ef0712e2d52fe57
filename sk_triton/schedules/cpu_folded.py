"""Schedule "folded", for the CPU: norms folded into the library's convolutions, everything after them in place.

A few samples pass through all steps before the next ones do, so that their branches stay in the caches and take the
same memory again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cpu.convolution import convolution
from ..folding import FoldedGate, attend, fold_unit, sum_dtype
from ..layout import branch_inputs, empty_output, memory_format
from ..pack_cache import PackCache, remember
from ..params import Branch, Gate
from ..plan import Plan
from ..spec import SKSpec


class _Unit(NamedTuple):
    convolutions: tuple[Callable[[Tensor], Tensor], ...]
    gate: FoldedGate


def prepare(
    plan: Plan,
    out_format: torch.memory_format,
    branches: Sequence[Branch],
    gate: Gate,
    spec: SKSpec,
    cache: PackCache | None,
) -> Callable[[Tensor], Tensor]:
    """What computes the unit's output from inputs in a memory format, as :func:`sk_triton.functional.sk_conv` does."""
    # Of the convolutions; an input in another one is converted.
    inner_format = torch.channels_last if plan.is_packed else out_format

    @torch.no_grad()
    def build() -> _Unit:
        unit = fold_unit(branches, gate, plan.dtype, inner_format)
        convolutions = tuple(
            convolution(weight, bias, branch, spec.stride, spec.branch_has_relu, plan.is_packed)
            for weight, bias, branch in zip(unit.weights, unit.biases, spec.branches, strict=True)
        )
        return _Unit(convolutions, unit.gate)

    unit = remember(cache, ("folded", spec, plan.dtype, inner_format, plan.is_packed), branches, gate, build)
    return functools.partial(_run, unit, spec, plan.samples, inner_format != out_format)


def _run(unit: _Unit, spec: SKSpec, samples: int, is_converted: bool, x: Tensor) -> Tensor:
    if is_converted:
        v = _select_parts(unit, spec, samples, x.contiguous(memory_format=torch.channels_last))
        # Not `contiguous`, to which a single pixel is in every format.
        return empty_output(x, spec).copy_(v)
    return _select_parts(unit, spec, samples, x).contiguous(memory_format=memory_format(x))


def _select_parts(unit: _Unit, spec: SKSpec, samples: int, x: Tensor) -> Tensor:
    n = x.shape[0]
    if samples >= n:
        us, a = _split_and_fuse(x, unit, spec)
        return _select(us, a, out=us[-1])
    v = empty_output(x, spec)
    for start in range(0, n, samples):
        us, a = _split_and_fuse(x[start : start + samples], unit, spec)
        _select(us, a, out=v[start : start + samples])
    return v


def _split_and_fuse(x: Tensor, unit: _Unit, spec: SKSpec) -> tuple[list[Tensor], list[Tensor]]:
    """The branches ``[N, C, H', W']`` and the attention to each, ``[N, C, 1, 1]``."""
    inputs = branch_inputs(x, spec)
    us = [convolve(x_m) for convolve, x_m in zip(unit.convolutions, inputs, strict=True)]
    # Each branch is summed by itself: no sum of the branches is written.
    dtype = sum_dtype(x.dtype)
    s = us[0].sum((2, 3), dtype=dtype)
    for u in us[1:]:
        s += u.sum((2, 3), dtype=dtype)
    s /= us[0].shape[2] * us[0].shape[3]
    a = attend(s, unit.gate, spec.gate_has_relu).to(x.dtype)
    return us, list(a[..., None, None].unbind(1))


def _select(us: list[Tensor], a: list[Tensor], out: Tensor) -> Tensor:
    """Writes ``sum_m a_m u_m`` to `out`, which may be the last branch."""
    if len(us) == 2:  # attention sums to 1
        return torch.lerp(us[1], us[0], a[0], out=out)
    torch.mul(us[-1], a[-1], out=out)
    for u, a_m in zip(us[:-1], a[:-1], strict=True):
        out.addcmul_(u, a_m)
    return out
