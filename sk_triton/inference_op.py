"""The unit in inference as an operator of ``torch.library``: opaque to ``torch.compile``, planned when it runs.

An operator sees tensors and knows no layer: packed weights are shared by all calls on the same parameters and
statistics. They are made anew at every call where one of the former is no ``nn.Parameter``: compiled code computes in
memory that it uses again without counting versions (so may it statistics, which is not seen). A CUDA graph packs them
at every replay: nobody asks by then whether they have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels.lasting import is_capturing
from .layout import empty_output
from .pack_cache import shared_cache
from .params import Branch, FrozenNorm, Gate, are_kept, norms_of
from .preference import inference_plan
from .replay.calls import call_kind
from .replay.recording import MAX_RECORDINGS
from .spec import SKSpec
from .undisturbed import undisturbed

_PART = 2 + len(FrozenNorm._fields[:-1])
"""Tensors of a branch, and of the gate's first layer: weight, bias and those of the norm."""


def run_inference_op(x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec) -> Tensor:
    """The unit's output; arguments and result as :func:`sk_triton.functional.sk_conv`."""
    flat: list[Tensor | None] = []
    for branch in branches:
        flat += [branch.weight, branch.bias, *_norm_tensors(branch.norm)]
    flat += [
        gate.reduce_weight,
        gate.reduce_bias,
        *_norm_tensors(gate.norm),
        *gate.select_weight,
        *(gate.select_bias or ()),
    ]
    epsilons = [0.0 if norm is None else norm.eps for norm in norms_of(branches, gate)]
    tensors = [t for t in flat if t is not None]
    return unit_inference(x, tensors, [t is not None for t in flat], epsilons, spec.encoded)


@torch.library.custom_op("sk_triton::unit_inference", mutates_args=())
def unit_inference(
    x: Tensor, tensors: Sequence[Tensor], has: Sequence[bool], epsilons: Sequence[float], encoded: str
) -> Tensor:
    """A unit in inference.

    Args:
        x: ``[N, in_channels, H, W]``.
        tensors: those that the unit `has`, of each branch: weight, bias, and the norm's as in ``FrozenNorm``; of the
            gate: the same of its first layer, then the weights and the biases of its second.
        epsilons: the norms', the gate's last; 0 where there is no norm.
        encoded: ``SKSpec.encoded``.

    Returns:
        v ``[N, C, H', W']`` in the memory format of x.

    Raises:
        RuntimeError: ``use_backend("triton", schedule=…)`` asks for one that cannot run the unit.
    """
    from . import launching
    from .packing import pack

    spec = SKSpec.decode(encoded)
    remaining = iter(tensors)
    branches, gate = _unit([next(remaining) if present else None for present in has], epsilons)
    with undisturbed(x):
        plan = inference_plan(x, spec)
        may_keep = are_kept(branches, gate) and not is_capturing(x.device)
        cache = shared_cache(tensors) if may_keep else None
        packed = pack(plan, x.shape[2], x.shape[3], branches, gate, cache)
        kind = call_kind(x)
        start = packed.calls.get((kind, spec))
        if start is not None:
            return start(x)
        v, call = launching.run_packed(plan, x, packed, spec)
        if kind is not None and cache is not None and call is not None:
            if len(packed.calls) >= MAX_RECORDINGS:
                packed.calls.clear()
            packed.calls[kind, spec] = call.start
        return v


@unit_inference.register_fake
def _(x, tensors, has, epsilons, encoded):
    return empty_output(x, SKSpec.decode(encoded))


def _norm_tensors(norm: object) -> list[Tensor | None]:
    return [getattr(norm, name, None) for name in FrozenNorm._fields[:-1]]


def _unit(flat: Sequence[Any], epsilons: Sequence[float]) -> tuple[tuple[Branch, ...], Gate]:
    """The inverse of what :func:`run_inference_op` hands over."""
    parts: list[Any] = []
    for i, eps in enumerate(epsilons):
        weight, bias, *norm = flat[_PART * i : _PART * (i + 1)]
        parts.append((weight, bias, None if norm[0] is None else FrozenNorm._make([*norm, eps])))
    select = [t for t in flat[_PART * len(parts) :] if t is not None]  # each stack in any number of pieces
    weights, biases = (tuple(t for t in select if (t.dim() == 1) == is_bias) for is_bias in (False, True))
    gate = Gate._make([*parts[-1], None, weights, biases or None])
    return tuple(Branch(*part) for part in parts[:-1]), gate
