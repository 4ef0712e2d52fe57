"""The unit in training as operators of ``torch.library``: opaque to ``torch.compile``, with fake kernels and autograd;
and as a function of autograd, for calls that need no operator: dispatching those takes the host longer than the unit.

Running statistics are no business of the operators, which change none of their inputs: see :mod:`.training`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .layout import memory_format
from .reasons import PLAIN
from .save import Save
from .spec import SKSpec
from .training import NormSettings, UnitTensors

if TYPE_CHECKING:
    from .kernels.running import Running
    from .replay import Recorder
    from .training_branches import TrainingUnit

# Outputs of the forward operator that its gradient reads: all after v and the unbiased variances. Two of them are the
# means over the batch.
FIRST_SAVED, MEAN, GATE_MEAN = 3, 4, 12


class UnitCall(NamedTuple):
    """A call of a unit, but for its tensors: which of its parameters there are, how its norms act, what it saves, which
    running statistics its kernels update (none, or one for each norm), and what takes note of it."""

    spec: SKSpec
    norms: NormSettings
    has: tuple[bool, ...]
    save: Save
    updates: tuple[Running | None, ...] = ()
    recorder: Recorder | None = None

    def unit(self, params: Sequence[Tensor], running: Sequence[Tensor]) -> TrainingUnit:
        from .training_passes import unit_of

        return unit_of(params, running, self.has, self.spec, self.norms, self.updates)


def run_operator(
    x: Tensor, tensors: UnitTensors, running: Sequence[Tensor], spec: SKSpec, norms: NormSettings, save: Save
) -> Sequence[Tensor]:
    """What :func:`unit_fwd` computes, differentiable: v, and of the batch the unbiased variances of the branches,
    ``[M, C]``, and of the gate, ``[d]``, and their means, of the same sizes."""
    flat = tensors.flat()
    params, has = [t for t in flat if t is not None], [t is not None for t in flat]
    return _results(unit_fwd(x, params, running, has, spec.encoded, *norms, save))


def run_unit(
    x: Tensor,
    tensors: UnitTensors,
    running: Sequence[Tensor],
    spec: SKSpec,
    norms: NormSettings,
    save: Save,
    updates: tuple[Running | None, ...] = (),
    recorder: Recorder | None = None,
) -> Sequence[Tensor]:
    """As :func:`run_operator`, for a call that nobody watches."""
    flat = tensors.flat()
    params = [t for t in flat if t is not None]
    call = UnitCall(spec, norms, tuple([t is not None for t in flat]), save, updates, recorder)
    return UnitFunction.apply(x, call, len(params), *params, *running)


def is_watched(tensor: Tensor) -> bool:
    """Whether a call on a tensor is seen by a compiler, a transformation, a mode or a subclass of Tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or _get_current_dispatch_mode() is not None
        or type(tensor) not in PLAIN
    )


class UnitFunction(torch.autograd.Function):
    """The operators :func:`unit_fwd` and :func:`unit_bwd` without the dispatcher.

    Arguments: x, the call, the number of parameters; then parameters and `running` of the operator.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: UnitCall, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        from .training_passes import forward_pass

        params, running = tensors[:count], tensors[count:]
        outputs, tape, x_in = forward_pass(x, call.unit(params, running), call.save)
        if call.recorder is not None and tape.is_whole:
            from .training_replay import record_call

            record_call(x, x_in, call, params, running, outputs, tape)
        results = _results(outputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[1:])
        ctx.call, ctx.count = call._replace(recorder=None), count
        ctx.save_for_backward(x, *tensors, *outputs[FIRST_SAVED:])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        count, num_inputs = ctx.count, len(ctx.needs_input_grad)
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3 : 3 + count]]
        if grads[0] is None or not any(needs):
            return (None,) * num_inputs
        x, *tensors = ctx.saved_tensors
        params, rest = tensors[:count], tensors[count:]
        num_running = num_inputs - 3 - count
        found = iter(
            run_backward(grads[0], x, ctx.call, params, rest[:num_running], rest[num_running:], needs)
        )
        dx, *dparams = [next(found) if is_needed else None for is_needed in needs]
        return dx, None, None, *dparams, *(None,) * num_running


def run_backward(
    dv: Tensor,
    x: Tensor,
    call: UnitCall,
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that `needs` names, by the operator where somebody watches: it says that it has no gradient, where
    one is asked for."""
    if torch.is_grad_enabled() or is_watched(dv):
        return unit_bwd(dv, x, params, running, saved, call.has, call.spec.encoded, *call.norms, needs)
    from .training_passes import backward_pass, in_format_of, kernel_inputs

    dv, x_in = kernel_inputs(dv, x)
    return in_format_of(x, backward_pass(dv, x_in, call.unit(params, running), saved, needs)[0], needs)


def _results(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (*outputs[:FIRST_SAVED], outputs[MEAN], outputs[GATE_MEAN])


@torch.library.custom_op("sk_triton::unit_fwd", mutates_args=())
def unit_fwd(
    x: Tensor,
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    has: Sequence[bool],
    spec: str,
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
        spec: ``SKSpec.encoded``.
        kinds, epsilons, groups: :class:`.training.NormSettings`.
        save: "branches" or "input".

    Returns:
        v; the unbiased variance over the batch of the branches, ``[M, C]``, and of the gate, ``[d]``, empty where the
        statistics are not the batch's; then what the gradient needs: :class:`.schedules.train.Saved`.
    """
    from .operator_replay import forward

    norms = NormSettings(kinds, list(epsilons), groups)
    return forward(x, params, running, tuple(has), SKSpec.decode(spec), norms, save)


@torch.library.custom_op("sk_triton::unit_bwd", mutates_args=())
def unit_bwd(
    dv: Tensor,
    x: Tensor,
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    saved: Sequence[Tensor],
    has: Sequence[bool],
    spec: str,
    kinds: str,
    epsilons: Sequence[float],
    groups: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x and of the parameters, of those that `needs` names; arguments as :func:`unit_fwd`."""
    from .operator_replay import backward

    norms = NormSettings(kinds, list(epsilons), groups)
    return backward(dv, x, params, running, saved, tuple(has), SKSpec.decode(spec), norms, tuple(needs))


@unit_fwd.register_fake
def _(x, params, running, has, spec, kinds, epsilons, groups, save):
    unit = SKSpec.decode(spec)
    n, _, h_in, w_in = x.shape
    h, w = unit.output_size(h_in, w_in)
    m, c, d = unit.num_branches, unit.out_channels, unit.gate_width

    branch_kinds, gate_kind = kinds[:m], kinds[-1]
    branch_groups, gate_group = groups.split(",")[:m], groups.split(",")[-1]

    def sums(*size: Any, when: bool = True) -> Tensor:
        return x.new_empty(size if when else (0,), dtype=torch.float32)

    v = torch.empty((n, c, h, w), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    is_kept, has_norm, has_gate_norm = save == "branches", unit.branch_norm, unit.gate_norm
    variances = [sums(m, c, when="b" in branch_kinds), sums(d, when=gate_kind != "-")]
    y = x.new_empty((m, n, h, w, c) if is_kept else (0,))
    statistics = [sums(m, c, when=has_norm), sums(m, c, when=has_norm), sums(m, when=any(branch_groups))]
    rows = 2 * m * has_norm + sum(has[m : 2 * m])
    vectors = sums(rows, c, when=rows > 0)
    gate = [sums(n, c), sums(n, d), sums(n, d), *(sums(d, when=has_gate_norm) for _ in range(2))]
    size = sums(when=bool(gate_group))
    return [
        v,
        *variances,
        y,
        *statistics,
        vectors,
        sums(2, n, m, c, when=is_kept and has_norm),
        *gate,
        size,
        sums(n, m, c),
    ]


@unit_bwd.register_fake
def _(dv, x, params, running, saved, has, spec, kinds, epsilons, groups, needs):
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
    found = iter(unit_bwd(dv, x, params, rest[:num_running], rest[num_running:], *ctx.static, needs))
    dx, *dparams = [next(found) if is_needed else None for is_needed in needs]
    return dx, dparams, [None] * num_running, *(None,) * 6


unit_fwd.register_autograd(_backward, setup_context=_setup_context)
