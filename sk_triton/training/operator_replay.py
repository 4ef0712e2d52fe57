"""Starts the training operators' kernels again without planning: as :mod:`.replay`, for calls of no layer.

An operator sees nothing but its arguments, so a call is known by all of them: sizes, strides and dtypes, and where the
parameters lie. It is recorded when it comes for the second time: compiled code may compute parameters, elsewhere at
every call.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import with_adjacent_channels
from ..replay.calls import settings_for
from ..replay.recording import Recording, record
from ..spec import SKSpec
from ..tuning import user_file
from ..undisturbed import undisturbed
from .norms import NormSettings
from .passes import (
    backward_pass,
    forward_pass,
    in_format_of,
    kernel_inputs,
    unit_of,
)
from .tape import Tape

# Calls that are remembered: both passes of every unit of some networks.
MAX_CALLS = 1024


class _Call(NamedTuple):
    """A recorded call; `outputs`: size, stride and dtype of each, None of those that the library makes."""

    recording: Recording
    outputs: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...]

    def start(self, inputs: Sequence[Tensor], fixed: Sequence[Tensor]) -> list[Tensor]:
        like, recording = inputs[0], self.recording
        outputs = [
            None if own is None else like.new_empty_strided(own[0], own[1], dtype=own[2])
            for own in self.outputs
        ]
        workspace = like.new_empty(recording.workspace_bytes, dtype=torch.uint8)
        read = [fixed[i] for i in recording.reads]
        made = iter(recording.start(*_present([*inputs, *outputs]), workspace, *read))
        return [next(made) if output is None else output for output in outputs]


# "seen": came once; "planned": cannot be recorded.
_calls: OrderedDict[Hashable, _Call | str] = OrderedDict()
_lock = threading.Lock()


def forget() -> None:
    """Forget every call."""
    with _lock:
        _calls.clear()


def forward(
    x: Tensor,
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    has: tuple[bool, ...],
    spec: SKSpec,
    norms: NormSettings,
    save: str,
) -> list[Tensor]:
    """As :func:`.operators.unit_fwd`."""
    x_in = with_adjacent_channels(x)

    def run() -> tuple[list[Tensor], Tape]:
        return forward_pass(x, x_in, unit_of(params, running, has, spec, norms), save)

    fixed = (*params, *running)
    kind = ("forward", has, spec, norms, save, *_state(x), x.stride(), *_places(fixed))
    return _run(kind, x, [x_in], fixed, run)


def backward(
    dv: Tensor,
    x: Tensor,
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    saved: Sequence[Tensor],
    has: tuple[bool, ...],
    spec: SKSpec,
    norms: NormSettings,
    needs: tuple[bool, ...],
) -> list[Tensor]:
    """As :func:`.operators.unit_bwd`."""
    dv, x_in = kernel_inputs(dv, x)
    saved = [tensor.contiguous() for tensor in saved]  # hooks may have given other strides
    inputs = [dv, x_in, *saved]

    def run() -> tuple[list[Tensor], Tape]:
        return backward_pass(dv, x_in, unit_of(params, running, has, spec, norms), saved, needs)

    fixed = (*params, *running)
    layouts = [(t.stride(), t.shape, t.data_ptr() % 16) for t in inputs]
    kind = ("backward", has, spec, norms, needs, *_state(x), *layouts, *_places(fixed))
    return in_format_of(x, _run(kind, x, inputs, fixed, run), needs)


def _run(
    kind: Hashable,
    x: Tensor,
    inputs: list[Tensor],
    fixed: Sequence[Tensor],
    run: Callable[[], tuple[list[Tensor], Tape]],
) -> list[Tensor]:
    """What a call of a kind computes: `run` plans it, and gives its outputs and what computed them."""
    with _lock:
        found = _calls.get(kind)
        if found is not None:
            _calls.move_to_end(kind)
    if isinstance(found, _Call):
        with undisturbed(x):
            return found.start(inputs, fixed)
    outputs, tape = run()
    entry: _Call | str = "seen"
    if found is not None:
        made = _present(outputs)
        recording = None
        if found == "seen" and tape.is_whole:
            tensors = (*_present(inputs), *made)
            recording = record(tape.steps, tape.started, tensors, fixed, outputs=len(made))
        entry = "planned"
        if recording is not None:
            given = {id(t) for t, is_given in zip(made, recording.given, strict=True) if is_given}
            entry = _Call(
                recording,
                tuple(None if id(t) in given else (t.shape, t.stride(), t.dtype) for t in outputs),
            )
    with _lock:
        _calls[kind] = entry
        _calls.move_to_end(kind)
        if len(_calls) > MAX_CALLS:
            _calls.popitem(last=False)
    return outputs


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None and tensor.numel()]


def _state(x: Tensor) -> tuple[Hashable, ...]:
    """What a plan depends on besides the unit; see :func:`..replay.calls.call_kind`."""
    return (
        x.shape,
        x.dtype,
        x.device,
        x.data_ptr() % 16,
        *settings_for(x.dtype),
    )


def _places(tensors: Sequence[Tensor]) -> list[Hashable]:
    return [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors]


user_file.when_changed(forget)
