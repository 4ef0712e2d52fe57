"""Start a launch as a GPU would: compiled for its very arguments, on its own tensors."""

import itertools
from functools import lru_cache

import numpy as np
import torch

from sk_triton.bench.compiled.compile import jit_compiled
from sk_triton.kernels.launch import flat

from .instructions import steps_of
from .machine import Machine
from .memory import GlobalMemory
from .ptx import parse

# Threads in lockstep: more take less time each, and more memory.
LANES = 2**14

# Pointers that Triton adds behind a kernel's own, to global memory that none of these kernels uses.
SCRATCH_PARAMETERS = 2


def emulate(launch, chip):
    """Run a launch of tensors on the CPU by the code for an NVIDIA chip.

    Raises:
        FaultError: what it accesses is no tensor's, or misaligned, or an instruction is used as it may not be.
        NotImplementedError: an instruction that kernels did not have so far.
    """
    compiled = jit_compiled(launch, chip)
    run(
        compiled.asm["ptx"],
        _parameters(compiled.src, launch),
        launch.grid,
        compiled.metadata.shared,
        [value for value in flat(launch.arguments) if isinstance(value, torch.Tensor)],
    )


def run(text, values, grid, shared, tensors):
    """Run the kernel of a PTX module, whose parameters have these values, the others 0, with `shared` bytes of shared
    memory to a program; it may access the storages of `tensors` alone."""
    kernel, steps = _read(text)
    if len(kernel.parameters) - len(values) > SCRATCH_PARAMETERS:
        raise ValueError(f"{len(values)} arguments for {list(kernel.parameters)}")
    if any(tensor.device.type != "cpu" for tensor in tensors):
        raise ValueError("the emulator runs on the CPU; some tensors are elsewhere")
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    memory = GlobalMemory({address: size for address, size in storages.items() if size})
    arguments = {
        name: _bytes(value, size)
        for (name, size), value in itertools.zip_longest(kernel.parameters.items(), values, fillvalue=0)
    }
    grid = (*grid, 1, 1)[:3]
    programs = np.array([index[::-1] for index in itertools.product(*map(range, reversed(grid)))])
    count = max(LANES // kernel.threads, 1)
    for first in range(0, len(programs), count):
        batch = programs[first : first + count]
        Machine(kernel, steps, arguments, memory, shared, batch, grid).run()


@lru_cache(maxsize=64)
def _read(text):
    kernel = parse(text)
    return kernel, steps_of(kernel)


def _bytes(value, size):
    if isinstance(value, float):
        return np.array(value, f"f{size}").tobytes()
    return value.to_bytes(size, "little", signed=value < 0)


def _parameters(source, launch):
    """What a compiled kernel's parameters are given: nothing for what Triton has compiled in."""
    values = []

    def add(value, kind, path):
        if isinstance(kind, tuple):
            for i, (member, member_kind) in enumerate(zip(value, kind, strict=True)):
                add(member, member_kind, (*path, i))
        elif kind != "constexpr" and path not in source.constants:
            values.append(value.data_ptr() if isinstance(value, torch.Tensor) else value)

    for i, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        add(value, source.signature[name], (i,))
    return values
