"""Frozen configs of launches, one entry in JSON each. Fields in capitals are constexprs of branch kernels by name; of
others most are."""

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
class WindowConfig:
    """`branch_conv_window_fwd_kernel`: BLOCK_N samples x BLOCK_H strips of RUN_H rows x BLOCK_W lanes of RUN_W pixels
    per tile, 8 lanes in all. Each of num_warps takes a channel block, side by side.

    HOLD_WEIGHTS: all branches' weights stay in registers; else a branch's are read anew for each row.
    PREFETCH: rows are fetched ahead of their loads, by one warp into L2, by several into L1; only on NVIDIA, from sm_90
    on.
    SPARSE: weights without the zeros of narrow groups (`geometry.is_sparse`), and a row is loaded ahead; on NVIDIA.
    """

    BLOCK_CI: int
    BLOCK_CO: int
    BLOCK_H: int
    BLOCK_W: int
    RUN_H: int
    RUN_W: int
    BLOCK_N: int = 1
    HOLD_WEIGHTS: bool = True
    PREFETCH: bool = False
    SPARSE: bool = False
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
class HeldConfig(ColumnConfig):
    """`branch_conv_held_fwd_kernel`: as `ColumnConfig`; a program walks TILES_PER_PROGRAM tiles, and holds weights of
    the first HELD_COLUMNS kernel columns of a branch meanwhile.
    """

    HELD_COLUMNS: int = 1
    TILES_PER_PROGRAM: int = 1


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
    """`gate_fwd_kernel`: BLOCK_N samples x BLOCK_C channels; BLOCK_S channels of s, BLOCK_D entries of z at a time, at
    most BLOCK_T tiles of each sum.
    """

    BLOCK_N: int
    BLOCK_S: int
    BLOCK_D: int
    BLOCK_C: int
    BLOCK_T: int = 1
    num_warps: int = 4


@dataclass(frozen=True)
class SelectConfig:
    """`select_fwd_kernel`: BLOCK_P pixels x BLOCK_C channels per program."""

    BLOCK_P: int
    BLOCK_C: int
    num_warps: int = 4


@dataclass(frozen=True)
class GatedSelectConfig:
    """`gated_select_fwd_kernel`: BLOCK_P pixels x BLOCK_C channels per program, the rest as in `GateConfig`."""

    BLOCK_P: int
    BLOCK_C: int
    BLOCK_S: int
    BLOCK_D: int
    BLOCK_T: int = 1
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


@dataclass(frozen=True)
class ResidentConfig:
    """`unit_resident_fwd_kernel`: tiles as `branch`, of one sample, to pool and to select.

    A gate item is GATE_CHANNELS channels, BLOCK_C at a time; it takes BLOCK_T tiles and BLOCK_S channels of the pooled
    sums at a time, and z of BLOCK_D entries as a whole. A program takes ITEMS_PER_TURN adjacent items at a time.
    GATE_LAG and SELECT_LAG: samples between a sample's pooling and its gate, its selection.
    `programs_per_processor` run at once on each of a chip's `processors`, with at most `maxnreg` registers a thread;
    None leaves that to the compiler.
    """

    branch: StreamConfig | ColumnConfig
    GATE_LAG: int
    SELECT_LAG: int
    GATE_CHANNELS: int
    BLOCK_C: int
    BLOCK_T: int
    BLOCK_S: int
    BLOCK_D: int
    ITEMS_PER_TURN: int
    programs_per_processor: int
    processors: int
    maxnreg: int | None = None


BranchConfig = StreamConfig | WindowConfig | ColumnConfig | TapConfig | DepthwiseConfig


@dataclass(frozen=True)
class GradStreamConfig:
    """`branch_grad_stream_kernel`: tiles of RUN_H rows x 16 runs of two pixels, down which a program walks; it does so
    for TILES_PER_PROGRAM, or more (`grad_geometry.grad_programs`). Each of its num_warps takes a channel block."""

    RUN_H: int
    TILES_PER_PROGRAM: int
    num_warps: int = 1
    num_stages: int = 1


@dataclass(frozen=True)
class GradWideConfig:
    """`branch_grad_weight_kernel`: tiles of RUN_H rows x 16 pixels, halo included, of which a program walks
    TILES_PER_PROGRAM, or as many fewer as a branch that reaches less far has; `branch_grad_data_kernel`: tiles of
    DATA_RUN_H rows x 16 pixels, one a program. PREFETCH: the former's next tile is fetched into L2; only on NVIDIA,
    from sm_90 on."""

    RUN_H: int
    TILES_PER_PROGRAM: int
    DATA_RUN_H: int = 4
    num_warps: int = 1
    num_stages: int = 1
    PREFETCH: bool = False


GradConfig = GradStreamConfig | GradWideConfig

Config = (
    BranchConfig
    | GateConfig
    | SelectConfig
    | GatedSelectConfig
    | MergedConfig
    | BorderConfig
    | ReductionConfig
    | GradConfig
)
"""What can be tuned."""
CONFIGS: dict[str, type] = {
    "stream": StreamConfig,
    "window": WindowConfig,
    "column": ColumnConfig,
    "held": HeldConfig,
    "tap": TapConfig,
    "depthwise": DepthwiseConfig,
    "gate": GateConfig,
    "select": SelectConfig,
    "gated_select": GatedSelectConfig,
    "border": BorderConfig,
    "merged": MergedConfig,
    "reduction": ReductionConfig,
    "grad_stream": GradStreamConfig,
    "grad_wide": GradWideConfig,
}
"""Its names in JSON."""
