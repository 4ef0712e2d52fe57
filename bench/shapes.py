"""What is measured: shapes of units, and the cases that competing providers share."""

from __future__ import annotations

from dataclasses import dataclass

from sk_triton import spec
from sk_triton.tuning import keys

GROUPS = 32
BRANCHES = 2
REDUCTION = 16
MIN_GATE_WIDTH = 32

CLASSIC = "classic"
PAPER = "paper"
UNITS = {
    CLASSIC: "Classic class: 3x3 and 5x5 with bias, no norm",
    PAPER: "Paper's and timm's unit: 3x3 and dilated 3x3, batch norm, ReLU",
}
"""The units, each a function that providers compete on, and their titles."""

SKNET50 = "sknet50"
SKRESNEXT50 = "skresnext50_32x4d"
NETWORKS = {SKNET50: "SKNet-50, the paper's", SKRESNEXT50: "timm's skresnext50_32x4d"}


def subject_title(subject: str) -> str:
    """The title of a unit or a network; the name itself of anything else that is measured."""
    return {**UNITS, **NETWORKS}.get(subject, subject)


DIRECTIONS = keys.DIRECTIONS
INFERENCE, TRAINING = DIRECTIONS


@dataclass(frozen=True)
class Shape:
    """A unit on inputs of `channels` x `height` x `width`, with as many output channels.

    Branch m has kernel `kernels[m]` and dilation `dilations[m]`; with `split_input` it reads the m-th slice of the
    channels. A network has its input's sizes and no branches.
    """

    channels: int
    height: int
    width: int
    groups: int = GROUPS
    kernels: tuple[int, ...] = (3, 3)
    dilations: tuple[int, ...] = (1, 2)
    stride: int = 1
    split_input: bool = False

    @property
    def name(self) -> str:
        if not self.channels:
            return "no input"
        size = f"{self.height}²" if self.height == self.width else f"{self.height}x{self.width}"
        return f"{self.channels}@{size}"

    @property
    def num_branches(self) -> int:
        return len(self.kernels)

    @property
    def gate_width(self) -> int:
        """`d` of the benchmark's units (paper, Eq. 4)."""
        return spec.gate_width(self.channels, REDUCTION, MIN_GATE_WIDTH)


def unit_shape(
    unit: str,
    channels: int,
    size: int,
    *,
    groups: int = GROUPS,
    num_branches: int = BRANCHES,
    kernel: int = 3,
    dilation: int = 2,
) -> Shape:
    """A unit's usual branches: of the classic class kernels 3, 5, …, of the paper's `kernel` with dilations 1,
    `dilation`, ….

    More than two branches dilate on by the same step.
    """
    if unit == CLASSIC:
        kernels = tuple(3 + 2 * m for m in range(num_branches))
        return Shape(channels, size, size, groups, kernels, (1,) * num_branches)
    dilations = tuple(1 + m * (dilation - 1) for m in range(num_branches))
    return Shape(channels, size, size, groups, (kernel,) * num_branches, dilations)


STAGES: dict[int, tuple[int, int]] = {1: (128, 56), 2: (256, 28), 3: (512, 14), 4: (1024, 7)}
"""Channels and size of the SK units of SKNet-50 at 224 x 224 input (paper, table 1)."""


def stage_shape(unit: str, stage: int) -> Shape:
    """The unit at one stage of SKNet-50."""
    return unit_shape(unit, *STAGES[stage])


def network_shape(size: int) -> Shape:
    """A network's input."""
    return Shape(3, size, size, groups=1, kernels=(), dilations=())


@dataclass(frozen=True)
class Case:
    """What competing records share: the same function of the same input with the same weights.

    `subject` is a key of UNITS or NETWORKS. A suite that varies one thing says which `axis`, and its `value`; one whose
    shapes do not tell its cases apart gives each a `name`. The start of a process has no channels, dtype and direction.
    """

    suite: str
    subject: str
    shape: Shape
    batch: int
    dtype: str
    direction: str = INFERENCE
    axis: str | None = None
    value: float | None = None
    name: str | None = None

    @property
    def title(self) -> str:
        return f"{self.suite}: {self.short_title} {self.dtype} {self.direction}".rstrip()

    @property
    def short_title(self) -> str:
        """Without what a run's cases have in common, mostly: suite, dtype and direction."""
        if not self.shape.channels:
            return self.subject
        what = f"{self.axis} {self.value:g}" if self.axis else self.shape.name
        if self.name:
            what = f"({self.name}) {what}"
        return f"{self.subject} {what} batch {self.batch}"

    @property
    def is_network(self) -> bool:
        return self.subject in NETWORKS

    @property
    def flops(self) -> float:
        """Multiplies and adds of the branch convolutions, which is nearly all; training counts three times (dx, dW)."""
        shape = self.shape
        channels = shape.channels / shape.num_branches if shape.split_input else shape.channels
        per_output = sum(2 * channels / shape.groups * k * k for k in shape.kernels)
        once = per_output * self.batch * shape.channels * shape.height * shape.width / shape.stride**2
        return once * (3 if self.direction == TRAINING else 1)

    @property
    def tensor_bytes(self) -> int:
        """T: one pass over an activation tensor."""
        shape, size = self.shape, 4 if self.dtype == "fp32" else 2
        return self.batch * shape.channels * shape.height * shape.width * size

    @property
    def floor_passes(self) -> float:
        """Passes over x that no implementation can avoid: x and v, and in training dv, x again and dx."""
        output = 1 / self.shape.stride**2
        return 3 + 2 * output if self.direction == TRAINING else 1 + output
