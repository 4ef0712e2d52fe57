"""What a kernel launch asks of a GPU, from its arguments and its compiled code: bytes, multiplies, instructions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sk_triton.kernels.geometry import cdiv
from sk_triton.kernels.launch import Launch
from sk_triton.library import Convolution

from ..compiled.footprint import PlannedStep, footprint
from ..compiled.instructions import access_width, matrix_flop, opcode
from ..grid import precision_of
from .gpus import Gpu
from .l2 import adjacent_bytes, l2_bytes, l2_requests, tile_bytes

if TYPE_CHECKING:
    from ..compiled.compile import Resources

# Share of L2 that data since an earlier launch may fill and still be found: two partitions keep copies of each other's.
L2_SHARE = 0.5


@dataclass(frozen=True)
class Work:
    """What one step asks in total. None: the code does not say.

    Attributes:
        memory_bytes, l2_bytes, l2_requests: as `memory_bytes` below, `l2.l2_bytes` and `l2.l2_requests`.
        programs, warps: thread blocks, and warps of each; zero for an operator that is no kernel of ours.
        resident: programs that a processor holds at once.
        flop: executed by tensor cores, by precision; those of single warps apart in `warp_flop`.
        shared_bytes: moved through the data path of shared memory and L1, by all warps.
        warp_instructions: issued by all warps.
        is_counted: False where loops in the code count once, because nothing says how often they run.
    """

    name: str
    memory_bytes: float
    l2_bytes: float
    programs: int = 0
    warps: int = 0
    resident: int = 0
    flop: dict[str, float] | None = None
    warp_flop: dict[str, float] | None = None
    shared_bytes: float | None = None
    warp_instructions: float | None = None
    is_counted: bool = True
    l2_requests: float = 0.0

    @property
    def is_arithmetic(self) -> bool:
        """Whether more than its bytes is known, or should be."""
        return self.programs > 0 or self.flop is not None


def library_work(
    name: str, multiplies: float, precision: str, gpu: Gpu, moved: float, touched: float
) -> Work:
    """Of the library's convolutions: `multiplies` multiply-adds at the GPU's dense rate, or without a rate for the
    precision one instruction for each 32 (64 on AMD). How the library cuts its tiles is not known.

    `moved`, `touched`: bytes of memory, and of L2.
    """
    has_rate = precision in gpu.matrix_flop_per_s
    return Work(
        name,
        moved,
        touched,
        flop={precision: 2.0 * multiplies} if has_rate else {},
        warp_flop={},
        warp_instructions=0.0 if has_rate else multiplies / gpu.warp,
    )


def convolution_work(step: Convolution, gpu: Gpu, memory: float) -> Work:
    """Of a step of the library's; `memory` is its share of `memory_bytes`, to which copies of its input come."""
    precision = precision_of(step.x.dtype, step.allow_tf32)
    touched = float(sum(footprint(step).values())) + step.copied_bytes
    return library_work(step_name(step), step.multiplies, precision, gpu, memory + step.copied_bytes, touched)


def operator_work(step: PlannedStep, memory: float) -> Work:
    """Of an operator that is no kernel of ours: its bytes alone."""
    return Work(step_name(step), memory, float(sum(footprint(step).values())))


def launch_work(launch: Launch, used: Resources, gpu: Gpu, memory: float) -> Work:
    """Of a launch, from what its compiled kernel uses; `memory` is its share of `memory_bytes`.

    Raises:
        ValueError: a program does not fit on the GPU's processors.
    """
    programs, warps = math.prod(launch.grid), used.threads // gpu.warp
    all_warps = programs * warps
    resident = resident_programs(used, gpu)
    flop: defaultdict[str, float] = defaultdict(float)
    warp_flop: defaultdict[str, float] = defaultdict(float)
    shared = 0.0
    pixel_bytes = adjacent_bytes(launch)
    for instruction, count in used.by_instruction.items():
        if (found := matrix_flop(instruction)) is not None:
            precision, per_warp, is_single = found
            (warp_flop if is_single else flop)[precision] += count * all_warps * per_warp
        if opcode(instruction) in ("LDS", "STS", "LDSM", "STSM", "LDG", "STG", "LDGSTS"):
            # A warp's access takes at least one clock, however narrow it is, and one for each pixel that it touches:
            # those of a channels_last image are in different lines.
            asked = gpu.warp * access_width(instruction)
            pixels = math.ceil(asked / pixel_bytes) if opcode(instruction) in ("LDG", "STG") else 1
            shared += count * max(asked, pixels * gpu.shared_bytes_per_clock)
    # AMD's code is counted without its loops, and other instructions than these move its data.
    is_cuda = gpu.warp == 32
    is_counted = is_cuda and used.instructions is not None
    has_flop = not used.matrix or bool(flop or warp_flop)
    touched = float(sum(footprint(launch).values()))
    from_l2 = max(touched, l2_bytes(launch, used) if is_counted else tile_bytes(launch) or 0.0)
    return Work(
        name=step_name(launch),
        memory_bytes=memory,
        l2_bytes=from_l2,
        l2_requests=l2_requests(launch, from_l2),
        programs=programs,
        warps=warps,
        resident=resident,
        flop=dict(flop) if has_flop else None,
        warp_flop=dict(warp_flop) if has_flop else None,
        shared_bytes=shared * all_warps if is_cuda else None,
        warp_instructions=float(sum(used.by_instruction.values()) * all_warps) if is_cuda else None,
        is_counted=is_counted,
    )


def uncompiled_work(step: PlannedStep, gpu: Gpu, memory: float) -> Work:
    """As `launch_work` and the others, as far as it is known without compiling."""
    if isinstance(step, Convolution):
        return convolution_work(step, gpu, memory)
    work = operator_work(step, memory)
    if not isinstance(step, Launch):
        return work
    asked = max(work.l2_bytes, tile_bytes(step) or 0.0)
    requests = l2_requests(step, asked)
    return replace(work, l2_bytes=asked, l2_requests=requests, programs=math.prod(step.grid))


def resident_programs(used: Resources, gpu: Gpu) -> int:
    """Programs that a processor holds at once.

    Raises:
        ValueError: not even one.
    """
    warps = used.threads // gpu.warp
    # Registers are handed out to a warp in units of 8 per thread; CUDA keeps 1 KiB of shared memory per program.
    by_registers = gpu.registers // (cdiv(max(used.registers, 1), 8) * 8 * gpu.warp) // warps
    taken = used.shared + (1024 if gpu.warp == 32 else 0)
    by_shared = gpu.shared_bytes // taken if taken else gpu.blocks
    resident = min(by_registers, by_shared, gpu.threads // used.threads, gpu.blocks)
    if resident < 1:
        raise ValueError(
            f"a program of {used.threads} threads, {used.registers} registers and {used.shared} bytes of shared memory "
            f"does not fit on a processor of {gpu.name}"
        )
    return resident


def memory_bytes(steps: Sequence[PlannedStep], l2_size: int) -> list[float]:
    """Bytes that each step moves from and to memory: its tensors once, less those that L2 still holds.

    L2 is cold at first. A tensor that an earlier step touched is still there if all that was touched from that step on,
    this one included, fits in `L2_SHARE` of it. What is written reaches memory once, at the first touch.
    """
    footprints = [footprint(step) for step in steps]
    last: dict[int, int] = {}
    moved = []
    for i, current in enumerate(footprints):
        since: dict[int, int] = {}
        size = sum(b for storage, b in current.items() if storage not in last)
        for j in range(i, -1, -1):
            for storage, touched in footprints[j].items():
                since[storage] = max(touched, since.get(storage, 0))
            if sum(since.values()) > L2_SHARE * l2_size:
                size += sum(b for storage, b in current.items() if last.get(storage) == j)
        last |= dict.fromkeys(current, i)
        moved.append(float(size))
    return moved


def step_name(step: PlannedStep) -> str:
    """The kernel's name without its task, or the operator's."""
    if isinstance(step, Launch):
        return step.kernel.fn.__name__.removesuffix("_fwd_kernel")
    if isinstance(step, Convolution):
        return f"the library's {step.branch}"
    return getattr(getattr(step, "func", step), "__name__", "operator")
