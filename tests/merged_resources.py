"""Prints, a JSON object a line, what the merged kernels of the classic units use on the chips given: a script of its
own, because kernels are compiled in a process that never interprets."""

import json
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import torch

from sk_triton import planning
from sk_triton.analytic import merged as analytic_merged
from sk_triton.analytic.window import takes_window
from sk_triton.bench.compiled.compile import compile_launches
from sk_triton.bench.compiled.instructions import opcode
from sk_triton.bench.compiled.planned import planned_steps
from sk_triton.bench.grid import classic_unit
from sk_triton.chips import CHIPS
from sk_triton.workload import Workload

# name: (unit, batch, size, dtype)
CASES = {
    "classic, M = 2": (classic_unit(128), 128, 56, torch.float16),
    "classic, M = 3": (classic_unit(128, num_branches=3), 128, 56, torch.float16),
    "classic, stage 2": (classic_unit(256), 128, 28, torch.bfloat16),
    "classic, stage 3": (classic_unit(512), 128, 14, torch.float16),
    "classic, TF32": (classic_unit(128), 128, 56, torch.float32),
}
# With the kernel that windows leave to other chips, strides, wider lattices, and small images of wider groups.
TILES = ", tiles"
CASES |= {name + TILES: CASES[name] for name in ("classic, M = 2", "classic, stage 2")}

# Others are compiled for sm_90, the chip that was measured.
ELSEWHERE = {
    "classic, TF32": ("sm_80",),
    "classic, M = 3": ("sm_100",),
}


def launches(name: str, chip: str):
    spec, n, size, dtype = CASES[name]
    _, steps, v = planned_steps(
        "merged", Workload(spec, n, size, size, dtype, CHIPS[chip], dtype == torch.float32)
    )
    return [step for step in steps if step.kernel.fn.__name__ != "gate_fwd_kernel"], v.numel()


def measure(job: tuple[str, str]) -> list[dict]:
    name, chip = job
    analytic_merged.takes_window = (lambda *args: False) if name.endswith(TILES) else takes_window
    planning.plan_schedule.cache_clear()
    steps, outputs = launches(name, chip)
    rows = []
    for step, used in zip(steps, compile_launches(steps, chip), strict=True):
        counts = Counter()
        for instruction, count in used.by_instruction.items():
            counts[opcode(instruction)] += count
        per_output = used.instructions and used.instructions * used.threads * step.grid[0] / outputs
        rows.append(
            {
                "unit": name,
                "chip": chip,
                "dtype": str(CASES[name][3]).removeprefix("torch."),
                "kernel": step.kernel.fn.__name__.removesuffix("_fwd_kernel"),
                "registers": used.registers,
                "spills": used.spills,
                "shared": used.shared,
                "matrix": used.matrix,
                "stores": counts["STG"],
                "barriers": counts["BAR"],
                "per_output": per_output,
            }
        )
    return rows


if __name__ == "__main__":
    jobs = [
        (name, chip) for name, chip in product(CASES, sys.argv[1:]) if chip in ELSEWHERE.get(name, ("sm_90",))
    ]
    with ProcessPoolExecutor(2) as pool:
        for rows in pool.map(measure, jobs):
            for row in rows:
                print(json.dumps(row), flush=True)
