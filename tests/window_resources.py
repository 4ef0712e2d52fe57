"""Prints, a JSON object a line, what the window kernels use on the chips given with four warps a program: a
script of its own, because kernels are compiled in a process that never interprets."""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product

from sk_triton.analytic import branch as analytic
from sk_triton.analytic import merged as analytic_merged
from sk_triton.analytic.window import merged_window_candidates
from sk_triton.bench.compiled import resources, training_resources
from sk_triton.bench.compiled.compile import compile_launches
from sk_triton.bench.grid import CASES
from sk_triton.tuning import lookup

PRESSED = ("stage 1", "train")
# (unit, schedule); those of training are those of "recompute" besides.
CHOSEN = (
    ("stage 2", "store"),
    ("classic, M = 2", "merged"),
    PRESSED,
)
WARPS = 4


def in_warps(config, *_):
    return replace(config, num_warps=WARPS, PREFETCH=True)


def merged_in_warps(*args):
    return [replace(config, num_warps=WARPS) for config in merged_window_candidates(*args)]


def measure(job):
    (name, schedule), chip = job
    lookup.shipped = lambda chip_name: {}
    analytic.in_warps = in_warps
    analytic_merged.merged_window_candidates = merged_in_warps
    case = next(case for case in CASES if (case.name, case.precision) == (name, "fp16"))
    if schedule == "train":
        launches = training_resources.launches(case, chip)
    else:
        _, launches = resources.launches(case, chip, schedule)[:2]
    chosen = {}
    for launch in launches:
        if "window" in launch.kernel.__name__:
            chosen.setdefault(launch.constexprs.get("TASK", "merged"), launch)
    rows = []
    for (task, launch), used in zip(
        chosen.items(), compile_launches(list(chosen.values()), chip), strict=True
    ):
        rows.append(
            {
                "unit": name,
                "task": task,
                "chip": chip,
                "blocks": launch.constexprs["BLOCKS"],
                "registers": used.registers,
                "spills": used.spills,
                "shared": used.shared,
                "stores": used.stores,
                "wide_stores": used.wide_stores,
                "barriers": used.by_opcode["BAR"],
                "prefetches": used.by_opcode["CCTL"],
            }
        )
    return rows


if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        jobs = product(CHOSEN, sys.argv[1:])
        # All on the chip that was measured; on others what is short of registers.
        for rows in pool.map(
            measure, [(case, chip) for case, chip in jobs if chip == "sm_90" or case == PRESSED]
        ):
            for row in rows:
                print(json.dumps(row), flush=True)
