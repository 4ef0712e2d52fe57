"""What a branch-convolution launch computes (`ConvShape`) and how a config cuts it into blocks (`Blocking`)."""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

import torch

from .config import (
    BranchConfig,
    ColumnConfig,
    DepthwiseConfig,
    HeldConfig,
    MergedConfig,
    ResidentConfig,
    StreamConfig,
    TapConfig,
    WindowConfig,
)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class ConvShape:
    """Branches that share a launch: equal channels, groups and stride; kernel size and dilation of their own.

    `c_in` and `c_out` are the channels of one branch; with `is_split`, branch m reads channels from `m * c_in` on.
    Padding is `dilation * (kernel - 1) / 2`.
    """

    c_in: int
    c_out: int
    groups: int
    kernels: tuple[int, ...]
    dilations: tuple[int, ...]
    stride: int = 1
    is_split: bool = False

    @property
    def group_channels(self) -> int:
        """Channels of a group, of inputs or of outputs, whichever are more."""
        return max(self.c_in, self.c_out) // self.groups

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.c_in == self.c_out

    def output_size(self, h: int, w: int) -> tuple[int, int]:
        """Output pixels for an input of `h` x `w` pixels."""
        return (h - 1) // self.stride + 1, (w - 1) // self.stride + 1


@dataclass(frozen=True)
class Blocking:
    """Static sizes of one (shape, config) pair; the packed weights are laid out by it.

    A channel block covers `groups_per_block` whole groups, or is one of `blocks_per_group` blocks of one group. Blocks
    beyond the last group fill up the last program; their weights are zero.
    `chunks` are the pieces of a block's inputs. By branch: outputs of a run are `spacings[m]` apart, and `steps[m]`
    points of the branch's lattice; a product's operand spans `spans[m]` of these; `taps_w[m]` kernel columns are
    products of their own. `offsets[m]` is where branch m's weights start inside a channel block's, `offsets[-1]` the
    block's length.
    """

    groups_per_block: int
    blocks_per_group: int
    channels_ci: int
    channels_co: int
    chunks: int
    blocks: int
    spacings: tuple[int, ...]
    steps: tuple[int, ...]
    spans: tuple[int, ...]
    taps_w: tuple[int, ...]
    offsets: tuple[int, ...]


def blocks_per_program(config: BranchConfig) -> int:
    """How many channel blocks a program takes."""
    if isinstance(config, WindowConfig):
        return config.num_warps
    return config.BLOCKS_PER_PROGRAM if isinstance(config, StreamConfig) else 1


@lru_cache(maxsize=1024)
def blocking(shape: ConvShape, config: BranchConfig) -> Blocking:
    # A 1x1 branch has no neighbouring taps: its lattice pitch is the stride, so that runs stay dense.
    dilations = lattice(shape)
    spacings = tuple(d // gcd(d, shape.stride) for d in dilations)
    steps = tuple(shape.stride // gcd(d, shape.stride) for d in dilations)
    if isinstance(config, DepthwiseConfig):
        sizes = [k * k for k in shape.kernels]
        return Blocking(
            groups_per_block=config.BLOCK_C,
            blocks_per_group=1,
            channels_ci=config.BLOCK_C,
            channels_co=config.BLOCK_C,
            chunks=1,
            blocks=cdiv(shape.c_out, config.BLOCK_C),
            spacings=spacings,
            steps=steps,
            spans=(1,) * len(sizes),
            taps_w=shape.kernels,
            offsets=_starts(sizes),
        )
    ci_per_group, co_per_group = shape.c_in // shape.groups, shape.c_out // shape.groups
    groups_per_block = min(shape.groups, config.BLOCK_CI // ci_per_group, config.BLOCK_CO // co_per_group)
    holds_inputs = ci_per_group <= config.BLOCK_CI
    holds_outputs = co_per_group <= config.BLOCK_CO or isinstance(config, ColumnConfig)
    if not (isinstance(config, TapConfig) or (holds_inputs and holds_outputs)):
        raise ValueError(
            f"config: a channel block of {config.BLOCK_CI} inputs and {config.BLOCK_CO} outputs cannot hold a group of "
            f"{ci_per_group} and {co_per_group}; only the tap formulation splits groups, and columns a group's outputs"
        )
    groups_per_block = max(1, groups_per_block)
    blocks_per_group = cdiv(co_per_group, config.BLOCK_CO)
    channels_ci = groups_per_block * ci_per_group
    chunks = cdiv(channels_ci, config.BLOCK_CI)
    run_w = row_run(config)
    if run_w > 1:
        spans = tuple(
            next_power_of_2((run_w - 1) * step + k) for step, k in zip(steps, shape.kernels, strict=True)
        )
        taps_w = (1,) * len(spans)
    else:
        spans, taps_w = (1,) * len(steps), shape.kernels
    per_program = blocks_per_program(config)
    density = 2 if isinstance(config, WindowConfig) and config.SPARSE else 1
    sizes = [
        k * t * chunks * run_w * config.BLOCK_CO * span * config.BLOCK_CI // density
        for k, t, span in zip(shape.kernels, taps_w, spans, strict=True)
    ]
    return Blocking(
        groups_per_block=groups_per_block,
        blocks_per_group=blocks_per_group,
        channels_ci=channels_ci,
        channels_co=groups_per_block * co_per_group,
        chunks=chunks,
        blocks=cdiv(cdiv(shape.groups, groups_per_block) * blocks_per_group, per_program) * per_program,
        spacings=spacings,
        steps=steps,
        spans=spans,
        taps_w=taps_w,
        offsets=_starts(sizes),
    )


def is_full(shape: ConvShape, config: StreamConfig | WindowConfig | ColumnConfig | TapConfig) -> bool:
    """Whether every channel block is full, so that channels need no mask."""
    layout = blocking(shape, config)
    return (
        layout.channels_ci == layout.chunks * config.BLOCK_CI
        and layout.channels_co == layout.blocks_per_group * config.BLOCK_CO
        and layout.blocks * layout.groups_per_block == layout.blocks_per_group * shape.groups
    )


def is_sparse(shape: ConvShape) -> bool:
    """Whether at least two of four weights in every row of a channel block are zero, in the order of `sparse_product`:
    groups of 1, 2, 4 or 8 channels."""
    return shape.c_in == shape.c_out and shape.c_in // shape.groups in (1, 2, 4, 8)


def is_crossed(shape: ConvShape, config: BranchConfig) -> bool:
    """Whether channels are in the order of `sparse_product.slot_channel`."""
    return isinstance(config, WindowConfig) and config.SPARSE and shape.c_in // shape.groups == 8


def lattice(shape: ConvShape) -> tuple[int, ...]:
    """Pitch in input pixels of the points each branch reads: its dilation, or the stride for a 1x1 kernel."""
    return tuple(d if k > 1 else shape.stride for k, d in zip(shape.kernels, shape.dilations, strict=True))


def runs(size: int, run: int, spacing: int) -> int:
    """Runs of `run` outputs, `spacing` apart, that cover an axis of `size` outputs."""
    return cdiv(size, run * spacing) * spacing


def column_run(config: BranchConfig) -> int:
    """Outputs of a run along a column."""
    return 1 if isinstance(config, TapConfig) else config.RUN_H


def row_run(config: BranchConfig) -> int:
    """Outputs of a run along a row: those that one product computes from the points they share."""
    return config.RUN_W if isinstance(config, StreamConfig | TapConfig) else 1


def reach(shape: ConvShape) -> int:
    """Input pixels that the farthest kernel tap of any branch is away from the one in the middle."""
    return max(k // 2 * d for k, d in zip(shape.kernels, shape.dilations, strict=True))


@dataclass(frozen=True)
class ColumnRuns:
    """Column runs of each branch: outputs `spacings` apart; input rows `pitches` apart, of which output r needs, for
    kernel row ky, row `r * steps_r + ky * steps_k`."""

    spacings: tuple[int, ...]
    pitches: tuple[int, ...]
    steps_r: tuple[int, ...]
    steps_k: tuple[int, ...]


@lru_cache(maxsize=1024)
def column_runs(shape: ConvShape, config: BranchConfig, is_common: bool) -> ColumnRuns:
    """Column runs of a launch. `is_common`: all branches of a tile cover the same pixels, as selecting them needs."""
    spacings = blocking(shape, config).spacings
    if is_common or isinstance(config, ColumnConfig | WindowConfig):
        spacings = (1,) * len(spacings)
    pitches = tuple(gcd(s * shape.stride, d) for s, d in zip(spacings, lattice(shape), strict=True))
    return ColumnRuns(
        spacings,
        pitches,
        steps_r=tuple(s * shape.stride // p for s, p in zip(spacings, pitches, strict=True)),
        steps_k=tuple(d // p for d, p in zip(lattice(shape), pitches, strict=True)),
    )


def tiles(
    shape: ConvShape, config: BranchConfig, h: int, w: int, *, is_common: bool = False
) -> tuple[int, int]:
    """Tiles along height and width of an `h` x `w` output: the most that any branch needs."""
    run_h, run_w = column_run(config), row_run(config)
    if isinstance(config, WindowConfig):
        return cdiv(h, run_h * config.BLOCK_H), cdiv(w, config.RUN_W * config.BLOCK_W)
    return (
        max(cdiv(runs(h, run_h, s), config.BLOCK_H) for s in column_runs(shape, config, is_common).spacings),
        max(cdiv(runs(w, run_w, s), config.BLOCK_W) for s in blocking(shape, config).spacings),
    )


def tile_count(shape: ConvShape, config: BranchConfig, h: int, w: int) -> int:
    """Tiles of a sample's `h` x `w` output."""
    return prod(tiles(shape, config, h, w))


def needs_64_bits(*images: torch.Tensor, samples: int = 1) -> bool:
    """IS_LARGE: whether offsets into `samples` samples of one of `images`, `[..., N, C, H, W]` or `[..., N, H, W, C]`,
    may exceed 32 bits."""
    for image in images:
        *_, a, b, c = image.shape
        *_, stride_n, stride_a, stride_b, stride_c = image.stride()
        last = (samples - 1) * stride_n + (a - 1) * stride_a + (b - 1) * stride_b + (c - 1) * stride_c
        if last >= 2**31:
            return True
    return False


def pixel_stride(image: torch.Tensor) -> int:
    """How far apart neighbouring pixels of an `image [N, C, H, W]` lie, in elements; 0 where that differs."""
    _, _, h, w = image.shape
    stride = image.stride(3) if w > 1 else image.stride(2)
    return stride if h == 1 or image.stride(2) == w * stride else 0


def known_stride(stride: int, channels: int, is_large: bool) -> int:
    """The stride between pixels of a row that a kernel is compiled for; 0, for any, unless they lie side by side and
    offsets are 32-bit."""
    return stride if stride == channels and not is_large else 0


def is_whole_height(shape: ConvShape, config: BranchConfig, h: int) -> bool:
    """Whether a column run is the image's whole height, so that a kernel that knows of it reads no row beyond."""
    if not isinstance(config, ColumnConfig | MergedConfig):
        return False
    is_dense = all(spacing == 1 for spacing in column_runs(shape, config, False).spacings)
    return h == config.RUN_H and config.BLOCK_H == 1 and shape.stride == 1 and is_dense


def branch_refusal(task: str, shape: ConvShape, config: BranchConfig, itemsize: int = 2) -> str:
    """Why the kernel of `config` does not do `task` ("store", "train", "measure", "pool" or "select") for `shape`, on
    inputs of `itemsize` bytes; "" if it does."""
    if isinstance(config, MergedConfig):
        return f"a MergedConfig is of another kernel, asked to {task}"
    if isinstance(config, WindowConfig):
        return _window_refusal(shape, config, itemsize)
    if isinstance(config, DepthwiseConfig):
        if not shape.is_depthwise:
            return f"a DepthwiseConfig takes groups of one channel, got {shape}"
        return "" if task == "store" else f"a DepthwiseConfig does nothing but store, asked to {task}"
    if isinstance(config, TapConfig):
        return "" if task in ("store", "train") else f"a TapConfig stores and trains, asked to {task}"
    if isinstance(config, HeldConfig):
        return "" if task in ("store", "pool") else f"a HeldConfig stores and pools, asked to {task}"
    if task != "select":
        return ""
    # A tile's row runs must be brought into the same order in every branch.
    spacings = blocking(shape, config).spacings if row_run(config) > 1 else ()
    if any(spacing & (spacing - 1) or config.BLOCK_W % spacing for spacing in spacings):
        return (
            f"to select, BLOCK_W must be a multiple of every branch's spacing, a power of two; got BLOCK_W "
            f"{config.BLOCK_W} and spacings {spacings}"
        )
    return ""


def _window_refusal(shape: ConvShape, config: WindowConfig, itemsize: int) -> str:
    """One window of rows serves all branches."""
    if itemsize != 2:
        return f"a window of rows takes inputs of 16 bits, got {8 * itemsize}"
    if shape.stride != 1 or shape.is_split:
        return f"a window of rows takes stride 1 and branches of the same channels, got {shape}"
    lanes = config.BLOCK_N * config.BLOCK_H * config.BLOCK_W
    if lanes != 8 or not config.BLOCK_CI == config.BLOCK_CO == 16:
        return f"a window of rows has 8 lanes and blocks of 16 channels, got {config}"
    if config.SPARSE and not is_sparse(shape):
        return f"sparse products take groups of 1, 2, 4 or 8 channels, got {shape}"
    return ""


def can_run(task: str, shape: ConvShape, config: BranchConfig) -> bool:
    """Whether the kernel of `config` does `task` for `shape`."""
    return not branch_refusal(task, shape, config)


# Work items of all samples: twice as many, and a round of programs, are still counted in 31 bits.
MAX_ITEMS = 2**29


@dataclass(frozen=True)
class ResidentItems:
    """Work items of one sample in `unit_resident_fwd_kernel`: (tiles along height, along width) of the tiles to pool
    and to select, items of the gate, and items of a step of the list: of all three."""

    pool_tiles: tuple[int, int]
    select_tiles: tuple[int, int]
    gate: int
    step: int


@lru_cache(maxsize=1024)
def resident_items(shape: ConvShape, config: ResidentConfig, h: int, w: int) -> ResidentItems:
    """Work items for an `h` x `w` output."""
    branch = config.branch
    pool_tiles = tiles(shape, branch, h, w)
    select_tiles = tiles(shape, branch, h, w, is_common=True)
    # Filled up, so that adjacent items of a turn stay the channel blocks of one tile.
    gate = cdiv(cdiv(shape.c_out, config.GATE_CHANNELS), config.ITEMS_PER_TURN) * config.ITEMS_PER_TURN
    programs = blocking(shape, branch).blocks // blocks_per_program(branch)
    step = (prod(pool_tiles) + prod(select_tiles)) * programs + gate
    return ResidentItems(pool_tiles, select_tiles, gate, step)


def _starts(sizes: list[int]) -> tuple[int, ...]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return tuple(starts)
