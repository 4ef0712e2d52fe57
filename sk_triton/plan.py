"""What a call will run: backend, schedule, and a config for every launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .kernels.config import BorderConfig, BranchConfig, GateConfig, MergedConfig, SelectConfig
    from .kernels.geometry import ConvShape


@dataclass(frozen=True)
class BranchLaunch:
    """Branches `start` to `stop` in one launch, with the config and where it came from."""

    start: int
    stop: int
    shape: ConvShape
    config: BranchConfig
    source: str


@dataclass(frozen=True)
class MergedLaunch:
    """Schedule "merged": the branches' own shape, that on their common lattice, and configs for its two launches."""

    branches: ConvShape
    shape: ConvShape
    border: BorderConfig
    conv: MergedConfig


@dataclass(frozen=True)
class Plan:
    """The choice for one call.

    Attributes:
        backend, schedule: "triton" and "store", or "reference" and "eager".
        passes: predicted passes over one activation tensor, counting every tensor read or written once.
        rejected: what was not taken, and why.
        dtype: of the computation and the result.
        branch_launches, gate, select: configs of the launches; empty and None for the reference.
        merged: shapes and configs of schedule "merged", else None.
        has_relu, gate_has_relu, allow_tf32: settings of the launches.
    """

    backend: str
    schedule: str
    passes: float
    dtype: torch.dtype
    rejected: tuple[tuple[str, str], ...] = ()
    branch_launches: tuple[BranchLaunch, ...] = ()
    gate: GateConfig | None = None
    select: SelectConfig | None = None
    merged: MergedLaunch | None = None
    has_relu: bool = False
    gate_has_relu: bool = False
    allow_tf32: bool = False
