"""What a launch's programs ask of L2: bytes, and the lines that it looks up for them."""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sk_triton.kernels.geometry import cdiv
from sk_triton.kernels.launch import Launch

from ..compiled.footprint import footprint, tensor_bytes
from ..compiled.instructions import access_width, opcode
from ..compiled.phases import as_branch_launches, gate_bytes, has_phases, named_arguments

if TYPE_CHECKING:
    from ..compiled.compile import Resources

SECTOR, LINE = 32, 128
"""Bytes that L2 hands out at a time, and bytes for which it looks up once what one access asks of them."""


def l2_bytes(launch: Launch, used: Resources) -> float:
    """Bytes that a launch's programs ask of L2.

    At most the loads and stores in the code, each with its width, masked lanes included. A kernel that cuts images into
    tiles reads a pixel again for other kernel taps; L1 is taken to catch that inside a program, so the distinct pixels
    of every tile count, halos included. Copies that bypass L1 count in full.
    """
    requested, bypasses = 0, False
    for instruction, count in used.by_instruction.items():
        if opcode(instruction) in ("LDG", "LDGSTS", "STG"):
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
    pixel_bytes, warps = adjacent_bytes(launch), options.get("BLOCKS", 1)
    written = _written_pixels(launch)
    together = warps if options.get("PREFETCH") else 1
    requests = (asked - written) / min(pixel_bytes * together, LINE) + written / min(
        pixel_bytes * warps, LINE
    )
    if options.get("PREFETCH") and warps == 1 and math.isfinite(pixel_bytes):
        requests += tensor_bytes(launch.arguments[0]) / LINE
    return requests


def _written_pixels(launch: Launch) -> int:
    """Bytes of the images that a convolution writes."""
    if not math.isfinite(adjacent_bytes(launch)):
        return 0
    named = named_arguments(launch)
    if launch.constexprs.get("TASK") in ("pool", "measure"):
        return 0
    return next((tensor_bytes(named[name]) for name in ("out_ptr", "u_ptr", "v_ptr") if name in named), 0)


def adjacent_bytes(launch: Launch) -> float:
    """Adjacent bytes of a pixel that a program of a branch convolution reads; without end in other kernels."""
    channels = launch.constexprs.get("CHANNELS_CI")
    if channels is None or launch.kernel.arg_names[0] != "x_ptr":
        return math.inf
    return float(channels * launch.arguments[0].element_size())


def tile_bytes(launch: Launch) -> float | None:
    """Distinct bytes of every program of a branch or merged convolution, a gate or border sums, all together; None for
    others."""
    if launch.kernel.fn.__name__ == "gate_fwd_kernel":
        return _gate_tile_bytes(launch)
    if launch.kernel.fn.__name__ == "gated_select_fwd_kernel":
        return _gated_select_tile_bytes(launch)
    if launch.kernel.fn.__name__ == "border_sums_fwd_kernel":
        return _border_tile_bytes(launch)
    if "REACH" in launch.constexprs:
        return _window_tile_bytes(launch)
    if "KERNELS" not in launch.constexprs or "CHANNEL_PROGRAMS" not in launch.kernel.arg_names:
        return None
    if has_phases(launch):
        shared = sum(footprint(launch).values())
        tiles = [_branch_tile_bytes(part) for part in as_branch_launches(launch)]
        return sum(tiles) - (len(tiles) - 1) * shared + gate_bytes(launch)
    return _branch_tile_bytes(launch)


def _gate_tile_bytes(launch: Launch) -> float:
    """Every program reads the pooled sums of its samples, all weights of the descriptor, and its channels' own."""
    named = named_arguments(launch)
    samples, channels = launch.grid
    weights = samples * (channels * tensor_bytes(named["reduce_ptr"]) + tensor_bytes(named["select_ptr"]))
    return float(
        channels * tensor_bytes(named["partial_ptr"]) + weights + tensor_bytes(named["attention_ptr"])
    )


def _gated_select_tile_bytes(launch: Launch) -> float:
    """Branches and result once; every program reads what a gate's program for one sample does."""
    named = named_arguments(launch)
    programs, channels = launch.grid
    sums = named["partial_ptr"]
    weights = programs * (channels * tensor_bytes(named["reduce_ptr"]) + tensor_bytes(named["select_ptr"]))
    summed = programs * channels * tensor_bytes(sums) / sums.shape[0]
    return float(tensor_bytes(named["u_ptr"]) + tensor_bytes(named["v_ptr"]) + weights + summed)


def _border_tile_bytes(launch: Launch) -> float:
    """x once, and for each sample and block of columns the weights of all sections."""
    named = named_arguments(launch)
    x, w = named["x_ptr"], named["w_ptr"]
    return float(
        tensor_bytes(x) + x.shape[0] * named["TILES_W"] * tensor_bytes(w) + tensor_bytes(named["partial_ptr"])
    )


def _window_tile_bytes(launch: Launch) -> float:
    """Every program reads its channels of a tile, as far as the taps of any branch reach, and all its weights."""
    options = launch.constexprs
    named = named_arguments(launch)
    x, w, programs = named["x_ptr"], named["w_ptr"], named["CHANNEL_PROGRAMS"]
    kernel = 2 * options["REACH"] + 1
    pixels = math.prod(
        int(_inputs_of_tiles(named[out], named[into], options[block], options[run], 1, kernel, 1, 1).sum())
        for out, into, block, run in (("H", "H_IN", "BLOCK_H", "RUN_H"), ("W", "W_IN", "BLOCK_W", "RUN_W"))
    )
    pixel_bytes = cdiv(options["CHANNELS_CI"] * options["BLOCKS"] * x.element_size(), SECTOR) * SECTOR
    others = sum(footprint(launch).values()) - tensor_bytes(x) - tensor_bytes(w)
    weights = tensor_bytes(w) * math.prod(launch.grid) / programs
    return float(x.shape[0] * pixels * pixel_bytes * programs + weights + others)


def _branch_tile_bytes(launch: Launch) -> float:
    options = launch.constexprs
    named = named_arguments(launch)
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
    others = sum(footprint(launch).values()) - tensor_bytes(x) - tensor_bytes(w)
    weights = tensor_bytes(w) * math.prod(launch.grid) / programs
    return float(named["N"] * pixels * pixel_bytes * programs + weights + others)


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
