"""The branches in a training forward pass: stored, or convolved three times and never written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kernels.batch_stats import moment_tiles, tile_moments_fwd
from .kernels.branch_conv import branch_measure_fwd, branch_pool_fwd, branch_select_fwd
from .kernels.geometry import tiles
from .kernels.packing import pack_branch_weights
from .kernels.pooled_moments import pooled_moments_fwd
from .kernels.select import select_fwd
from .plan import BranchLaunch, Plan
from .training_branches import (
    BranchNorm,
    Moments,
    TrainingUnit,
    conv_settings,
    convolve,
    empty_moments,
    operands,
    stacked_biases,
    sums_over_pixels,
)


class StoredBranches:
    """Convolutions that are written once, ``y``, and read to pool and to select.

    Attributes:
        y: ``[M, N, H', W', C]``.
        sums: ``[2, N, M, C]`` fp32, `active` and `pooled` of `pooled_moments_fwd`, once :meth:`pool` has run.
    """

    def __init__(self, x: Tensor, unit: TrainingUnit, plan: Plan) -> None:
        self.unit, self.plan = unit, plan
        self.y, self._moments = convolve(x, unit, plan)
        self.sums = self.y.new_empty(0, dtype=torch.float32)

    def moments(self) -> list[Moments]:
        """Moments of every branch's convolution, by launches."""
        measured = {i for members, _ in self._moments for i in range(members.start, members.stop)}
        found = list(self._moments)
        config = self.plan.reduction
        assert config is not None
        m, *sizes, c = self.y.shape
        for i in {*range(m)} - measured:
            moments = self.sums.new_empty((1, 3, moment_tiles(math.prod(sizes), config), c))
            tile_moments_fwd(self.y[i : i + 1], moments, config=config)()
            found.append((slice(i, i + 1), moments))
        return found

    def pool(self, norm: BranchNorm) -> Tensor:
        """The pooled features ``[N, C]`` fp32 (Eqs. 1 and 2)."""
        self.sums = sums_over_pixels(
            pooled_moments_fwd, (self.y, *norm.operands), 2, self.y, self.unit, self.plan
        )
        pixels = self.y.shape[2] * self.y.shape[3]
        if not self.unit.spec.branch_norm:
            return self.sums[1].sum(1) / pixels
        return (self.sums * norm.affine[:, None]).sum((0, 2)) / pixels

    def select(self, norm: BranchNorm, attention: Tensor, v: Tensor) -> None:
        """Write the output ``v`` (Eq. 6)."""
        assert self.plan.select is not None
        select_fwd(
            self.y,
            attention,
            v,
            norm=norm.operands if self.unit.spec.branch_norm else None,
            has_relu=self.plan.has_relu,
            config=self.plan.select,
        )()


class FoldedBranches:
    """Convolutions that are computed for their moments, again to pool and again to select, by then with the norms in
    their weights; `y` and `sums` are empty."""

    def __init__(self, x: Tensor, unit: TrainingUnit, plan: Plan) -> None:
        self.x, self.unit, self.plan = x, unit, plan
        self.y = x.new_empty(0)
        self.sums = x.new_empty(0, dtype=torch.float32)
        self._scaled: tuple[list[Tensor], Tensor] | None = None

    def moments(self) -> list[Moments]:
        """Moments of every branch's convolution, by launches."""
        launch = self.plan.folded_launches[0]
        moments = empty_moments(self.x, launch, self.unit)
        packed, shift = operands(launch, self.unit, self.x.dtype)
        branch_measure_fwd(self.x, packed, shift, moments, **conv_settings(launch, self.plan))()
        return [(slice(launch.start, launch.stop), moments)]

    def pool(self, norm: BranchNorm) -> Tensor:
        """The pooled features ``[N, C]`` fp32 (Eqs. 1 and 2)."""
        launch, spec = self.plan.folded_launches[1], self.unit.spec
        h, w = spec.output_size(*self.x.shape[2:])
        size = (self.x.shape[0], math.prod(tiles(launch.shape, launch.config, h, w)), spec.out_channels)
        partial = self.x.new_empty(size, dtype=torch.float32)
        settings = conv_settings(launch, self.plan)
        packed, shift = self._normalizing(launch, norm)
        branch_pool_fwd(self.x, packed, shift, partial, has_relu=self.plan.has_relu, **settings)()
        return partial.sum(1) / (h * w)

    def select(self, norm: BranchNorm, attention: Tensor, v: Tensor) -> None:
        """Write the output ``v`` (Eq. 6)."""
        launch = self.plan.folded_launches[2]
        settings = conv_settings(launch, self.plan)
        packed, shift = self._normalizing(launch, norm)
        branch_select_fwd(self.x, packed, shift, attention, v, has_relu=self.plan.has_relu, **settings)()

    def _normalizing(self, launch: BranchLaunch, norm: BranchNorm) -> tuple[Tensor, Tensor | None]:
        """Packed weights and shift ``[M, C]`` with which the convolutions come out normalized."""
        if not self.unit.spec.branch_norm:
            return operands(launch, self.unit, self.x.dtype)
        if self._scaled is None:
            scale = norm.gamma * norm.rstd
            scaled = [
                weight.float() * scale_m[:, None, None, None]
                for weight, scale_m in zip(self.unit.tensors.weights, scale.unbind(0), strict=True)
            ]
            biases = stacked_biases(self.unit)
            away = norm.mean if biases is None else norm.mean - biases
            self._scaled = scaled, torch.addcmul(norm.beta, scale, away, value=-1)
        weights, shift = self._scaled
        return pack_branch_weights(weights, launch.shape, launch.config, self.x.dtype), shift
