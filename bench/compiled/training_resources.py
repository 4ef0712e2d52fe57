"""What the kernels of a training step use on a chip, from the compiled code alone."""

from __future__ import annotations

from sk_triton.kernels.launch import Launch
from sk_triton.save import SAVES
from sk_triton.training.plan import plan_training

from ..grid import GridCase
from .resources import Row, kernel_name, row_of, workload_of
from .training_steps import meta_launches


def launches(case: GridCase, target: str) -> list[Launch]:
    """The different launches of training steps under both save policies on chip `target`, on meta tensors."""
    workload = workload_of(case, target)
    found = [la for save in SAVES for la in meta_launches(workload, plan_training(workload, save), save)]
    different = {(kernel_name(la), str(la.constexprs), str(la.options), la.grid): la for la in found}
    return list(different.values())


def measure(case: GridCase, target: str, kernels: str | tuple[str, ...] = "") -> list[Row]:
    """Compiles the kernels of a case's training steps for `target` and reads what they use; `per_output` is by element
    of all branches. `kernels`: how the names of those wanted begin, any of several."""
    from .compile import compile_launches

    height, width = case.spec.output_size(case.size, case.size)
    outputs = case.n * height * width * case.spec.out_channels * case.spec.num_branches
    wanted = [launch for launch in launches(case, target) if kernel_name(launch).startswith(kernels)]
    return [
        row_of(case, launch, used, outputs)
        for launch, used in zip(wanted, compile_launches(wanted, target), strict=True)
    ]
