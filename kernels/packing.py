"""Convolution weights in the order the kernels read them."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from .config import BranchConfig, DepthwiseConfig
from .geometry import Blocking, ConvShape, blocking, row_run


def pack_branch_weights(
    weights: Sequence[torch.Tensor], shape: ConvShape, config: BranchConfig, dtype: torch.dtype
) -> torch.Tensor:
    """Pack `weights[m] [c_out, c_in / groups, k, k]` for `branch_conv_fwd` under `config`, rounded to `dtype`.

    Depthwise: `[M][k * k][C]`. Otherwise `[blocks][M][k][taps_w][chunks][RUN_W * BLOCK_CO][span * BLOCK_CI]`: the entry
    for output `(o, co)` and input `(j, ci)` is the weight of kernel column `j - o * step`, zero where that is outside
    the kernel or co and ci are in different groups (block-Toeplitz over pixels, block-diagonal over groups).
    """
    if isinstance(config, DepthwiseConfig):
        return torch.cat([w.reshape(shape.c_out, -1).t().reshape(-1) for w in weights]).to(dtype)
    layout = blocking(shape, config)
    packed = []
    for m, weight in enumerate(weights):
        index, mask = _gather_index(shape, config, layout, m, weight.device)
        taken = weight.reshape(-1)[index]
        packed.append(torch.where(mask, taken, taken.new_zeros(())))
    return torch.cat(packed, dim=1).to(dtype).reshape(-1)


@lru_cache(maxsize=256)
def _gather_index(
    shape: ConvShape, config: BranchConfig, layout: Blocking, m: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in `weight.reshape(-1)` each packed entry comes from, and which entries are not zero. [blocks, entries]"""
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
    return (
        torch.where(mask, index, 0).expand(sizes).reshape(layout.blocks, -1).to(device),
        mask.expand(sizes).reshape(layout.blocks, -1).to(device),
    )
