"""Prints, a JSON object a line, what the window kernels use on the chips given: of dense products with four warps a
program, or, if "sparse" comes first, of sparse ones with two, and how the threads hold the operands. A script of its
own, because kernels are compiled in a process that never interprets."""

import json
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from sk_triton.analytic import branch as analytic
from sk_triton.analytic import merged as analytic_merged
from sk_triton.analytic.window import merged_window_candidates, window_candidates
from sk_triton.bench.compiled import resources, training_resources
from sk_triton.bench.compiled.compile import compile_launches, jit_compiled
from sk_triton.bench.compiled.instructions import opcode
from sk_triton.bench.grid import CASES
from sk_triton.tuning import lookup

# (unit, schedule, precision); those of training are those of "recompute" besides. The code of one chip differs from
# another's in registers alone: all on the chip that was measured, on others the first, which is short of them.
DENSE = (
    ("stage 1", "train", "fp16"),
    ("stage 2", "store", "fp16"),
    ("classic, M = 2", "merged", "fp16"),
)
SPARSE = (
    ("stage 1", "recompute", "bf16"),
    ("stage 2", "store", "fp16"),
    ("stage 1", "train", "fp16"),
    ("classic, M = 2", "merged", "fp16"),
)


def in_four_warps(config, *_):
    return replace(config, num_warps=4, PREFETCH=True)


def merged_in_four_warps(*args):
    return [replace(config, num_warps=4) for config in merged_window_candidates(*args)]


def sparse_windows(shape, h, dtype, _allow_tf32, chip, task):
    return window_candidates(shape, h, dtype, task, chip, sparse=True)


def in_two_warps(config, *_):
    return replace(config, num_warps=2)


def merged_in_two_warps(*args):
    return [in_two_warps(config) for config in merged_window_candidates(*args, sparse=True)]


def choose(is_sparse):
    """Leaves the analytic choice no other configs."""
    lookup.shipped = lambda chip_name: {}
    if is_sparse:
        analytic.branch_candidates = sparse_windows
    analytic.in_warps = in_two_warps if is_sparse else in_four_warps
    analytic_merged.merged_window_candidates = merged_in_two_warps if is_sparse else merged_in_four_warps


def layouts(ttgir):
    """How the tensors of sparse products lie in threads, as Triton writes it."""
    aliases = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    lines = [line for line in ttgir.splitlines() if "elementwise_inline_asm" in line and "mma.sp" in line]
    names = {name for line in lines for name in re.findall(r"tensor<[^,>]*, (#\w+)>", line)}
    return sorted(aliases[name] for name in names)


def of_dense(launch, used):
    counts = Counter()
    for name, count in used.by_instruction.items():
        counts[opcode(name)] += count
        counts["wide stores"] += count * (opcode(name) == "STG" and ".128" in name)
    return {
        "blocks": launch.constexprs["BLOCKS"],
        "shared": used.shared,
        "stores": counts["STG"],
        "wide_stores": counts["wide stores"],
        "barriers": counts["BAR"],
        "prefetches": counts["CCTL"],
    }


def of_sparse(launch, used):
    products = {text: count for text, count in used.by_instruction.items() if text.startswith("HMMA")}
    return {
        "pairs": sum(count for text, count in products.items() if text.startswith("HMMA.SP.16832")),
        "single": sum(count for text, count in products.items() if text.startswith("HMMA.SP.16816")),
        "dense": sum(count for text, count in products.items() if "SP" not in text),
        "layouts": layouts(jit_compiled(launch, used.target).asm["ttgir"]),
    }


def measure(job):
    is_sparse, (name, schedule, precision), chip = job
    choose(is_sparse)
    case = next(case for case in CASES if (case.name, case.precision) == (name, precision))
    if schedule == "train":
        launches = training_resources.launches(case, chip)
    else:
        _, launches = resources.launches(case, chip, schedule)
    chosen = {}
    for launch in launches:
        if "window" in launch.kernel.__name__:
            chosen.setdefault(launch.constexprs.get("TASK", "merged"), launch)
    return [
        {
            "unit": name,
            "task": task,
            "chip": chip,
            "precision": precision,
            "registers": used.registers,
            "spills": used.spills,
            **(of_sparse if is_sparse else of_dense)(launch, used),
        }
        for (task, launch), used in zip(
            chosen.items(), compile_launches(list(chosen.values()), chip), strict=True
        )
    ]


if __name__ == "__main__":
    is_sparse = sys.argv[1] == "sparse"
    chips, units = sys.argv[1 + is_sparse :], SPARSE if is_sparse else DENSE
    jobs = [
        (is_sparse, unit, chip) for unit in units for chip in chips if chip == "sm_90" or unit == units[0]
    ]
    with ProcessPoolExecutor(2) as pool:
        for rows in pool.map(measure, jobs):
            for row in rows:
                print(json.dumps(row), flush=True)
