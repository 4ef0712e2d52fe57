"""Schedule "train", for the CPU and linear branches: one function with a backward pass of its own.

Autograd would keep what every operator reads, and walk over the branches once for each operator's gradient. Here the
input and the branches are kept, of two branches their difference alone; and a branch's gradient is written once, into
memory that the next branch takes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cpu import differentiable
from ..cpu.gate import attend_bwd
from ..folding import FoldedGate, affine_gate, attend, sum_dtype
from ..layout import branch_inputs, memory_format, with_own_strides
from ..library import convolution_grads
from ..params import Branch, Gate
from ..plan import Plan
from ..spec import SKSpec


def run(plan: Plan, x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec) -> Tensor:
    """The unit's output; arguments and result as :func:`sk_triton.functional.sk_conv`."""
    out_format = memory_format(x)
    # PyTorch's convolution would convert weights to the format of its input in both passes.
    weights = [branch.weight.to(plan.dtype).contiguous(memory_format=out_format) for branch in branches]
    biases = [None if branch.bias is None else branch.bias.to(plan.dtype) for branch in branches]
    affine = affine_gate(gate, sum_dtype(plan.dtype))
    return _LinearUnit.apply(spec, x, *weights, *biases, *affine)


class _LinearUnit(torch.autograd.Function):
    """From x, M weights, M biases and the four tensors of :class:`..folding.FoldedGate` to the unit's output."""

    @staticmethod
    def forward(ctx: Any, spec: SKSpec, x: Tensor, *parameters: Tensor | None) -> Tensor:
        m = spec.num_branches
        us = differentiable.convolutions(x, parameters, spec)
        sums = sum_dtype(x.dtype)
        s = us[0].mean((2, 3), dtype=sums)
        for u in us[1:]:
            s += u.mean((2, 3), dtype=sums)
        attention = attend(s, FoldedGate(*parameters[2 * m :]), spec.gate_has_relu)  # type: ignore[arg-type]
        a = attention.to(x.dtype)[..., None, None]
        v = us[0] * a[:, 0]
        for i in range(1, m):
            v.addcmul_(us[i], a[:, i])
        if m == 2:
            # a_1 = 1 - a_0: the gradient by a_0 takes their difference, and that by a_1 is 0.
            us = [us[0].sub_(us[1])]
        ctx.spec = spec
        ctx.save_for_backward(x, s, attention, *parameters, *us)
        return v.contiguous(memory_format=memory_format(x))

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:
        spec, needs = ctx.spec, ctx.needs_input_grad[1:]
        # Autograd may run under an autocast that the forward pass did not.
        with torch.autocast("cpu", enabled=False):
            if differentiable.are_asked(dv):
                x, _, _, *rest = ctx.saved_tensors
                parameters = rest[: 2 * spec.num_branches + 4]
                return None, *differentiable.unit_grads(x, parameters, dv, needs, spec)
            return _backward(ctx, dv)


def _backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:
    spec: SKSpec = ctx.spec
    m = spec.num_branches
    needs = ctx.needs_input_grad
    x, s, a, *rest = ctx.saved_tensors
    weights, gate, us = rest[:m], FoldedGate(*rest[2 * m : 2 * m + 4]), rest[2 * m + 4 :]
    sums = sum_dtype(dv.dtype)
    scratch = torch.empty_like(us[0])
    da = torch.zeros_like(a)  # and so it stays where a difference stands for two branches
    for i, u in enumerate(us):
        da[:, i] = torch.mul(dv, u, out=scratch).sum((2, 3), dtype=sums)
    ds, gate_grads = attend_bwd(s, gate, spec.gate_has_relu, da)
    pixels = dv.shape[2] * dv.shape[3]
    g = (ds / pixels).to(dv.dtype)[..., None, None]
    dv_sum = dv.sum((2, 3), dtype=sums)
    dxs: list[Tensor] = []
    weight_grads, bias_grads = [], []
    for i, (x_i, weight, branch) in enumerate(
        zip(branch_inputs(with_own_strides(x), spec), weights, spec.branches, strict=True)
    ):
        du = torch.addcmul(g, a[:, i, :, None, None].to(dv.dtype), dv, out=scratch)
        needed = needs[1], needs[2 + i]
        dx_i, weight_grad = convolution_grads(du, x_i, weight, branch, spec.stride, needed)
        weight_grads.append(weight_grad)
        bias_grads.append((a[:, i] * dv_sum + ds).sum(0).to(dv.dtype) if needs[2 + m + i] else None)
        if dx_i is None:
            continue
        if spec.split_input or not dxs:
            dxs.append(dx_i)
        else:
            dxs[0] += dx_i
    dx = dxs[0] if len(dxs) == 1 else torch.cat(dxs, dim=1) if dxs else None
    return None, dx, *weight_grads, *bias_grads, *gate_grads
