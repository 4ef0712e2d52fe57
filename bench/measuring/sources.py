"""Whose module runs: a peer's, ours, or ours at another revision. Adding a peer is one small class here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

from torch import Tensor, nn

import sk_triton
from sk_triton.backend import SCHEDULES
from sk_triton.environment import MissingPackageError, require
from sk_triton.save import Save

from .. import results
from ..results import SAVING_INPUT
from ..shapes import CLASSIC, MIN_GATE_WIDTH, PAPER, REDUCTION, SKNET50, SKRESNEXT50, Case, Shape
from .peers import ClassicSKConv, ClassicUnit, PaperUnit, SKNet50
from .protocol import NotApplicableError


class Source(ABC):
    """Whose module it is, in every case that it can run."""

    key: str
    label: str
    role: str = results.PEER

    def missing(self) -> str | None:
        """Why this source cannot run here, with the line that mends it; None if it can."""
        return None

    @abstractmethod
    def module(self, case: Case) -> nn.Module:
        """The case's unit or network, with the parameter names of the subject's yardstick."""

    def scope(self) -> AbstractContextManager[Any]:
        """What holds around a measurement of this source, entered outside of the timed call."""
        return nullcontext()

    def runs(self, module: nn.Module, x: Tensor) -> str | None:
        """What the dispatcher takes for `module` on `x` in this scope, as "triton/store"; None without a dispatcher."""
        return None


class ClassicClass(Source):
    """The classic class."""

    key = "classic"
    label = "classic SKConv"

    def module(self, case: Case) -> nn.Module:
        return ClassicSKConv(case.shape.channels, **_classic_settings(case.shape))


class PlainClassic(Source):
    """The classic class's unit in plain PyTorch."""

    key = "plain-classic"
    label = "plain PyTorch"

    def module(self, case: Case) -> nn.Module:
        return ClassicUnit(case.shape.channels, **_classic_settings(case.shape))


class PlainPaper(Source):
    """The paper's unit and network in plain PyTorch."""

    key = "paper"
    label = "plain PyTorch"

    def module(self, case: Case) -> nn.Module:
        return SKNet50(_paper_unit) if case.is_network else _paper_unit(case.shape)


class Timm(Source):
    """timm's `SelectiveKernel` and skresnext50_32x4d."""

    key = "timm"
    label = "timm"

    def missing(self) -> str | None:
        return _missing("timm")

    def module(self, case: Case) -> nn.Module:
        import timm
        from timm.layers import SelectiveKernel

        if case.subject == SKRESNEXT50:
            return timm.create_model(SKRESNEXT50)
        return SelectiveKernel(case.shape.channels, **timm_settings(case.shape))


class Ours(Source):
    """sk_triton as its users get it, held to one schedule, or a revision of it under another name.

    Args:
        backend, schedule: arguments of `use_backend`; without a schedule the dispatcher chooses it.
        save: argument of `save_for_backward`, if any.
        package: the imported package.
    """

    role = results.OURS

    def __init__(
        self,
        key: str = results.SK_TRITON,
        label: str = "sk_triton",
        *,
        backend: str = "auto",
        schedule: str | None = None,
        save: Save | None = None,
        role: str = results.OURS,
        package: ModuleType = sk_triton,
    ) -> None:
        self.key, self.label, self.backend, self.role = key, label, backend, role
        self.package, self.schedule, self.save = package, schedule, save

    def missing(self) -> str | None:
        return _missing("triton") if self.backend == "triton" else None

    def module(self, case: Case) -> nn.Module:
        if case.subject == SKNET50:
            return SKNet50(self._selective_kernel)
        if case.subject == SKRESNEXT50:
            return self.package.convert(Timm().module(case))
        if case.subject == CLASSIC:
            return self.package.SKConv(case.shape.channels, **_classic_settings(case.shape))
        return self._selective_kernel(case.shape)

    @contextmanager
    def scope(self) -> Iterator[None]:
        # Older revisions know no schedules, and no choice of what to save.
        settings = {"schedule": self.schedule} if self.schedule else {}
        save = self.package.save_for_backward(self.save) if self.save else nullcontext()
        with self.package.use_backend(self.backend, **settings), save:
            yield

    def runs(self, module: nn.Module, x: Tensor) -> str | None:
        """Asks each unit about its own input while `module` runs on `x` once; with counts where they differ.

        Raises:
            NotApplicableError: this is held to a schedule that cannot run a unit.
        """
        taken: Counter[str] = Counter()

        def ask(unit: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            try:
                plan = self.package.explain(unit, inputs[0]).plan
            except RuntimeError as error:
                if self.schedule is None:
                    raise
                raise NotApplicableError(str(error)) from None
            taken[f"{plan.backend}/{plan.schedule}"] += 1

        kinds = (self.package.SKConv, self.package.SelectiveKernel)
        hooks = [unit.register_forward_pre_hook(ask) for unit in module.modules() if isinstance(unit, kinds)]
        try:
            module(x)
        finally:
            for hook in hooks:
                hook.remove()
        if len(taken) == 1:
            return next(iter(taken))
        return ", ".join(f"{count} {plan}" for plan, count in taken.most_common())

    def _selective_kernel(self, shape: Shape) -> nn.Module:
        return self.package.SelectiveKernel(shape.channels, **timm_settings(shape))


def forced_schedules() -> list[Ours]:
    """sk_triton held to one of its kernels' schedules each, whatever "auto" would take."""
    return [Ours(f"ours-{name}", f"sk_triton, {name}", backend="triton", schedule=name) for name in SCHEDULES]


def saving_input() -> Ours:
    """sk_triton in training, with the branches convolved again instead of saved."""
    return Ours(SAVING_INPUT, 'sk_triton, save="input"', save="input")


def yardstick(subject: str) -> Source:
    """The plain peer whose own error in a dtype decides which error is allowed."""
    return {CLASSIC: ClassicClass(), PAPER: PlainPaper(), SKNET50: PlainPaper(), SKRESNEXT50: Timm()}[subject]


def timm_settings(shape: Shape) -> dict[str, Any]:
    """The arguments of timm's `SelectiveKernel` for a shape.

    Raises:
        ValueError: kernels above 3 with a dilation, which timm has no argument for.
    """
    if set(shape.kernels) == {3}:
        kernels, keep_3x3 = [2 * dilation + 1 for dilation in shape.dilations], True
    elif set(shape.dilations) == {1}:
        kernels, keep_3x3 = list(shape.kernels), False
    else:
        raise ValueError(
            f"timm dilates 3x3 kernels only, got kernels {shape.kernels}, dilations {shape.dilations}"
        )
    return {
        "kernel_size": kernels,
        "keep_3x3": keep_3x3,
        "groups": shape.groups,
        "stride": shape.stride,
        "split_input": shape.split_input,
        "rd_channels": shape.gate_width,
    }


def _paper_unit(shape: Shape) -> nn.Module:
    return PaperUnit(
        shape.channels,
        shape.kernels,
        shape.dilations,
        shape.groups,
        shape.gate_width,
        shape.stride,
        shape.split_input,
    )


def _classic_settings(shape: Shape) -> dict[str, Any]:
    if shape.kernels != tuple(3 + 2 * m for m in range(shape.num_branches)) or set(shape.dilations) != {1}:
        raise ValueError(f"the classic class has kernels 3, 5, ... without dilation, got {shape}")
    return {"M": shape.num_branches, "G": shape.groups, "r": REDUCTION, "L": MIN_GATE_WIDTH}


def _missing(module: str) -> str | None:
    try:
        require(module)
    except MissingPackageError as error:
        return str(error)
    return None
