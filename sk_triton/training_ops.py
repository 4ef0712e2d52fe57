"""The unit in training as operators of ``torch.library``: opaque to ``torch.compile``, with fake kernels and autograd;
and as a function of autograd, for calls that need no operator: dispatching those takes the host longer than the unit.

Running statistics are no business of the operators, which change none of their inputs: see :mod:`.training`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .layout import memory_format
from .reasons import PLAIN
from .spec import SKSpec
from .training import NormSettings, UnitTensors

if TYPE_CHECKING:
    from .training_branches import TrainingUnit

# Outputs of the forward operator that its gradient reads: all after v and the unbiased variances. Two of them are the
# means over the batch.
FIRST_SAVED, MEAN, GATE_MEAN = 3, 4, 12


def run_unit(
    x: Tensor, tensors: UnitTensors, running: Sequence[Tensor], spec: SKSpec, norms: NormSettings, save: str
) -> Sequence[Tensor]:
    """What :func:`unit_fwd` computes, differentiable: v, and of the batch the unbiased variances of the branches,
    ``[M, C]``, and of the gate, ``[d]``, and their means, of the same sizes."""
    flat = tensors.flat()
    params = [t for t in flat if t is not None]
    has = [t is not None for t in flat]
    if _is_watched(x):
        return _results(unit_fwd(x, params, running, has, spec.encoded, *norms, save))
    return UnitFunction.apply(x, save, spec, norms, has, len(params), *params, *running)


def _is_watched(tensor: Tensor) -> bool:
    """Whether a call on a tensor is seen by a compiler, a transformation, a mode or a subclass of Tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or _get_current_dispatch_mode() is not None
        or type(tensor) not in PLAIN
    )


class UnitFunction(torch.autograd.Function):
    """The operators :func:`unit_fwd` and :func:`unit_bwd` without the dispatcher.

    Arguments: x, `save`, `spec`, `norms`, `has`, the number of parameters; then the tensors of `params` and `running`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, save: str, *rest: Any) -> tuple[Tensor, ...]:
        spec, norms, has, count, *tensors = rest
        outputs = _run_forward(x, _unit(tensors[:count], tensors[count:], has, spec, norms), save)
        results = _results(outputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[1:])
        ctx.static = spec, norms, has, count, len(tensors) - count
        ctx.save_for_backward(x, *tensors, *outputs[FIRST_SAVED:])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        spec, norms, has, count, num_running = ctx.static
        before = len(ctx.needs_input_grad) - count - num_running  # arguments before the parameters
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[before : before + count]]
        dv = grads[0]
        if dv is None or not any(needs):
            return (None,) * len(ctx.needs_input_grad)
        x, *tensors = ctx.saved_tensors
        params, running = tensors[:count], tensors[count : count + num_running]
        saved = tensors[count + num_running :]
        # The operator says that it has no gradient, where one is asked for.
        if torch.is_grad_enabled() or _is_watched(dv):
            found = iter(unit_bwd(dv, x, params, running, saved, has, spec.encoded, *norms, needs))
        else:
            found = iter(_run_backward(dv, x, _unit(params, running, has, spec, norms), saved, needs))
        dx, *dparams = [next(found) if is_needed else None for is_needed in needs]
        return dx, *(None,) * (before - 1), *dparams, *(None,) * num_running


def _results(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (*outputs[:FIRST_SAVED], outputs[MEAN], outputs[GATE_MEAN])


def _run_forward(x: Tensor, unit: TrainingUnit, save: str) -> list[Tensor]:
    from .dispatch import workload_of
    from .schedules import train
    from .steps import Tape
    from .training_plan import plan_training

    with undisturbed(x):
        return train.forward(x, unit, plan_training(workload_of(x, unit.spec), save), save=save, tape=Tape())


def _run_backward(
    dv: Tensor, x: Tensor, unit: TrainingUnit, saved: Sequence[Tensor], needs: list[bool]
) -> list[Tensor]:
    from .dispatch import workload_of
    from .schedules import train
    from .steps import Tape
    from .training_plan import plan_training

    with undisturbed(x):
        plan = plan_training(workload_of(x, unit.spec), "branches")
        return train.backward(dv, x, unit, plan, train.Saved(*saved), needs, Tape())


@contextlib.contextmanager
def undisturbed(x: Tensor) -> Iterator[None]:
    """On the device of x, without gradients or autocast."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(x.device.type):
            stack.enter_context(torch.autocast(x.device.type, enabled=False))
        if x.is_cuda:
            stack.enter_context(torch.cuda.device_of(x))
        yield


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
    unit = _unit(params, running, has, SKSpec.decode(spec), NormSettings(kinds, list(epsilons), groups))
    return _run_forward(x, unit, save)


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
    unit = _unit(params, running, has, SKSpec.decode(spec), NormSettings(kinds, list(epsilons), groups))
    return _run_backward(dv, x, unit, saved, list(needs))


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
        sums(2, n, m, c, when=is_kept),
        *gate,
        size,
        sums(n, m, c),
    ]


@unit_bwd.register_fake
def _(dv, x, params, running, saved, has, spec, kinds, epsilons, groups, needs):
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))]
    grads += [torch.empty_like(param) for param in params]
    return [grad for grad, is_needed in zip(grads, needs, strict=True) if is_needed]


def _unit(
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    has: Sequence[bool],
    spec: SKSpec,
    norms: NormSettings,
) -> TrainingUnit:
    from .training_branches import TrainingUnit

    remaining = iter(params)
    values = [next(remaining) if present else None for present in has]
    tensors = UnitTensors.from_flat(values, spec.num_branches)
    return TrainingUnit(spec, tensors, tuple(running), norms)


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
