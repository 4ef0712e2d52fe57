"""Convolution weights in the order the kernels read them."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from .config import BranchConfig, ColumnConfig, DepthwiseConfig, StreamConfig
from .geometry import Blocking, ConvShape, blocking, row_run


def pack_branch_weights(
    weights: Sequence[torch.Tensor], shape: ConvShape, config: BranchConfig, dtype: torch.dtype
) -> torch.Tensor:
    """Pack `weights[m] [c_out, c_in / groups, k, k]` for `branch_conv_fwd` under `config`, rounded to `dtype`.

    Depthwise: `[M][k * k][C]`. Otherwise `[blocks][M][k][taps_w][chunks][RUN_W * BLOCK_CO][span * BLOCK_CI]`: the entry
    for output `(o, co)` and input `(j, ci)` is the weight of kernel column `j - o * step`, zero where that is outside
    the kernel or co and ci are in different groups (block-Toeplitz over pixels, block-diagonal over groups). Blocks
    that go straight into registers (`is_operand`) are in the order of `operand_order`.
    """
    if isinstance(config, DepthwiseConfig):
        return torch.cat([w.reshape(shape.c_out, -1).t().reshape(-1) for w in weights]).to(dtype)
    layout = blocking(shape, config)
    packed = []
    for m, weight in enumerate(weights):
        block_m, block_k = row_run(config) * config.BLOCK_CO, layout.spans[m] * config.BLOCK_CI
        is_ordered = is_operand(config, block_m, block_k, dtype)
        index, is_empty = _gather_index(shape, config, layout, m, is_ordered, weight.device)
        packed.append(weight.reshape(-1)[index].masked_fill_(is_empty, 0.0))
    return torch.cat(packed, dim=1).to(dtype).reshape(-1)


def is_operand(config: BranchConfig, block_m: int, block_k: int, dtype: torch.dtype) -> bool:
    """Whether a kernel reads its weight blocks straight into the tensor core's registers (`load_weight_operand`)."""
    widths = {StreamConfig: (32,), ColumnConfig: (16, 32)}.get(type(config), ())
    return block_k in widths and block_m % 16 == 0 and dtype.itemsize == 2


def operand_order(size: int, block_m: int, block_k: int) -> torch.Tensor:
    """Where each entry of a row of weight blocks `[block_m, block_k]`, `size` in all, moves from. [size]

    Eight entries in a row are the four registers that a thread holds of a 16 x 16 left operand: rows r and r + 8 of
    columns 2 t and 2 t + 1, then of columns 2 t + 8 and 2 t + 9. A column of an operand stands for the element of x
    that `as_operand` puts there.
    """
    k = torch.arange(block_k)
    # An operand's column is (product, half, thread, parity); x is read as (thread, product, half, parity), and where a
    # thread reads 4 elements, not 8, its first bit stands last (`part_elements`).
    product, half, thread, parity = k // 16, k // 8 % 2, k // 2 % 4, k % 2
    first = thread * 8 + product * 4 if block_k == 32 else thread % 2 * 8 + thread // 2 * 4
    source = torch.arange(block_m)[:, None] * block_k + first + half * 2 + parity
    # [block_m, block_k] as (tile, row half, row, product, half, thread, parity), from most significant.
    source = source.reshape(block_m // 16, 2, 8, block_k // 16, 2, 4, 2).permute(3, 0, 2, 5, 4, 1, 6)
    blocks = torch.arange(size // (block_m * block_k))[:, None] * (block_m * block_k)
    return (blocks + source.reshape(1, -1)).reshape(-1)


@lru_cache(maxsize=256)
def _gather_index(
    shape: ConvShape, config: BranchConfig, layout: Blocking, m: int, is_ordered: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in `weight.reshape(-1)` each packed entry comes from, and which are zero; `is_ordered`: in the order
    of `operand_order`. [blocks, entries]"""
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
    block, ky, kx_step, chunk, o, co, j, ci = (
        torch.arange(size, device="cpu").reshape([-1 if axis == i else 1 for i in range(len(sizes))])
        for axis, size in enumerate(sizes)
    )
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
    if is_ordered:
        block_m, block_k = row_run(config) * config.BLOCK_CO, layout.spans[m] * config.BLOCK_CI
        order = operand_order(index.shape[1], block_m, block_k)
        index, is_empty = index[:, order], is_empty[:, order]
    return index.to(device), is_empty.to(device)
