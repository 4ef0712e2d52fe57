"""Prints, a JSON object a line, what the kernels use that pack parameters on the chips that are its arguments: a script
of its own, as kernels are compiled in a process that never interprets."""

import json
import sys

from sk_triton import planning
from sk_triton.bench.compiled import resources
from sk_triton.bench.compiled.compile import compile_launch, compile_launches
from sk_triton.bench.compiled.planned import empty_on_meta, unit_parameters
from sk_triton.bench.grid import CASES
from sk_triton.kernels.launch import Launch
from sk_triton.packing import prepare_packed

UNITS = (("stage 1", "bf16", "recompute"), ("classic, M = 2", "fp16", "merged"))

for unit, precision, schedule in UNITS:
    case = next(case for case in CASES if (case.name, case.precision) == (unit, precision))
    for chip in sys.argv[1:]:
        workload = resources.workload_of(case, chip)
        plan = planning.plan_schedule(schedule, workload)
        parameters = unit_parameters(case.spec, empty_on_meta(workload))
        _, steps = prepare_packed(plan, case.size, case.size, *parameters)
        launches = [step for step in steps if isinstance(step, Launch)]
        for launch, used in zip(launches, compile_launches(launches, chip), strict=True):
            row = {
                "unit": unit,
                "chip": chip,
                "kernel": resources.kernel_name(launch),
                "faults": used.excesses,
            }
            if chip == "sm_90":
                row["is_as_alone"] = used == compile_launch(launch, chip)
            print(json.dumps(row), flush=True)
