"""Schedule "resident": one cooperative launch pools, gates and selects; a few samples are in flight at a time.

Two passes over an activation tensor: x once from memory (and once more from L2), the result once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.geometry import tile_count
from ..kernels.unit_resident import STATE_HEADER, unit_resident_fwd
from ..packed import Packed
from ..plan import Plan
from ..replay.workspace import kept_exchange
from ..spec import SKSpec
from ..steps import Step


def prepare(plan: Plan, x: Tensor, v: Tensor, packed: Packed, spec: SKSpec) -> list[Step]:
    """The step that computes the unit; see :func:`..launching.prepare`."""
    config = plan.resident
    assert config is not None
    (launch,) = plan.branch_launches
    n, c, h, w = v.shape
    partial = x.new_empty((n, tile_count(launch.shape, config.branch, h, w), c), dtype=torch.float32)
    state, attention = kept_exchange(n + STATE_HEADER.value, n * spec.num_branches * c, x.device)
    (weights,), (shift,) = packed.weights, packed.shifts
    return [
        unit_resident_fwd(
            x,
            weights,
            shift,
            *packed.gate,
            partial,
            attention,
            v,
            state,
            shape=launch.shape,
            has_relu=spec.branch_has_relu,
            gate_has_relu=spec.gate_has_relu,
            allow_tf32=plan.allow_tf32,
            config=config,
            programs=_programs(plan, x.device),
        )
    ]


def _programs(plan: Plan, device: torch.device) -> int:
    """Programs that run on the device at once; the interpreter runs one."""
    assert plan.resident is not None
    if device.type == "cpu":
        return 1
    processors = plan.resident.processors
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return plan.resident.programs_per_processor * processors
