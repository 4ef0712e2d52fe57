"""Convolution weights in the order the kernels read them."""

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import pairwise

import torch

from .config import (
    BranchConfig,
    ColumnConfig,
    DepthwiseConfig,
    HeldConfig,
    MergedConfig,
    StreamConfig,
    WindowConfig,
)
from .geometry import Blocking, ConvShape, blocking, is_crossed, row_run
from .lasting import lasting
from .merging import lattice_taps, merged_shape, row_parts, widen_kernel


def in_memory(weights: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], ...] | None:
    """How the weights `[c_out, fan_in, k, k]` lie in memory, which they fill: their strides; None if all are
    contiguous.

    Raises:
        ValueError: a weight that is neither contiguous nor channels_last.
    """
    if all(weight.is_contiguous() for weight in weights):
        return None
    for weight in weights:
        if not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
            raise ValueError(
                f"weights must be contiguous or channels_last, got strides {weight.stride()} for shape "
                f"{tuple(weight.shape)}"
            )
    return tuple(weight.stride() for weight in weights)


def index_in_memory(
    index: torch.Tensor, shape: ConvShape, strides: tuple[tuple[int, ...], ...] | None
) -> torch.Tensor:
    """`index` into weights as they lie in memory, from one into contiguous weights; 32 bits wide."""
    start = 0
    found = index.clone()
    for kernel, own in zip(shape.kernels, strides or (), strict=bool(strides)):
        sizes = (shape.c_out, shape.c_in // shape.groups, kernel, kernel)
        stop = start + math.prod(sizes)
        is_own = (index >= start) & (index < stop)
        coordinates = torch.unravel_index(index[is_own] - start, sizes)
        places = sum(i * stride for i, stride in zip(coordinates, own, strict=True))
        found[is_own] = start + places
        start = stop
    return found.to(torch.int32)


def axes(sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """An index along each axis of an array of `sizes`, to be broadcast together."""
    return [
        torch.arange(size, device="cpu").reshape([-1 if axis == i else 1 for i in range(len(sizes))])
        for axis, size in enumerate(sizes)
    ]


def is_operand(config: BranchConfig, block_m: int, block_k: int, dtype: torch.dtype) -> bool:
    """Whether a kernel reads its weight blocks straight into the tensor core's registers (`load_weight_operand`)."""
    widths = {StreamConfig: (32,), ColumnConfig: (16, 32), HeldConfig: (16, 32)}.get(type(config), ())
    return block_k in widths and block_m % 16 == 0 and dtype.itemsize == 2


def operand_order(size: int, block_m: int, block_k: int) -> torch.Tensor:
    """Where each entry of a row of weight blocks `[block_m, block_k]`, `size` in all, moves from. [size]

    Eight entries in a row are the four registers that a thread holds of a 16 x 16 left operand: rows r and r + 8 of
    columns 2 t and 2 t + 1, then of columns 2 t + 8 and 2 t + 9. A column of an operand stands for the element of x
    that `right_operand` puts there.
    """
    source = torch.arange(block_m, device="cpu")[:, None] * block_k + operand_elements(block_k)
    # [block_m, block_k] as (tile, row half, row, product, half, thread, parity), from most significant.
    source = source.reshape(block_m // 16, 2, 8, block_k // 16, 2, 4, 2).permute(3, 0, 2, 5, 4, 1, 6)
    blocks = torch.arange(size // (block_m * block_k), device="cpu")[:, None] * (block_m * block_k)
    return (blocks + source.reshape(1, -1)).reshape(-1)


def window_order(size: int) -> torch.Tensor:
    """As `operand_order`, for blocks `[16, 16]` of `window.load_taps`, where a thread holds four adjacent
    channels: rows r and r + 8 of channels 4 t and 4 t + 1, then of channels 4 t + 2 and 4 t + 3. [size]
    """
    # (row half, row, thread, pair, parity), from most significant.
    source = torch.arange(256, device="cpu").reshape(2, 8, 4, 2, 2).permute(1, 2, 3, 0, 4)
    blocks = torch.arange(size // 256, device="cpu")[:, None] * 256
    return (blocks + source.reshape(1, -1)).reshape(-1)


def sparse_order(size: int, is_crossed: bool) -> torch.Tensor:
    """As `operand_order`, for blocks `[16, 16]` of `sparse_product.load_sparse_left`, which leaves out what is zero: of
    each row, for each thread of a four, two of the four columns that it stands for. [size / 2]
    """
    row_half, row, thread, parity = axes((2, 8, 4, 2))
    column = thread % 2 * 8 + row // 4 * 4 + thread // 2 * 2 + parity
    rows, columns = (
        slot // 8 * 4 + slot // 4 % 2 * 8 + slot % 4 if is_crossed else slot
        for slot in (row_half * 8 + row, column)
    )
    source = (rows * 16 + columns).permute(1, 2, 0, 3).reshape(-1)
    blocks = torch.arange(size // 256, device="cpu")[:, None] * 256
    return (blocks + source).reshape(-1)


def operand_elements(block_k: int) -> torch.Tensor:
    """The element, in the order of x's memory, that each column of an operand stands for. [block_k]"""
    k = torch.arange(block_k, device="cpu")
    # An operand's column is (product, half, thread, parity); x is read as (thread, product, half, parity), and where a
    # thread reads 4 elements, not 8, its first bit stands last (`part_elements`).
    product, half, thread, parity = k // 16, k // 8 % 2, k // 2 % 4, k % 2
    first = thread * 8 + product * 4 if block_k == 32 else thread % 2 * 8 + thread // 2 * 4
    return first + half * 2 + parity


def merging_order(shape: ConvShape, config: MergedConfig, dtype: torch.dtype) -> torch.Tensor:
    """Where each entry of a branch's weights of one channel block moves from, for `merged_conv.load_right_operand`;
    what no part reads is left out. [entries]

    A kernel row is cut into the parts in which x is read. A part is a right operand `[16 outputs, elements of x]`, its
    columns in the order of `right_operand`'s rows: eight entries in a row are what a thread holds of 16 of them.
    """
    kernel, parts = shape.kernels[0], row_parts(shape, config, dtype)
    block_m = config.RUN_W * config.BLOCK_CO
    points = blocking(shape, config).spans[0] if config.RUN_W > 1 else kernel
    if block_m != 16 or parts[-1] > points:
        raise ValueError(
            f"config: products of 16-bit merged weights have 16 outputs and read whole parts, got {config}"
        )
    row = torch.arange(block_m, device="cpu")[:, None, None]
    point = torch.arange(points, device="cpu")[:, None]
    ci = torch.arange(config.BLOCK_CI, device="cpu")
    if config.RUN_W > 1:  # [block_m, points, BLOCK_CI] of a kernel row
        entries = (row * points + point) * config.BLOCK_CI + ci
    else:
        entries = (point * block_m + row) * config.BLOCK_CI + ci
    found = []
    for start, stop in pairwise(parts):
        part = entries[:, start:stop].flatten(1)
        part = part[:, operand_elements(part.shape[1])]
        # (half, thread, parity) of the outputs, (pair of 8 columns, one of the pair, column), most significant first.
        part = part.reshape(2, 4, 2, -1, 2, 8).permute(3, 5, 1, 4, 0, 2)
        found.append(part.reshape(-1))
    rows = torch.arange(kernel, device="cpu")[:, None] * (block_m * points * config.BLOCK_CI)
    return (rows + torch.cat(found)).reshape(-1)


# The fields of a config that decide where a weight is packed; batch and image size only change the others. A window's
# run does not: each of its pixels is a product of its own.
_PACKED_FIELDS = ("BLOCK_CI", "BLOCK_CO", "RUN_W", "SPARSE")
_PACKED_WINDOW_FIELDS = ("BLOCK_CI", "BLOCK_CO", "SPARSE")


@lru_cache(maxsize=1024)
def weight_order(shape: ConvShape, config: BranchConfig) -> Hashable:
    """What the order of packed weights depends on besides their dtypes: equal for configs that read the same."""
    packed = merged_shape(shape) if isinstance(config, MergedConfig) else shape
    names = _PACKED_WINDOW_FIELDS if isinstance(config, WindowConfig) else _PACKED_FIELDS
    fields = tuple(getattr(config, name, None) for name in names)
    return shape, type(config), fields, blocking(packed, config).blocks


_tables: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}


def branch_weight_order(
    shape: ConvShape,
    config: BranchConfig,
    dtype: torch.dtype,
    source: torch.dtype,
    device: torch.device,
    strides: tuple[tuple[int, ...], ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each entry comes from that `gather.branch_weight_launch` packs for `config`: in the weights `[c_out, c_in /
    groups, k, k]`, one after another as `in_memory`, and behind them the second tensor, a zero of dtype `source`. Both
    are kept for good: CUDA graphs go on reading them.

    Depthwise: `[M][k * k][C]`. Otherwise `[blocks][M][k][taps_w][chunks][RUN_W * BLOCK_CO][span * BLOCK_CI]`: the entry
    for output `(o, co)` and input `(j, ci)` is the weight of kernel column `j - o * step`, zero where that is outside
    the kernel or co and ci are in different groups (block-Toeplitz over pixels, block-diagonal over groups). Blocks
    that go straight into registers are in the order of `operand_order` (`is_operand`) or, under a `WindowConfig`, of
    `window_order` or `sparse_order`. For a `MergedConfig` kernels stand on the branches' common lattice, in 16 bits in
    the order of `merging_order`.
    """
    key = weight_order(shape, config), dtype, source, device, strides
    if key in _tables:
        return _tables[key]
    fan_in = shape.c_in // shape.groups
    sizes = [shape.c_out * fan_in * kernel * kernel for kernel in shape.kernels]
    packed = merged_shape(shape) if isinstance(config, MergedConfig) else shape

    def build() -> tuple[torch.Tensor, torch.Tensor]:
        indices = []
        for m, kernel in enumerate(shape.kernels):
            if isinstance(config, DepthwiseConfig):
                index = torch.arange(sizes[m], device="cpu").view(shape.c_out, -1).t()
                is_empty = torch.zeros(1, dtype=torch.bool, device="cpu")
            else:
                index, is_empty = _gather_index(packed, config, blocking(packed, config), m, dtype)
            if packed is not shape:
                # Entries count from 1, so that taps which the branch lacks are 0.
                own = torch.arange(1, sizes[m] + 1, device="cpu").view(shape.c_out, fan_in, kernel, kernel)
                wide = widen_kernel(own, lattice_taps(shape)[m], packed.kernels[m])
                index = wide.reshape(-1)[index] - 1
                is_empty = is_empty | (index < 0)
            indices.append(torch.where(is_empty, sum(sizes), index + sum(sizes[:m])))
        # Depthwise, one branch after another; else all branches of a block of channels.
        axis = 0 if isinstance(config, DepthwiseConfig) else 1
        index = index_in_memory(torch.cat(indices, axis).reshape(-1), shape, strides)
        return index.to(device), torch.zeros(1, dtype=source, device="cpu").to(device)

    _tables[key] = lasting(build, device)
    return _tables[key]


def _gather_index(
    shape: ConvShape, config: BranchConfig, layout: Blocking, m: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in the flat weight of branch m each packed entry comes from, and which are zero. [blocks, entries]"""
    assert not isinstance(config, DepthwiseConfig)
    k, taps_w, step = shape.kernels[m], layout.taps_w[m], layout.steps[m]
    sizes = (
        layout.blocks,
        k,
        taps_w,
        layout.chunks,
        row_run(config),
        config.BLOCK_CO,
        layout.spans[m],
        config.BLOCK_CI,
    )
    block, ky, kx_step, chunk, o, co, j, ci = axes(sizes)
    ci_per_group, co_per_group = shape.c_in // shape.groups, shape.c_out // shape.groups
    kx = kx_step if taps_w > 1 else j - o * step
    ci = chunk * config.BLOCK_CI + ci
    co = block % layout.blocks_per_group * config.BLOCK_CO + co
    group = block // layout.blocks_per_group * layout.groups_per_block + co // co_per_group
    mask = (
        (kx >= 0)
        & (kx < k)
        & (ci < layout.channels_ci)
        & (co < layout.channels_co)
        & (group < shape.groups)
        & (ci // ci_per_group == co // co_per_group)
    )
    index = (
        ((group * co_per_group + co % co_per_group) * ci_per_group + ci % ci_per_group) * k + ky
    ) * k + kx
    index = torch.where(mask, index, 0).expand(sizes).reshape(layout.blocks, -1)
    is_empty = ~mask.expand(sizes).reshape(layout.blocks, -1)
    block_m, block_k = row_run(config) * config.BLOCK_CO, layout.spans[m] * config.BLOCK_CI
    order = None
    if isinstance(config, WindowConfig):
        order = (
            sparse_order(index.shape[1], is_crossed(shape, config))
            if config.SPARSE
            else window_order(index.shape[1])
        )
    elif is_operand(config, block_m, block_k, dtype):
        order = operand_order(index.shape[1], block_m, block_k)
    elif isinstance(config, MergedConfig) and dtype.itemsize == 2:
        order = merging_order(shape, config, dtype)
    if order is not None:
        index, is_empty = index[:, order], is_empty[:, order]
    return index, is_empty
