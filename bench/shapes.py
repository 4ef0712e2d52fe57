"""The shapes that are measured: the SK units of SKNet-50 at 224 x 224 input (paper, table 1)."""

from __future__ import annotations

from dataclasses import dataclass

GROUPS = 32
BRANCHES = 2
REDUCTION = 16
MIN_GATE_WIDTH = 32


@dataclass(frozen=True)
class Stage:
    """Input of one stage's SK units: `channels` x `height` x `width`; stride 1, groups 32, two branches."""

    index: int
    channels: int
    height: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.channels}@{self.height}²"


STAGES: dict[int, Stage] = {
    1: Stage(1, 128, 56, 56),
    2: Stage(2, 256, 28, 28),
    3: Stage(3, 512, 14, 14),
    4: Stage(4, 1024, 7, 7),
}


@dataclass(frozen=True)
class Grid:
    """What one run covers: stage numbers, batch sizes and dtype names."""

    stages: tuple[int, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]


def default_grid(device_type: str, quick: bool) -> Grid:
    """The grid of `sk-triton bench` on a device type ("cpu" or "cuda"), with and without `--quick`."""
    if device_type == "cpu":
        return Grid((1, 3) if quick else tuple(STAGES), (1, 8), ("fp32",))
    if quick:
        return Grid((1, 3), (1, 32), ("fp16",))
    return Grid(tuple(STAGES), (1, 8, 32, 128), ("fp16", "bf16", "fp32"))
