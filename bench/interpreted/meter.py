"""Counts the bytes that interpreted kernels ask for and the distinct bytes they touch, tensor by tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Traffic:
    """Counts for one tensor under one launch, in bytes."""

    kernel: str
    tensor: str
    read: int = 0
    written: int = 0
    touched: int = 0

    @property
    def requested(self) -> int:
        return self.read + self.written


class Meter:
    """Counts accesses per tensor while the interpreter runs kernels inside :meth:`watch`.

    An access outside of every tensor's storage raises ``IndexError``: on a GPU it would be a fault, or worse, nothing.
    """

    def __init__(self, tensors: Mapping[str, Tensor | Sequence[Tensor]]) -> None:
        self._storages: dict[int, tuple[str, int]] = {}
        """Name and size of each storage, by its address."""
        for name, value in tensors.items():
            for tensor in (value,) if isinstance(value, Tensor) else value:
                storage = tensor.untyped_storage()
                self._storages.setdefault(storage.data_ptr(), (name, storage.nbytes()))
        self._rows: dict[str, Traffic] = {}
        self._touched: dict[int, np.ndarray] = {}

    @contextlib.contextmanager
    def watch(self, kernel: str = "") -> Iterator[list[Traffic]]:
        """Count what runs inside; the list that is handed out is filled at the end, one row per tensor used."""
        self._rows = {name: Traffic(kernel, name) for name, _ in self._storages.values()}
        self._touched = {}
        result: list[Traffic] = []
        with observed_accesses(self._count):
            yield result
        for address, touched in self._touched.items():
            self._rows[self._storages[address][0]].touched += int(touched.sum())
        result.extend(row for row in self._rows.values() if row.requested)

    def _count(self, addresses: np.ndarray, size: int, is_write: bool) -> None:
        import numpy as np

        if not addresses.size:
            return
        found, first, last = 0, int(addresses.min()), int(addresses.max())
        for address, (name, nbytes) in self._storages.items():
            if last < address or first >= address + nbytes:
                continue
            offsets = addresses - address
            offsets = offsets[(offsets >= 0) & (offsets + size <= nbytes)]
            found += offsets.size
            row = self._rows[name]
            if is_write:
                row.written += offsets.size * size
            else:
                row.read += offsets.size * size
            if address not in self._touched:
                self._touched[address] = np.zeros(nbytes, bool)
            touched = self._touched[address]
            for byte in range(size):
                touched[offsets + byte] = True
        if found != addresses.size:
            raise IndexError(f"{addresses.size - found} accesses outside of every tensor")


@contextlib.contextmanager
def observed_accesses(observer: Callable[[np.ndarray, int, bool], None]) -> Iterator[None]:
    """Inside, `observer(addresses, bytes of each, is_write)` is told of all loads and stores of the interpreter."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def tell(ptrs: Any, mask: Any, is_write: bool) -> None:
        # A mask and a scalar condition make integers of it, which would count as indices.
        wanted = mask.data.astype(bool)
        addresses = np.broadcast_to(ptrs.data, wanted.shape)[wanted].astype(np.int64).reshape(-1)
        observer(addresses, ptrs.get_element_ty().primitive_bitwidth // 8, is_write)

    def observed_load(builder, ptrs, mask, *args, **kwargs):
        tell(ptrs, mask, False)
        return load(builder, ptrs, mask, *args, **kwargs)

    def observed_store(builder, ptrs, value, mask, *args, **kwargs):
        tell(ptrs, mask, True)
        return store(builder, ptrs, value, mask, *args, **kwargs)

    InterpreterBuilder.create_masked_load = observed_load
    InterpreterBuilder.create_masked_store = observed_store
    try:
        yield
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
