"""Machine code that nobody compiled, for predictions by hand."""

from __future__ import annotations

import dataclasses
from collections import Counter

from sk_triton.bench.compiled.compile import Resources


def resources(instructions: dict[str, int], **changes) -> Resources:
    used = Resources(
        target="sm_90",
        registers=32,
        spills=0,
        shared=0,
        threads=64,
        instructions=sum(instructions.values()),
        wide_loads=0,
        loads=0,
        matrix=sum(count for name, count in instructions.items() if "MMA" in name),
        by_instruction=Counter(instructions),
    )
    return dataclasses.replace(used, **changes)
