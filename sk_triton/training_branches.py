"""The branches in training: their convolutions with the moments of these, and the gradients of these."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.branch_conv import branch_conv_fwd, branch_train_fwd
from .kernels.geometry import cdiv, tiles
from .kernels.norm_bwd import norm_bwd
from .kernels.packing import pack_branch_weights
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
    for m, (x_m, conv) in enumerate(zip(_inputs(x, unit.spec), unit.spec.branches, strict=True)):
        weight, bias = unit.tensors.weights[m].to(x.dtype), unit.tensors.biases[m]
        if bias is not None:
            bias = bias.to(x.dtype)
        y_m = F.conv2d(x_m, weight, bias, unit.spec.stride, conv.padding, conv.dilation, conv.groups)
        y[m].copy_(y_m.permute(0, 2, 3, 1))


def branch_backward(
    x: Tensor,
    dv: Tensor,
    y: Tensor,
    attention: Tensor,
    pooled_grad: Tensor,
    norm: BranchNorm,
    dbeta: Tensor,
    dgamma: Tensor,
    unit: TrainingUnit,
    plan: Plan,
    needs: list[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the input and of the convolutions' weights.

    Args:
        x: ``[N, in_channels, H, W]`` with adjacent channels.
        dv: ``[N, C, H', W']`` with adjacent channels and equally spaced pixels.
        y: ``[M, N, H', W', C]``, the branches' convolutions.
        attention: ``[N, M, C]`` fp32.
        pooled_grad: ``[N, C]`` fp32, the gradient of every pixel's share in the pooled features.
        norm: mean, rstd, gamma, beta: ``[M, C]`` fp32 each.
        dbeta, dgamma: ``[M, C]`` fp32, the norms' gradients over the number of values; 0 for running statistics.
        needs: whether the input's, and each weight's, gradient is wanted.

    Returns:
        ``[N, in_channels, H, W]``, and M times ``[C, C_branch_in / groups, k, k]``, in the dtype of x; None where not
        wanted.
    """
    spec = unit.spec
    assert plan.select is not None
    dy = torch.empty_like(y)
    norm_bwd(
        dv,
        y,
        attention,
        pooled_grad,
        *norm,
        dbeta,
        dgamma,
        dy,
        has_norm=spec.branch_norm,
        has_relu=plan.has_relu,
        config=plan.select,
    )()
    inputs, weights = [], []
    for m, (x_m, conv) in enumerate(zip(_inputs(x, spec), spec.branches, strict=True)):
        if not (needs[0] or needs[1 + m]):
            weights.append(None)
            continue
        dx_m, dw_m, _ = torch.ops.aten.convolution_backward(
            dy[m].permute(0, 3, 1, 2),
            x_m,
            unit.tensors.weights[m].to(x.dtype),
            None,
            [spec.stride] * 2,
            [conv.padding] * 2,
            [conv.dilation] * 2,
            False,
            [0, 0],
            conv.groups,
            [needs[0], needs[1 + m], False],
        )
        inputs.append(dx_m)
        weights.append(dw_m)
    if not needs[0]:
        return None, weights
    if spec.split_input:
        return torch.cat(inputs, 1), weights
    dx = inputs[0]
    for dx_m in inputs[1:]:
        dx = dx + dx_m
    return dx, weights


def _inputs(x: Tensor, spec: SKSpec) -> list[Tensor]:
    """What each branch reads."""
    if spec.split_input:
        return list(x.split(spec.branch_in_channels, 1))
    return [x] * spec.num_branches
