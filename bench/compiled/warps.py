"""What the compiler's own schedule makes of a loop: clocks a trip of the warps that share a scheduler, simulated.

Machine code of NVIDIA's chips from sm_70 on says of each instruction how many clocks later its warp may issue the next,
and which of six barriers it sets and waits for (Jia et al. 2018, "Dissecting the NVIDIA Volta GPU Architecture via
Microbenchmarking"). Left out are what memory can deliver, loads that find their data in L1, conflicts of register banks
and the instruction cache.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from .instructions import DENSE_CLOCKS, SPARSE_CLOCKS
from .loops import Instruction, natural_loops

TARGETS = ("sm_90",)
"""Chips of which it is known how long a product keeps a scheduler's tensor core busy."""
REGISTERS, SCHEDULERS, MAX_WARPS = 65536, 4, 16
"""Of a processor; warps that a scheduler holds at most."""
OTHER_LATENCY = 30
"""Clocks until what sets a barrier, and is no load from memory, has its result: shared memory, constants, shuffles."""
TRIPS, SETTLED = 24, 8
"""Trips that are simulated, and of these the first, which are not counted."""
NO_BARRIER = 7


class Step(NamedTuple):
    """An instruction of the loop: clocks until the next of its warp, the barriers that it sets when it has written its
    result and when it has read its operands (`NO_BARRIER`: none), and a bit for each that it waits for."""

    opcode: str
    stall: int
    written: int
    read: int
    waits: int


def longest_loop(code: Sequence[Instruction], sass: str) -> tuple[Step, ...]:
    """The loop with the most instructions, one after the other; none where the code has no natural loop."""
    loops = natural_loops(code)
    if not loops:
        return ()
    words = _upper_words(sass)
    longest: set[int] = max(loops, key=lambda loop: len(loop))
    return tuple(_step(code[i].opcode, words[code[i].address]) for i in sorted(longest))


def _upper_words(sass: str) -> dict[int, int]:
    """The upper 64 bits of each instruction, by its address."""
    pattern = re.compile(r"/\*([0-9a-f]{4,})\*/[^\n]*/\* 0x[0-9a-f]{16} \*/\s*\n\s*/\* 0x([0-9a-f]{16}) \*/")
    return {int(address, 16): int(word, 16) for address, word in pattern.findall(sass)}


def _step(opcode: str, word: int) -> Step:
    control = word >> 41
    return Step(opcode, control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63)


def resident_warps(registers: int) -> int:
    """Warps of a scheduler that registers leave room for."""
    rounded = -(-registers // 8) * 8 * 32
    return max(1, min(MAX_WARPS, REGISTERS // rounded // SCHEDULERS))


def product_clocks(loop: Sequence[Step], target: str) -> int:
    """Clocks a trip of one warp's products.

    Raises:
        ValueError: a target of which that is not known.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    return sum(map(_product_clocks, loop))


def _product_clocks(step: Step) -> int:
    """Clocks that a product keeps the tensor core busy, 0 for other instructions."""
    if found := re.match(r"HMMA\.SP\.(\d+)", step.opcode):
        return SPARSE_CLOCKS[found[1]]
    return DENSE_CLOCKS if step.opcode.startswith("HMMA") else 0


def clocks_per_trip(loop: Sequence[Step], target: str, warps: int, latency: int) -> float:
    """Clocks a trip of `warps` that begin together, loads from memory taking `latency`; all of them run meanwhile.

    Each clock, of the warps that may issue, the one that has waited longest does.

    Raises:
        ValueError: a target whose products were not measured, or an empty loop.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if not loop:
        raise ValueError("loop must have instructions")
    place, ready, last = [0] * warps, [0] * warps, [-1] * warps
    barriers = [[0] * 6 for _ in range(warps)]
    ends: list[int] = []
    clock = tensor_free = 0
    while len(ends) < TRIPS:
        able, soonest = [], []
        for warp in range(warps):
            step = loop[place[warp] % len(loop)]
            at = max([ready[warp], *(barriers[warp][b] for b in range(6) if step.waits >> b & 1)])
            if _product_clocks(step):
                at = max(at, tensor_free)
            soonest.append(at)
            if at <= clock:
                able.append(warp)
        if not able:
            clock = min(soonest)
            continue
        warp = min(able, key=lambda candidate: last[candidate])
        step = loop[place[warp] % len(loop)]
        last[warp], ready[warp] = clock, clock + max(1, step.stall)
        if product := _product_clocks(step):
            tensor_free = clock + product
        is_load = step.opcode.startswith(("LDG", "LD.", "LDL"))
        for barrier, delay in (
            (step.written, latency if is_load else OTHER_LATENCY),
            (step.read, OTHER_LATENCY),
        ):
            if barrier < len(barriers[warp]):
                barriers[warp][barrier] = max(barriers[warp][barrier], clock + delay)
        place[warp] += 1
        if warp == 0 and place[warp] % len(loop) == 0:
            ends.append(clock)
        clock += 1
    return (ends[-1] - ends[SETTLED - 1]) / (TRIPS - SETTLED)
