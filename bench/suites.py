"""The suites: which cases each of them measures, on a GPU, on a CPU, and in a hurry.

Important cases come first, since a time limit ends a suite wherever it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from .grid import GRID_UNITS
from .shapes import (
    CLASSIC,
    INFERENCE,
    NETWORKS,
    PAPER,
    TRAINING,
    UNITS,
    Case,
    Shape,
    network_shape,
    stage_shape,
    unit_shape,
)

LAYER, TRAIN, MODEL, SWEEP, HOST, SCALING, GRID = (
    "layer",
    "train",
    "model",
    "sweep",
    "host",
    "scaling",
    "grid",
)

CHANNELS_PER_GROUP = "channels per group"
DILATION = "dilation"
KERNEL = "kernel size"
BRANCHES = "branches"
BATCH = "batch"
PIXELS = "height × width"
CHANNELS = "channels"


@dataclass(frozen=True)
class Choice:
    """What a run is asked to cover; None leaves it to the suite. Suites of `ONE_BATCH` take one batch size."""

    on_gpu: bool
    quick: bool = False
    stages: tuple[int, ...] | None = None
    batches: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None

    def pick(self, gpu: tuple, cpu: tuple, quick_gpu: tuple, quick_cpu: tuple) -> tuple:
        """The default that fits."""
        if self.on_gpu:
            return quick_gpu if self.quick else gpu
        return quick_cpu if self.quick else cpu


def layer(choice: Choice) -> Iterable[Case]:
    """Both units in inference at the four stages of SKNet-50."""
    stages = choice.stages or choice.pick((1, 2, 3, 4), (1, 2, 3, 4), (1, 3), (1, 3))
    batches = choice.batches or choice.pick((128, 1, 32, 8, 256), (8, 1), (32, 1), (8, 1))
    dtypes = choice.dtypes or choice.pick(("fp16", "bf16", "fp32"), ("fp32",), ("fp16",), ("fp32",))
    for dtype in dtypes:
        for batch in batches:
            for unit in reversed(UNITS):
                for stage in stages:
                    yield Case(LAYER, unit, stage_shape(unit, stage), batch, dtype)


def train(choice: Choice) -> Iterable[Case]:
    """Both units, forward and backward, with peak memory."""
    stages = choice.stages or choice.pick((1, 2, 3, 4), (1, 2, 3, 4), (1, 3), (3,))
    batches = choice.batches or choice.pick((128, 32), (8,), (32,), (4,))
    dtypes = choice.dtypes or choice.pick(("fp16", "bf16", "fp32"), ("fp32",), ("fp16",), ("fp32",))
    for dtype in dtypes:
        for batch in batches:
            for unit in reversed(UNITS):
                for stage in stages:
                    yield Case(TRAIN, unit, stage_shape(unit, stage), batch, dtype, TRAINING)


def model(choice: Choice) -> Iterable[Case]:
    """Whole networks: images per second in inference and in a training step without optimizer."""
    size = 224 if choice.on_gpu or not choice.quick else 64
    dtypes = choice.dtypes or choice.pick(("fp16", "bf16"), ("fp32",), ("fp16",), ("fp32",))
    inference = choice.batches or choice.pick((128, 1), (1,), (32,), (1,))
    training = choice.batches or choice.pick((64,), (4,), (16,), (4,))
    for dtype in dtypes:
        for direction, batches in (
            (INFERENCE, inference[:1]),
            (TRAINING, training),
            (INFERENCE, inference[1:]),
        ):
            for batch in batches:
                for network in NETWORKS:
                    yield Case(MODEL, network, network_shape(size), batch, dtype, direction)


def sweep(choice: Choice) -> Iterable[Case]:
    """The paper's unit with one thing varied: channels per group up to dense, dilation, kernel, branches."""
    channels, size = choice.pick((256, 28), (128, 14), (256, 28), (64, 14))
    (batch,) = choice.batches or choice.pick((128,), (4,), (32,), (1,))
    dtypes = choice.dtypes or choice.pick(("fp16",), ("fp32",), ("fp16",), ("fp32",))
    per_group = tuple(width for width in (1, 2, 4, 8, 16, 32) if width < channels)
    for dtype in dtypes:
        for axis, setting, values in (
            (CHANNELS_PER_GROUP, "groups", (*per_group, channels)),
            (DILATION, "dilation", (1, 2, 3, 4)),
            (KERNEL, "kernel", (3, 5, 7)),
            (BRANCHES, "num_branches", (1, 2, 3, 4)),
        ):
            for value in values[::3] if choice.quick else values:
                options = {setting: channels // value if axis == CHANNELS_PER_GROUP else value}
                if axis == KERNEL:
                    options["dilation"] = 1
                shape = unit_shape(PAPER, channels, size, **options)
                yield Case(SWEEP, PAPER, shape, batch, dtype, axis=axis, value=value)


def scaling(choice: Choice) -> Iterable[Case]:
    """The paper's unit as the batch, the image and the channels grow, everything else fixed."""
    channels, size = choice.pick((256, 28), (128, 14), (256, 28), (64, 14))
    (batch,) = choice.batches or choice.pick((32,), (2,), (32,), (1,))
    dtypes = choice.dtypes or choice.pick(("fp16",), ("fp32",), ("fp16",), ("fp32",))
    factors = (1, 2) if choice.quick else (1, 2, 4, 8)
    for dtype in dtypes:
        for factor in factors:
            grown = {
                BATCH: (unit_shape(PAPER, channels, size), batch * factor, batch * factor),
                PIXELS: (unit_shape(PAPER, channels, size * factor), batch, (size * factor) ** 2),
                CHANNELS: (unit_shape(PAPER, channels * factor, size), batch, channels * factor),
            }
            for axis, (shape, samples, value) in grown.items():
                yield Case(SCALING, PAPER, shape, samples, dtype, axis=axis, value=value)


def grid(choice: Choice) -> Iterable[Case]:
    """Every unit of the support grid in inference, so that each that is lost to a peer is listed."""
    dtypes = choice.dtypes or choice.pick(("fp16", "bf16", "fp32"), ("fp32",), ("fp16",), ("fp32",))
    (most,) = choice.pick((256,), (4,), (32,), (1,))
    found: set[Case] = set()
    for dtype in dtypes:
        for name, spec, n, size in GRID_UNITS:
            shape = Shape(
                spec.out_channels,
                *(size, size),
                spec.branches[0].groups,
                tuple(branch.kernel_size for branch in spec.branches),
                tuple(branch.dilation for branch in spec.branches),
                spec.stride,
                spec.split_input,
            )
            for batch in choice.batches or (min(n, most),):
                unit = CLASSIC if spec.is_linear else PAPER
                # Units that differ in their batch alone are one where the batch is the same.
                nameless = Case(GRID, unit, shape, batch, dtype)
                if nameless not in found:
                    found.add(nameless)
                    yield replace(nameless, name=name)


SUITES: dict[str, Callable[[Choice], Iterable[Case]]] = {
    LAYER: layer,
    TRAIN: train,
    MODEL: model,
    SWEEP: sweep,
    SCALING: scaling,
    GRID: grid,
}
"""The suites that time calls; "host" measures other things and is in `measuring/host.py`."""

_OF_CASES = ("batch", "dtype", "quick", "every_form", "resume", "time_limit")
OPTIONS: dict[str, tuple[str, ...]] = {
    LAYER: ("stage", *_OF_CASES),
    TRAIN: ("stage", *_OF_CASES),
    MODEL: _OF_CASES,
    SWEEP: _OF_CASES,
    HOST: (),
    SCALING: _OF_CASES,
    GRID: _OF_CASES,
}
"""Which options of `sk-triton bench` have an effect on which suite."""

GPU_OPTIONS: dict[str, tuple[str, ...]] = {HOST: ("quick", "every_form")}
"""Those that have one on a GPU alone."""

ONE_BATCH = (SWEEP, SCALING)
"""Suites that vary something else, or start from one batch size."""
