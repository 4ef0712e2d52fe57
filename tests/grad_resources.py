"""Prints, a JSON object a line, what the backward kernels of SKNet-50's stages use on the chips given: a script of its
own, because kernels are compiled in a process that never interprets."""

import json
import math
import sys

import torch

from sk_triton.analytic_grad import grad_config
from sk_triton.bench.compile import compile_launch
from sk_triton.chips import CHIPS
from sk_triton.kernels.branch_grad import branch_grad, reduce_weight_grad
from sk_triton.kernels.geometry import ConvShape
from sk_triton.kernels.grad_geometry import partial_shape

# name: (branches, size) at batch 128
CASES = {
    "stage 1": (ConvShape(128, 128, 32, (3, 3), (1, 2)), 56),
    "stage 1, one branch": (ConvShape(128, 128, 32, (3,), (1,)), 56),
    "stage 3": (ConvShape(512, 512, 32, (3, 3), (1, 2)), 14),
    "stage 4": (ConvShape(1024, 1024, 32, (3, 3), (1, 2)), 7),
}
BATCH = 128


def launches(shape: ConvShape, size: int, chip: str):
    """The launches of a backward pass on meta tensors."""
    config = grad_config(shape, BATCH, size, size, torch.float16, CHIPS[chip])
    m, c = len(shape.kernels), shape.c_out

    def empty(*sizes: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    x, dv, dx = (empty(BATCH, size, size, c).permute(0, 3, 1, 2) for _ in range(3))
    partial = empty(*partial_shape(shape, config, BATCH, size, size), dtype=torch.float32)
    terms = empty(BATCH, m, c, 6, dtype=torch.float32)
    y = empty(m, BATCH, size, size, c)
    dw = [empty(c, shape.c_in // shape.groups, k, k) for k in shape.kernels]
    found = branch_grad(x, dv, y, terms, empty(1), dx, partial, shape=shape, has_relu=True, config=config)
    return found + reduce_weight_grad(partial, dw, shape=shape, config=config)


def main() -> None:
    for chip in sys.argv[1:]:
        for name, (shape, size) in CASES.items():
            outputs = BATCH * size * size * shape.c_out * len(shape.kernels)
            for launch in launches(shape, size, chip):
                used = compile_launch(launch, chip)
                threads = used.threads * math.prod(launch.grid)
                row = {
                    "unit": name,
                    "chip": chip,
                    "kernel": launch.kernel.fn.__name__.removesuffix("_kernel"),
                    "registers": used.registers,
                    "spills": used.spills,
                    "shared": used.shared,
                    "matrix": used.matrix,
                    "per_output": used.instructions and used.instructions * threads / outputs,
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
