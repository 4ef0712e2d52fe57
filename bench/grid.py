"""The support grid: units, sizes and dtypes whose kernels are compiled and checked for every chip."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sk_triton.spec import BranchSpec, SKSpec, gate_width

from .shapes import MIN_GATE_WIDTH, PAPER, REDUCTION, Shape

PRECISIONS = {
    "fp16": (torch.float16, False),
    "bf16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}
"""Dtypes, fp32 with and without TF32, as `(dtype, allow_tf32)`."""


def precision_of(dtype: torch.dtype, allow_tf32: bool) -> str:
    """The name of a product's precision, as in `PRECISIONS`; TF32 is of fp32 alone."""
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    return names.get(dtype, "tf32" if allow_tf32 else "fp32")


@dataclass(frozen=True)
class GridCase:
    """A unit on a batch of `n` inputs of `size` x `size` pixels."""

    name: str
    spec: SKSpec
    n: int
    size: int
    dtype: torch.dtype
    allow_tf32: bool = False

    @property
    def precision(self) -> str:
        return precision_of(self.dtype, self.allow_tf32)


def paper_unit(
    channels: int,
    groups: int = 32,
    kernels: tuple[int, ...] = (3, 3),
    dilations: tuple[int, ...] = (1, 2),
    *,
    in_channels: int | None = None,
    stride: int = 1,
    split_input: bool = False,
) -> SKSpec:
    """The paper's unit: norm and ReLU in the branches and the gate."""
    return SKSpec(
        in_channels=channels if in_channels is None else in_channels,
        out_channels=channels,
        branches=tuple(BranchSpec(k, d, groups) for k, d in zip(kernels, dilations, strict=True)),
        stride=stride,
        split_input=split_input,
        gate_width=gate_width(channels, REDUCTION, MIN_GATE_WIDTH),
    )


def classic_unit(channels: int, num_branches: int = 2, groups: int = 32) -> SKSpec:
    """The classic class: bare branches with true kernels 3, 5, … and biases."""
    return SKSpec(
        in_channels=channels,
        out_channels=channels,
        branches=tuple(BranchSpec(3 + 2 * m, 1, groups) for m in range(num_branches)),
        branch_bias=True,
        branch_norm=False,
        branch_act="identity",
        gate_width=gate_width(channels, REDUCTION, MIN_GATE_WIDTH),
        gate_bias=True,
        gate_norm=False,
        gate_act="identity",
        select_bias=True,
    )


def unit_spec(unit: str, shape: Shape) -> SKSpec:
    """The paper's or the classic unit of a shape: what `SelectiveKernel` and `SKConv` make of it."""
    usual = paper_unit(shape.channels) if unit == PAPER else classic_unit(shape.channels)
    branches = tuple(
        BranchSpec(k, d, shape.groups) for k, d in zip(shape.kernels, shape.dilations, strict=True)
    )
    return replace(usual, branches=branches, stride=shape.stride, split_input=shape.split_input)


# (name, unit, batch, input size): the four SKNet-50 stages first.
GRID_UNITS: tuple[tuple[str, SKSpec, int, int], ...] = (
    ("stage 1", paper_unit(128), 128, 56),
    ("stage 2", paper_unit(256), 128, 28),
    ("stage 3", paper_unit(512), 128, 14),
    ("stage 4", paper_unit(1024), 128, 7),
    ("stage 1, batch 1", paper_unit(128), 1, 56),
    ("stage 2, stride 2", paper_unit(256, stride=2), 128, 56),
    ("stage 3, stride 2", paper_unit(512, stride=2), 128, 28),
    ("classic, M = 2", classic_unit(128), 128, 56),
    ("classic, stage 2", classic_unit(256), 128, 28),
    ("classic, stage 3", classic_unit(512), 128, 14),
    ("classic, M = 3", classic_unit(128, num_branches=3), 128, 56),
    ("depthwise", paper_unit(64, groups=64), 128, 56),
    ("dense, split", paper_unit(64, groups=1, in_channels=64, split_input=True), 128, 56),
    ("dense", paper_unit(128, groups=1), 128, 28),
    ("dense, one branch", paper_unit(256, groups=1, kernels=(3,), dilations=(1,)), 128, 28),
    ("dense, classic", classic_unit(128, groups=1), 128, 28),
    ("dense, 512 channels", paper_unit(512, groups=1), 32, 14),
    ("dense, stride 2", paper_unit(128, groups=1, stride=2), 128, 28),
    ("128 channels per group", paper_unit(512, groups=4), 128, 14),
    ("12 channels per group", paper_unit(384), 128, 14),
    ("64 channels per group", paper_unit(2048), 32, 14),
    ("one branch", paper_unit(128, kernels=(3,), dilations=(1,)), 128, 56),
)
CASES = tuple(
    GridCase(name, spec, n, size, dtype, allow_tf32)
    for name, spec, n, size in GRID_UNITS
    for dtype, allow_tf32 in PRECISIONS.values()
)
