"""What a launch of the resident kernel does in total: its phases are compiled alone, counted, and put together.

Each phase's code runs once per work item, the rest once per program. The loops inside a gate item count once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sk_triton.kernels.geometry import cdiv
from sk_triton.kernels.launch import Launch

from .footprint import tensor_bytes

if TYPE_CHECKING:
    from .compile import Resources

_PHASES = ("pool", "gate", "select")


def has_phases(launch: Launch) -> bool:
    """Whether a launch is one of the resident kernel, whole."""
    return launch.constexprs.get("PHASE") == "all"


def named_arguments(launch: Launch) -> dict[str, Any]:
    """A launch's arguments by name."""
    return dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))


def items(launch: Launch) -> dict[str, int]:
    """How many work items each phase has."""
    named = named_arguments(launch)
    tiles = {
        "pool": named["POOL_TILES_H"] * named["POOL_TILES_W"],
        "select": named["TILES_H"] * named["TILES_W"],
    }
    of_sample = {phase: count * named["CHANNEL_PROGRAMS"] for phase, count in tiles.items()}
    of_sample["gate"] = cdiv(named["C_OUT"], launch.constexprs["GATE_CHANNELS"])
    return {phase: named["N"] * of_sample[phase] for phase in _PHASES}


def counted(launch: Launch, compiled: Callable[[Launch], Resources]) -> Resources:
    """What a launch's kernel uses, with the instructions of an average program, from `compiled` launches."""
    whole = compiled(launch)
    parts = {
        phase: compiled(
            launch._replace(constexprs={**launch.constexprs, "PHASE": phase}, trips=_trips(launch, phase))
        )
        for phase in ("none", *_PHASES)
    }
    rest = parts["none"].by_instruction
    programs = math.prod(launch.grid)
    totals: Counter[str] = Counter(rest)
    for phase, count in items(launch).items():
        own = parts[phase].by_instruction
        for instruction in own.keys() | rest.keys():
            totals[instruction] += (own[instruction] - rest[instruction]) * count / programs  # type: ignore[assignment]
    totals = Counter({instruction: count for instruction, count in totals.items() if count > 0})
    is_counted = all(parts[phase].instructions is not None for phase in ("none", "pool", "select"))
    return replace(whole, instructions=sum(totals.values()) if is_counted else None, by_instruction=totals)


def _trips(launch: Launch, phase: str) -> tuple[int, ...]:
    """Trips of a phase's loops: over items, waits for each branch, kernel columns, and the counters' reset.

    Those of a gate depend on the compiler's unrolling; its share is small, and counts once.
    """
    if phase == "none":
        return (0,)
    kernels = launch.constexprs["KERNELS"]
    waits = len(kernels) * (0,) if phase == "select" else ()
    columns = kernels if launch.constexprs["IS_COLUMN"] and not launch.constexprs["UNROLL"] else ()
    return (0, *waits, *columns, 0)


def as_branch_launches(launch: Launch) -> list[Launch]:
    """The launches that would pool and select the same tiles, for their sizes: they cannot be run."""
    per_turn = launch.constexprs["ITEMS_PER_TURN"]
    names = launch.kernel.arg_names
    found = []
    for phase, tiles in (("pool", ("POOL_TILES_H", "POOL_TILES_W")), ("select", ("TILES_H", "TILES_W"))):
        arguments = list(launch.arguments)
        # Adjacent channel blocks that one program takes in a row find each other's sectors in L1.
        programs = arguments[names.index("CHANNEL_PROGRAMS")] // per_turn
        arguments[names.index("CHANNEL_PROGRAMS")] = programs
        named = named_arguments(launch)
        constexprs = {**launch.constexprs, "BLOCKS_PER_PROGRAM": per_turn}
        if phase == "select" and not launch.constexprs["IS_COLUMN"]:
            constexprs["SPACINGS_H"] = launch.constexprs["SELECT_SPACINGS_H"]
        if launch.constexprs["IS_COLUMN"]:
            constexprs.pop("SPACINGS_H")
            constexprs.pop("SPACINGS_W")
        grid = (named["N"] * math.prod(named[name] for name in tiles) * programs,)
        found.append(launch._replace(grid=grid, arguments=tuple(arguments), constexprs=constexprs))
    return found


def gate_bytes(launch: Launch) -> float:
    """Bytes that the gates of all samples read: each item, the pooled sums and the descriptor's weights."""
    named = named_arguments(launch)
    partial, reduce, select = (tensor_bytes(named[f"{name}_ptr"]) for name in ("partial", "reduce", "select"))
    blocks = cdiv(named["C_OUT"], launch.constexprs["GATE_CHANNELS"])
    return float(blocks * (partial + named["N"] * reduce) + named["N"] * select)
