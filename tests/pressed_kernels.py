"""Prints, a JSON object a line, the kernels that have spilled under configs of other shapes: a script of its own, as
kernels are compiled in a process that never interprets."""

import json

from sk_triton.bench.compiled import resources
from sk_triton.bench.compiled.compile import compile_launch
from sk_triton.bench.grid import CASES

# Each comes close to the registers that there are: what may be alive at a time depends on shape, config and chip.
PRESSED = (
    ("sm_89", "stage 2, stride 2", "store"),
    ("sm_89", "stage 2, stride 2", "recompute"),
    ("sm_80", "stage 2, stride 2", "recompute"),
    ("sm_90", "stage 2, stride 2", "resident"),
    ("sm_80", "stage 3, stride 2", "resident"),
    ("sm_89", "stage 3", "resident"),
    ("sm_100", "stage 3", "resident"),
    ("sm_90", "12 channels per group", "recompute"),
    ("sm_89", "12 channels per group", "resident"),
    ("sm_120", "12 channels per group", "resident"),
    ("sm_90", "stage 4", "store"),
    ("sm_90", "stage 4", "recompute"),
    ("sm_100", "stage 4", "store"),
)

by_name = {case.name: case for case in CASES if case.precision == "fp16"}
for chip, unit, schedule in PRESSED:
    for launch in resources.launches(by_name[unit], chip, schedule)[1]:
        name = resources.kernel_name(launch)
        if name.startswith(("branch_conv", "unit_resident")):
            row = {
                "chip": chip,
                "unit": unit,
                "kernel": name,
                "faults": compile_launch(launch, chip).excesses,
            }
            print(json.dumps(row), flush=True)
