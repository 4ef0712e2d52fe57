"""Takes launches through Triton's JIT entry, up to the driver: run as a script where kernels are not interpreted.

Checks what compiling by hand cannot: that the JIT binds the arguments, hashes the constexprs and accepts the options.
"""

import dataclasses

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sk_triton.bench import resources
from sk_triton.bench.grid import CASES


class AbsentDevice:
    """A driver that knows what to compile for and can run nothing."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


CHOSEN = {
    ("stage 1", "fp16"),
    ("stage 3", "fp16"),
    ("seed, M = 2", "fp16"),
    ("dense", "fp16"),
    ("depthwise", "tf32"),
}

driver.set_active(AbsentDevice())
for case in CASES:
    if (case.name, case.precision) in CHOSEN:
        small = dataclasses.replace(case, n=2, size=8)
        for schedule in resources.schedules(small, "sm_90"):
            _, launches = resources.launches(small, "sm_90", schedule)
            for launch in launches:
                arguments = [
                    torch.empty(64, dtype=a.dtype) if isinstance(a, torch.Tensor) else a
                    for a in launch.arguments
                ]
                compiled = launch.kernel.warmup(
                    *arguments, grid=launch.grid, **launch.constexprs, **launch.compile_options
                )
                assert compiled.metadata.num_warps == launch.options["num_warps"]
                assert compiled.metadata.enable_fp_fusion
                print(launch.kernel.fn.__name__)
