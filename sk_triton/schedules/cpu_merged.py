"""Schedule "merged", for linear branches on the CPU: one convolution with a kernel of each sample's own.

Pooling commutes with a convolution, so the gate is known before any branch is computed: it needs only the sums of x
over the windows that the kernel's taps slide over. And the attention weighs kernels as well as it weighs branches:
``sum_m a_m conv_m(x) = conv(x, sum_m a_m W_m)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..folding import FoldedGate, attend, fold_unit, sum_dtype
from ..layout import memory_format
from ..packing import PackCache, remember
from ..params import Branch, Gate
from ..plan import Plan
from ..spec import BranchSpec, SKSpec


class _MergedUnit(NamedTuple):
    """Parameters, with K the side of the merged kernel and ``fan_in`` the input channels of a group.

    Attributes:
        weights: M kernels ``[C, fan_in, K, K]``, each a branch's with zeros between and around its taps.
        biases: ``[M, C]`` or None.
        total_weight, total_bias: their sums over the branches, ``[groups, fan_in * K * K, C / groups]`` and
            ``[C]`` or None.
        gate: the gate.

    All in float32, or float64 where the unit is.
    """

    weights: tuple[Tensor, ...]
    biases: Tensor | None
    total_weight: Tensor
    total_bias: Tensor | None
    gate: FoldedGate


def run(
    plan: Plan, x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec, cache: PackCache | None
) -> Tensor:
    """The unit's output; arguments and result as :func:`sk_triton.functional.sk_conv`."""
    merged = plan.merged
    assert merged is not None
    out_format = memory_format(x)

    def build() -> _MergedUnit:
        return _merge(plan, branches, gate, spec, merged, out_format)

    unit = remember(cache, ("merged", plan.dtype, merged, out_format), branches, gate, build)
    a = _attention(x, unit, spec, merged)
    n, step = x.shape[0], plan.samples
    if step >= n:
        return _merged_conv(x, a, unit, spec, merged).contiguous(memory_format=out_format)
    size = (n, spec.out_channels, *spec.output_size(*x.shape[2:]))
    v = torch.empty(size, dtype=plan.dtype, device=x.device, memory_format=out_format)
    for start in range(0, n, step):
        part = slice(start, start + step)
        v[part] = _merged_conv(x[part], a[part], unit, spec, merged)
    return v


def _attention(x: Tensor, unit: _MergedUnit, spec: SKSpec, merged: BranchSpec) -> Tensor:
    """``[N, M, C]``, by the pooled sum of the branches: no branch is computed."""
    n, c = x.shape[0], spec.out_channels
    h, w = spec.output_size(*x.shape[2:])
    sums = window_sums(x, merged, spec.stride).view(n, merged.groups, -1)
    s = torch.bmm(sums.transpose(0, 1), unit.total_weight).transpose(0, 1).reshape(n, c).div_(h * w)
    if unit.total_bias is not None:
        s += unit.total_bias
    return attend(s, unit.gate, spec.gate_act == "relu")


def _merged_conv(x: Tensor, a: Tensor, unit: _MergedUnit, spec: SKSpec, merged: BranchSpec) -> Tensor:
    n, _, h_in, w_in = x.shape
    a_0, *rest = a[..., None, None, None].unbind(1)  # [N, C, 1, 1, 1] each
    weight = unit.weights[0] * a_0  # [N, C, fan_in, K, K]
    for weight_m, a_m in zip(unit.weights[1:], rest, strict=True):
        weight.addcmul_(weight_m, a_m)
    weight = weight.flatten(0, 1).to(x.dtype)
    bias = None if unit.biases is None else (a * unit.biases).sum(1).flatten().to(x.dtype)
    # Samples side by side along the channels: a convolution of N times the groups.
    wide = x.reshape(1, -1, h_in, w_in)
    groups = n * merged.groups
    v = F.conv2d(wide, weight, bias, spec.stride, merged.padding, merged.dilation, groups)
    return v.reshape(n, spec.out_channels, *v.shape[2:])


def window_sums(x: Tensor, kernel: BranchSpec, stride: int) -> Tensor:
    """Sum of x over the pixels that each tap of a kernel reads.

    Args:
        x: ``[N, C, H, W]``.
        kernel: the kernel, of side K.
        stride: of the convolution.

    Returns:
        ``[N, C, K, K]`` in float32, or float64 where x is.
    """
    rows, columns = ((size - 1) // stride + 1 for size in x.shape[2:])
    if (
        memory_format(x) == torch.channels_last
    ):  # neighbours in memory are of one row: sum over the rows first
        sums = _axis_sums(x.transpose(2, 3), kernel, stride, rows)  # [N, C, W, K]
        return _axis_sums(sums.transpose(2, 3), kernel, stride, columns).contiguous()
    sums = _axis_sums(x, kernel, stride, columns)  # [N, C, H, K]
    return _axis_sums(sums.transpose(2, 3), kernel, stride, rows).transpose(2, 3).contiguous()


def _axis_sums(x: Tensor, kernel: BranchSpec, stride: int, outputs: int) -> Tensor:
    """``[..., size]`` to ``[..., K]``: entry k sums the positions that tap k reads for a row of `outputs` outputs.

    They are a whole lattice of pitch `stride` but for a border on either side, which is subtracted.
    """
    dtype = sum_dtype(x.dtype)
    totals: dict[int, Tensor] = {}
    sums = []
    for k in range(kernel.kernel_size):
        offset = k * kernel.dilation - kernel.padding
        phase = offset % stride
        first, end = max(offset, phase), offset + outputs * stride
        if first >= min(end, x.shape[-1]):  # the tap sees padding alone
            sums.append(x.new_zeros(x.shape[:-1], dtype=dtype))
            continue
        if phase not in totals:
            totals[phase] = x[..., phase::stride].sum(-1, dtype=dtype)
        total = totals[phase]
        for border in (x[..., phase:first:stride], x[..., end::stride]):
            if border.shape[-1]:
                total = total - border.sum(-1, dtype=dtype)
        sums.append(total)
    return torch.stack(sums, -1)


@torch.no_grad()
def _merge(
    plan: Plan,
    branches: Sequence[Branch],
    gate: Gate,
    spec: SKSpec,
    merged: BranchSpec,
    memory_format: torch.memory_format,
) -> _MergedUnit:
    sums = sum_dtype(plan.dtype)
    unit = fold_unit(branches, gate, sums, torch.contiguous_format, None)
    c, groups, side = spec.out_channels, merged.groups, merged.kernel_size
    weights = []
    for weight, branch in zip(unit.weights, spec.branches, strict=True):
        first = (merged.padding - branch.padding) // merged.dilation
        pitch = max(1, branch.dilation // merged.dilation)
        taps = slice(first, first + pitch * (branch.kernel_size - 1) + 1, pitch)
        padded = weight.new_zeros(c, weight.shape[1], side, side).contiguous(memory_format=memory_format)
        padded[:, :, taps, taps] = weight
        weights.append(padded)
    total = torch.stack(weights).sum(0).reshape(groups, c // groups, -1)
    biases = [bias for bias in unit.biases if bias is not None]
    stacked = torch.stack(biases) if biases else None
    return _MergedUnit(
        tuple(weights),
        stacked,
        total.transpose(1, 2).contiguous(),
        None if stacked is None else stacked.sum(0),
        unit.gate,
    )
