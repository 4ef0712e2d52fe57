"""A call of a unit in training, but for its tensors; its gradients; and whether anybody watches it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..reasons import PLAIN, is_batched
from ..save import Save
from ..spec import SKSpec
from .norms import NormSettings
from .operators import unit_bwd

if TYPE_CHECKING:
    from ..kernels.running import Running
    from .branches import TrainingUnit


class UnitCall(NamedTuple):
    """A call of a unit, but for its tensors: which of its parameters there are, how its norms act, what it saves, and
    which running statistics its kernels update (none, or one for each norm)."""

    spec: SKSpec
    norms: NormSettings
    has: tuple[bool, ...]
    save: Save
    updates: tuple[Running | None, ...] = ()

    def unit(self, params: Sequence[Tensor], running: Sequence[Tensor]) -> TrainingUnit:
        from .passes import unit_of

        return unit_of(params, running, self.has, self.spec, self.norms, self.updates)


def is_watched(tensor: Tensor) -> bool:
    """Whether a call on a tensor is seen by a compiler, a transformation, a mode or a subclass of Tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or _get_current_dispatch_mode() is not None
        or type(tensor) not in PLAIN
    )


def run_backward(
    dv: Tensor,
    x: Tensor,
    call: UnitCall,
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that `needs` names, by the operator where somebody watches: it refuses a second derivative.

    Raises:
        RuntimeError: `dv` stands for a batch of gradients.
    """
    if is_batched(dv):
        raise RuntimeError(
            "the kernels take no batch of gradients (torch.func.vmap, is_grads_batched=True): call the unit under "
            'use_backend("reference") for those'
        )
    if torch.is_grad_enabled() or is_watched(dv):
        return unit_bwd(dv, x, params, running, saved, call.has, call.spec.encoded, *call.norms, needs)
    from .passes import backward_pass, in_format_of, kernel_inputs

    saved = [tensor.contiguous() for tensor in saved]  # hooks may have given other strides
    dv, x_in = kernel_inputs(dv, x)
    return in_format_of(x, backward_pass(dv, x_in, call.unit(params, running), saved, needs)[0], needs)
