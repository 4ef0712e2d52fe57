"""What a layer would run, as a report to print."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import dispatch
from .backend import current_backend
from .checks import check_input
from .chips import chip_of
from .functional import autocast_dtype
from .plan import Plan
from .save import chosen_save
from .spec import SKSpec
from .tuning.lookup import describe

if TYPE_CHECKING:
    from .unit import SKUnit


def explain(layer: SKUnit, x: Tensor) -> Explanation:
    """What ``layer(x)`` would run under the current backend, grad mode and autocast, and why not the others.

    Raises:
        ValueError: an unknown ``layer.save``.
        RuntimeError: ``use_backend("triton")`` or ``use_backend("torch")`` is in force and it cannot run.
    """
    check_input(x, layer.spec)
    x = x.to(autocast_dtype(x) or x.dtype)
    branches, gate, spec = layer.branches(), layer.gate(), layer.spec
    save = chosen_save(layer.save)
    plan = dispatch.choose(x, branches, gate, spec, backend=current_backend(), save=save)
    chip = chip_of(x.device) if plan.backend == "triton" else None
    return Explanation(plan, spec, "" if chip is None else describe(chip))


@dataclass(frozen=True)
class Explanation:
    """A plan that prints as a report."""

    plan: Plan
    spec: SKSpec
    gpu: str = ""

    def __str__(self) -> str:
        plan = self.plan
        lines = [
            f"backend   {plan.backend}",
            f"schedule  {plan.schedule}",
            f"passes    {plan.passes:g} over one activation tensor (predicted)",
        ]
        if self.gpu:
            lines.append(f"gpu       {self.gpu}")
        if plan.samples:
            lines.append(f"samples   {plan.samples} at a time")
        if plan.merged is not None:
            lines.append(f"merged    {plan.merged}")
        if plan.merged_launch is not None:
            lines.append(f"sums      {_show(plan.merged_launch.border)}")
            lines.append(f"merged    {_show(plan.merged_launch.conv)}")
        for launch in (*plan.folded_launches, *plan.branch_launches):
            branches = ", ".join(map(str, self.spec.branches[launch.start : launch.stop]))
            lines.append(f"{launch.task:<9} {branches}")
            lines.append(f"  config  {_show(launch.config)}")
        if plan.schedule == "library":
            lines.append(f"convolve  by the library: {', '.join(map(str, self.spec.branches))}")
            lines.append(f"pool      {_show(plan.reduction)}")
        if plan.resident is not None:
            lines.append(f"resident  {_show(plan.resident)}")
        if plan.gate is not None:
            lines.append(f"gate      {_show(plan.gate)}")
        if plan.select is not None:
            lines.append(f"select    {_show(plan.select)}")
        if plan.gated_select is not None:
            lines.append(f"gated     {_show(plan.gated_select)}")
        for source in plan.sources:
            lines.append(f"source    {source.kind}: {source.text}")
            lines.append(f"  key     {source.key}")
        lines.extend(f"not {name}: {reason}" for name, reason in plan.rejected)
        return "\n".join(lines)


def _show(config: Any) -> str:
    values = ", ".join(f"{f.name}={getattr(config, f.name)}" for f in fields(config))
    return f"{type(config).__name__}({values})"
