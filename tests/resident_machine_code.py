"""Prints, a JSON object a line, what the resident kernel is on the chips given: a script of its own, as
kernels are compiled in a process that never interprets."""

import json
import sys

import torch

from sk_triton.bench.compiled.compile import compile_launch, jit_compiled
from sk_triton.bench.compiled.planned import planned_steps
from sk_triton.bench.grid import paper_unit
from sk_triton.chips import CHIPS
from sk_triton.workload import Workload

for chip in sys.argv[1:]:
    # Columns, which take a minute to compile, on the one chip that has run the kernel; `pressed_kernels.py` has others.
    for channels, size in ((128, 56), (512, 14)) if chip == "sm_90" else ((128, 56),):
        workload = Workload(paper_unit(channels), 128, size, size, torch.float16, CHIPS[chip])
        _, (launch,), _ = planned_steps("resident", workload)
        used, compiled = compile_launch(launch, chip), jit_compiled(launch, chip)
        row = {
            "chip": chip,
            "channels": channels,
            "spills": used.spills,
            "registers": used.registers,
            "shared": used.shared,
            "matrix": used.matrix,
            "is_cooperative": compiled.metadata.launch_cooperative_grid,
            "ptx": compiled.asm["ptx"],
        }
        print(json.dumps(row), flush=True)
