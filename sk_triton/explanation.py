"""What a layer would run, as a report to print."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .chips import chip_of
from .functional import planned
from .plan import Plan
from .save import Save, chosen_save
from .spec import SKSpec
from .tuning.lookup import describe
from .unit import SKUnit


def explain(layer: SKUnit, x: Tensor) -> Explanation:
    """What ``layer(x)`` would run under the current backend, grad mode and autocast, and why not the others.

    Args:
        layer: an ``SKConv`` or ``SelectiveKernel``.
        x: ``[N, in_channels, H, W]``.

    Raises:
        TypeError: another layer, and what ``layer(x)`` raises.
        ValueError, RuntimeError: what ``layer(x)`` raises: x does not fit the layer, or the backend that
            ``use_backend`` asks for cannot run.
    """
    if not isinstance(layer, SKUnit):
        raise TypeError(
            f"layer must be an SKConv or a SelectiveKernel, got {type(layer).__name__}: of a model take one unit and "
            "its input, as in explain(model.layer1[0].conv1, x)"
        )
    save = chosen_save(layer.save)
    x, plan, _ = planned(x, layer.branches(), layer.gate(), layer.spec, save)
    chip = chip_of(x.device) if plan.backend == "triton" else None
    return Explanation(plan, layer.spec, "" if chip is None else describe(chip), save)


@dataclass(frozen=True)
class Explanation:
    """A plan that prints as a report.

    Attributes:
        gpu: the GPU and what is tuned for it, "" where no kernel runs.
        save: what a training step of kernels saves for its backward pass.
    """

    plan: Plan
    spec: SKSpec
    gpu: str = ""
    save: Save = "branches"

    def __str__(self) -> str:
        plan = self.plan
        part = ", forward" if self._is_kernel_training else ""
        lines = [
            f"backend   {plan.backend}",
            f"schedule  {plan.schedule}",
            f"passes    {plan.passes:g} over one activation tensor{part} (predicted)",
        ]
        if self.gpu:
            lines.append(f"gpu       {self.gpu}")
        if plan.samples:
            lines.append(f"samples   {plan.samples} at a time")
        if plan.is_packed:
            lines.append("weights   laid out for oneDNN once, in channels_last")
        if plan.merged_branch is not None:
            lines.append(f"merged    {plan.merged_branch}")
        lines.extend(self._launch_lines())
        for source in plan.sources:
            lines.append(f"source    {source.kind}: {source.text}")
            lines.append(f"  key     {source.key}")
        lines.extend(f"not {name}: {reason}" for name, reason in plan.rejected)
        return "\n".join(lines)

    @property
    def _is_kernel_training(self) -> bool:
        return (self.plan.backend, self.plan.schedule) == ("triton", "train")

    def _launch_lines(self) -> list[str]:
        """What the kernels compute, with their configs: the launches of the branches, then the others."""
        plan, lines = self.plan, []
        if self._is_kernel_training:
            lines.append(f"saves     {self.save}")
        if plan.merged_launch is not None:
            lines.append(f"sums      {_show(plan.merged_launch.border)}")
            lines.append(f"merged    {_show(plan.merged_launch.conv)}")
        for launch in (*plan.folded_launches, *plan.branch_launches):
            branches = ", ".join(map(str, self.spec.branches[launch.start : launch.stop]))
            lines.append(f"{launch.task:<9} {branches}")
            lines.append(f"  config  {_show(launch.config)}")
        if plan.reduction is not None and not plan.branch_launches:
            lines.append(f"convolve  by the library: {', '.join(map(str, self.spec.branches))}")
        for title, config in (
            ("reduce" if self._is_kernel_training else "pool", plan.reduction),
            ("resident", plan.resident),
            ("gate", plan.gate),
            ("select", plan.select),
            ("gated", plan.gated_select),
        ):
            if config is not None:
                lines.append(f"{title:<9} {_show(config)}")
        if self._is_kernel_training:
            by_kernels = plan.gradient is not None
            lines.append(f"gradient  {_show(plan.gradient) if by_kernels else 'by the library'}")
        return lines


def _show(config: Any) -> str:
    values = ", ".join(f"{f.name}={getattr(config, f.name)}" for f in fields(config))
    return f"{type(config).__name__}({values})"
