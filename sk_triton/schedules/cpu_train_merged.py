"""Schedule "train_merged", for the CPU and linear branches of large images: no branch, nor its gradient, is computed.

Forward as :mod:`.cpu_merged`. Backward, the convolution with each sample's own kernels ``K_n = sum_m a_nm W_m`` gives
their gradients ``dK_n`` and most of dx. The rest is small: ``dW_m = sum_n a_nm dK_n``, ``da_nm = <W_m, dK_n>``. What
the gate adds to the gradient of every branch, ``g = ds / HW``, is the same for all pixels: it meets x through its sums
over windows alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cpu import differentiable
from ..cpu.gate import attend_bwd
from ..cpu.merging import (
    MergedKernels,
    add_to_windows,
    by_group,
    convolve,
    merge,
    pooled,
    sample_weights,
    side_by_side,
    taps_of,
    window_sums,
)
from ..folding import FoldedGate, affine_gate, attend
from ..layout import memory_format
from ..library import convolution_grads
from ..params import Branch, Gate
from ..plan import Plan
from ..spec import BranchSpec, SKSpec

# Pixels whose products oneDNN may add to a gradient of weights in one call; a single row may have more. Below AVX-512
# it adds them one by one in channels_last, and rounding errors grow four times as fast.
LONGEST_SUM = 2048 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 512


def run(plan: Plan, x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec) -> Tensor:
    """The unit's output; arguments and result as :func:`sk_triton.functional.sk_conv`."""
    weights = [branch.weight.to(plan.dtype) for branch in branches]
    biases = [None if branch.bias is None else branch.bias.to(plan.dtype) for branch in branches]
    return _MergedUnit.apply(plan, spec, x, *weights, *biases, *affine_gate(gate, plan.dtype))


class _MergedUnit(torch.autograd.Function):
    """From x, M weights, M biases and the four tensors of :class:`..folding.FoldedGate` to the unit's output."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, spec: SKSpec, x: Tensor, *parameters: Tensor | None) -> Tensor:
        m, merged = spec.num_branches, plan.merged_branch
        assert merged is not None
        weights = [weight for weight in parameters[:m] if weight is not None]
        kernels = merge(weights, parameters[m : 2 * m], spec, merged, memory_format(x))
        sums = window_sums(x, merged, spec.stride)
        s = pooled(sums, kernels, math.prod(spec.output_size(*x.shape[2:])))
        a = attend(s, FoldedGate(*parameters[2 * m :]), spec.gate_has_relu)  # type: ignore[arg-type]
        ctx.plan, ctx.spec, ctx.merged = plan, spec, merged
        ctx.save_for_backward(x, sums, s, a, *parameters)
        return convolve(x, a, kernels, spec, merged, plan.samples)

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd may run under an autocast that the forward pass did not.
        with torch.autocast("cpu", enabled=False):
            if differentiable.are_asked(dv):
                x, _, _, _, *parameters = ctx.saved_tensors
                needs = ctx.needs_input_grad[2:]
                return None, None, *differentiable.unit_grads(x, parameters, dv, needs, ctx.spec)
            return _backward(ctx, dv)


def _backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:
    spec, merged = ctx.spec, ctx.merged
    m, c = spec.num_branches, spec.out_channels
    needs = ctx.needs_input_grad[2:]
    x, sums, s, a, *parameters = ctx.saved_tensors
    n, out_format = x.shape[0], memory_format(x)
    kernels = merge(parameters[:m], parameters[m : 2 * m], spec, merged, out_format)
    dv = dv.contiguous(memory_format=out_format)
    dx, dk = _convolve_bwd(dv, x, a, kernels, spec, merged, ctx.plan.samples, needs_dx=needs[0])

    # By channel, since attention weighs output channels; contiguous, or bmm copies channel by channel.
    weights = torch.stack([weight.reshape(c, -1) for weight in kernels.weights], dim=-1)  # [C, F, M]
    dk_by_channel = dk.flatten(2).transpose(0, 1).contiguous()  # [C, N, F]
    a_by_channel = a.permute(2, 1, 0).contiguous()  # [C, M, N]
    da = torch.bmm(dk_by_channel, weights).permute(1, 2, 0)  # [N, M, C]
    dv_sum = dv.sum((2, 3))
    if kernels.biases is not None:
        da = da + dv_sum[:, None] * kernels.biases
    ds, gate_grads = attend_bwd(s, FoldedGate(*parameters[2 * m :]), spec.gate_has_relu, da)

    g = (ds / math.prod(dv.shape[2:])).view(n, merged.groups, -1)
    dw = torch.bmm(a_by_channel, dk_by_channel)  # [C, M, F]
    dw += torch.bmm(g.permute(1, 2, 0).contiguous(), by_group(sums, kernels).contiguous()).reshape(c, 1, -1)
    side = merged.kernel_size
    weight_grads = []
    for i, branch in enumerate(spec.branches):
        taps = taps_of(branch, merged)
        dw_i = dw[:, i].view(c, -1, side, side)[:, :, taps, taps]
        weight_grads.append(dw_i.contiguous() if needs[1 + i] else None)
    bias_grads = [(a[:, i] * dv_sum + ds).sum(0) if needs[1 + m + i] else None for i in range(m)]
    if dx is not None:
        sums_grad = torch.bmm(g.transpose(0, 1), kernels.total_weight).transpose(0, 1)
        add_to_windows(dx, sums_grad.reshape(sums.shape), merged, spec.stride)
    return None, None, dx, *weight_grads, *bias_grads, *gate_grads


def _convolve_bwd(
    dv: Tensor,
    x: Tensor,
    a: Tensor,
    kernels: MergedKernels,
    spec: SKSpec,
    merged: BranchSpec,
    samples: int,
    needs_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of :func:`..cpu.merging.convolve` by x and by each sample's own kernels.

    Returns:
        dx as x, None unless needed, and dK ``[N, C, fan_in, K, K]``.
    """
    dk = _kernel_grads(dv, x, spec, merged)
    if not needs_dx:
        return None, dk
    dx = torch.empty_like(x, memory_format=memory_format(x))
    for start in range(0, x.shape[0], samples):
        part = slice(start, start + samples)
        weight = sample_weights(kernels.weights, a[part])
        dv_part, x_part = side_by_side(dv[part]), side_by_side(x[part])
        dx_part, _ = convolution_grads(dv_part, x_part, weight, merged, spec.stride, (True, False))
        assert dx_part is not None
        dx[part] = dx_part.view_as(dx[part])
    return dx, dk


def _kernel_grads(dv: Tensor, x: Tensor, spec: SKSpec, merged: BranchSpec) -> Tensor:
    """The gradients of each sample's own kernels, ``[N, C, fan_in, K, K]``.

    By strips of rows: the rounding of a sum over a large image would be several times that of eager's attention
    gradient.
    """
    h, w = dv.shape[2:]
    rows = math.ceil(h / math.ceil(h / max(1, LONGEST_SUM // w)))
    pad = merged.padding
    n, c, h_in, w_in = x.shape
    # One sample and the rows of zeros around it; strips begin and end anywhere in it.
    padded = x.new_zeros(1, c, h_in + 2 * pad, w_in).contiguous(memory_format=torch.channels_last)
    dk = x.new_zeros(n, spec.out_channels, c // merged.groups, merged.kernel_size, merged.kernel_size)
    for dk_i, dv_i, x_i in zip(dk, dv.split(1), x.split(1), strict=True):
        padded[:, :, pad : pad + h_in] = x_i
        dv_i = dv_i.contiguous(memory_format=torch.channels_last)
        for start in range(0, h, rows):
            dv_strip = dv_i[:, :, start : start + rows]
            first = start * spec.stride
            x_strip = padded[:, :, first : first + (dv_strip.shape[2] - 1) * spec.stride + 2 * pad + 1]
            needed, padding = (False, True), (0, pad)
            _, dk_strip = convolution_grads(dv_strip, x_strip, dk_i, merged, spec.stride, needed, padding)
            assert dk_strip is not None
            dk_i += dk_strip
    return dk
