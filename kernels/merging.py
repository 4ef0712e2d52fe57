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
    kernel, m = 2 * (reach(shape) // pitch) + 1, len(shape.kernels)
    return ConvShape(shape.c_in, shape.c_out, shape.groups, (kernel,) * m, (pitch,) * m, shape.stride)


@lru_cache(maxsize=1024)
def lattice_taps(branches: ConvShape) -> tuple[tuple[int, ...], ...]:
    """Where the taps of each branch stand along an axis of the merged lattice."""
    shape = merged_shape(branches)
    center, pitch = shape.kernels[0] // 2, shape.dilations[0]
    found = []
    for k, dilation in zip(branches.kernels, branches.dilations, strict=True):
        spacing = dilation // pitch if k > 1 else 1
        found.append(tuple(center + spacing * (i - k // 2) for i in range(k)))
    return tuple(found)


def widen_kernel(weight: torch.Tensor, taps: Sequence[int], kernel: int) -> torch.Tensor:
    """`weight [C_out, C_in, k, k]` on a lattice of `kernel` points along an axis, of which it has `taps`."""
    wide = weight.new_zeros((*weight.shape[:2], kernel, kernel))
    points = torch.tensor(taps, device=weight.device)
    wide[:, :, points[:, None], points] = weight
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


@lru_cache(maxsize=1024)
def met_taps(shape: ConvShape, size: int) -> tuple[int, ...]:
    """The taps of each section of `size` rows (or columns), bit t for tap t of the merged lattice."""
    return tuple(sum(1 << tap for tap in section.taps) for section in sections(shape, size))


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
    kernel, step, parts = shape.kernels[0], blocking(shape, config).steps[0], row_parts(shape, config, dtype)
    return tuple(
        row in taps and any(start <= tap + o * step < stop for tap in taps for o in range(config.RUN_W))
        for row in range(kernel)
        for start, stop in pairwise(parts)
        for taps in lattice_taps(branches)
    )
