"""Global memory: the storages of a launch's tensors at their own addresses, and nothing else."""

import contextlib
import ctypes

import numpy as np

ALIGNMENT = 64

_observers = []


class FaultError(Exception):
    """What a GPU would not do, or not do right."""


@contextlib.contextmanager
def observed_accesses(observer):
    """Inside, `observer(addresses, bytes of each, is_write)` is told of all loads and stores, once for each thread."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


class GlobalMemory:
    """Some storages, whose sizes in bytes are given by their addresses."""

    def __init__(self, storages):
        self.starts = np.array(sorted(storages), np.uint64)
        self.ends = self.starts + np.array([storages[int(start)] for start in self.starts], np.uint64)
        self.base = int(self.starts[0]) // ALIGNMENT * ALIGNMENT
        size = -(-(int(self.ends.max()) - self.base) // ALIGNMENT) * ALIGNMENT
        # All that lies between the first storage and the last; `locate` sees to it that they alone are touched.
        self.bytes = np.frombuffer((ctypes.c_char * size).from_address(self.base), np.uint8)

    def words(self, size):
        """All of it, as integers of `size` bytes."""
        return self.bytes.view(f"u{size}")

    def locate(self, addresses, size, *, is_write):
        """Where the `size` bytes at each address are in `bytes`."""
        if (addresses % np.uint64(size)).any():
            raise FaultError(f"an access of {size} bytes is misaligned")
        inside = self.holds(addresses, np.uint64(size))
        if not inside.all():
            raise FaultError(f"{(~inside).sum()} of {len(addresses)} accesses lie outside of every tensor")
        places = addresses.astype(np.int64)
        for observer in _observers:
            observer(places, size, is_write)
        return places - self.base

    def holds(self, addresses, sizes):
        """Whether the bytes from each address on are in one storage."""
        storage = np.searchsorted(self.starts, addresses, side="right") - 1
        return (storage >= 0) & (addresses <= self.ends[storage] - sizes)
