"""One launch of the branch convolutions as its kernels' launchers take it: what it does, its tensors and its config."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from .config import BranchConfig, ColumnConfig, StreamConfig, TapConfig
from .geometry import (
    ConvShape,
    blocking,
    blocks_per_program,
    cdiv,
    column_runs,
    is_full,
    lattice,
    needs_64_bits,
    tiles,
)
from .versions import TRITON

# Columns of the product that pools a tile, one per position in a run: the fewest that Triton takes.
BLOCK_POOL = 8 if TRITON >= (3, 5) else 16

ConfigT = TypeVar("ConfigT", bound=BranchConfig, covariant=True)


@dataclass(eq=False)
class BranchCall(Generic[ConfigT]):
    """What a launch computes, whichever kernel runs it; tensors as the launchers in `branch_conv` take them.

    `task`: "store", "train", "measure", "pool" or "select". `out` is `u`, `y` or `v`; `partial` are pooled sums, or the
    first branch's moments.

    Of these follow `layout` and `runs` (`geometry`), the pixels of the output (`output_size`), `tiles` along its height
    and width, and `channel_programs`, those that share a tile.
    """

    task: str
    x: torch.Tensor
    w: torch.Tensor
    shift: torch.Tensor | None
    shape: ConvShape
    config: ConfigT
    has_relu: bool
    allow_tf32: bool
    attention: torch.Tensor | None = None
    out: torch.Tensor | None = None
    partial: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.layout = blocking(self.shape, self.config)
        self.runs = column_runs(self.shape, self.config, self.task == "select")
        self.output_size = h, w = self.shape.output_size(*self.x.shape[2:])
        self.tiles = tiles(self.shape, self.config, h, w, is_common=self.task == "select")
        self.channel_programs = self.layout.blocks // blocks_per_program(self.config)

    @property
    def pointers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, w and shift."""
        return self.x, self.w, self._or_unused(self.shift)

    @property
    def attention_pointer(self) -> torch.Tensor:
        return self._or_unused(self.attention)

    @property
    def out_pointers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out and partial."""
        return self._or_unused(self.out), self._or_unused(self.partial)

    def _or_unused(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """x stands for a pointer that the task does not follow."""
        return self.x if tensor is None else tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        """N, H_IN, W_IN, H, W."""
        n, _, h_in, w_in = self.x.shape
        return n, h_in, w_in, *self.output_size

    @property
    def x_strides(self) -> tuple[int, int, int]:
        """Of samples, rows and columns."""
        return self.x.stride(0), self.x.stride(2), self.x.stride(3)

    @property
    def out_strides(self) -> tuple[int, int, int, int, int]:
        """Of branches, samples, channels, rows and columns."""
        if self.out is None:
            return 0, 0, 1, 0, 0
        if self.task == "select":
            n, c, h, w = self.out.stride()
            return 0, n, c, h, w
        m, n, h, w, c = self.out.stride()
        return m, n, c, h, w

    @property
    def out_size(self) -> tuple[int, int]:
        """Pixels of `out`, which there must be."""
        assert self.out is not None
        h, w = self.out.shape[2:4]  # of v [N, C, H, W] as of u [M, N, H, W, C]
        return h, w

    @property
    def partial_strides(self) -> tuple[int, int]:
        """Of samples and tiles."""
        return (0, 0) if self.partial is None else (self.partial.stride(0), self.partial.stride(1))

    @property
    def is_large(self) -> bool:
        """IS_LARGE: of offsets into a tile's samples, of x or out."""
        images = (self.x,) if self.out is None else (self.x, self.out)
        return needs_64_bits(*images, samples=self.config.BLOCK_N)

    @property
    def all_tiles(self) -> int:
        """Tiles of all samples."""
        tiles_h, tiles_w = self.tiles
        return cdiv(self.x.shape[0], self.config.BLOCK_N) * tiles_h * tiles_w

    @property
    def grid(self) -> tuple[int]:
        """A program for each tile and channel program."""
        return (self.all_tiles * self.channel_programs,)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}

    @property
    def selecting_arguments(self) -> tuple[Any, ...]:
        """Arguments of the kernels that can select."""
        return (
            *self.pointers, self.attention_pointer, *self.out_pointers,
            *self.sizes, self.shape.c_in, self.shape.c_out, *self.tiles, self.channel_programs,
            *self.x_strides, *self.out_strides, *self.partial_strides,
        )  # fmt: skip

    def storing_arguments(self, *channels: int) -> tuple[Any, ...]:
        """Arguments of the kernels that only store or train, where channels are adjacent; `channels`: C_IN, C_OUT."""
        stride_om, stride_on, _, stride_oh, stride_ow = self.out_strides
        return (
            *self.pointers, *self.out_pointers, *self.sizes, *channels, *self.tiles, self.channel_programs,
            *self.x_strides, stride_om, stride_on, stride_oh, stride_ow, *self.partial_strides,
        )  # fmt: skip


def branch_constexprs(call: BranchCall[BranchConfig]) -> dict[str, Any]:
    """Constexprs of every branch kernel but the window's."""
    shape, config = call.shape, call.config
    return {
        "KERNELS": shape.kernels,
        "DILATIONS": lattice(shape),
        "W_OFFSETS": call.layout.offsets,
        "STRIDE": shape.stride,
        "SPLIT_CI": shape.c_in if shape.is_split else 0,
        "HAS_SHIFT": call.shift is not None,
        "HAS_RELU": call.has_relu,
        "IS_LARGE": call.is_large,
        **{name: value for name, value in vars(config).items() if name.isupper()},
    }


def block_constexprs(call: BranchCall[StreamConfig | ColumnConfig | TapConfig]) -> dict[str, Any]:
    """Constexprs of the kernels that multiply channel blocks on the tensor core, but for the window's."""
    return {
        **branch_constexprs(call),
        "CHANNELS_CI": call.layout.channels_ci,
        "CHANNELS_CO": call.layout.channels_co,
        "BLOCK_POOL": BLOCK_POOL,
        # Pooling on the tensor core multiplies by 0 or 1: a NaN would reach the other samples of its tile, and fp32
        # sums would be rounded to TF32.
        "POOL_BY_DOT": call.config.BLOCK_N == 1 and call.x.element_size() == 2,
        "HAS_CHANNEL_MASK": not is_full(call.shape, call.config),
        "PRECISION": "tf32" if call.allow_tf32 else "ieee",
    }


def run_constexprs(call: BranchCall[StreamConfig | ColumnConfig]) -> dict[str, Any]:
    """Constexprs that say where the rows of a run along a column are."""
    return {"PITCHES": call.runs.pitches, "STEPS_R": call.runs.steps_r, "STEPS_K": call.runs.steps_k}


def even_rows(call: BranchCall[StreamConfig | TapConfig]) -> tuple[bool, ...]:
    """IS_EVEN_W: whether whole runs along a row cover it, for each branch."""
    return tuple(call.output_size[1] % (call.config.RUN_W * spacing) == 0 for spacing in call.layout.spacings)
