"""The lookups that plans make, one for each kind of launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..analytic import branch, gate, gated, grad, merged, pixelwise
from ..kernels.geometry import ConvShape
from ..workload import Workload
from . import space
from .entries import Choice
from .keys import SCHEDULE, conv_text, key, unit_text
from .lookup import Found, Request, Source, resolve


def branch_config(workload: Workload, shape: ConvShape, task: str) -> Found:
    """For the branches of `shape`, to "store", "train", "pool" or "select" them."""
    n, (h, w), chip = workload.n, workload.output_size, workload.chip
    numbers = workload.dtype, workload.allow_tf32
    return _look_up(
        workload,
        f"branch_{task}",
        conv_text(shape),
        partial(space.branch_configs, shape, h, *numbers, chip, task=task),
        partial(branch.branch_config, shape, n, h, w, *numbers, chip, task=task),
        lambda config: branch.branch_cost(config, shape, n, h, w, chip, task),
        allow_tf32=workload.allow_tf32,
    )


def branch_key(workload: Workload, shape: ConvShape, task: str) -> str:
    """Text key of :func:`branch_config`."""
    return _key(workload, f"branch_{task}", conv_text(shape), workload.allow_tf32)


def gate_config(workload: Workload) -> Found:
    """For the gate."""
    spec, dtype = workload.spec, workload.dtype
    m, c, d = spec.num_branches, spec.out_channels, spec.gate_width
    return _look_up(
        workload,
        "gate",
        f"m{m}/c{c}/d{d}",
        partial(space.gate_configs, m, c, d, dtype),
        partial(gate.gate_config, m, c, d, workload.n, dtype, workload.chip),
    )


def select_config(workload: Workload) -> Found:
    """For the selection from stored branches."""
    pixels, c = math.prod(workload.output_size), workload.spec.out_channels
    return _look_up(
        workload,
        "select",
        f"m{workload.spec.num_branches}/c{c}",
        partial(space.select_configs, pixels, c),
        partial(pixelwise.select_config, pixels, c),
    )


def gated_select_config(workload: Workload) -> Found:
    """For the selection from stored branches that computes its gate."""
    pixels, expected = math.prod(workload.output_size), gated.gated_select_config(workload)
    m, c, d = workload.spec.num_branches, workload.spec.out_channels, workload.spec.gate_width
    return _look_up(
        workload,
        "gated_select",
        f"m{m}/c{c}/d{d}",
        partial(space.gated_select_configs, pixels, expected),
        lambda: expected,
    )


def pooled_sums_config(workload: Workload) -> Found:
    """For the pooled sums of branches that the library has convolved."""
    pixels, c, m = math.prod(workload.output_size), workload.spec.out_channels, workload.spec.num_branches
    return _look_up(
        workload,
        "pooled_sums",
        f"m{m}/c{c}",
        partial(space.pooled_sums_configs, pixels, c),
        partial(pixelwise.pooled_sums_config, workload.n, pixels, c, workload.chip),
    )


def reduction_config(workload: Workload) -> Found:
    """For the sums over pixels in training."""
    pixels, c, m = math.prod(workload.output_size), workload.spec.out_channels, workload.spec.num_branches
    return _look_up(
        workload,
        "reduction",
        f"m{m}/c{c}",
        partial(space.reduction_configs, m, pixels, c, workload.chip),
        partial(pixelwise.reduction_config, m, pixels, c, workload.chip),
    )


def grad_config(workload: Workload, shape: ConvShape) -> Found | None:
    """For the gradients of the branches of `shape`; None where no kernel computes them."""
    n, (h, w), dtype, chip = workload.n, workload.output_size, workload.dtype, workload.chip
    choice = grad.grad_config(shape, n, h, w, dtype, chip)
    if choice is None:
        return None
    return _look_up(
        workload,
        "branch_grad",
        conv_text(shape),
        partial(space.grad_configs, shape, h, w, dtype, choice, chip),
        lambda: choice,
    )


def border_config(workload: Workload, shape: ConvShape) -> Found:
    """For the pooled sums of the merged `shape`."""
    size = workload.h_in, workload.w_in
    return _look_up(
        workload,
        "border_sums",
        conv_text(shape),
        partial(space.border_configs, shape, *size),
        partial(merged.border_config, shape, workload.n, *size, workload.chip),
        size=size,
    )


def merged_config(workload: Workload, branches: ConvShape, shape: ConvShape) -> Found:
    """For the merged convolution of `branches`, `shape` on their common lattice."""
    n, (h, w), dtype, chip = workload.n, workload.output_size, workload.dtype, workload.chip
    return _look_up(
        workload,
        "merged_conv",
        conv_text(shape),
        partial(space.merged_configs, branches, shape, h, w, dtype, chip),
        partial(merged.merged_config, branches, shape, n, h, w, dtype, chip),
        lambda config: merged.merged_cost(config, branches, shape, n, h, w, chip),
        allow_tf32=workload.allow_tf32,
    )


def resident_source(workload: Workload) -> Source:
    """Of the configs of schedule "resident", which are not tuned: only whether to take the schedule is."""
    return Source("unit_resident", f"analytic ({workload.chip.name})", "none: not tuned")


def schedule_request(
    workload: Workload, candidates: Callable[[], Sequence[str]], expected: Callable[[int], str]
) -> Request:
    """For the schedule: `candidates` gives those that can run, `expected` the one chosen without measurements for so
    many samples."""

    def serves(choice: Choice | None, n: int) -> bool:
        # Each program more of "gated" computes a gate more.
        return (choice != "gated" or workload.n <= n) and expected(n) == expected(workload.n)

    n, name = workload.n, schedule_key(workload)
    return Request(
        SCHEDULE, name, candidates, lambda: expected(n), n, serves=serves, is_pinned=workload.is_pinned
    )


def schedule_key(workload: Workload) -> str:
    """Text key of :func:`schedule_request`."""
    return _key(workload, SCHEDULE, unit_text(workload.spec), workload.allow_tf32)


def _key(
    workload: Workload, kind: str, what: str, allow_tf32: bool, size: tuple[int, int] | None = None
) -> str:
    return key(kind, what, workload.n, *(size or workload.output_size), workload.dtype, allow_tf32)


def _look_up(
    workload: Workload,
    kind: str,
    what: str,
    candidates: Callable[[], Sequence[Any]],
    analytic: Callable[[], Any],
    cost: Callable[[Any], float] | None = None,
    *,
    size: tuple[int, int] | None = None,
    allow_tf32: bool = False,
) -> Found:
    """The config of a launch, asked for as by :class:`Request`; what, size and allow_tf32 are parts of its key: `what`
    it works on, and the `size` of images that matters to it, the output's where none is given."""
    name = _key(workload, kind, what, allow_tf32, size)
    request = Request(kind, name, candidates, analytic, workload.n, cost, is_pinned=workload.is_pinned)
    return resolve(request, workload.chip)
