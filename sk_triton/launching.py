"""Runs a plan of the Triton backend: pack the parameters, prepare the launches, start them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layout import empty_output, with_adjacent_channels
from .pack_cache import PackCache
from .packed import Packed
from .packing import pack
from .params import Branch, Gate
from .plan import Plan
from .replay.calls import InferenceCall, Recorder
from .schedules import gated, library, merged, recompute, resident, store
from .spec import SKSpec
from .steps import Step

_PREPARE: dict[str, Callable[..., list[Step]]] = {
    "store": store.prepare,
    "gated": gated.prepare,
    "recompute": recompute.prepare,
    "merged": merged.prepare,
    "resident": resident.prepare,
    "library": library.prepare,
}


def run(
    plan: Plan,
    x: Tensor,
    branches: Sequence[Branch],
    gate: Gate,
    spec: SKSpec,
    cache: PackCache | None,
    recorder: Recorder | None = None,
) -> Tensor:
    """The unit's output; arguments and result as :func:`sk_triton.functional.sk_conv`."""
    if recorder is not None:
        recorder = None if recorder.has_gradients else recorder.watching()
    with torch.cuda.device_of(x):
        packed = pack(plan, x.shape[2], x.shape[3], branches, gate, cache)
        v, call = run_packed(plan, x, packed, spec)
    if recorder is not None and call is not None:
        recorder.add(call.keeping(packed).start)
    return v


def run_packed(plan: Plan, x: Tensor, packed: Packed, spec: SKSpec) -> tuple[Tensor, InferenceCall | None]:
    """The unit's output, on the current device, and what starts its kernels again while `packed` is alive, if it can
    be."""
    v = empty_output(x, spec)
    x_in = with_adjacent_channels(x)
    steps = prepare(plan, x_in, v, packed, spec)
    started = [step() for step in steps]
    return v, InferenceCall.of(x, x_in, v, packed, steps, started)


def prepare(plan: Plan, x: Tensor, v: Tensor, packed: Packed, spec: SKSpec) -> list[Step]:
    """The steps, mostly kernel launches, that compute the unit's output.

    Every tensor that they share is allocated here, without values: a call that is started again gets other memory,
    except for what a launch names as `kept`.

    Args:
        x: ``[N, in_channels, H, W]``, channels adjacent in memory.
        v: ``[N, C, H', W']``, receives the output.
    """
    return _PREPARE[plan.schedule](plan, x, v, packed, spec)
