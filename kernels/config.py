"""One frozen config per kernel. Keys equal the kernels' constexpr names, so a JSON entry is a config."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StreamConfig:
    """`branch_conv_stream_fwd_kernel`: BLOCK_N samples x BLOCK_H column runs x BLOCK_W row runs per tile."""

    BLOCK_CI: int
    BLOCK_CO: int
    BLOCK_H: int
    BLOCK_W: int
    RUN_H: int
    RUN_W: int
    BLOCK_N: int = 1
    BLOCKS_PER_PROGRAM: int = 1
    num_warps: int = 1
    num_stages: int = 1


@dataclass(frozen=True)
class ColumnConfig:
    """`branch_conv_column_fwd_kernel`: BLOCK_N samples x BLOCK_H columns of RUN_H outputs x BLOCK_W pixels per tile.

    ROWS input rows are held at a time; UNROLL: the loop over kernel columns is unrolled.
    """

    BLOCK_CI: int
    BLOCK_CO: int
    BLOCK_H: int
    BLOCK_W: int
    RUN_H: int
    BLOCK_N: int = 1
    ROWS: int = 8
    UNROLL: bool = False
    num_warps: int = 1
    num_stages: int = 1


@dataclass(frozen=True)
class TapConfig:
    """`branch_conv_tap_fwd_kernel`: BLOCK_N samples x BLOCK_H rows x BLOCK_W row runs per tile."""

    BLOCK_CI: int
    BLOCK_CO: int
    BLOCK_H: int
    BLOCK_W: int
    RUN_W: int = 1
    BLOCK_N: int = 1
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class DepthwiseConfig:
    """`branch_conv_depthwise_fwd_kernel`: BLOCK_N samples x BLOCK_H column runs x BLOCK_W columns per tile."""

    BLOCK_C: int
    BLOCK_H: int
    BLOCK_W: int
    RUN_H: int = 1
    BLOCK_N: int = 1
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class GateConfig:
    """`gate_fwd_kernel`: BLOCK_N samples x BLOCK_C channels; BLOCK_S channels of s, BLOCK_D entries of z at a time."""

    BLOCK_N: int
    BLOCK_S: int
    BLOCK_D: int
    BLOCK_C: int
    num_warps: int = 4


@dataclass(frozen=True)
class SelectConfig:
    """`select_fwd_kernel`: BLOCK_P pixels x BLOCK_C channels per program."""

    BLOCK_P: int
    BLOCK_C: int
    num_warps: int = 4


@dataclass(frozen=True)
class ReductionConfig:
    """Kernels that reduce over pixels: STEPS blocks of BLOCK_P pixels x BLOCK_C channels per program."""

    BLOCK_P: int
    BLOCK_C: int
    STEPS: int
    num_warps: int = 4


@dataclass(frozen=True)
class MergedConfig(StreamConfig):
    """`merged_conv_fwd_kernel`: as `StreamConfig`, of one sample; a program walks TILES_PER_PROGRAM tiles."""

    TILES_PER_PROGRAM: int = 1


@dataclass(frozen=True)
class BorderConfig:
    """`border_sums_fwd_kernel`: BLOCK_C channels x BLOCK_W columns x STRIPS_PER_PROGRAM strips of at most ROWS rows."""

    BLOCK_C: int
    BLOCK_W: int
    ROWS: int
    STRIPS_PER_PROGRAM: int
    num_warps: int = 1


BranchConfig = StreamConfig | ColumnConfig | TapConfig | DepthwiseConfig
