"""What the training kernels use on a chip, from the compiled code alone: SKNet-50's stages at batch 128 in fp16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sk_triton.chips import CHIPS
from sk_triton.kernels.launch import Launch
from sk_triton.training_plan import plan_training
from sk_triton.workload import Workload

from .grid import paper_unit
from .processes import compiling_processes

if TYPE_CHECKING:
    from .compile import Resources

STAGES = {1: (128, 56), 2: (256, 28), 3: (512, 14), 4: (1024, 7)}
"""Channels and pixels a side."""


def launches(stage: int, chip: str) -> list[Launch]:
    """The launches of a training step, on meta tensors; the library's convolution gradients aside."""
    from sk_triton.kernels.batch_stats import combine_moments_fwd, tile_moments_fwd
    from sk_triton.kernels.branch_conv import branch_train_fwd
    from sk_triton.kernels.norm_bwd import norm_bwd
    from sk_triton.kernels.pooled_moments import pooled_moments_fwd
    from sk_triton.kernels.select import select_fwd
    from sk_triton.kernels.select_bwd import select_bwd

    n, (c, size) = 128, STAGES[stage]
    plan = plan_training(Workload(paper_unit(c), n, size, size, torch.float16, CHIPS[chip]))
    (conv,), config = plan.branch_launches, plan.reduction
    assert config is not None
    assert plan.select is not None

    def sums(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    x = torch.empty(n, c, size, size, dtype=torch.float16, device="meta").to(
        memory_format=torch.channels_last
    )
    y, moments = x.new_empty(2, n, size, size, c), sums(2, 3, 99, c)
    mean, rstd, gamma, beta = (sums(2, c) for _ in range(4))
    first, second = sums(9, n, 2, c), sums(9, n, 2, c)
    norm = (mean, rstd, gamma, beta)
    flags: dict[str, Any] = {"has_norm": True, "has_relu": True}
    return [
        branch_train_fwd(
            x, x.flatten(), None, y, moments, shape=conv.shape, allow_tf32=False, config=conv.config
        ),
        tile_moments_fwd(y, moments, config=config),
        combine_moments_fwd(moments, mean, rstd, pixels=n * size**2),
        pooled_moments_fwd(y, *norm, first, second, **flags, config=config),
        select_fwd(y, first, x, norm=norm, has_relu=True, config=plan.select),
        select_bwd(x, y, *norm, first, second, **flags, config=config),
        norm_bwd(x, y, first, second, *norm, mean, rstd, torch.empty_like(y), **flags, config=plan.select),
    ]


def measure(stage: int, chip: str) -> dict[tuple[int, str], Resources]:
    """What each kernel uses on a chip, by stage and kernel. Only its convolution differs from stage to stage."""
    from .compile import compile_launch

    found = launches(stage, chip)
    return {
        (stage, launch.kernel.fn.__name__.removesuffix("_kernel").removesuffix("_fwd")): compile_launch(
            launch, chip
        )
        for launch in (found if stage == 1 else found[:1])
    }


def measure_all(chip: str, workers: int) -> dict[tuple[int, str], Resources]:
    """`measure` for every stage, in new processes, where kernels are compiled, not interpreted."""
    with compiling_processes(workers) as pool:
        rows = pool.map(measure, STAGES, [chip] * len(STAGES))
        return {key: used for row in rows for key, used in row.items()}
