"""What the kernels read of norms and biases, from parameters of any dtype, each by itself."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .geometry import cdiv
from .lasting import lasting
from .launch import Launch

BLOCK_C = 128


class Affine(NamedTuple):
    """A bias `[width]`, then a norm by running statistics, or either, or neither.

    `mean` and `var` are None without a norm; `gamma` and `beta` where it is not affine.
    """

    width: int
    bias: torch.Tensor | None
    mean: torch.Tensor | None = None
    var: torch.Tensor | None = None
    gamma: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    eps: float = 0.0


@triton.jit
def stack_vectors_kernel(
    vector_ptrs, stacked_ptr,
    C,
    DEFAULTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of every vector; a row of DEFAULTS is no vector where it is None, else the row's value."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    for i in tl.static_range(len(DEFAULTS)):
        if DEFAULTS[i] is None:
            vector = tl.load(vector_ptrs[i] + c, mask=mask, other=0.0).to(tl.float32)
        else:
            vector = tl.full([BLOCK_C], DEFAULTS[i], tl.float32)
        tl.store(stacked_ptr + i * C + c, vector, mask=mask)


@triton.jit
def norm_scale_shift_kernel(
    mean_ptr, rstd_ptr, affine_ptr, bias_ptr, scale_ptr, shift_ptr,
    C,
    BLOCK_C: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """BLOCK_C of the channels of all branches."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    mean = tl.load(mean_ptr + c, mask=mask, other=0.0)
    if HAS_BIAS:
        mean -= tl.load(bias_ptr + c, mask=mask, other=0.0)
    scale = tl.load(affine_ptr + C + c, mask=mask, other=0.0) * tl.load(rstd_ptr + c, mask=mask, other=0.0)
    beta = tl.load(affine_ptr + c, mask=mask, other=0.0)
    tl.store(scale_ptr + c, scale, mask=mask)
    tl.store(shift_ptr + c, beta - scale * mean, mask=mask)


@triton.jit(do_not_specialize=("ENTRIES",))
def fold_norms_kernel(
    bias_ptrs, mean_ptrs, var_ptrs, gamma_ptrs, beta_ptrs, places_ptr, scale_ptr, shift_ptr,
    ENTRIES,
    EPSILONS: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
):  # fmt: skip
    """BLOCK_C entries; map p has a start and a width of `places`. In float64, rounded once."""
    i = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = tl.full([BLOCK_C], 1.0, tl.float64)
    shift = tl.zeros([BLOCK_C], tl.float64)
    for p in tl.static_range(len(EPSILONS)):
        c = i - tl.load(places_ptr + 2 * p)
        mask = (c >= 0) & (c < tl.load(places_ptr + 2 * p + 1))
        own_shift = tl.zeros([BLOCK_C], tl.float64)
        if HAS_BIAS[p]:
            own_shift = tl.load(bias_ptrs[p] + c, mask=mask, other=0.0).to(tl.float64)
        if HAS_NORM[p]:
            var = tl.load(var_ptrs[p] + c, mask=mask, other=1.0).to(tl.float64)
            own_scale = 1.0 / tl.sqrt(var + EPSILONS[p])
            if HAS_GAMMA[p]:
                own_scale *= tl.load(gamma_ptrs[p] + c, mask=mask, other=0.0).to(tl.float64)
            own_shift -= tl.load(mean_ptrs[p] + c, mask=mask, other=0.0).to(tl.float64)
            own_shift *= own_scale
            if HAS_BETA[p]:
                own_shift += tl.load(beta_ptrs[p] + c, mask=mask, other=0.0).to(tl.float64)
            scale = tl.where(mask, own_scale, scale)
        shift = tl.where(mask, own_shift, shift)
    tl.store(scale_ptr + i, scale.to(tl.float32), mask=i < ENTRIES)
    tl.store(shift_ptr + i, shift.to(tl.float32), mask=i < ENTRIES)


def stack_vectors(
    vectors: Sequence[torch.Tensor | None], defaults: Sequence[float], stacked: torch.Tensor
) -> Launch:
    """Write `stacked [rows, C]` fp32: the `vectors [C]`, and the row's default where there is none."""
    c = stacked.shape[1]
    arguments = (tuple(stacked if vector is None else vector for vector in vectors), stacked, c)
    constexprs = {
        "DEFAULTS": tuple(
            None if vector is not None else default for vector, default in zip(vectors, defaults, strict=True)
        ),
        "BLOCK_C": BLOCK_C,
    }
    return Launch(stack_vectors_kernel, (cdiv(c, BLOCK_C),), arguments, constexprs, {"num_warps": 1})


def norm_scale_shift(
    mean: torch.Tensor,
    rstd: torch.Tensor,
    affine: torch.Tensor,
    biases: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> Launch:
    """Write `scale` and `shift`, with which `scale * conv + shift` is the normalized convolution without bias.

    All `[M, C]` fp32, but for `affine [2, M, C]`, beta and gamma.
    """
    count = mean.numel()
    arguments = (mean, rstd, affine, mean if biases is None else biases, scale, shift, count)
    constexprs = {"BLOCK_C": BLOCK_C, "HAS_BIAS": biases is not None}
    return Launch(norm_scale_shift_kernel, (cdiv(count, BLOCK_C),), arguments, constexprs, {"num_warps": 1})


def fold_norms(
    maps: Sequence[Affine], starts: Sequence[int], scale: torch.Tensor, shift: torch.Tensor
) -> Launch:
    """Write `scale` and `shift` fp32, with which `norm(y + bias) = scale * y + shift` of map p, from `starts[p]` on,
    ascending.

    Where they hold entries of no map in between, these become 1 and 0.
    """
    vectors = [
        tuple(scale if (vector := getattr(own, part)) is None else vector for own in maps)
        for part in ("bias", "mean", "var", "gamma", "beta")
    ]
    places = _places(tuple((start, own.width) for start, own in zip(starts, maps, strict=True)), scale.device)
    entries = starts[-1] + maps[-1].width
    constexprs = {
        "EPSILONS": tuple(own.eps for own in maps),
        "HAS_BIAS": tuple(own.bias is not None for own in maps),
        "HAS_NORM": tuple(own.var is not None for own in maps),
        "HAS_GAMMA": tuple(own.gamma is not None for own in maps),
        "HAS_BETA": tuple(own.beta is not None for own in maps),
        "BLOCK_C": BLOCK_C,
    }
    arguments = (*vectors, places, scale, shift, entries)
    grid, options = (cdiv(entries, BLOCK_C),), {"num_warps": 1}
    return Launch(fold_norms_kernel, grid, arguments, constexprs, options, kept=(places,))


@cache  # for good: CUDA graphs go on reading it
def _places(places: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    return lasting(lambda: torch.tensor(places, dtype=torch.int32, device=device), device)
