"""Starts a training step again without planning it again: as :mod:`..replay.calls`, forward and backward.

The first call of a kind runs as any other, and so does the first backward pass through a call that was started again.
Either is recorded where nothing but kernels and the library computed it. Parameters may change, but not move.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..kernels.running import running_tensors
from ..layout import with_adjacent_channels
from ..replay.calls import Recorder, settings_for
from ..replay.places import Part, SideBySide
from ..replay.recording import MAX_RECORDINGS, Recording, record
from .call import UnitCall, is_watched, run_backward
from .operators import FIRST_SAVED
from .passes import backward_pass, in_format_of, kernel_inputs
from .tape import Tape
from .tensors import where_needed

Slot = tuple[dict[str, Any], str]
"""Where a layer keeps a parameter."""


class TrainingCall:
    """A recorded call.

    Attributes:
        call: it, but for its tensors.
        slots: of the parameters.
        running: statistics that norms do not take from the batch.
        v_layout: size and stride of the output.
        saved: what the gradient needs, parts of one piece of memory of `saved_bytes`.
        counters: of the batches that norms saw, which the kernels bring up to date with their statistics.
    """

    def __init__(
        self,
        call: UnitCall,
        slots: Sequence[Slot],
        running: Sequence[Tensor],
        x: Tensor,
        v: Tensor,
        saved: Sequence[Tensor],
        side_by_side: SideBySide,
        recording: Recording,
    ) -> None:
        self.call, self.slots, self.running = call, slots, running
        self.dtype, self.is_converted = x.dtype, x.stride(1) != 1
        self.v_layout = v.shape, v.stride()
        self.saved = [Part.of(tensor, side_by_side.add(tensor)) for tensor in saved]
        self.saved_bytes = side_by_side.nbytes
        self.counters = [own.counter for own in call.updates if own is not None]
        self.recording = recording
        self.backwards: dict[Hashable, Recording] = {}

    def start(self, x: Tensor) -> Tensor:
        """The output for x."""
        if x.dtype != self.dtype:  # autocast
            x = x.to(self.dtype)
        return _RecordedUnit.apply(x, self, *[own[name] for own, name in self.slots])

    def forward(self, x: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The output, and the memory of what the gradient needs."""
        x = with_adjacent_channels(x) if self.is_converted else x
        v, saved = x.new_empty_strided(*self.v_layout), _memory(x, self.saved_bytes)
        workspace = _memory(x, self.recording.workspace_bytes)
        self.recording.start(x, saved, v, workspace, *[params[i] for i in self.recording.reads])
        if self.counters:
            increment_version(self.counters)
        return v, saved

    def backward(
        self, dv: Tensor, x: Tensor, memory: Tensor, params: Sequence[Tensor], needs: tuple[bool, ...]
    ) -> list[Tensor]:
        """The gradients that `needs` names; `memory` as :meth:`forward` gave it."""
        memory = memory.contiguous()
        if torch.is_grad_enabled() or is_watched(dv):
            saved = [part.view(memory) for part in self.saved]
            return run_backward(dv, x, self.call, params, self.running, saved, needs)
        dv, x_in = kernel_inputs(dv, x)
        # Hooks on single saved tensors may hand over others: of another layout, elsewhere.
        kind = (
            dv.stride(),
            x_in.stride(),
            dv.data_ptr() % 16,
            x_in.data_ptr() % 16,
            memory.data_ptr() % 16,
            needs,
            *settings_for(x.dtype),
            *map(Tensor.stride, params),
            *map(Tensor.data_ptr, params),
        )
        recording = self.backwards.get(kind)
        if recording is None:
            grads = self._record_backward(kind, dv, x_in, memory, params, needs)
            return in_format_of(x, grads, needs)
        wanted = [t for t, is_needed in zip((x_in, *params), needs, strict=True) if is_needed]
        written = [
            torch.empty_like(t) for t, is_given in zip(wanted, recording.given, strict=True) if not is_given
        ]
        workspace = _memory(x, recording.workspace_bytes)
        read = [params[i] for i in recording.reads]
        made, rest = iter(recording.start(dv, x_in, memory, *written, workspace, *read)), iter(written)
        return in_format_of(x, [next(made if is_given else rest) for is_given in recording.given], needs)

    def _record_backward(
        self,
        kind: Hashable,
        dv: Tensor,
        x_in: Tensor,
        memory: Tensor,
        params: Sequence[Tensor],
        needs: tuple[bool, ...],
    ) -> list[Tensor]:
        saved = [part.view(memory) for part in self.saved]
        unit = self.call.unit(params, self.running)
        grads, tape = backward_pass(dv, x_in, unit, saved, needs)
        if tape.is_whole:
            recording = record(
                tape.steps,
                tape.started,
                (dv, x_in, memory, *grads),
                (*params, *self.running),
                outputs=len(grads),
            )
            if recording is not None:
                if len(self.backwards) >= MAX_RECORDINGS:
                    self.backwards.clear()
                self.backwards[kind] = recording
        return grads


class _RecordedUnit(torch.autograd.Function):
    """Arguments: x, the recorded call, its parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: TrainingCall, *params: Tensor) -> Tensor:
        v, saved = call.forward(x, params)
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(x, saved, *params)
        return v

    @staticmethod
    def backward(ctx: Any, dv: Tensor | None) -> tuple[Any, ...]:
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        if dv is None or not any(needs):
            return (None,) * (1 + len(needs))
        x, saved, *params = ctx.saved_tensors
        dx, *dparams = where_needed(ctx.call.backward(dv, x, saved, params, needs), needs)
        return dx, None, *dparams


def record_call(
    recorder: Recorder,
    x: Tensor,
    x_in: Tensor,
    call: UnitCall,
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    outputs: Sequence[Tensor],
    tape: Tape,
) -> None:
    """Hand a call that has run to a recorder, if it can be started again.

    Args:
        x: as the call got it.
        x_in: with adjacent channels.
        outputs: of :func:`.operators.unit_fwd`.
        tape: of a call that was whole.
    """
    slots = _slots(recorder.layer, params)
    if slots is None or any(isinstance(m, nn.SyncBatchNorm) for m in recorder.layer.modules()):
        return  # a group of processes may form later
    v, saved = outputs[0], outputs[FIRST_SAVED:]
    side_by_side = SideBySide(tensor for tensor in saved if tensor.numel())
    fixed = (*params, *running, *running_tensors(call.updates))
    recording = record(tape.steps, tape.started, (x_in, side_by_side, v), fixed, outputs=1)
    if recording is not None:
        recorder.add(TrainingCall(call, slots, running, x, v, saved, side_by_side, recording).start)


def _slots(layer: nn.Module, params: Sequence[Tensor]) -> list[Slot] | None:
    """Where the layer keeps each parameter, None where it computes one."""
    slots = {id(t): (m._parameters, name) for m in layer.modules() for name, t in m._parameters.items()}
    found = [slots.get(id(param)) for param in params]
    return None if None in found else found  # type: ignore[return-value]


def _memory(x: Tensor, nbytes: int) -> Tensor:
    return x.new_empty(nbytes, dtype=torch.uint8)
