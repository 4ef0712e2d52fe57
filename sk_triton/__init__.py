"""Selective Kernel convolutions (Li et al., CVPR 2019) accelerated with Triton.

From the call down: `layers` (whose base is `unit`, whose parts are `blocks`) give parameters (`params`) and description
(`spec`) to `functional`, which checks them (`checks`) and asks `dispatch` for a plan (`plan`). That names the
`reference`, a schedule of the CPU's (`cpu.choice`), or the kernels. For these `preference` takes one of the plans of
`planning`, `packing` puts parameters in the form that it reads, and `launching` starts its schedule (`schedules`);
`training` computes with gradients, and `inference_op` for ``torch.compile``. `replay` starts calls again without a new
plan, and `tuning` and `analytic` find the configs of plans.
"""

from importlib.metadata import version

from .backend import use_backend
from .conversion import convert
from .dispatch import can_run_triton
from .explanation import explain
from .layers import SelectiveKernel, SKConv
from .params import Branch, Gate
from .save import save_for_backward
from .spec import BranchSpec, SKSpec
from .tuning.ranks import sync_configs

__version__ = version("sk-triton")

__all__ = [
    "Branch",
    "BranchSpec",
    "Gate",
    "SKConv",
    "SKSpec",
    "SelectiveKernel",
    "__version__",
    "can_run_triton",
    "convert",
    "explain",
    "save_for_backward",
    "sync_configs",
    "use_backend",
]
