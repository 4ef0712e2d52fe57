"""How the backward kernels cut images and channels, which shapes they take, and the order of their weights."""

from dataclasses import dataclass
from functools import cache

import torch

from .config import GradConfig, GradStreamConfig
from .geometry import ConvShape, cdiv
from .lasting import lasting
from .weight_orders import axes, index_in_memory

RUNS, HALO = 16, 2
"""Of `branch_grad_stream`: runs of two pixels that a tile's row has, and columns read beyond it on either side."""
PIXELS = 16
"""Of `branch_grad_wide`: pixels that a tile's row has."""
MAX_GRID_Y = 65535
"""Programs along a grid's second axis; the first takes 2^31 (CUDA C++ programming guide, technical specifications)."""


def grad_refusal(shape: ConvShape, dtype: torch.dtype, config: GradConfig, w: int) -> str:
    """Why the kernels of `config` do not compute the gradients of `shape` on images of `w` columns; "" if they do."""
    width = shape.group_channels
    if dtype not in (torch.float16, torch.bfloat16):
        return f"x is {dtype}; gradients are computed in torch.float16 and torch.bfloat16"
    if shape.stride != 1:
        return f"the stride is {shape.stride}; gradients are computed for stride 1"
    if shape.is_split:
        return "split_input: every branch reads channels of its own"
    if isinstance(config, GradStreamConfig):
        if width > 8:
            return f"a group has {width} channels; GradStreamConfig takes at most 8"
        if set(shape.kernels) != {3} or not set(shape.dilations) <= {1, 2}:
            return (
                "GradStreamConfig takes 3x3 kernels of dilation 1 or 2, got kernels "
                f"{shape.kernels} and dilations {shape.dilations}"
            )
        if len(shape.kernels) > 2:
            return f"the weight gradients of {len(shape.kernels)} branches do not fit in registers; at most 2"
        if (count := grad_blocks(shape, config).count) % config.num_warps:
            return (
                f"there are {count} channel blocks, which {config.num_warps} warps of a program do not divide"
            )
    elif w > PIXELS and 2 * wide_halo(shape, w) >= PIXELS:
        return f"a branch reads {wide_halo(shape, w)} columns beyond a pixel; at most {PIXELS // 2 - 1}"
    return ""


@dataclass(frozen=True)
class GradBlocks:
    """Channel blocks of a backward launch: `groups` whole groups with `ci` inputs and `co` outputs, `count` of them, in
    `chunks_ci` and `chunks_co` pieces of `size` channels."""

    size: int
    groups: int
    ci: int
    co: int
    count: int
    chunks_ci: int
    chunks_co: int


def grad_blocks(shape: ConvShape, config: GradConfig) -> GradBlocks:
    group_ci, group_co = shape.c_in // shape.groups, shape.c_out // shape.groups
    size = 8 if isinstance(config, GradStreamConfig) else 16
    groups = max(1, min(shape.groups, size // max(group_ci, group_co)))
    ci, co = groups * group_ci, groups * group_co
    return GradBlocks(size, groups, ci, co, cdiv(shape.groups, groups), cdiv(ci, size), cdiv(co, size))


def wide_halo(shape: ConvShape, w: int) -> int:
    """Columns that a tile of `branch_grad_data_kernel` reads beyond its own, as one of `branch_grad_weight_kernel` for
    the branch that reaches furthest; none where a row of `w` pixels fits."""
    return max(branch_halo(k, d, w) for k, d in zip(shape.kernels, shape.dilations, strict=True))


def branch_halo(kernel: int, dilation: int, w: int) -> int:
    """As :func:`wide_halo`, of one branch."""
    return 0 if w <= PIXELS else kernel // 2 * dilation


def grad_tiles(shape: ConvShape, config: GradConfig, h: int, w: int) -> tuple[int, int]:
    """Tiles along height and width of an `h` x `w` image: under GradWideConfig, of the weight gradients of the branch
    that reaches furthest."""
    columns = (
        2 * RUNS - 2 * HALO if isinstance(config, GradStreamConfig) else PIXELS - 2 * wide_halo(shape, w)
    )
    return cdiv(h, config.RUN_H), cdiv(w, columns)


def grad_programs(shape: ConvShape, config: GradConfig, n: int, h: int, w: int) -> tuple[int, int]:
    """How many programs walk the tiles of weight gradients of `n` images, and how many tiles each: as `config` says, or
    more where a grid would have too many programs."""
    tiles_h, tiles_w = grad_tiles(shape, config, h, w)
    tiles = n * tiles_h * tiles_w
    per_program = max(config.TILES_PER_PROGRAM, cdiv(tiles, MAX_GRID_Y))
    return cdiv(tiles, per_program), per_program


def partial_shape(shape: ConvShape, config: GradConfig, n: int, h: int, w: int) -> tuple[int, ...]:
    """Shape of the fp32 workspace for `n` images of `h` x `w` pixels: summands, blocks of output channels, kernel taps
    of all branches, channels of a block, input channels of a group."""
    count, _ = grad_programs(shape, config, n, h, w)
    blocks = grad_blocks(shape, config)
    taps = sum(k * k for k in shape.kernels)
    return count, blocks.count * blocks.chunks_co, taps, blocks.size, shape.c_in // shape.groups


def grad_weight_order(
    shape: ConvShape,
    config: GradConfig,
    dtype: torch.dtype,
    device: torch.device,
    strides: tuple[tuple[int, ...], ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each entry that `gather.grad_weight_launch` packs comes from, in the weights, one after another as
    `in_memory`, and behind them the second tensor, of `dtype`: what is no weight. Both are kept for good: CUDA graphs
    go on reading them."""
    # All configs of a kernel read the same; they differ by batch and image size.
    return _kept_order(shape, type(config)(1, 1), dtype, device, strides)


@cache
def _kept_order(
    shape: ConvShape,
    config: GradConfig,
    dtype: torch.dtype,
    device: torch.device,
    strides: tuple[tuple[int, ...], ...] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = [shape.c_out * (shape.c_in // shape.groups) * kernel * kernel for kernel in shape.kernels]

    def build() -> tuple[torch.Tensor, torch.Tensor]:
        is_stream = isinstance(config, GradStreamConfig)
        moves = _moves() if is_stream else torch.zeros(0, device="cpu")
        zero = sum(sizes) + moves.numel()
        indices = []
        for m, kernel in enumerate(shape.kernels):
            index, mask = _gather_index(shape, config, kernel)
            indices.append(torch.where(mask, index + sum(sizes[:m]), zero))
        index = torch.cat([torch.cat(indices, 1).reshape(-1), torch.arange(sum(sizes), zero, device="cpu")])
        index = index_in_memory(index, shape, strides)
        return index.to(device), torch.cat([moves, moves.new_zeros(1)]).to(device, dtype)

    return lasting(build, device)


def _gather_index(shape: ConvShape, config: GradConfig, kernel: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in `weight.reshape(-1)` each packed entry comes from, and which entries are any. [blocks, entries]"""
    blocks = grad_blocks(shape, config)
    pieces = blocks.count
    if isinstance(config, GradStreamConfig):
        block, ky, part, o, ci, h, co = axes((blocks.count, 3, 2, 2, 8, 2, 8))
        kx = 2 + o - torch.where(part == 0, 1 + h, 3 * (1 - h))
    else:
        sizes = (blocks.count, blocks.chunks_ci, blocks.chunks_co, kernel, kernel, 16, 16)
        block, chunk_ci, chunk_co, ky, kx, ci, co = axes(sizes)
        ci, co = chunk_ci * 16 + ci, chunk_co * 16 + co
        kx = kernel - 1 - kx
        pieces *= blocks.chunks_ci
    ky = kernel - 1 - ky
    group_ci, group_co = shape.c_in // shape.groups, shape.c_out // shape.groups
    group = block * blocks.groups + co // group_co
    mask = (kx >= 0) & (kx < kernel) & (ci < blocks.ci) & (co < blocks.co) & (group < shape.groups)
    mask = mask & (ci // group_ci == co // group_co)
    index = (((group * group_co + co % group_co) * group_ci + ci % group_ci) * kernel + ky) * kernel + kx
    return _by_register(index).reshape(pieces, -1), _by_register(mask.expand_as(index)).reshape(pieces, -1)


def _by_register(matrices: torch.Tensor) -> torch.Tensor:
    """Entries of `matrices [..., 16, 16]` (flat, or in that shape) in the order of a thread's registers."""
    # (row half, row, column half, thread, parity)
    return matrices.reshape(-1, 2, 8, 2, 4, 2).permute(0, 2, 4, 3, 1, 5)


def _moves() -> torch.Tensor:
    """What `branch_grad_stream` multiplies with to move data, flat: the order of memory to that of accumulators; the
    identity; for every run the one to its right by a dilation of 1, the one to its left, and both of 2.
    """
    entry = torch.arange(16, device="cpu")
    read = entry // 2 % 4 * 4 + entry // 8 * 2 + entry % 2
    half, position, channel = read // 8, read // 4 % 2, read % 4
    sources = [(entry, position * 8 + half * 4 + channel), (entry, entry)]
    for dilation in (1, 2):
        sources += [(entry, entry - dilation), (entry, entry + dilation)]
    matrices = torch.stack([rows[:, None] == columns for rows, columns in sources])
    return _by_register(matrices).reshape(-1).to(torch.float32)
