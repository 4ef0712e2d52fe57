"""What a pixel of x adds to the pooled sums of linear branches, by the sections that it is in (`border_sums`)."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .geometry import ConvShape, cdiv
from .launch import Launch
from .merging import lattice_taps, merged_shape

BLOCK = 128


@triton.jit(do_not_specialize=("SECTIONS_W", "C_IN", "C_OUT", "GROUP_CI", "GROUP_CO"))
def section_weights_kernel(
    weight_ptrs, scale_ptr, met_h_ptr, met_w_ptr, out_ptr,
    SECTIONS_W, C_IN, C_OUT, GROUP_CI, GROUP_CO,
    TAPS: tl.constexpr, IS_CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """BLOCK weights of one pair of sections: the sum over branches and those taps that meet both, in float64.

    Along either axis, tap k of branch m is point TAPS[m][k] of the lattice.
    """
    sections = tl.program_id(1)
    met_h = tl.load(met_h_ptr + sections // SECTIONS_W)
    met_w = tl.load(met_w_ptr + sections % SECTIONS_W)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < GROUP_CO * C_IN
    ci = i % C_IN
    co = ci // GROUP_CI * GROUP_CO + i // C_IN
    total = tl.zeros([BLOCK], tl.float64)
    for m in tl.static_range(len(TAPS)):
        taps = len(TAPS[m]) * len(TAPS[m])
        stride_tap = GROUP_CI if IS_CHANNELS_LAST[m] else 1
        stride_ci = 1 if IS_CHANNELS_LAST[m] else taps
        weight_ptr = weight_ptrs[m] + co * (taps * GROUP_CI) + ci % GROUP_CI * stride_ci
        own = tl.zeros([BLOCK], tl.float64)
        for ky in tl.static_range(len(TAPS[m])):
            for kx in tl.static_range(len(TAPS[m])):
                is_met = (met_h >> TAPS[m][ky]) & (met_w >> TAPS[m][kx]) & 1
                tap = weight_ptr + (ky * len(TAPS[m]) + kx) * stride_tap
                # Not `mask & (is_met == 1)`: of a scalar's comparison Triton's interpreter makes no mask.
                own += tl.load(tap, mask=tl.where(is_met == 1, mask, False), other=0.0).to(tl.float64)
        if HAS_SCALE:
            own *= tl.load(scale_ptr + m * C_OUT + co, mask=mask, other=0.0).to(tl.float64)
        total += own
    out_ptr += sections.to(tl.int64) * (GROUP_CO * C_IN)
    tl.store(out_ptr + i, total.to(tl.float32), mask=mask)


def section_weights(
    weights: Sequence[torch.Tensor],
    scale: torch.Tensor | None,
    met_h: torch.Tensor,
    met_w: torch.Tensor,
    out: torch.Tensor,
    *,
    branches: ConvShape,
) -> Launch:
    """Write `out [sections_h, sections_w, C_out / groups, C_in]` fp32: at ci, what a pixel of a pair of sections of x
    adds to the j-th output of ci's group, summed over pixels and branches.

    `weights[m] [C_out, C_in / groups, k, k]` as `weight_orders.in_memory` takes them; `scale [M, C_out]` fp32
    multiplies them. `met_h` and `met_w` int32 from `merging.met_taps`.
    """
    points = merged_shape(branches).kernels[0]
    if points > 31:
        raise ValueError(f"branches: taps must stand on a lattice of at most 31 points an axis, got {points}")
    group_ci, group_co = branches.c_in // branches.groups, branches.c_out // branches.groups
    arguments = (
        tuple(weights), out if scale is None else scale, met_h, met_w, out,
        len(met_w), branches.c_in, branches.c_out, group_ci, group_co,
    )  # fmt: skip
    constexprs = {
        "TAPS": lattice_taps(branches),
        "IS_CHANNELS_LAST": tuple(not weight.is_contiguous() for weight in weights),
        "BLOCK": BLOCK,
        "HAS_SCALE": scale is not None,
    }
    grid = (cdiv(group_co * branches.c_in, BLOCK), len(met_h) * len(met_w))
    return Launch(section_weights_kernel, grid, arguments, constexprs, {"num_warps": 4}, kept=(met_h, met_w))
