"""The units to tune: one that is described, or all that a network runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import nn

import sk_triton
from sk_triton.spec import SKSpec

from ..grid import precision_of
from ..measuring.sources import Ours
from ..model.speed_of_light import Problem
from ..shapes import NETWORKS, Case, network_shape

IMAGE_SIZE = 224


def network_problems(
    name: str, batch: int, dtype: torch.dtype, allow_tf32: bool, size: int = IMAGE_SIZE
) -> list[Problem]:
    """The different units of a network on `batch` images of `size` x `size` pixels, those that run most often first.

    Raises:
        MissingPackageError: the network needs a package that is not installed.
        ValueError: an unknown network.
    """
    if name not in NETWORKS:
        raise ValueError(f"model must be one of {', '.join(NETWORKS)}, got {name!r}")
    found: Counter[tuple[SKSpec, int, int]] = Counter()

    def note(unit: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(unit, sk_triton.SelectiveKernel)
        height, width = inputs[0].shape[2:]
        found[unit.spec, height, width] += 1

    shape = network_shape(size)
    with torch.device("meta"), torch.no_grad():
        network = Ours().module(Case("tune", name, shape, 1, "fp32")).eval()
        for unit in network.modules():
            if isinstance(unit, sk_triton.SelectiveKernel):
                unit.register_forward_pre_hook(note)
        network(torch.empty(1, shape.channels, size, size))
    problem = Problem(next(iter(found))[0], batch, 1, 1, dtype, allow_tf32)
    return [replace(problem, spec=spec, height=h, width=w) for (spec, h, w), _ in found.most_common()]


def title(problem: Problem) -> str:
    """A unit in a few words: "128@56x56, batch 128, fp16"."""
    spec = problem.spec
    stride = f", stride {spec.stride}" if spec.stride > 1 else ""
    precision = precision_of(problem.dtype, problem.allow_tf32)
    return f"{spec.in_channels}@{problem.height}x{problem.width}{stride}, batch {problem.n}, {precision}"
