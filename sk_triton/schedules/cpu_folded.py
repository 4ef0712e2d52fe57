"""Schedule "folded", for the CPU: norms folded into PyTorch's convolutions, everything after them in place.

A few samples pass through all steps before the next ones do, so that their branches stay in the caches and take the
same memory again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..folding import FoldedUnit, attend, fold_unit, sum_dtype
from ..layout import empty_output
from ..packing import PackCache
from ..params import Branch, Gate
from ..plan import Plan
from ..spec import SKSpec


def prepare(
    plan: Plan,
    out_format: torch.memory_format,
    branches: Sequence[Branch],
    gate: Gate,
    spec: SKSpec,
    cache: PackCache | None,
) -> Callable[[Tensor], Tensor]:
    """What computes the unit's output from inputs in a memory format, as :func:`sk_triton.functional.sk_conv` does."""
    unit = fold_unit(branches, gate, plan.dtype, out_format, cache)
    return functools.partial(_run, unit, spec, plan.samples, out_format)


def _run(unit: FoldedUnit, spec: SKSpec, samples: int, out_format: torch.memory_format, x: Tensor) -> Tensor:
    n = x.shape[0]
    if samples >= n:
        us, a = _split_and_fuse(x, unit, spec)
        return _select(us, a, out=us[-1]).contiguous(memory_format=out_format)
    v = empty_output(x, spec)
    for start in range(0, n, samples):
        us, a = _split_and_fuse(x[start : start + samples], unit, spec)
        _select(us, a, out=v[start : start + samples])
    return v


def _split_and_fuse(x: Tensor, unit: FoldedUnit, spec: SKSpec) -> tuple[list[Tensor], list[Tensor]]:
    """The branches ``[N, C, H', W']`` and the attention to each, ``[N, C, 1, 1]``."""
    xs = x.split(spec.branch_in_channels, dim=1) if spec.split_input else [x] * spec.num_branches
    us = []
    for x_m, weight, bias, branch in zip(xs, unit.weights, unit.biases, spec.branches, strict=True):
        u = F.conv2d(x_m, weight, bias, spec.stride, branch.padding, branch.dilation, branch.groups)
        us.append(u.relu_() if spec.branch_act == "relu" else u)
    # Each branch is summed by itself: no sum of the branches is written.
    dtype = sum_dtype(x.dtype)
    s = us[0].sum((2, 3), dtype=dtype)
    for u in us[1:]:
        s += u.sum((2, 3), dtype=dtype)
    s /= us[0].shape[2] * us[0].shape[3]
    a = attend(s, unit.gate, spec.gate_act == "relu").to(x.dtype)
    return us, list(a[..., None, None].unbind(1))


def _select(us: list[Tensor], a: list[Tensor], out: Tensor) -> Tensor:
    """Writes ``sum_m a_m u_m`` to `out`, which may be the last branch."""
    if len(us) == 2:  # attention sums to 1
        return torch.lerp(us[1], us[0], a[0], out=out)
    torch.mul(us[-1], a[-1], out=out)
    for u, a_m in zip(us[:-1], a[:-1], strict=True):
        out.addcmul_(u, a_m)
    return out
