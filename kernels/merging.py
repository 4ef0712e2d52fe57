"""Linear branches as one convolution: their common lattice of taps, and where each tap meets the image."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import gcd
from typing import NamedTuple

import torch

from .config import MergedConfig
from .geometry import ConvShape, blocking, lattice, reach


def merged_shape(shape: ConvShape) -> ConvShape:
    """`shape` with every branch's kernel widened to the lattice that holds the taps of all of them.

    The lattice's pitch is the greatest common divisor of the dilations; taps that a branch lacks are zero.
    """
    pitch = gcd(*(d for k, d in zip(shape.kernels, shape.dilations, strict=True) if k > 1)) or 1
    reach = max(d * (k // 2) for k, d in zip(shape.kernels, shape.dilations, strict=True))
    m = len(shape.kernels)
    return ConvShape(
        shape.c_in, shape.c_out, shape.groups, (2 * (reach // pitch) + 1,) * m, (pitch,) * m, shape.stride
    )


def widen_kernel(weight: torch.Tensor, dilation: int, kernel: int, pitch: int) -> torch.Tensor:
    """`weight [C_out, C_in, k, k]` of a branch of `dilation` on the lattice of `kernel` taps of `pitch` pixels."""
    step = dilation // pitch if weight.shape[-1] > 1 else 1
    reach = step * (weight.shape[-1] // 2)
    wide = weight.new_zeros((*weight.shape[:2], kernel, kernel))
    taps = slice(kernel // 2 - reach, kernel // 2 + reach + 1, step)
    wide[:, :, taps, taps] = weight
    return wide


class Section(NamedTuple):
    """`size` rows (or columns) of the input from `start` on, `stride` apart, that the same taps meet.

    `taps` are positions on the merged lattice, ascending.
    """

    start: int
    size: int
    taps: tuple[int, ...]


@lru_cache(maxsize=1024)
def sections(shape: ConvShape, size: int) -> tuple[Section, ...]:
    """The rows (or columns) of an input of `size` that some tap of the merged `shape` meets, by the taps that do.

    Tap t of an output at y meets input row `y * stride + (t - kernel // 2) * pitch`. Within a residue of the stride the
    taps' windows are intervals of one length, so rows that meet the same taps are adjacent.
    """
    kernel, pitch = shape.kernels[0], shape.dilations[0]
    outputs, _ = shape.output_size(size, size)
    met: dict[tuple[int, ...], list[int]] = {}
    for row in range(size):
        taps = []
        for tap in range(kernel):
            y, rest = divmod(row - (tap - kernel // 2) * pitch, shape.stride)
            if rest == 0 and 0 <= y < outputs:
                taps.append(tap)
        if taps:
            met.setdefault(tuple(taps), []).append(row)
    return tuple(Section(rows[0], len(rows), taps) for taps, rows in met.items())


def strips(shape: ConvShape, size: int, longest: int) -> list[tuple[int, int, int]]:
    """(first row, rows, section) of the sections of `size` rows, in pieces of at most `longest` rows."""
    return [
        (section.start + first * shape.stride, min(longest, section.size - first), index)
        for index, section in enumerate(sections(shape, size))
        for first in range(0, section.size, longest)
    ]


def column_sections(shape: ConvShape, size: int) -> list[int]:
    """The section of each of `size` columns, -1 where no tap meets it."""
    of = [-1] * size
    for index, section in enumerate(sections(shape, size)):
        for i in range(section.size):
            of[section.start + i * shape.stride] = index
    return of


def section_weights(weights: Sequence[torch.Tensor], shape: ConvShape, h: int, w: int) -> torch.Tensor:
    """What a pixel of each pair of sections of an `h` x `w` input adds to the pooled sums of all branches.

    `weights[m] [C_out, C_in / groups, k, k]` are fp32, on the merged lattice (`widen_kernel`); the result is
    `[sections_h, sections_w, C_out / groups, C_in]`: at ci, the weight to the j-th output of ci's group.
    """
    total = sum(weights[1:], weights[0]).double()
    k = total.shape[-1]

    def incidence(size: int) -> torch.Tensor:
        rows = [[float(t in section.taps) for t in range(k)] for section in sections(shape, size)]
        return torch.tensor(rows, dtype=torch.float64, device=total.device)

    met = torch.einsum("ap,bq,oipq->aboi", incidence(h), incidence(w), total)
    met = met.unflatten(2, (shape.groups, -1)).permute(
        0, 1, 3, 2, 4
    )  # [a, b, C_out / groups, groups, C_in / groups]
    return met.flatten(3).float().contiguous()


def row_parts(shape: ConvShape, config: MergedConfig, dtype: torch.dtype) -> tuple[int, ...]:
    """Where the parts start, in lattice points, in which a run's input row is read; the last entry is their end.

    A part is 32 elements of 16 bits, of which a thread reads 8, or 16 (4); 16 of 32 bits (4).
    """
    points = (config.RUN_W - 1) * blocking(shape, config).steps[0] + shape.kernels[0]
    longest = 32 if dtype.itemsize == 2 else 16
    starts = [0]
    while starts[-1] < points:
        is_short = (points - starts[-1]) * config.BLOCK_CI <= 16
        starts.append(starts[-1] + (16 if is_short else longest) // config.BLOCK_CI)
    return tuple(starts)


@lru_cache(maxsize=1024)
def lattice_points(branches: ConvShape) -> tuple[tuple[tuple[int, int], tuple[int, ...]], ...]:
    """The points at which some branch has a tap: rows and pixels from an output, and each branch's tap there or -1."""
    far = reach(branches)
    found = []
    for dy in range(-far, far + 1):
        for dx in range(-far, far + 1):
            taps = []
            for k, d in zip(branches.kernels, lattice(branches), strict=True):
                ky, kx = dy // d + k // 2, dx // d + k // 2
                has_tap = dy % d == dx % d == 0 and 0 <= ky < k and 0 <= kx < k
                taps.append(ky * k + kx if has_tap else -1)
            if max(taps) >= 0:
                found.append(((dy, dx), tuple(taps)))
    return tuple(found)


@lru_cache(maxsize=1024)
def branch_blocks(branches: ConvShape, config: MergedConfig, dtype: torch.dtype) -> tuple[bool, ...]:
    """Whether there are taps, for each kernel row of the merged lattice, part of the row, and branch: nothing is built
    of the weights that a branch does not have.
    """
    shape = merged_shape(branches)
    kernel, pitch = shape.kernels[0], shape.dilations[0]
    step, parts = blocking(shape, config).steps[0], row_parts(shape, config, dtype)
    taps_of = []
    for k, dilation in zip(branches.kernels, branches.dilations, strict=True):
        spacing = dilation // pitch if k > 1 else 1
        taps_of.append([kernel // 2 + spacing * (i - k // 2) for i in range(k)])
    return tuple(
        row in taps and any(start <= tap + o * step < stop for tap in taps for o in range(config.RUN_W))
        for row in range(kernel)
        for start, stop in pairwise(parts)
        for taps in taps_of
    )
