"""The branches in a training forward pass: stored, or convolved three times and never written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.batch_stats import moment_tiles, tile_moments_fwd
from ..kernels.branch_conv import branch_measure_fwd, branch_pool_fwd, branch_select_fwd
from ..kernels.geometry import tile_count
from ..kernels.norm_params import norm_scale_shift
from ..kernels.pooled_moments import pooled_moments_fwd
from ..kernels.select import select_fwd
from ..plan import BranchLaunch, Plan
from .branches import (
    BranchNorm,
    BranchVectors,
    Moments,
    TrainingUnit,
    convolve,
    empty_moments,
    launch_settings,
    operands,
    packed_weights,
    sums_over_pixels,
)
from .tape import Tape


class StoredBranches:
    """Convolutions that are written once, ``y``, and read to pool, unless what wrote them has, and to select.

    Attributes:
        y: ``[M, N, H', W', C]``.
        affine: what multiplies the sums of :meth:`pool`, ``[2, M, C]``; None where the branches have no norms.
    """

    def __init__(self, x: Tensor, unit: TrainingUnit, plan: Plan, vectors: BranchVectors, tape: Tape) -> None:
        self.unit, self.plan, self.tape = unit, plan, tape
        self.affine = vectors.affine if unit.spec.branch_norm else None
        self.y, self._moments, self._pooled = convolve(x, unit, plan, vectors, tape)

    def moments(self) -> list[Moments]:
        """Moments of every branch's convolution, by launches."""
        measured = {i for members, _ in self._moments for i in range(members.start, members.stop)}
        found = list(self._moments)
        config = self.plan.reduction
        assert config is not None
        m, *sizes, c = self.y.shape
        for i in {*range(m)} - measured:
            size = (1, 3, moment_tiles(math.prod(sizes), config), c)
            moments = self.y.new_empty(size, dtype=torch.float32)
            self.tape.run(tile_moments_fwd(self.y[i], moments[0], config=config))
            found.append((slice(i, i + 1), moments))
        return found

    def pool(self, norm: BranchNorm) -> Tensor:
        """Sums over pixels fp32: `active` and `pooled` of `pooled_moments_fwd`, ``[2, tiles, N, M, C]``, or of all
        branches, ``[1, tiles, N, 1, C]``, as the convolution left them."""
        if self._pooled is not None:
            return of_all_branches(self._pooled)
        return sums_over_pixels(
            pooled_moments_fwd, (self.y, *norm), 2, self.y, self.unit, self.plan, self.tape
        )

    def select(self, norm: BranchNorm, attention: Tensor, v: Tensor) -> None:
        """Write the output ``v`` (Eq. 6)."""
        assert self.plan.select is not None
        self.tape.run(
            select_fwd(
                self.y,
                attention,
                v,
                norm=norm if self.unit.spec.branch_norm else None,
                has_relu=self.unit.spec.branch_has_relu,
                config=self.plan.select,
            )
        )


class FoldedBranches:
    """Convolutions that are computed for their moments, again to pool and again to select, by then with the norms in
    their weights: `y` is empty, and no `affine` multiplies what is pooled."""

    affine = None

    def __init__(self, x: Tensor, unit: TrainingUnit, plan: Plan, vectors: BranchVectors, tape: Tape) -> None:
        self.x, self.unit, self.plan, self.vectors, self.tape = x, unit, plan, vectors, tape
        self.y = x.new_empty(0)
        self._fold: tuple[Tensor, Tensor] | None = None

    def moments(self) -> list[Moments]:
        """Moments of every branch's convolution, by launches."""
        launch = self.plan.folded_launches[0]
        moments = empty_moments(self.x, launch, self.unit)
        packed, shift = operands(launch, self.unit, self.x.dtype, self.vectors, self.tape)
        self.tape.run(
            branch_measure_fwd(self.x, packed, shift, moments, **launch_settings(launch, self.plan))
        )
        return [(slice(launch.start, launch.stop), moments)]

    def pool(self, norm: BranchNorm) -> Tensor:
        """Sums of all branches over pixels, ``[1, tiles, N, 1, C]`` fp32."""
        launch, spec = self.plan.folded_launches[1], self.unit.spec
        h, w = spec.output_size(*self.x.shape[2:])
        size = (self.x.shape[0], tile_count(launch.shape, launch.config, h, w), spec.out_channels)
        partial = self.x.new_empty(size, dtype=torch.float32)
        settings = launch_settings(launch, self.plan)
        packed, shift = self._normalizing(launch, norm)
        self.tape.run(
            branch_pool_fwd(
                self.x, packed, shift, partial, has_relu=self.unit.spec.branch_has_relu, **settings
            )
        )
        return of_all_branches(partial)

    def select(self, norm: BranchNorm, attention: Tensor, v: Tensor) -> None:
        """Write the output ``v`` (Eq. 6)."""
        launch = self.plan.folded_launches[2]
        settings = launch_settings(launch, self.plan)
        packed, shift = self._normalizing(launch, norm)
        self.tape.run(
            branch_select_fwd(
                self.x, packed, shift, attention, v, has_relu=self.unit.spec.branch_has_relu, **settings
            )
        )

    def _normalizing(self, launch: BranchLaunch, norm: BranchNorm) -> tuple[Tensor, Tensor | None]:
        """Packed weights and shift ``[M, C]`` with which the convolutions come out normalized."""
        if not self.unit.spec.branch_norm:
            return operands(launch, self.unit, self.x.dtype, self.vectors, self.tape)
        if self._fold is None:
            scale, shift = torch.empty_like(norm.mean), torch.empty_like(norm.mean)
            _, affine, biases = self.vectors
            self.tape.run(norm_scale_shift(norm.mean, norm.rstd, affine, biases, scale, shift))
            self._fold = scale, shift
        scale, shift = self._fold
        return packed_weights(launch, self.unit, self.x.dtype, self.tape, scale), shift


def of_all_branches(partial: Tensor) -> Tensor:
    """``[N, tiles, C]`` as the gate takes sums over pixels: ``[1, tiles, N, 1, C]``."""
    return partial.transpose(0, 1)[None, :, :, None]
