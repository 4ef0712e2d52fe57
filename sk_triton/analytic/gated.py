"""Config of the selection that computes its gate, from shapes alone, and where it is expected to pay."""

from __future__ import annotations

from math import prod

from ..kernels.config import GatedSelectConfig
from ..kernels.geometry import cdiv, next_power_of_2
from ..workload import Workload
from .gate import gate_config

# Bytes that programs may ask of L2 beyond what a gate's own would: 8 MiB are 1.5 µs on an H100, a launch 2 µs.
MAX_GATED_BYTES = 8 * 2**20
TILE_ELEMENTS = 4096


def gated_select_config(workload: Workload) -> GatedSelectConfig:
    """Config of the selection.

    The same for every batch: smaller tiles would keep more processors busy, and each read the gate's weights again.
    """
    spec = workload.spec
    sizes = spec.num_branches, spec.out_channels, spec.gate_width
    gate = gate_config(*sizes, 1, workload.dtype, workload.chip)
    block_p = min(TILE_ELEMENTS // gate.BLOCK_C, next_power_of_2(prod(workload.output_size)))
    return GatedSelectConfig(
        block_p, gate.BLOCK_C, gate.BLOCK_S, gate.BLOCK_D, gate.BLOCK_T, num_warps=gate.num_warps
    )


def gated_reason(workload: Workload, summed: int) -> str:
    """Why computing the gate in every selecting program is not expected to pay, "" if it is.

    `summed`: pooled tiles of a sample, under the analytic config of the branches, as the selection's is here.
    """
    spec, config = workload.spec, gated_select_config(workload)
    m, c, d = spec.num_branches, spec.out_channels, spec.gate_width
    tiles = cdiv(prod(workload.output_size), config.BLOCK_P)
    blocks = workload.n * cdiv(c, config.BLOCK_C)
    programs = tiles * blocks
    if programs > workload.chip.processors:
        return (
            f"its {programs} programs do not run at once on {workload.chip.processors} processors: the launch that it "
            "saves no longer counts"
        )
    # All weights of the descriptor and the rows of its own channels. A gate of its own has a program for each block of
    # channels.
    weights = d * (c + m * config.BLOCK_C)
    asked = (programs - blocks) * (weights * workload.dtype.itemsize + 4 * summed * c)
    if asked > MAX_GATED_BYTES:
        return (
            f"its programs would read {asked / 2**20:.1f} MiB more of weights and sums than a gate's own; up to "
            f"{MAX_GATED_BYTES // 2**20} MiB cost less than the launch that it saves"
        )
    return ""
