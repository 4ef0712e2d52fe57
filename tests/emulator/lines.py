"""Lines of memory that warps touch: L1's data pipe takes a clock for each."""

import collections
import contextlib

import numpy as np
import pytest

from . import accesses

LINE = 128


@contextlib.contextmanager
def counted_lines():
    """Inside, loads and stores of global memory are counted, in lines of 128 bytes: of a warp's access those that it
    touches; of one of more than a line those of each of its parts, neighbouring threads that make one."""
    counts, located = collections.Counter(), accesses._located

    def counting(machine, address, where, size, count, is_shared, *, is_write):
        if not is_shared:
            lanes = np.arange(machine.lanes)
            part = lanes * max(LINE // 32, size * count) // LINE
            touched = accesses._addresses(machine, address, where) // np.uint64(LINE)
            of_part = np.stack([part if where is None else part[where], touched.astype(np.int64)])
            counts["stores" if is_write else "loads"] += np.unique(of_part, axis=1).shape[1]
        return located(machine, address, where, size, count, is_shared, is_write=is_write)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(accesses, "_located", counting)
        yield counts
