"""What the library (cuDNN, MIOpen or oneDNN, as PyTorch chooses) computes: steps beside kernel launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import BranchSpec


class LibraryCall(NamedTuple):
    """Operators of PyTorch's that can run again on other tensors. They are dispatched each time, so that switches, such
    as those of ``torch.backends.cudnn``, hold as they are by then.

    Attributes:
        compute: writes into some of the tensors, or gives new ones; keeps none.
        tensors: what it takes.
    """

    compute: Callable[..., Sequence[Tensor]]
    tensors: tuple[Tensor | None, ...]

    def __call__(self) -> Sequence[Tensor]:
        return self.compute(*self.tensors)


@dataclass(frozen=True)
class Convolution:
    """One branch's convolution, without what follows it; it can be run any number of times.

    The library allocates what it writes, and `y` becomes that memory: a copy into memory of ours would cost two passes.
    So launches that read `y` are prepared before it has any memory.

    Attributes:
        x: ``[N, C_branch_in, H, W]``, channels adjacent in memory.
        weight: ``[C, C_branch_in / groups, k, k]``, channels_last.
        y: ``[N, H', W', C]`` contiguous, from :func:`without_memory`.
        allow_tf32: what PyTorch's switch, which the library reads itself, said to the plan.
    """

    x: Tensor
    weight: Tensor
    y: Tensor
    branch: BranchSpec
    stride: int
    allow_tf32: bool = False

    def __call__(self) -> None:
        branch = self.branch
        found = F.conv2d(
            self.x, self.weight, None, self.stride, branch.padding, branch.dilation, branch.groups
        )
        # No copy where the library keeps to channels_last, as cuDNN and oneDNN do.
        found = found.permute(0, 2, 3, 1).contiguous()
        # Not found's own strides: those of axes of one element are arbitrary.
        self.y.set_(found.untyped_storage(), found.storage_offset(), self.y.shape, self.y.stride())

    @property
    def multiplies(self) -> int:
        """Multiply-adds, those with the padding's zeros included."""
        return self.y.numel() * self.weight[0].numel()

    @property
    def copied_bytes(self) -> int:
        """What PyTorch moves before it calls the library: an input that is a part of another tensor is copied."""
        x = self.x
        return 0 if x.is_contiguous(memory_format=torch.channels_last) else 2 * x.numel() * x.element_size()


def convolution_grads(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    branch: BranchSpec,
    stride: int,
    needs: Sequence[bool],
    padding: Sequence[int] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a branch's convolution by its input and by its weight, None where not needed. That by the weight
    reads the weight's shape alone.

    Args:
        dy: ``[N, C, H', W']``, of the convolution.
        x: ``[N, C_branch_in, H, W]``, of one sample or more; samples may also lie side by side along the channels.
        weight: ``[C, C_branch_in / groups, k, k]`` in the dtype of x.
        needs: of the input, of the weight.
        padding: along the height and the width, where it is not the branch's own.
    """
    dx, dw, _ = torch.ops.aten.convolution_backward.default(
        dy, x, weight, None, [stride] * 2, padding or [branch.padding] * 2, [branch.dilation] * 2, False, [0, 0],
        x.shape[1] // weight.shape[1], [*needs, False],
    )  # fmt: skip
    return dx, dw


def without_memory(like: Tensor, size: tuple[int, ...]) -> Tensor:
    """A contiguous tensor that knows its size, dtype and device, and waits for memory."""
    y = like.new_empty(size)
    if not y.is_meta:
        y.untyped_storage().resize_(0)
    return y
