"""The unit in training as operators of ``torch.library``: opaque to ``torch.compile``, with fake kernels and autograd.

Running statistics are no business of the operators, which change none of their inputs: see :mod:`.run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import cannot_run, inference_schedule_reason
from ..layout import empty_output, memory_format
from ..save import Save
from ..spec import SKSpec
from .norms import NormSettings
from .tensors import Saved, UnitTensors, where_needed

# Outputs of the forward operator that its gradient reads: all after v and the two unbiased variances.
FIRST_SAVED = 3
# Those that are the means over the batch.
MEAN, GATE_MEAN = (FIRST_SAVED + Saved._fields.index(name) for name in ("mean", "gate_mean"))


def run_operator(
    x: Tensor, tensors: UnitTensors, running: Sequence[Tensor], spec: SKSpec, norms: NormSettings, save: Save
) -> Sequence[Tensor]:
    """What :func:`unit_fwd` computes, differentiable: v, and of the batch the unbiased variances of the branches,
    ``[M, C]``, and of the gate, ``[d]``, and their means, of the same sizes."""
    flat = tensors.flat()
    params, has = [t for t in flat if t is not None], [t is not None for t in flat]
    return results_of(unit_fwd(x, params, running, has, spec.encoded, *norms, save))


def results_of(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What :func:`run_operator` gives, of the outputs of :func:`unit_fwd`."""
    return (*outputs[:FIRST_SAVED], outputs[MEAN], outputs[GATE_MEAN])


@torch.library.custom_op("sk_triton::unit_fwd", mutates_args=())
def unit_fwd(
    x: Tensor,
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    has: Sequence[bool],
    encoded: str,
    kinds: str,
    epsilons: Sequence[float],
    groups: str,
    save: str,
) -> list[Tensor]:
    """A unit in training.

    Args:
        x: ``[N, in_channels, H, W]``.
        params: those of ``UnitTensors.flat()`` that the unit `has`.
        running: mean and variance of each norm of kind "r".
        encoded: ``SKSpec.encoded``.
        kinds, epsilons, groups: :class:`.norms.NormSettings`.
        save: "branches" or "input".

    Returns:
        v; the unbiased variance over the batch of the branches, ``[M, C]``, and of the gate, ``[d]``, empty where the
        statistics are not the batch's; then what the gradient needs: :class:`.tensors.Saved`.

    Raises:
        RuntimeError: ``use_backend`` asks for a schedule of inference.
    """
    from .operator_replay import forward

    if reason := inference_schedule_reason():
        raise cannot_run("triton", reason)
    norms = NormSettings(kinds, tuple(epsilons), groups)
    return forward(x, params, running, tuple(has), SKSpec.decode(encoded), norms, save)


@torch.library.custom_op("sk_triton::unit_bwd", mutates_args=())
def unit_bwd(
    dv: Tensor,
    x: Tensor,
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    saved: Sequence[Tensor],
    has: Sequence[bool],
    encoded: str,
    kinds: str,
    epsilons: Sequence[float],
    groups: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x and of the parameters, of those that `needs` names; arguments as :func:`unit_fwd`."""
    from .operator_replay import backward

    norms = NormSettings(kinds, tuple(epsilons), groups)
    return backward(dv, x, params, running, saved, tuple(has), SKSpec.decode(encoded), norms, tuple(needs))


@unit_fwd.register_fake
def _(x, params, running, has, encoded, kinds, epsilons, groups, save):
    spec = SKSpec.decode(encoded)
    n, _, h_in, w_in = x.shape
    h, w = spec.output_size(h_in, w_in)
    m, c, d = spec.num_branches, spec.out_channels, spec.gate_width
    norms = NormSettings(kinds, epsilons, groups)

    def sums(*size: Any, when: bool = True) -> Tensor:
        return x.new_empty(size if when else (0,), dtype=torch.float32)

    v = empty_output(x, spec)
    is_kept, has_norm, has_gate_norm = save == "branches", spec.branch_norm, spec.gate_norm
    variances = [sums(m, c, when="b" in norms.branch_kinds), sums(d, when=has_gate_norm)]
    rows = 2 * m * has_norm + sum(has[m : 2 * m])
    saved = Saved(
        y=x.new_empty((m, n, h, w, c) if is_kept else (0,)),
        mean=sums(m, c, when=has_norm),
        rstd=sums(m, c, when=has_norm),
        sizes=sums(m, when=any(norms.branch_groups)),
        vectors=sums(rows, c, when=rows > 0),
        sums=sums(2, n, m, c, when=is_kept and has_norm),
        s=sums(n, c),
        h=sums(n, d),
        z=sums(n, d),
        gate_mean=sums(d, when=has_gate_norm),
        gate_rstd=sums(d, when=has_gate_norm),
        gate_size=sums(when=bool(norms.gate_group)),
        attention=sums(n, m, c),
    )
    return [v, *variances, *saved]


@unit_bwd.register_fake
def _(dv, x, params, running, saved, has, encoded, kinds, epsilons, groups, needs):
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))]
    grads += [torch.empty_like(param) for param in params]
    return [grad for grad, is_needed in zip(grads, needs, strict=True) if is_needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, params, running, *ctx.static, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.counts = len(params), len(running)
    ctx.save_for_backward(x, *params, *running, *output[FIRST_SAVED:])


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    num_params, num_running = ctx.counts
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    dv = grads[0]
    if dv is None or not any(needs):
        return None, [None] * num_params, [None] * num_running, *(None,) * 6
    x, *rest = ctx.saved_tensors
    params, rest = rest[:num_params], rest[num_params:]
    found = unit_bwd(dv, x, params, rest[:num_running], rest[num_running:], *ctx.static, needs)
    dx, *dparams = where_needed(found, needs)
    return dx, dparams, [None] * num_running, *(None,) * 6


def _refuse_second(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    raise RuntimeError(
        'the kernels compute no second derivatives of a unit: call it under use_backend("reference") for those'
    )


unit_fwd.register_autograd(_backward, setup_context=_setup_context)
unit_bwd.register_autograd(_refuse_second)
