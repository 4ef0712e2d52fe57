"""Selective Kernel convolutions (Li et al., CVPR 2019) accelerated with Triton."""

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
