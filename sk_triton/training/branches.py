"""The branches in training: their convolutions, with the moments of these, and sums over their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.branch_conv import branch_conv_fwd, branch_train_fwd
from ..kernels.gather import branch_weight_launch
from ..kernels.geometry import cdiv, tile_count
from ..kernels.norm_params import stack_vectors
from ..kernels.running import Running
from ..plan import BranchLaunch, Plan
from ..spec import SKSpec
from .library import convolution_calls
from .norms import NormSettings
from .tape import Tape
from .tensors import UnitTensors

Moments = tuple[slice, Tensor]
"""Some branches, and ``[M, 3, tiles, C]`` fp32: number, mean and centred second moment of a tile's values."""


class TrainingUnit(NamedTuple):
    """What a call computes with: `running` holds mean and variance of each norm of kind "r"; `updates`, of each norm
    what the kernels bring up to date, or nothing at all."""

    spec: SKSpec
    tensors: UnitTensors
    running: tuple[Tensor, ...]
    norms: NormSettings
    updates: tuple[Running | None, ...] = ()


class BranchVectors(NamedTuple):
    """Parameters of the branches' norms and convolutions as the kernels read them, fp32.

    Attributes:
        stacked: ``[rows, C]``: beta of every branch and gamma of every branch, where they have norms, then the biases
            of the convolutions, where these have some. Empty without either.
        affine: its first rows, ``[2, M, C]``.
        biases: its last ones, ``[M, C]``, or None.
    """

    stacked: Tensor
    affine: Tensor
    biases: Tensor | None

    @classmethod
    def of(cls, stacked: Tensor, unit: TrainingUnit) -> BranchVectors:
        m = unit.spec.num_branches
        rows = 2 * m * unit.spec.branch_norm
        affine = stacked[:rows].view(2, m, -1) if rows else stacked
        return cls(stacked, affine, stacked[rows:] if stacked.shape[0] > rows else None)


class BranchNorm(NamedTuple):
    """The branches' norms as the kernels read them, ``[M, C]`` fp32 each; all empty without norms."""

    mean: Tensor
    rstd: Tensor
    gamma: Tensor
    beta: Tensor


def stack(unit: TrainingUnit, x: Tensor, tape: Tape) -> BranchVectors:
    """The unit's vectors, from its parameters; 0 and 1 stand for those that a norm lacks."""
    t, m = unit.tensors, unit.spec.num_branches
    vectors: list[Tensor | None] = []
    if unit.spec.branch_norm:
        vectors += [*t.betas, *t.gammas]
    vectors += [bias for bias in t.biases if bias is not None]
    if not vectors:
        return BranchVectors.of(x.new_empty(0, dtype=torch.float32), unit)
    stacked = x.new_empty((len(vectors), unit.spec.out_channels), dtype=torch.float32)
    defaults = [1.0 if m <= i < 2 * m else 0.0 for i in range(len(vectors))]
    tape.run(stack_vectors([tape.contiguous_or_none(vector) for vector in vectors], defaults, stacked))
    return BranchVectors.of(stacked, unit)


def branch_norm(mean: Tensor, rstd: Tensor, vectors: BranchVectors, unit: TrainingUnit) -> BranchNorm:
    if not unit.spec.branch_norm:
        return BranchNorm(mean, rstd, mean, mean)
    beta, gamma = vectors.affine.unbind(0)
    return BranchNorm(mean, rstd, gamma, beta)


class Convolved(NamedTuple):
    """The branches' convolutions with their biases.

    Attributes:
        y: ``[M, N, H', W', C]``; behind the ReLU where `pooled` is given, which has the same gradient.
        moments: for each launch that takes them its branches' moments.
        pooled: ``[N, tiles, C]`` fp32, sums of all branches over pixels, where one launch stores and pools.
    """

    y: Tensor
    moments: list[Moments]
    pooled: Tensor | None


def convolve(x: Tensor, unit: TrainingUnit, plan: Plan, vectors: BranchVectors, tape: Tape) -> Convolved:
    """The branches' convolutions of an input with adjacent channels."""
    spec = unit.spec
    n, _, h_in, w_in = x.shape
    h, w = spec.output_size(h_in, w_in)
    y = x.new_empty((spec.num_branches, n, h, w, spec.out_channels))
    if not plan.branch_launches:
        for call in convolution_calls(x, y, spec, unit.tensors):
            tape.call(call)
    found: list[Moments] = []
    pooled = None
    for launch in plan.branch_launches:
        members = slice(launch.start, launch.stop)
        x_in = x[:, launch.start * spec.branch_in_channels :] if spec.split_input else x
        packed, shift = operands(launch, unit, x.dtype, vectors, tape)
        settings = launch_settings(launch, plan)
        if launch.task == "train":
            moments = empty_moments(x, launch, unit)
            tape.run(branch_train_fwd(x_in, packed, shift, y[members], moments, **settings))
            found.append((members, moments))
        else:
            count = tile_count(launch.shape, launch.config, h, w)
            partial = x.new_empty((n, count, spec.out_channels), dtype=torch.float32)
            has_relu = plan.pools and spec.branch_has_relu
            tape.run(branch_conv_fwd(x_in, packed, shift, y[members], partial, has_relu=has_relu, **settings))
            if plan.pools:
                pooled = partial
    return Convolved(y, found, pooled)


def operands(
    launch: BranchLaunch, unit: TrainingUnit, dtype: torch.dtype, vectors: BranchVectors, tape: Tape
) -> tuple[Tensor, Tensor | None]:
    """Packed weights and biases ``[M, C]`` of the branches of a launch."""
    members = slice(launch.start, launch.stop)
    packed = packed_weights(launch, unit, dtype, tape)
    return packed, None if vectors.biases is None else vectors.biases[members]


def packed_weights(
    launch: BranchLaunch, unit: TrainingUnit, dtype: torch.dtype, tape: Tape, scale: Tensor | None = None
) -> Tensor:
    """Packed weights of the branches of a launch, times a `scale` ``[M, C]`` of these."""
    weights = [tape.filling_memory(weight) for weight in unit.tensors.weights[launch.start : launch.stop]]
    packed, gather = branch_weight_launch(weights, launch.shape, launch.config, dtype, scale)
    tape.run(gather)
    return packed


def launch_settings(launch: BranchLaunch, plan: Plan) -> dict[str, Any]:
    """What the launchers of the branch kernels take of a plan."""
    return {"shape": launch.shape, "allow_tf32": plan.allow_tf32, "config": launch.config}


def empty_moments(x: Tensor, launch: BranchLaunch, unit: TrainingUnit) -> Tensor:
    """For the moments of a launch on x: ``[M, 3, tiles, C]`` fp32."""
    h, w = unit.spec.output_size(*x.shape[2:])
    count = cdiv(x.shape[0], launch.config.BLOCK_N) * tile_count(launch.shape, launch.config, h, w)
    size = (launch.stop - launch.start, 3, count, unit.spec.out_channels)
    return x.new_empty(size, dtype=torch.float32)


def sums_over_pixels(
    kernel: Any, inputs: Sequence[Tensor], count: int, y: Tensor, unit: TrainingUnit, plan: Plan, tape: Tape
) -> Tensor:
    """The `count` sums over the pixels of ``y``, ``[count, tiles, N, M, C]`` fp32, of a kernel that takes them by
    tiles."""
    config = plan.reduction
    assert config is not None
    m, n, h, w, c = y.shape
    partial = y.new_empty((count, cdiv(h * w, config.BLOCK_P * config.STEPS), n, m, c), dtype=torch.float32)
    settings = {"has_norm": unit.spec.branch_norm, "has_relu": unit.spec.branch_has_relu, "config": config}
    tape.run(kernel(*inputs, *partial.unbind(0), **settings))
    return partial
