"""The branches in training: their convolutions, with the moments of these, and sums over their pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.branch_conv import branch_conv_fwd, branch_train_fwd
from .kernels.geometry import cdiv, tiles
from .kernels.packing import pack_branch_weights
from .library import inputs_of
from .plan import BranchLaunch, Plan
from .spec import SKSpec
from .training import NormSettings, UnitTensors

Moments = tuple[slice, Tensor]
"""Some branches, and ``[M, 3, tiles, C]`` fp32: number, mean and centred second moment of a tile's values."""


class TrainingUnit(NamedTuple):
    """What a call computes with: `running` holds mean and variance of each norm of kind "r"."""

    spec: SKSpec
    tensors: UnitTensors
    running: tuple[Tensor, ...]
    norms: NormSettings


class BranchNorm(NamedTuple):
    """The branches' norms as the kernels read them, ``[M, C]`` fp32 each; all empty without norms.

    Attributes:
        affine: ``[2, M, C]``, beta and gamma.
    """

    mean: Tensor
    rstd: Tensor
    gamma: Tensor
    beta: Tensor
    affine: Tensor

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a kernel takes: all but `affine`."""
        return self.mean, self.rstd, self.gamma, self.beta


def convolve(x: Tensor, unit: TrainingUnit, plan: Plan) -> tuple[Tensor, list[Moments]]:
    """The branches' convolutions with their biases, of an input with adjacent channels.

    Returns:
        y ``[M, N, H', W', C]``, and for each launch that takes them its branches' moments.
    """
    spec = unit.spec
    n, _, h_in, w_in = x.shape
    h, w = spec.output_size(h_in, w_in)
    y = x.new_empty((spec.num_branches, n, h, w, spec.out_channels))
    if not plan.branch_launches:
        _convolve_by_library(x, unit, y)
    found: list[Moments] = []
    for launch in plan.branch_launches:
        members = slice(launch.start, launch.stop)
        x_in = x[:, launch.start * spec.branch_in_channels :] if spec.split_input else x
        packed, shift = operands(launch, unit, x.dtype)
        settings = conv_settings(launch, plan)
        if launch.task == "train":
            moments = empty_moments(x, launch, unit)
            branch_train_fwd(x_in, packed, shift, y[members], moments, **settings)()
            found.append((members, moments))
        else:
            tile_count = math.prod(tiles(launch.shape, launch.config, h, w))
            partial = x.new_empty((n, tile_count, spec.out_channels), dtype=torch.float32)
            branch_conv_fwd(x_in, packed, shift, y[members], partial, has_relu=False, **settings)()
    return y, found


def operands(launch: BranchLaunch, unit: TrainingUnit, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Packed weights and biases ``[M, C]`` of the branches of a launch."""
    members = slice(launch.start, launch.stop)
    packed = pack_branch_weights(unit.tensors.weights[members], launch.shape, launch.config, dtype)
    return packed, stacked_biases(unit, members)


def stacked_biases(unit: TrainingUnit, members: slice = slice(None)) -> Tensor | None:
    """The biases ``[M, C]`` fp32 of some branches' convolutions, None where these have none."""
    biases = [bias for bias in unit.tensors.biases[members] if bias is not None]
    return torch.cat(biases).float().view(len(biases), -1) if biases else None


def conv_settings(launch: BranchLaunch, plan: Plan) -> dict[str, Any]:
    """What the launchers of the branch kernels take of a plan."""
    return {"shape": launch.shape, "allow_tf32": plan.allow_tf32, "config": launch.config}


def empty_moments(x: Tensor, launch: BranchLaunch, unit: TrainingUnit) -> Tensor:
    """For the moments of a launch on x: ``[M, 3, tiles, C]`` fp32."""
    h, w = unit.spec.output_size(*x.shape[2:])
    tile_count = cdiv(x.shape[0], launch.config.BLOCK_N) * math.prod(tiles(launch.shape, launch.config, h, w))
    size = (launch.stop - launch.start, 3, tile_count, unit.spec.out_channels)
    return x.new_empty(size, dtype=torch.float32)


def sums_over_pixels(
    kernel: Any, inputs: Sequence[Tensor], count: int, y: Tensor, unit: TrainingUnit, plan: Plan
) -> Tensor:
    """The `count` sums over the pixels of ``y``, ``[count, N, M, C]`` fp32, of a kernel that takes them by tiles."""
    config = plan.reduction
    assert config is not None
    m, n, h, w, c = y.shape
    tile_count = cdiv(h * w, config.BLOCK_P * config.STEPS)
    partial = y.new_empty((count, tile_count, n, m, c), dtype=torch.float32)
    kernel(
        *inputs, *partial.unbind(0), has_norm=unit.spec.branch_norm, has_relu=plan.has_relu, config=config
    )()
    return partial.squeeze(1) if tile_count == 1 else partial.sum(1)


def _convolve_by_library(x: Tensor, unit: TrainingUnit, y: Tensor) -> None:
    for m, (x_m, conv) in enumerate(zip(inputs_of(x, unit.spec), unit.spec.branches, strict=True)):
        weight, bias = unit.tensors.weights[m].to(x.dtype), unit.tensors.biases[m]
        if bias is not None:
            bias = bias.to(x.dtype)
        y_m = F.conv2d(x_m, weight, bias, unit.spec.stride, conv.padding, conv.dilation, conv.groups)
        y[m].copy_(y_m.permute(0, 2, 3, 1))
