"""The steps of a training pass, run one by one and kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.launch import Launch
from ..library import LibraryCall


class Tape:
    """Runs the steps of a call one by one, and keeps them: what :mod:`.replay` and :mod:`.operator_replay`
    start again.

    Attributes:
        steps, started: what was run, and what each step gave.
        is_whole: False once the call computed something by other means, which starting the steps would leave out.
    """

    def __init__(self) -> None:
        self.steps: list[Launch | LibraryCall] = []
        self.started: list[Any] = []
        self.is_whole = True

    def run(self, launch: Launch) -> None:
        self.steps.append(launch)
        self.started.append(launch())

    def call(self, call: LibraryCall) -> Sequence[Tensor]:
        """The new tensors that the library gives."""
        found = call()
        self.steps.append(call)
        self.started.append(found)
        return found

    def note_operators(self) -> None:
        """Say that other operators of PyTorch's compute a part of the call."""
        self.is_whole = False

    def contiguous(self, tensor: Tensor) -> Tensor:
        """The tensor, copied where it is not contiguous."""
        if tensor.is_contiguous():
            return tensor
        self.note_operators()
        return tensor.contiguous()

    def contiguous_or_none(self, tensor: Tensor | None) -> Tensor | None:
        """Likewise, None for none."""
        return None if tensor is None else self.contiguous(tensor)

    def filling_memory(self, weight: Tensor) -> Tensor:
        """A weight ``[C, fan_in, k, k]``, copied where it is neither contiguous nor channels_last."""
        if weight.is_contiguous(memory_format=torch.channels_last):
            return weight
        return self.contiguous(weight)
