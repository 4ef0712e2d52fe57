"""Compile a planned launch for a chip that need not be present, and read its resources from the machine code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sk_triton.chips import CHIPS, is_amd
from sk_triton.kernels.launch import Launch

from .loops import loop_weights
from .machine_code import disassembled, instructions_of, registers_of
from .warps import Step, longest_loop

TARGETS = {
    chip: GPUTarget("hip", chip, 64) if is_amd(chip) else GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)
    for chip in CHIPS
}
# Bytes of shared memory one block may use (CUDA programming guide, table of compute capabilities; LDS on gfx942).
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses. Instruction counts are per thread, loops counted as often as they run.

    `instructions` is None where the compiler unrolled some of the kernel's loops, so that trips cannot be assigned.
    `spills` counts instructions that move registers to or from local memory: `cuobjdump`'s LOCAL figure alone misses
    those that ptxas puts on the stack.
    """

    target: str
    registers: int
    spills: int
    shared: int
    threads: int
    instructions: int | None
    wide_loads: int
    loads: int
    matrix: int
    by_instruction: Counter[str] = field(repr=False)
    """With modifiers: "LDG.E.128" and "HMMA.16816.F32" say how much they move and multiply."""
    loop: tuple[Step, ...] = field(compare=False, repr=False, default=())
    """The longest loop, for `warps`."""

    @property
    def excesses(self) -> list[str]:
        """What no kernel may do: spill registers, or take more shared memory than the chip has."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > SHARED_LIMIT[self.target]:
            found.append(f"{self.shared} of {SHARED_LIMIT[self.target]} bytes of shared memory")
        return found


class _AbsentChip:
    """A driver of a chip that need not be there: Triton compiles for it and can run nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> GPUTarget:
        """What compiled kernels are kept by."""
        return self.target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def _compiling_for(target: str) -> Iterator[None]:
    """Inside, no thread of this process can start a kernel."""
    try:
        before = driver.active
    except RuntimeError:  # there is no GPU
        before = None
    driver.set_active(_AbsentChip(TARGETS[target]))
    try:
        yield
    finally:
        driver.set_active(before)


def jit_compiled(launch: Launch, target: str) -> Any:
    """What Triton's JIT compiles where a launch is started on a chip: it finds this in its cache then. Tensors on the
    meta device count as aligned."""
    arguments = (with_memory(argument) for argument in launch.arguments)
    options = launch.options_for(is_amd=is_amd(target))
    with _compiling_for(target):
        return launch.kernel.warmup(*arguments, grid=launch.grid, **launch.constexprs, **options)


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile one launch as :func:`jit_compiled`, and read its resources."""
    return compile_launches([launch], target)[0]


def compile_launches(launches: Sequence[Launch], target: str) -> list[Resources]:
    """As :func:`compile_launch`, sooner than one by one."""
    compiled = []
    for launch in launches:
        compiled.append(jit_compiled(launch, target))
        launch.kernel.device_caches.pop(TARGETS[target], None)  # its code would stay in memory
    if is_amd(target):
        return [_read_amdgcn(kernel, target) for kernel in compiled]
    texts = disassembled([kernel.asm["cubin"] for kernel in compiled], target)
    return [
        _read_cubin(kernel, text, target, launch.trips)
        for kernel, text, launch in zip(compiled, texts, launches, strict=True)
    ]


def with_memory(argument: object) -> object:
    """A tensor in memory in place of one that has none, alone or in a tuple."""
    if isinstance(argument, tuple):
        return tuple(map(with_memory, argument))
    if isinstance(argument, torch.Tensor) and argument.is_meta:
        return torch.empty(64, dtype=argument.dtype)
    return argument


def _read_cubin(compiled: Any, sass: str, target: str, trips: tuple[int, ...]) -> Resources:
    code = instructions_of(sass)
    weights = loop_weights(code, trips)
    instructions: Counter[str] = Counter()
    for instruction, weight in zip(code, weights or [1] * len(code), strict=True):
        instructions[instruction.opcode] += weight

    def total(pattern: str) -> int:
        return sum(count for name, count in instructions.items() if re.match(pattern, name))

    return Resources(
        target=target,
        registers=registers_of(compiled.asm["cubin"]),
        spills=total(r"(LDL|STL)\b"),
        shared=compiled.metadata.shared,
        threads=32 * compiled.metadata.num_warps,
        instructions=instructions.total() if weights else None,
        wide_loads=total(r"(LDG|LDGSTS)\b.*\.128"),
        loads=total(r"(LDG|LDGSTS)\b"),
        matrix=total(r"(H|HG|I|O)MMA\b|UTC\w*MMA"),
        by_instruction=instructions,
        loop=longest_loop(code, sass),
    )


def _read_amdgcn(compiled: Any, target: str) -> Resources:
    """Static counts only: loops of AMD code are not weighted."""
    text = compiled.asm["amdgcn"]
    opcodes = Counter(
        m[1] for line in text.splitlines() if (m := re.match(r"\t([vs]_\w+|ds_\w+|global_\w+)", line))
    )

    def total(prefix: str) -> int:
        return sum(count for opcode, count in opcodes.items() if opcode.startswith(prefix))

    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        if found is None:
            raise RuntimeError(f"the AMD assembly states no .{name}")
        return int(found[1])

    return Resources(
        target=target,
        registers=figure("vgpr_count"),
        spills=figure("vgpr_spill_count"),
        shared=compiled.metadata.shared,
        threads=64 * compiled.metadata.num_warps,
        instructions=sum(opcodes.values()),
        wide_loads=opcodes["global_load_dwordx4"] + opcodes["buffer_load_dwordx4"],
        loads=total("global_load") + total("buffer_load"),
        matrix=total("v_mfma"),
        by_instruction=opcodes,
    )
