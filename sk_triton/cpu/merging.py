"""What the CPU's schedules for linear branches share: kernels that hold those of all branches, and sums over windows.

Attention weighs kernels as well as it weighs branches, ``sum_m a_m conv_m(x) = conv(x, sum_m a_m W_m)``, and pooling
commutes with a convolution: the pooled sum of a branch needs only the sums of x over the pixels that each tap reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..folding import sum_dtype
from ..kernels.lasting import lasting
from ..layout import empty_output, memory_format
from ..spec import BranchSpec, SKSpec


class MergedKernels(NamedTuple):
    """Linear branches as kernels of one shape, with K its side and ``fan_in`` the input channels of a group.

    Attributes:
        weights: M kernels ``[C, fan_in, K, K]``, each a branch's with zeros between and around its taps.
        biases: ``[M, C]`` or None.
        total_weight: the sum of the kernels, ``[groups, C / groups, fan_in * K * K]``.
    """

    weights: tuple[Tensor, ...]
    biases: Tensor | None
    total_weight: Tensor


def merged_branch(spec: SKSpec) -> BranchSpec:
    """The smallest kernel and dilation whose taps include those of all branches, which have equal groups.

    The same lattice as :func:`..kernels.merging.merged_shape` takes.
    """
    wide = [branch for branch in spec.branches if branch.kernel_size > 1]
    dilation = math.gcd(*(branch.dilation for branch in wide)) or 1
    reach = max(branch.padding for branch in spec.branches)
    return BranchSpec(2 * reach // dilation + 1, dilation, spec.branches[0].groups)


def merge(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    spec: SKSpec,
    merged: BranchSpec,
    memory_format: torch.memory_format,
) -> MergedKernels:
    """The branches' ``[C, fan_in, k, k]`` weights and ``[C]`` biases, None in all or none of them, in one shape."""
    embedded = tuple(
        _embed(weight, branch, merged, memory_format)
        for weight, branch in zip(weights, spec.branches, strict=True)
    )
    total = torch.stack(embedded).sum(0).reshape(merged.groups, spec.out_channels // merged.groups, -1)
    present = [bias for bias in biases if bias is not None]
    return MergedKernels(embedded, torch.stack(present) if present else None, total)


def _embed(
    weight: Tensor, branch: BranchSpec, merged: BranchSpec, memory_format: torch.memory_format
) -> Tensor:
    size = (*weight.shape[:2], merged.kernel_size, merged.kernel_size)
    embedded = weight.new_zeros(size).contiguous(memory_format=memory_format)
    taps = taps_of(branch, merged)
    embedded[:, :, taps, taps] = weight
    return embedded


def taps_of(branch: BranchSpec, merged: BranchSpec) -> slice:
    """Where a branch's taps lie along an axis of the merged kernel."""
    first = (merged.padding - branch.padding) // merged.dilation
    pitch = max(1, branch.dilation // merged.dilation)
    return slice(first, first + pitch * (branch.kernel_size - 1) + 1, pitch)


def sample_weights(weights: Sequence[Tensor], a: Tensor) -> Tensor:
    """Each sample's own kernels, ``sum_m a_m W_m``.

    Args:
        weights: M embedded kernels ``[C, fan_in, K, K]``.
        a: attention ``[N, M, C]``.

    Returns:
        ``[N * C, fan_in, K, K]``: the weights of a convolution of samples side by side along the channels.
    """
    a_0, *rest = a[..., None, None, None].unbind(1)  # [N, C, 1, 1, 1] each
    weight = weights[0] * a_0  # [N, C, fan_in, K, K]
    for weight_m, a_m in zip(weights[1:], rest, strict=True):
        weight.addcmul_(weight_m, a_m)
    return weight.flatten(0, 1)


def side_by_side(x: Tensor) -> Tensor:
    """Samples ``[N, C, H, W]`` along the channels of one, ``[1, N * C, H, W]``."""
    return x.reshape(1, -1, *x.shape[2:])


def convolve(
    x: Tensor, a: Tensor, kernels: MergedKernels, spec: SKSpec, merged: BranchSpec, samples: int
) -> Tensor:
    """``sum_m a_m u_m`` by one convolution with each sample's own kernels, `samples` of them at a time.

    Args:
        x: ``[N, in_channels, H, W]``.
        a: attention ``[N, M, C]``.
        kernels: the branches.
        spec, merged: their description, and the shape of the merged kernel.
        samples: 1 in channels_last, where several do not lie side by side along the channels.

    Returns:
        ``[N, C, H', W']`` in the dtype and memory format of x.
    """
    n = x.shape[0]
    biases = None if kernels.biases is None else (a * kernels.biases).sum(1).to(x.dtype)  # [N, C]

    def convolve_part(part: slice) -> Tensor:
        x_part = x[part]
        weight = sample_weights(kernels.weights, a[part]).to(x.dtype)
        bias = None if biases is None else biases[part].flatten()
        groups = x_part.shape[0] * merged.groups
        v = F.conv2d(side_by_side(x_part), weight, bias, spec.stride, merged.padding, merged.dilation, groups)
        return v.reshape(-1, spec.out_channels, *v.shape[2:])

    if samples >= n:
        # Detached: autograd refuses changes in place of what it takes for a view.
        return convolve_part(slice(n)).contiguous(memory_format=memory_format(x)).detach()
    v = empty_output(x, spec)
    for start in range(0, n, samples):
        part = slice(start, start + samples)
        v[part] = convolve_part(part)
    return v


def pooled(sums: Tensor, kernels: MergedKernels, pixels: int) -> Tensor:
    """Global average pooling of the branches' sum (Li et al., CVPR 2019, Eq. 2).

    Args:
        sums: of x over windows, ``[N, in_channels, K, K]``.
        kernels: the branches.
        pixels: of an output.

    Returns:
        s ``[N, C]``.
    """
    columns = by_group(sums, kernels)
    s = torch.bmm(columns, kernels.total_weight.transpose(1, 2))
    s = s.transpose(0, 1).reshape(sums.shape[0], -1).div_(pixels)
    if kernels.biases is not None:
        s += kernels.biases.sum(0)
    return s


def by_group(sums: Tensor, kernels: MergedKernels) -> Tensor:
    """Sums over windows ``[N, in_channels, K, K]`` as a left operand by groups, ``[groups, N, fan_in * K * K]``."""
    groups, _, fan_in = kernels.total_weight.shape
    return sums.reshape(-1, groups, fan_in).transpose(0, 1)


def window_sums(x: Tensor, kernel: BranchSpec, stride: int) -> Tensor:
    """Sum of x over the pixels that each tap of a kernel reads.

    Args:
        x: ``[N, C, H, W]``.
        kernel: the kernel, of side K.
        stride: of the convolution.

    Returns:
        ``[N, C, K, K]`` in float32, or float64 where x is.
    """
    # The first pass reads all of x: along the axis whose pixels lie side by side or, where they are whole vectors of
    # channels, across rows.
    if memory_format(x) == torch.channels_last:
        sums = _axis_sums(x.permute(0, 2, 3, 1), 1, kernel, stride)
        return _axis_sums(sums, 2, kernel, stride).permute(0, 3, 1, 2)
    sums = _axis_sums(x, 3, kernel, stride)
    return _axis_sums(sums, 2, kernel, stride)


def _axis_sums(x: Tensor, dim: int, kernel: BranchSpec, stride: int) -> Tensor:
    """Replaces axis `dim` by one of K entries: entry k sums the positions that tap k reads.

    They are a whole lattice of pitch `stride` but for a border on either side, which is subtracted.
    """
    size = x.shape[dim]
    end_of_outputs = ((size - 1) // stride + 1) * stride
    shape = (*x.shape[:dim], kernel.kernel_size, *x.shape[dim + 1 :])
    sums = x.new_empty(shape, dtype=sum_dtype(x.dtype))
    totals: dict[int, Tensor] = {}
    for k, sum_k in enumerate(sums.unbind(dim)):
        offset = k * kernel.dilation - kernel.padding
        phase = offset % stride
        first, end = max(offset, phase), offset + end_of_outputs
        if first >= min(end, size):  # the tap sees padding alone
            sum_k.zero_()
            continue
        if phase not in totals:
            lattice = x[(slice(None),) * dim + (slice(phase, None, stride),)]
            totals[phase] = lattice.sum(dim, dtype=sums.dtype)
        borders = [*range(phase, first, stride), *range(end, size, stride)]
        if not borders:
            sum_k.copy_(totals[phase])
            continue
        torch.sub(totals[phase], x.select(dim, borders[0]), out=sum_k)
        for position in borders[1:]:
            sum_k -= x.select(dim, position)
    return sums


def add_to_windows(dx: Tensor, sums_grad: Tensor, kernel: BranchSpec, stride: int) -> None:
    """The gradient of :func:`window_sums`, added to dx in place.

    Args:
        dx: ``[N, C, H, W]``, dense in its memory format.
        sums_grad: ``[N, C, K, K]``, of the sums.
        kernel, stride: of the sums.
    """
    n, c, h, w = dx.shape
    rows, columns = (_windows(size, kernel, stride, dx.dtype) for size in (h, w))
    side = kernel.kernel_size
    if memory_format(dx) == torch.channels_last:
        lines = torch.matmul(columns, sums_grad.permute(0, 2, 3, 1))  # [N, K, W, C]
        image = dx.permute(0, 2, 3, 1).view(n, h, w * c)
        image.baddbmm_(rows.expand(n, h, side), lines.reshape(n, side, w * c))
        return
    lines = torch.matmul(sums_grad, columns.T)  # [N, C, K, W]
    dx.view(n * c, h, w).baddbmm_(rows.expand(n * c, h, side), lines.view(n * c, side, w))


@lru_cache(maxsize=64)
def _windows(size: int, kernel: BranchSpec, stride: int, dtype: torch.dtype) -> Tensor:
    """1 where a tap reads a position for some output, ``[size, K]``."""
    outputs = (size - 1) // stride + 1

    def build() -> Tensor:
        positions = torch.arange(size)[:, None]
        first = torch.arange(kernel.kernel_size) * kernel.dilation - kernel.padding
        distance = positions - first
        reads = (distance % stride == 0) & (distance >= 0) & (distance < outputs * stride)
        return reads.to(dtype)

    return lasting(build, torch.device("cpu"))
