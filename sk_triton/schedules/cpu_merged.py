"""Schedule "merged", for linear branches on the CPU: one convolution with a kernel of each sample's own.

The gate is known before any branch is computed (:mod:`..cpu.merging`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..cpu.merging import MergedKernels, convolve, merge, pooled, window_sums
from ..folding import FoldedGate, attend, fold_unit, sum_dtype
from ..pack_cache import PackCache, remember
from ..params import Branch, Gate
from ..plan import Plan
from ..spec import BranchSpec, SKSpec


def prepare(
    plan: Plan,
    out_format: torch.memory_format,
    branches: Sequence[Branch],
    gate: Gate,
    spec: SKSpec,
    cache: PackCache | None,
) -> Callable[[Tensor], Tensor]:
    """What computes the unit's output from inputs in a memory format, as :func:`sk_triton.functional.sk_conv` does."""
    merged = plan.merged_branch
    assert merged is not None

    @torch.no_grad()
    def build() -> tuple[MergedKernels, FoldedGate]:
        unit = fold_unit(branches, gate, sum_dtype(plan.dtype), torch.contiguous_format)
        return merge(unit.weights, unit.biases, spec, merged, out_format), unit.gate

    kernels, affine = remember(cache, ("merged", spec, plan.dtype, merged, out_format), branches, gate, build)
    return functools.partial(_run, kernels, affine, spec, merged, plan.samples)


def _run(
    kernels: MergedKernels, gate: FoldedGate, spec: SKSpec, merged: BranchSpec, samples: int, x: Tensor
) -> Tensor:
    s = pooled(window_sums(x, merged, spec.stride), kernels, math.prod(spec.output_size(*x.shape[2:])))
    a = attend(s, gate, spec.gate_has_relu)
    return convolve(x, a, kernels, spec, merged, samples)
