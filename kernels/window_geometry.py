"""Where taps meet a window of rows."""

from collections.abc import Sequence
from functools import lru_cache

from .geometry import ConvShape, lattice, reach

Point = tuple[int, int]
"""Rows and pixels from an output to an input pixel."""


@lru_cache(maxsize=1024)
def branch_points(shape: ConvShape) -> tuple[tuple[Point, ...], ...]:
    """What each branch's taps, row by row, meet."""
    return tuple(
        tuple(
            ((ky - kernel // 2) * dilation, (kx - kernel // 2) * dilation)
            for ky in range(kernel)
            for kx in range(kernel)
        )
        for kernel, dilation in zip(shape.kernels, lattice(shape), strict=True)
    )


def places(points: Sequence[Point], shape: ConvShape, run_w: int) -> tuple[int, ...]:
    """Which pixel of a window meets each of `points` for the first output of a lane: windows have RUN_W pixels a row,
    and those that the branches of `shape` reach beyond them."""
    far = reach(shape)
    return tuple((far + dy) * (run_w + 2 * far) + far + dx for dy, dx in points)


def partners(points: Sequence[Point], shape: ConvShape) -> tuple[int, ...]:
    """With which of `points` each shares a sparse product of two taps: -1 with none, itself if it is another's.

    Rows 0 and 2 of a window are a pair, and 1 and 3, 4 and 6, …: a product of two taps wants both pixels in adjacent
    registers, and when the window moves down by a row, a pair becomes the one before.
    """
    far, found = reach(shape), []
    for i, (dy, dx) in enumerate(points):
        is_upper = (far + dy) % 4 < 2
        other = (dy + 2, dx) if is_upper else (dy - 2, dx)
        found.append(-1 if other not in points else points.index(other) if is_upper else i)
    return tuple(found)
