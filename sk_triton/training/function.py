"""The unit in training as a function of autograd, for calls that need no operator: dispatching those takes the host
longer than the unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layout import with_adjacent_channels
from ..save import Save
from ..spec import SKSpec
from .call import UnitCall, run_backward
from .norms import NormSettings
from .operators import FIRST_SAVED, results_of
from .tensors import UnitTensors, where_needed

if TYPE_CHECKING:
    from ..kernels.running import Running
    from ..replay.calls import Recorder


def run_function(
    x: Tensor,
    tensors: UnitTensors,
    running: Sequence[Tensor],
    spec: SKSpec,
    norms: NormSettings,
    save: Save,
    updates: tuple[Running | None, ...] = (),
    recorder: Recorder | None = None,
) -> Sequence[Tensor]:
    """As :func:`.operators.run_operator`, for a call that nobody watches."""
    flat = tensors.flat()
    params = [t for t in flat if t is not None]
    call = UnitCall(spec, norms, tuple([t is not None for t in flat]), save, updates)
    return UnitFunction.apply(x, call, recorder, len(params), *params, *running)


class UnitFunction(torch.autograd.Function):
    """The operators :func:`.operators.unit_fwd` and :func:`.operators.unit_bwd` without the dispatcher.

    Arguments: x, the call, what takes note of it, the number of parameters; then parameters and `running` of the
    operator.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, call: UnitCall, recorder: Recorder | None, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        from .passes import forward_pass

        params, running = tensors[:count], tensors[count:]
        x_in = with_adjacent_channels(x)
        outputs, tape = forward_pass(x, x_in, call.unit(params, running), call.save)
        if recorder is not None and tape.is_whole:
            from .replay import record_call

            record_call(recorder, x, x_in, call, params, running, outputs, tape)
        results = results_of(outputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[1:])
        ctx.call, ctx.count = call, count
        ctx.save_for_backward(x, *tensors, *outputs[FIRST_SAVED:])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        count, num_inputs = ctx.count, len(ctx.needs_input_grad)
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4 : 4 + count]]
        if grads[0] is None or not any(needs):
            return (None,) * num_inputs
        x, *tensors = ctx.saved_tensors
        params, rest = tensors[:count], tensors[count:]
        num_running = num_inputs - 4 - count
        found = run_backward(grads[0], x, ctx.call, params, rest[:num_running], rest[num_running:], needs)
        dx, *dparams = where_needed(found, needs)
        return dx, None, None, None, *dparams, *(None,) * num_running
