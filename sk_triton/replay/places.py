"""Where the tensors of a recorded call lie: in memory that its later calls have elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes; Triton specialises for addresses that 16 divides.
_ALIGNMENT = 256

IN_PLACE = -1
"""Stands for what holds a tensor that stays where it is."""


class Part(NamedTuple):
    """A tensor in the memory of another: where it begins there, in bytes."""

    start: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor, start: int) -> Part:
        return cls(start, tensor.dtype, tensor.shape, tensor.stride())

    def view(self, memory: Tensor) -> Tensor:
        if not math.prod(self.size):
            return memory.new_empty(self.size, dtype=self.dtype)
        as_dtype = memory.view(self.dtype)
        start = as_dtype.storage_offset() + self.start // self.dtype.itemsize
        return as_dtype.as_strided(self.size, self.stride, start)


class SideBySide:
    """Tensors side by side in one piece of memory, each with all of its own storage.

    Attributes:
        nbytes: of that memory.
        offsets: by the address of a storage, where it begins there.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self.nbytes = 0
        self.offsets: dict[int, int] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> int:
        """Where the tensor begins."""
        storage = storage_of(tensor)
        if storage not in self.offsets:
            self.offsets[storage] = self.nbytes
            self.nbytes += -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
        return self.offsets[storage] + tensor.data_ptr() - storage


class Places:
    """Where the tensors of one call lie, as (holder, offset in bytes).

    Holders are numbered: the call's own tensors, then the workspace, then the fixed tensors that are read whole;
    `IN_PLACE` is none of these.

    Args:
        tensors: each in a storage of its own.
        fixed, kept: stay where they are.

    Attributes:
        are_apart: False where two of the tensors share memory, or one with what stays.
        workspace: what none of them holds.
        met: which of the tensors hold something.
        reads: which of the fixed tensors are read whole.
    """

    def __init__(
        self, tensors: Sequence[Tensor | SideBySide], fixed: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> None:
        self.tensors, self.fixed = tensors, fixed
        self.are_apart = True
        self.workspace = SideBySide()
        self.met: set[int] = set()
        self.reads: list[int] = []
        self._stays = {storage_of(tensor) for tensor in (*fixed, *kept)}
        # Of a storage: what holds it, and the address where that would begin.
        self._origins: dict[int, tuple[int, int]] = {}
        for holder, tensor in enumerate(tensors):
            if isinstance(tensor, SideBySide):
                own = {storage: storage - offset for storage, offset in tensor.offsets.items()}
            else:
                own = {storage_of(tensor): tensor.data_ptr()}
            if self.hold_any(own):
                self.are_apart = False
            self._origins |= {storage: (holder, address) for storage, address in own.items()}

    def hold_any(self, storages: Iterable[int]) -> bool:
        """Whether one of the storages has a place."""
        known = self._origins.keys() | self._stays | self.workspace.offsets.keys()
        return not known.isdisjoint(storages)

    def of(self, tensor: Tensor) -> tuple[int, int]:
        """What holds a tensor, and where that begins there, in bytes; of what stays, the address."""
        storage = storage_of(tensor)
        if storage in self._stays:
            return IN_PLACE, tensor.data_ptr()
        if storage not in self._origins:
            return len(self.tensors), self.workspace.add(tensor)
        holder, origin = self._origins[storage]
        self.met.add(holder)
        return holder, tensor.data_ptr() - origin

    def view_of(self, tensor: Tensor) -> tuple[int, Part | None] | None:
        """What holds a tensor, and which part of that it is, None for all; None for a part of what stays."""
        holder, start = self.of(tensor)
        if holder == IN_PLACE:
            which = next((i for i, own in enumerate(self.fixed) if own is tensor), None)
            if which is None:
                return None
            if which not in self.reads:
                self.reads.append(which)
            return len(self.tensors) + 1 + self.reads.index(which), None
        is_whole = holder < len(self.tensors) and self.tensors[holder] is tensor
        return holder, None if is_whole else Part.of(tensor, start)


def storage_of(tensor: Tensor) -> int:
    """The address of a tensor's storage."""
    return tensor.untyped_storage().data_ptr()
