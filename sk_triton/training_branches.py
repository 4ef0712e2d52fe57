"""The branches in training: their convolutions, with the moments of these."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.branch_conv import branch_conv_fwd, branch_train_fwd
from .kernels.geometry import cdiv, tiles
from .kernels.packing import pack_branch_weights
from .library import inputs_of
from .plan import Plan
from .spec import SKSpec
from .training import NormSettings, UnitTensors


class TrainingUnit(NamedTuple):
    """What a call computes with: `running` holds mean and variance of each norm of kind "r"."""

    spec: SKSpec
    tensors: UnitTensors
    running: tuple[Tensor, ...]
    norms: NormSettings


class BranchNorm(NamedTuple):
    """The branches' norms as the kernels read them: ``[M, C]`` fp32 each."""

    mean: Tensor
    rstd: Tensor
    gamma: Tensor
    beta: Tensor


def convolve(x: Tensor, unit: TrainingUnit, plan: Plan) -> tuple[Tensor, list[tuple[slice, Tensor]]]:
    """The branches' convolutions with their biases, of an input with adjacent channels.

    Returns:
        y ``[M, N, H', W', C]``, and for each launch that takes them its branches and their moments by tiles.
    """
    spec, tensors = unit.spec, unit.tensors
    n, _, h_in, w_in = x.shape
    h, w = spec.output_size(h_in, w_in)
    y = x.new_empty((spec.num_branches, n, h, w, spec.out_channels))
    if not plan.branch_launches:
        _convolve_by_library(x, unit, y)
    found = []
    for launch in plan.branch_launches:
        members = slice(launch.start, launch.stop)
        weights = [weight.float() for weight in tensors.weights[members]]
        biases = [bias.float() for bias in tensors.biases[members] if bias is not None]
        tile_count = math.prod(tiles(launch.shape, launch.config, h, w))
        x_in = x[:, launch.start * spec.branch_in_channels :] if spec.split_input else x
        packed = pack_branch_weights(weights, launch.shape, launch.config, x.dtype)
        shift = torch.stack(biases) if biases else None
        settings: dict[str, Any] = {
            "shape": launch.shape,
            "allow_tf32": plan.allow_tf32,
            "config": launch.config,
        }
        if launch.task == "train":
            sample_tiles = cdiv(n, launch.config.BLOCK_N) * tile_count
            size = (launch.stop - launch.start, 3, sample_tiles, spec.out_channels)
            moments = x.new_empty(size, dtype=torch.float32)
            branch_train_fwd(x_in, packed, shift, y[members], moments, **settings)()
            found.append((members, moments))
        else:
            partial = x.new_empty((n, tile_count, spec.out_channels), dtype=torch.float32)
            branch_conv_fwd(x_in, packed, shift, y[members], partial, has_relu=False, **settings)()
    return y, found


def _convolve_by_library(x: Tensor, unit: TrainingUnit, y: Tensor) -> None:
    for m, (x_m, conv) in enumerate(zip(inputs_of(x, unit.spec), unit.spec.branches, strict=True)):
        weight, bias = unit.tensors.weights[m].to(x.dtype), unit.tensors.biases[m]
        if bias is not None:
            bias = bias.to(x.dtype)
        y_m = F.conv2d(x_m, weight, bias, unit.spec.stride, conv.padding, conv.dilation, conv.groups)
        y[m].copy_(y_m.permute(0, 2, 3, 1))
