"""Prints, a JSON object a line, what the kernels use that pack parameters on the chips that are its arguments: a script
of its own, as kernels are compiled in a process that never interprets."""

import json
import sys

from sk_triton.bench.compiled import resources
from sk_triton.bench.compiled.compile import compile_launch
from sk_triton.bench.compiled.planned import packing_steps
from sk_triton.bench.grid import CASES
from sk_triton.kernels.launch import Launch

UNITS = (("stage 1", "bf16", "recompute"), ("classic, M = 2", "fp16", "merged"))

for unit, precision, schedule in UNITS:
    case = next(case for case in CASES if (case.name, case.precision) == (unit, precision))
    for chip in sys.argv[1:]:
        for launch in packing_steps(schedule, resources.workload_of(case, chip)):
            if isinstance(launch, Launch):
                found = {"unit": unit, "chip": chip, "kernel": resources.kernel_name(launch)}
                print(json.dumps(found | {"faults": compile_launch(launch, chip).excesses}), flush=True)
