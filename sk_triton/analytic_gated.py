"""Config of the selection that computes its gate, from shapes alone, and where it is expected to pay."""

from __future__ import annotations

from math import prod

import torch

from .analytic import gate_config
from .chips import Chip
from .kernels.config import GatedSelectConfig
from .kernels.geometry import cdiv, next_power_of_2
from .workload import Workload

# Bytes that programs may ask of L2 beyond what a gate's own would: 8 MiB are 1.5 µs on an H100, a launch 2 µs.
MAX_GATED_BYTES = 8 * 2**20
TILE_ELEMENTS = 4096


def gated_select_config(
    pixels: int, m: int, c: int, d: int, dtype: torch.dtype, chip: Chip
) -> GatedSelectConfig:
    """Config for outputs of `pixels` pixels and `c` channels, `m` branches and a descriptor of `d` entries.

    The same for every batch: smaller tiles would keep more processors busy, and each read the gate's weights again.
    """
    gate = gate_config(m, c, d, 1, dtype, chip)
    block_p = min(TILE_ELEMENTS // gate.BLOCK_C, next_power_of_2(pixels))
    return GatedSelectConfig(
        block_p, gate.BLOCK_C, gate.BLOCK_S, gate.BLOCK_D, gate.BLOCK_T, num_warps=gate.num_warps
    )


def gated_reason(workload: Workload, summed: int, config: GatedSelectConfig) -> str:
    """Why computing the gate in every selecting program is not expected to pay, "" if it is.

    `summed`: pooled tiles of a sample; `config`: the analytic one, since a tuned one may have smaller tiles.
    """
    spec = workload.spec
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
