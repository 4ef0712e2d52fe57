"""The one path that every layer takes: checks, autocast, then the reference or a schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch, reference
from .backend import current_backend
from .checks import check_input, check_params
from .pack_cache import PackCache
from .params import Branch, Gate
from .plan import Plan
from .replay.calls import Recorder
from .save import Save, chosen_save
from .spec import SKSpec
from .training.norms import check_empty_batch


def sk_conv(
    x: Tensor,
    branches: Sequence[Branch],
    gate: Gate,
    spec: SKSpec,
    *,
    save: Save | None = None,
) -> Tensor:
    """Selective-kernel convolution (Li et al., CVPR 2019), equivalent to ``sk_triton.reference.sk_conv``.

    Autocast acts as on ``nn.Conv2d``: the result has autocast's dtype, and float64 is left alone.

    Args:
        x: ``[N, in_channels, H, W]`` of float16, bfloat16, float32 or float64. N = 0 gives an empty result.
        branches: M branches, as ``spec`` describes them, with the dtype and device of x.
        gate: the gate, likewise.
        spec: the unit's description.
        save: what schedule "train" saves for the backward pass, see :func:`.save.save_for_backward`, which goes before
            it; None is "branches". The reference saves what its operators save.

    Returns:
        ``[N, out_channels, H', W']`` in the memory format of x; under transformations of ``torch.func`` in PyTorch's.

    Raises:
        TypeError: x is no tensor, or dtypes are mixed or not floating.
        ValueError: wrong rank, channels, sizes, shapes or devices, parts that ``spec`` does not describe, or batch
            statistics of one value per channel.
        RuntimeError: ``use_backend("triton")`` or ``use_backend("torch")`` where it cannot run; the message holds
            the reason.
    """
    return run(x, branches, gate, spec, save=save)


def run(
    x: Tensor,
    branches: Sequence[Branch],
    gate: Gate,
    spec: SKSpec,
    *,
    cache: PackCache | None = None,
    recorder: Recorder | None = None,
    save: Save | None = None,
) -> Tensor:
    """As :func:`sk_conv`, for a layer.

    Args:
        cache: packed weights to reuse from call to call with the same parameters; None packs them anew.
        recorder: takes note of a call that can be started again, see :mod:`.replay.calls`.
    """
    save = chosen_save(save)
    x, plan, autocast = planned(x, branches, gate, spec, save)
    if plan.backend == "reference":
        v = reference.sk_conv(x, branches, gate, spec)
        # A norm or an activation of the user's may leave the autocast dtype.
        return v if autocast is None else v.to(autocast)
    if autocast is None:
        return dispatch.run(plan, x, branches, gate, spec, cache, recorder, save)
    with torch.autocast(x.device.type, enabled=False):  # sums stay in float32
        return dispatch.run(plan, x, branches, gate, spec, cache, recorder, save)


def attention(x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec) -> Tensor:
    """The attention to each branch (Li et al., CVPR 2019, Eq. 5), by plain PyTorch, differentiable.

    :func:`sk_conv` never writes it where kernels run. In training mode norms update their running statistics, as they
    do there.

    Args:
        x, branches, gate, spec: as of :func:`sk_conv`.

    Returns:
        a ``[N, M, C]``, which sums to 1 over M.

    Raises:
        TypeError, ValueError: as :func:`sk_conv`.
    """
    check_input(x, spec)
    check_params(x, branches, gate, spec, autocast_dtype(x))
    us = reference.split(x, branches, spec)
    return reference.attend(reference.fuse(us, gate), gate, spec.num_branches)


def planned(
    x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec, save: Save
) -> tuple[Tensor, Plan, torch.dtype | None]:
    """x as :func:`sk_conv` computes on it, the plan of the call, and the dtype of the autocast in force or None.

    Raises:
        As :func:`sk_conv`.
    """
    check_input(x, spec)
    autocast = autocast_dtype(x)
    check_params(x, branches, gate, spec, autocast)
    if autocast is not None:
        x = x.to(autocast)
    plan = dispatch.choose(x, branches, gate, spec, backend=current_backend(), save=save)
    if x.shape[0] == 0 and plan.backend != "reference":
        if plan.schedule == "train":
            check_empty_batch(branches, gate)
        plan = dispatch.reference_plan(x.dtype, spec, "x holds no samples")
    return x, plan, autocast


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast takes ``nn.Conv2d`` on x, or None where it leaves it alone."""
    device = x.device.type
    if x.dtype is torch.float64 or device == "meta":  # autocast does not know the meta device
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
