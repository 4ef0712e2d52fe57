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


def small_tensor(argument):
    """A tensor in memory in place of one that has none, alone or in a tuple."""
    if isinstance(argument, tuple):
        return tuple(map(small_tensor, argument))
    return torch.empty(64, dtype=argument.dtype) if isinstance(argument, torch.Tensor) else argument


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
                compiled = launch.kernel.warmup(
                    *map(small_tensor, launch.arguments),
                    grid=launch.grid,
                    **launch.constexprs,
                    **launch.compile_options,
                )
                assert compiled.metadata.num_warps == launch.options["num_warps"]
                assert compiled.metadata.enable_fp_fusion
                print(launch.kernel.fn.__name__)
