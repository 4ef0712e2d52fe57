"""Prints, a JSON object a line, what window kernels with sparse products use on the chips given, and how the threads
hold the operands: a script of its own, because kernels are compiled in a process that never interprets."""

import json
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product

from sk_triton.analytic import branch as analytic
from sk_triton.analytic import merged as analytic_merged
from sk_triton.analytic.window import merged_window_candidates, window_candidates
from sk_triton.bench.compiled import resources, training_resources
from sk_triton.bench.compiled.compile import compile_launches, jit_compiled
from sk_triton.bench.grid import CASES
from sk_triton.tuning import lookup

# (unit, schedule, precision); those of training are those of "recompute" besides.
ANYWHERE = ("stage 1", "recompute", "bf16")
CHOSEN = (
    ANYWHERE,
    ("stage 2", "store", "fp16"),
    ("stage 1", "train", "fp16"),
    ("classic, M = 2", "merged", "fp16"),
)


def window_only(shape, h, dtype, _allow_tf32, chip, task):
    return window_candidates(shape, h, dtype, task, chip, sparse=True)


def in_two_warps(config, *_):
    return replace(config, num_warps=2)


def merged_in_two_warps(*args):
    return [in_two_warps(config) for config in merged_window_candidates(*args, sparse=True)]


def layouts(ttgir):
    """How the tensors of sparse products lie in threads, as Triton writes it."""
    aliases = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    lines = [line for line in ttgir.splitlines() if "elementwise_inline_asm" in line and "mma.sp" in line]
    names = {name for line in lines for name in re.findall(r"tensor<[^,>]*, (#\w+)>", line)}
    return sorted(aliases[name] for name in names)


def measure(job):
    (name, schedule, precision), chip = job
    lookup.shipped = lambda chip_name: {}
    analytic.branch_candidates = window_only
    analytic.in_warps = in_two_warps
    analytic_merged.merged_window_candidates = merged_in_two_warps
    case = next(case for case in CASES if (case.name, case.precision) == (name, precision))
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
        products = {text: count for text, count in used.by_instruction.items() if text.startswith("HMMA")}
        rows.append(
            {
                "unit": name,
                "task": task,
                "chip": chip,
                "precision": precision,
                "registers": used.registers,
                "spills": used.spills,
                "pairs": sum(count for text, count in products.items() if text.startswith("HMMA.SP.16832")),
                "single": sum(count for text, count in products.items() if text.startswith("HMMA.SP.16816")),
                "dense": sum(count for text, count in products.items() if "SP" not in text),
                "layouts": layouts(jit_compiled(launch, chip).asm["ttgir"]),
            }
        )
    return rows


if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        jobs = product(CHOSEN, sys.argv[1:])
        # The code of one chip differs from another's in registers alone: all on the chip that was measured.
        for rows in pool.map(
            measure, [(case, chip) for case, chip in jobs if chip == "sm_90" or case == ANYWHERE]
        ):
            for row in rows:
                print(json.dumps(row), flush=True)
