"""What a call will run: backend, schedule, and a config for every launch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .kernels.config import (
        BorderConfig,
        BranchConfig,
        GateConfig,
        GatedSelectConfig,
        GradConfig,
        MergedConfig,
        ReductionConfig,
        ResidentConfig,
        SelectConfig,
        WindowConfig,
    )
    from .kernels.geometry import ConvShape
    from .spec import BranchSpec
    from .tuning.lookup import Source

MAX_GATE_TILES = 64
"""The gate walks the partial sums of a channel one tile after another; past this many a reduction of its own is faster.
"""


@dataclass(frozen=True)
class BranchLaunch:
    """Branches `start` to `stop` in one launch, with the config and where it came from.

    `task`: "store", "train", "measure", "pool" or "select", what the launch does with the branches
    (:mod:`.kernels.branch_conv`), or "resident": both of the latter (:mod:`.kernels.unit_resident`).
    """

    start: int
    stop: int
    shape: ConvShape
    config: BranchConfig
    source: Source
    task: str = "store"


@dataclass(frozen=True)
class MergedLaunch:
    """Schedule "merged": the branches' own shape, that on their common lattice, and configs for its two launches."""

    branches: ConvShape
    shape: ConvShape
    border: BorderConfig
    conv: MergedConfig | WindowConfig


@dataclass(frozen=True)
class Plan:
    """The choice for one call.

    Attributes:
        backend, schedule: "triton" and "store", "gated", "recompute", "merged", "resident", "library" or "train", or
            "traced" where ``torch.compile`` traces an operator that plans when it runs; "torch" and "folded", "merged",
            "train" or "train_merged"; or "reference" and "eager".
        passes: predicted passes over one activation tensor, counting every tensor read or written once.
        rejected: what was not taken, and why.
        dtype: of the computation and the result.
        branch_launches, gate, select: configs of the launches; empty and None where there are none.
        gated_select: config of the selection that computes its gate in "gated", else None.
        sources: where the configs are from, one for each lookup.
        folded_launches: of "train" where no branch is written in the forward pass: the launches that take moments, pool
            and select; ``branch_launches`` then convolve in the backward pass.
        pools: of "train", whether the launch that stores the branches pools them too, behind their ReLU.
        reduction: config of the launches of "train" and "library" that reduce over pixels, else None.
        gradient: config of the launches that compute the branches' gradients in "train", None where the library does.
        merged_launch: shapes and configs of the Triton schedule "merged", else None.
        resident: config of the Triton schedule "resident", else None.
        allow_tf32: whether products in fp32 round their operands to TF32.
        is_packed: whether the CPU's schedule "folded" lays out weights for its library once, and computes in
            channels_last.
        samples: how many samples pass through all steps of a schedule on the CPU together.
        merged_branch: the kernel that holds those of all branches, for the CPU's schedules "merged" and "train_merged".
    """

    backend: str
    schedule: str
    passes: float
    dtype: torch.dtype
    rejected: tuple[tuple[str, str], ...] = ()
    branch_launches: tuple[BranchLaunch, ...] = ()
    gate: GateConfig | None = None
    select: SelectConfig | None = None
    gated_select: GatedSelectConfig | None = None
    sources: tuple[Source, ...] = ()
    folded_launches: tuple[BranchLaunch, ...] = ()
    pools: bool = False
    reduction: ReductionConfig | None = None
    gradient: GradConfig | None = None
    merged_launch: MergedLaunch | None = None
    resident: ResidentConfig | None = None
    allow_tf32: bool = False
    is_packed: bool = False
    samples: int = 0
    merged_branch: BranchSpec | None = None

    def rejecting(self, name: str, reason: str) -> Plan:
        """This plan, with one more alternative that was not taken."""
        return replace(self, rejected=(*self.rejected, (name, reason)))
