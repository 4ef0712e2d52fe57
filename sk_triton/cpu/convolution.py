"""A branch's convolution on a CPU, its ReLU included, for inference."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..spec import BranchSpec


def packs_weights(dtype: torch.dtype) -> bool:
    """Whether weights are put into the layout that oneDNN computes in once, not at every call: in channels_last.

    By the operators that Inductor freezes models with: no public one does, and where they are missing PyTorch's
    convolution serves. So it does in NCHW, where these operators were slower (``sk_triton/schedules/README.md``); and
    under a dispatch mode, which counts operations or memory by the operators it knows.
    """
    return (
        dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and _get_current_dispatch_mode() is None
        and _has_operators()
    )


@functools.lru_cache
def _has_operators() -> bool:
    names = ("_reorder_convolution_weight", "_convolution_pointwise")
    # On ARM another library than oneDNN stands behind them.
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return (
        is_x86
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
    )


def convolution(
    weight: Tensor, bias: Tensor | None, branch: BranchSpec, stride: int, has_relu: bool, is_packed: bool
) -> Callable[[Tensor], Tensor]:
    """What computes a branch ``[N, C, H', W']`` from its input.

    Args:
        weight, bias: ``[C, C_branch_in / groups, k, k]``, norm folded in, and ``[C]`` or None.
        has_relu: whether a ReLU follows.
        is_packed: as :func:`packs_weights` says.
    """
    if not is_packed:
        return functools.partial(_convolve, weight, bias, branch, stride, has_relu)
    # Of any input size: the layout that is found without one is as fast.
    where = [branch.padding] * 2, [stride] * 2, [branch.dilation] * 2, branch.groups
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *where)
    bias = None if bias is None else bias.contiguous()  # the operator reads any other wrongly, without a word
    return functools.partial(_convolve_packed, packed, bias, where, "relu" if has_relu else "none")


def _convolve(
    weight: Tensor, bias: Tensor | None, branch: BranchSpec, stride: int, has_relu: bool, x: Tensor
) -> Tensor:
    u = F.conv2d(x, weight, bias, stride, branch.padding, branch.dilation, branch.groups)
    return u.relu_() if has_relu else u


def _convolve_packed(
    weight: Tensor,
    bias: Tensor | None,
    where: tuple[list[int], list[int], list[int], int],
    act: str,
    x: Tensor,
) -> Tensor:
    u: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *where, act, [], "")
    return u
