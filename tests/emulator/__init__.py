"""Compiled kernels without a GPU: the PTX that Triton makes of a launch, run on the launch's own tensors.

All threads of many programs go through the instructions in lockstep, as arrays. What the interpreter cannot show is
checked so: layouts, inline assembly, vector widths and alignment, addresses as the JIT specialises them, shared memory.
Not checked: what ptxas makes of PTX, races between threads and waits for copies (which are done at once), rounding to
TF32, and programs that wait for one another.
"""

from .launching import emulate, run
from .memory import FaultError, observed_accesses

__all__ = ["FaultError", "emulate", "observed_accesses", "run"]
