"""Schedule "merged", for linear branches on the CPU: one convolution with a kernel of each sample's own.

The gate is known before any branch is computed (:mod:`..cpu_merging`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..cpu_merging import MergedKernels, convolve, merge, pooled, window_sums
from ..folding import FoldedGate, attend, fold_unit, sum_dtype
from ..layout import memory_format
from ..packing import PackCache, remember
from ..params import Branch, Gate
from ..plan import Plan
from ..spec import SKSpec


def run(
    plan: Plan, x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec, cache: PackCache | None
) -> Tensor:
    """The unit's output; arguments and result as :func:`sk_triton.functional.sk_conv`."""
    merged = plan.merged
    assert merged is not None
    out_format = memory_format(x)

    @torch.no_grad()
    def build() -> tuple[MergedKernels, FoldedGate]:
        unit = fold_unit(branches, gate, sum_dtype(plan.dtype), torch.contiguous_format, None)
        return merge(unit.weights, unit.biases, spec, merged, out_format), unit.gate

    kernels, affine = remember(cache, ("merged", plan.dtype, merged, out_format), branches, gate, build)
    sums = window_sums(x, merged, spec.stride)
    s = pooled(sums, kernels, math.prod(spec.output_size(*x.shape[2:])))
    a = attend(s, affine, spec.gate_act == "relu")
    return convolve(x, a, kernels, spec, merged, plan.samples)
