"""Takes launches through Triton's JIT entry, up to the driver: run as a script where kernels are not interpreted.

Checks what compiling by hand cannot: that the JIT binds the arguments, hashes the constexprs and accepts the options.
With the argument "training", of what a training step starts besides convolutions; else, of inference.
"""

import dataclasses
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sk_triton import planning
from sk_triton.bench.compiled import resources, training_resources
from sk_triton.bench.compiled.compile import jit_compiled, with_memory
from sk_triton.bench.compiled.planned import empty_on_meta, unit_parameters
from sk_triton.bench.grid import CASES
from sk_triton.kernels.branch_grad import branch_grad, reduce_weight_grad
from sk_triton.kernels.config import GradStreamConfig, GradWideConfig
from sk_triton.kernels.gather import grad_weight_launch
from sk_triton.kernels.geometry import ConvShape
from sk_triton.kernels.grad_geometry import partial_shape
from sk_triton.kernels.grad_terms import grad_terms
from sk_triton.kernels.launch import Launch
from sk_triton.packing import prepare_packed


class Starting:
    """A driver as a launch meets it on a GPU, which can run nothing."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


CHOSEN = {
    ("stage 1", "fp16"),
    ("stage 1", "tf32"),
    ("stage 4", "fp16"),
    ("classic, M = 2", "fp16"),
    ("classic, M = 2", "tf32"),
    ("dense", "fp16"),
    ("depthwise", "tf32"),
}

# (shape, config, whether there are norms and ReLUs). Few rows: the code, and the time to compile it, grow with them.
GRADIENTS = (
    (ConvShape(16, 16, 4, (3,), (1,)), GradStreamConfig(1, 2), True),
    (ConvShape(32, 32, 2, (1, 3), (1, 2)), GradWideConfig(1, 2), False),
)


def inference_launches():
    for case in CASES:
        if (case.name, case.precision) in CHOSEN:
            small = dataclasses.replace(case, n=2, size=8)
            workload = resources.workload_of(small, "sm_90")
            parameters = unit_parameters(small.spec, empty_on_meta(workload))
            for schedule in resources.schedules(small, "sm_90"):
                plan = planning.plan_schedule(schedule, workload)
                _, steps = prepare_packed(plan, small.size, small.size, *parameters)
                yield from (step for step in steps if isinstance(step, Launch))
                yield from resources.launches(small, "sm_90", schedule)[1]
            if case.name == "stage 4":  # many tiles: weights are held
                yield from resources.launches(case, "sm_90", "store")[1]


def gradient_launches():
    for shape, config, has_norm in GRADIENTS:
        (n, h, w), c, m = (2, 4, 8), shape.c_out, len(shape.kernels)
        x, dv, dx = (torch.empty(n, h, w, c).half().permute(0, 3, 1, 2) for _ in range(3))
        y = torch.empty(m, n, h, w, c).half()
        weights = [torch.empty(c, shape.c_in // shape.groups, k, k) for k in shape.kernels]
        terms = torch.empty(n, m, c, 6 if has_norm else 2)
        norm, attention = torch.empty(m, c), torch.empty(n, m, c)
        yield grad_terms(attention, norm, *[norm] * 6, terms, has_norm=has_norm)
        partial = torch.empty(partial_shape(shape, config, n, h, w))
        packed, _ = grad_weight_launch(weights, shape, config, x.dtype)
        settings = {"shape": shape, "config": config}
        yield from branch_grad(x, dv, y, terms, packed, dx, partial, has_relu=has_norm, **settings)
        yield from reduce_weight_grad(partial, weights, **settings)


def training_launches():
    yield from gradient_launches()
    for case in CASES:
        if case.name in ("stage 1", "classic, M = 2") and case.precision == "fp16":
            for launch in training_resources.launches(dataclasses.replace(case, n=2, size=8), "sm_90"):
                if not launch.kernel.fn.__name__.startswith("branch_"):
                    yield launch


def dtype_of(argument):
    if isinstance(argument, tuple):
        return tuple(map(dtype_of, argument))
    return argument.dtype if isinstance(argument, torch.Tensor) else type(argument)


def different(launches):
    """The first launch of each kernel, task, and types of arguments and constexprs: what differs but in values is bound
    and hashed alike."""
    seen = set()
    for launch in launches:
        dtypes = tuple(map(dtype_of, launch.arguments))
        types = tuple((name, type(value)) for name, value in sorted(launch.constexprs.items()))
        kind = launch.kernel.fn.__name__, launch.constexprs.get("TASK"), dtypes, types
        if kind not in seen:
            seen.add(kind)
            yield launch


for launch in different(training_launches() if sys.argv[1:] == ["training"] else inference_launches()):
    ahead = jit_compiled(launch, "sm_90")
    driver.set_active(Starting())
    compiled = launch.kernel.warmup(
        *map(with_memory, launch.arguments),
        grid=launch.grid,
        **launch.constexprs,
        **launch.compile_options,
    )
    assert compiled.hash == ahead.hash  # what is compiled ahead is what a start takes from the cache
    assert compiled.metadata.num_warps == launch.options["num_warps"]
    assert compiled.metadata.enable_fp_fusion
    print(launch.kernel.fn.__name__)
