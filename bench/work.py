"""What a kernel launch asks of a GPU, from its arguments and its compiled code: bytes, multiplies, instructions."""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sk_triton.kernels.geometry import cdiv
from sk_triton.kernels.launch import Launch, flat
from sk_triton.library import Convolution

from .gpus import Gpu
from .phases import as_branch_launches, gate_bytes, has_phases

if TYPE_CHECKING:
    from .compile import Resources

# Share of L2 that data since an earlier launch may fill and still be found: two partitions keep copies of each other's.
L2_SHARE = 0.5
SECTOR, LINE = 32, 128
"""Bytes that L2 hands out at a time, and bytes for which it looks up once what one access asks of them."""

PlannedStep = Launch | Convolution | Callable[[], object]
"""A kernel launch, the library's convolution, or a `functools.partial` of another operator on its tensors."""


@dataclass(frozen=True)
class Work:
    """What one step asks in total. None: the code does not say.

    Attributes:
        memory_bytes, l2_bytes, l2_requests: as the functions of these names below.
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


def precision_of(dtype: torch.dtype, allow_tf32: bool) -> str:
    """The name of a product's precision, as `Gpu.matrix_flop_per_s` has it."""
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    return names.get(dtype, "tf32" if allow_tf32 else "fp32")


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
    pixel_bytes = _pixel_bytes(launch)
    for instruction, count in used.by_instruction.items():
        if (found := matrix_flop(instruction)) is not None:
            precision, per_warp, is_single = found
            (warp_flop if is_single else flop)[precision] += count * all_warps * per_warp
        if _opcode(instruction) in ("LDS", "STS", "LDSM", "STSM", "LDG", "STG", "LDGSTS"):
            # A warp's access takes at least one clock, however narrow it is, and one for each pixel that it touches:
            # those of a channels_last image are in different lines.
            asked = gpu.warp * access_width(instruction)
            pixels = math.ceil(asked / pixel_bytes) if _opcode(instruction) in ("LDG", "STG") else 1
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


def _pixel_bytes(launch: Launch) -> float:
    """Adjacent bytes of a pixel that a program of a branch convolution reads; without end in other kernels."""
    channels = launch.constexprs.get("CHANNELS_CI")
    if channels is None or launch.kernel.arg_names[0] != "x_ptr":
        return math.inf
    return float(channels * launch.arguments[0].element_size())


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


def matrix_flop(instruction: str) -> tuple[str, float, bool] | None:
    """(precision, FLOP per warp, whether one warp multiplies alone) of a tensor-core instruction.

    None for any other, and for Blackwell's UTCHMMA, whose shape is in a register.
    """
    precision = "bf16" if "BF16" in instruction else "tf32" if "TF32" in instruction else "fp16"
    if found := re.match(r"HMMA\.(16)(8)(16|8|4)\b", instruction):
        return precision, 2.0 * math.prod(map(int, found.groups())), True
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\b", instruction):
        return precision, 2.0 * math.prod(map(int, found.groups())) / 4, False
    if found := re.match(r"v_mfma_f32_(\d+)x(\d+)x(\d+)_?(bf16|f16|xf32|f32)", instruction):
        names = {"bf16": "bf16", "f16": "fp16", "xf32": "tf32", "f32": "fp32"}
        return names[found[4]], 2.0 * math.prod(map(int, found.groups()[:3])), False
    return None


def access_width(instruction: str) -> int:
    """Bytes per thread of a load or store; LDSM and STSM move 4 bytes per thread and matrix."""
    if _opcode(instruction) in ("LDSM", "STSM"):
        return 4 * int(instruction[-1]) if instruction.endswith((".2", ".4")) else 4
    modifiers = instruction.split(".")
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((width for name, width in widths.items() if name in modifiers), 4)


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


def l2_bytes(launch: Launch, used: Resources) -> float:
    """Bytes that a launch's programs ask of L2.

    At most the loads and stores in the code, each with its width, masked lanes included. A kernel that cuts images into
    tiles reads a pixel again for other kernel taps; L1 is taken to catch that inside a program, so the distinct pixels
    of every tile count, halos included. Copies that bypass L1 count in full.
    """
    requested, bypasses = 0, False
    for instruction, count in used.by_instruction.items():
        if _opcode(instruction) in ("LDG", "LDGSTS", "STG"):
            requested += count * access_width(instruction)
            bypasses |= "BYPASS" in instruction
    requested *= used.threads * math.prod(launch.grid)
    tiled = None if bypasses else tile_bytes(launch)
    return float(requested) if tiled is None else min(float(requested), tiled)


def l2_requests(launch: Launch, asked: float) -> float:
    """Lines that L2 looks up for a launch's programs, which ask `asked` bytes of it: one for each that an access
    touches, of whole lines in kernels other than the convolutions.

    Warps of a program that fetch a row ahead together read lines whole; that exchange what they write, write them so.
    """
    options = launch.constexprs
    pixel_bytes, warps = _pixel_bytes(launch), options.get("BLOCKS", 1)
    written = _written_pixels(launch)
    together = warps if options.get("PREFETCH") else 1
    requests = (asked - written) / min(pixel_bytes * together, LINE) + written / min(
        pixel_bytes * warps, LINE
    )
    if options.get("PREFETCH") and warps == 1 and math.isfinite(pixel_bytes):
        requests += _bytes(launch.arguments[0]) / LINE
    return requests


def _written_pixels(launch: Launch) -> int:
    """Bytes of the images that a convolution writes."""
    if not math.isfinite(_pixel_bytes(launch)):
        return 0
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    if launch.constexprs.get("TASK") in ("pool", "measure"):
        return 0
    return next((_bytes(named[name]) for name in ("out_ptr", "u_ptr", "v_ptr") if name in named), 0)


def tile_bytes(launch: Launch) -> float | None:
    """Distinct bytes of every program of a branch or merged convolution, a gate or border sums, all together; None for
    others."""
    if launch.kernel.fn.__name__ == "gate_fwd_kernel":
        return _gate_tile_bytes(launch)
    if launch.kernel.fn.__name__ == "gated_select_fwd_kernel":
        return _gated_select_tile_bytes(launch)
    if launch.kernel.fn.__name__ == "border_sums_fwd_kernel":
        return _border_tile_bytes(launch)
    if launch.kernel.fn.__name__ == "merged_conv_window_fwd_kernel":
        return _merged_tile_bytes(launch)
    if "KERNELS" not in launch.constexprs or "CHANNEL_PROGRAMS" not in launch.kernel.arg_names:
        return None
    if has_phases(launch):
        shared = sum(footprint(launch).values())
        tiles = [_branch_tile_bytes(part) for part in as_branch_launches(launch)]
        return sum(tiles) - (len(tiles) - 1) * shared + gate_bytes(launch)
    return _branch_tile_bytes(launch)


def _gate_tile_bytes(launch: Launch) -> float:
    """Every program reads the pooled sums of its samples, all weights of the descriptor, and its channels' own."""
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    samples, channels = launch.grid
    weights = samples * (channels * _bytes(named["reduce_ptr"]) + _bytes(named["select_ptr"]))
    return float(channels * _bytes(named["partial_ptr"]) + weights + _bytes(named["attention_ptr"]))


def _gated_select_tile_bytes(launch: Launch) -> float:
    """Branches and result once; every program reads what a gate's program for one sample does."""
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    programs, channels = launch.grid
    sums = named["partial_ptr"]
    weights = programs * (channels * _bytes(named["reduce_ptr"]) + _bytes(named["select_ptr"]))
    summed = programs * channels * _bytes(sums) / sums.shape[0]
    return float(_bytes(named["u_ptr"]) + _bytes(named["v_ptr"]) + weights + summed)


def _border_tile_bytes(launch: Launch) -> float:
    """x once, and for each sample and block of columns the weights of all sections."""
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    x, w = named["x_ptr"], named["w_ptr"]
    return float(_bytes(x) + x.shape[0] * named["TILES_W"] * _bytes(w) + _bytes(named["partial_ptr"]))


def _merged_tile_bytes(launch: Launch) -> float:
    """Every program reads its channels of a tile, as far as the taps of any branch reach, and all its weights."""
    options = launch.constexprs
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    x, w, programs = named["x_ptr"], named["w_ptr"], named["CHANNEL_PROGRAMS"]
    kernel = 2 * options["REACH"] + 1
    pixels = math.prod(
        int(_inputs_of_tiles(named[out], named[into], options[block], options[run], 1, kernel, 1, 1).sum())
        for out, into, block, run in (("H", "H_IN", "BLOCK_H", "RUN_H"), ("W", "W_IN", "BLOCK_W", "RUN_W"))
    )
    pixel_bytes = cdiv(options["CHANNELS_CI"] * options["BLOCKS"] * x.element_size(), SECTOR) * SECTOR
    others = sum(footprint(launch).values()) - _bytes(x) - _bytes(w)
    weights = _bytes(w) * math.prod(launch.grid) / programs
    return float(x.shape[0] * pixels * pixel_bytes * programs + weights + others)


def _branch_tile_bytes(launch: Launch) -> float:
    options = launch.constexprs
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    x, w, programs = named["x_ptr"], named["w_ptr"], named["CHANNEL_PROGRAMS"]
    per_program = options.get("BLOCKS_PER_PROGRAM", options.get("BLOCKS", 1))
    channels = options.get("CHANNELS_CI", options.get("BLOCK_C")) * per_program
    pixel_bytes = cdiv(channels * x.element_size(), SECTOR) * SECTOR
    branches = list(zip(options["KERNELS"], options["DILATIONS"], strict=True))
    common = options.get("SPACINGS", (1,) * len(branches))
    axes = [
        [
            _inputs_of_tiles(out, into, block, run, spacing, kernel, dilation, options.get("STRIDE", 1))
            for spacing, (kernel, dilation) in zip(spacings, branches, strict=True)
        ]
        for out, into, block, run, spacings in (
            (
                named["H"],
                named["H_IN"],
                options["BLOCK_H"],
                options.get("RUN_H", 1),
                options.get("SPACINGS_H", common),
            ),
            (
                named["W"],
                named["W_IN"],
                options["BLOCK_W"],
                options.get("RUN_W", 1),
                options.get("SPACINGS_W", common),
            ),
        )
    ]
    # Pixels that branches have in common are read once, by inclusion and exclusion; of split inputs there are none, and
    # programs that walk over tiles come to them with one branch after another.
    pixels = 0
    is_apart = options.get("SPLIT_CI") or "TILES_PER_PROGRAM" in options
    for count in range(1, 2 if is_apart else len(branches) + 1):
        for members in combinations(range(len(branches)), count):
            # A tile's rows and columns are independent: what all members read is counted by axis.
            shared = math.prod(
                int(torch.stack([_padded(axis, m) for m in members]).all(0).sum()) for axis in axes
            )
            pixels += shared if count % 2 else -shared
    others = sum(footprint(launch).values()) - _bytes(x) - _bytes(w)
    weights = _bytes(w) * math.prod(launch.grid) / programs
    return float(named["N"] * pixels * pixel_bytes * programs + weights + others)


def footprint(step: PlannedStep) -> dict[int, int]:
    """Bytes of each storage that a step is handed; every tensor is taken to be touched as a whole."""
    views: dict[int, dict[Any, int]] = {}
    limits: dict[int, int] = {}
    for tensor in _tensors(step):
        storage = tensor.untyped_storage()
        views.setdefault(storage._cdata, {})[tensor.storage_offset(), tensor.shape] = _bytes(tensor)
        limits[storage._cdata] = storage.nbytes()
    return {key: min(sum(found.values()), limits[key]) for key, found in views.items()}


def step_name(step: PlannedStep) -> str:
    """The kernel's name as the resources table has it, or the operator's."""
    if isinstance(step, Launch):
        return step.kernel.fn.__name__.removesuffix("_fwd_kernel")
    if isinstance(step, Convolution):
        return f"the library's {step.branch}"
    return getattr(getattr(step, "func", step), "__name__", "operator")


def _inputs_of_tiles(
    size: int, size_in: int, block: int, run: int, spacing: int, kernel: int, dilation: int, stride: int
) -> Tensor:
    """Which inputs along an axis each tile's outputs read, runs laid out as in `kernels/tiling.py`. [tiles, size_in]"""
    outputs = torch.arange(size)
    tile = (outputs // (run * spacing) * spacing + outputs % spacing) // block
    needed = torch.zeros(int(tile.max()) + 1, size_in, dtype=torch.bool)
    for tap in range(kernel):
        inputs = outputs * stride + (tap - kernel // 2) * dilation
        inside = (inputs >= 0) & (inputs < size_in)
        needed[tile[inside], inputs[inside]] = True
    return needed


def _padded(axis: list[Tensor], m: int) -> Tensor:
    """Branch m's tiles along an axis, filled up to the most that a branch has."""
    missing = max(len(tiles) for tiles in axis) - len(axis[m])
    return torch.nn.functional.pad(axis[m], (0, 0, 0, missing))


def _tensors(step: PlannedStep) -> Iterable[Tensor]:
    if isinstance(step, Launch):
        handed: Iterable[Any] = flat(step.arguments)
    elif isinstance(step, Convolution):
        handed = (step.x, step.weight, step.y)
    elif isinstance(step, functools.partial):
        handed = (*step.args, *step.keywords.values())
    else:
        raise TypeError(
            f"a step must be a Launch, a Convolution or a functools.partial of an operator, got {step!r}"
        )
    return [value for value in handed if isinstance(value, Tensor)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _opcode(instruction: str) -> str:
    return instruction.split(".")[0]
