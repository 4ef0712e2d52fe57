"""What a config is found by: the kinds of launches, their text keys, and the stamp of the code it was made for."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from .. import kernels
from ..environment import installed_triton
from ..kernels.config import (
    BorderConfig,
    ColumnConfig,
    DepthwiseConfig,
    GateConfig,
    GatedSelectConfig,
    GradStreamConfig,
    GradWideConfig,
    HeldConfig,
    MergedConfig,
    ReductionConfig,
    SelectConfig,
    StreamConfig,
    TapConfig,
    WindowConfig,
)
from ..kernels.geometry import ConvShape
from ..spec import SKSpec

INFERENCE, TRAINING = "inference", "training"
DIRECTIONS = (INFERENCE, TRAINING)
NEAR = 2
"""Powers of two of the batch across which an entry may still serve: from a quarter to four times as many samples."""


@dataclass(frozen=True)
class Kind:
    """A kind of launch, whose config can be looked up and tuned.

    Attributes:
        kernels: what the names of its kernels start with; task: their constexpr TASK, "" if they have none.
        is_shared: all launches of these kernels have one config, and are tuned together.
        configs: the types of its configs. None of a schedule, whose choice is a name.
    """

    name: str
    direction: str
    kernels: tuple[str, ...]
    configs: tuple[type, ...]
    task: str = ""
    is_shared: bool = False


_BRANCH = (StreamConfig, WindowConfig, ColumnConfig, HeldConfig, TapConfig, DepthwiseConfig)
SCHEDULE = "schedule"
KINDS = {
    kind.name: kind
    for kind in (
        Kind("branch_store", INFERENCE, ("branch_conv",), _BRANCH, "store"),
        Kind("branch_pool", INFERENCE, ("branch_conv",), _BRANCH, "pool"),
        Kind("branch_select", INFERENCE, ("branch_conv",), _BRANCH, "select"),
        Kind("gate", INFERENCE, ("gate",), (GateConfig,)),
        Kind("select", INFERENCE, ("select",), (SelectConfig,)),
        Kind("gated_select", INFERENCE, ("gated_select",), (GatedSelectConfig,)),
        Kind("pooled_sums", INFERENCE, ("pooled_sums",), (ReductionConfig,)),
        Kind("border_sums", INFERENCE, ("border_sums",), (BorderConfig,)),
        Kind("merged_conv", INFERENCE, ("merged_conv",), (MergedConfig, WindowConfig)),
        Kind(SCHEDULE, INFERENCE, (), ()),
        Kind("branch_train", TRAINING, ("branch_conv",), _BRANCH, "train"),
        Kind("reduction", TRAINING, ("pooled_moments", "select_bwd"), (ReductionConfig,), is_shared=True),
        Kind("branch_grad", TRAINING, ("branch_grad",), (GradStreamConfig, GradWideConfig), is_shared=True),
    )
}
"""By name. A new kind is a line here, a search space in :mod:`.space` and a lookup in :mod:`.launches`."""


def key(
    kind: str,
    what: str,
    n: int,
    h: int,
    w: int,
    dtype: torch.dtype,
    allow_tf32: bool,
) -> str:
    """Text key of a launch for `n` images of `h` x `w` pixels, those of the input where its size matters to the launch,
    else those of the output; `n` counts by its power of two, rounded up."""
    precision = str(dtype).removeprefix("torch.") + ("-tf32" if allow_tf32 and dtype == torch.float32 else "")
    return f"{KINDS[kind].direction}/{kind}/{precision}/{what}/{h}x{w}/n{(n - 1).bit_length()}"


def conv_text(shape: ConvShape) -> str:
    """The part of a key that names a convolution."""
    branches = "+".join(f"k{k}d{d}" for k, d in zip(shape.kernels, shape.dilations, strict=True))
    split = "-split" if shape.is_split else ""
    return f"c{shape.c_in}-{shape.c_out}/g{shape.groups}/{branches}/s{shape.stride}{split}"


def unit_text(spec: SKSpec) -> str:
    """The part of a key that names a whole unit."""
    branches = "+".join(f"k{b.kernel_size}d{b.dilation}g{b.groups}" for b in spec.branches)
    split = "-split" if spec.split_input else ""
    return (
        f"c{spec.in_channels}-{spec.out_channels}/{branches}/s{spec.stride}{split}"
        f"/{spec.branch_act}/d{spec.gate_width}"
    )


_KEY = re.compile(
    r"(?P<direction>[a-z]+)/(?P<kind>[a-z_]+)/[a-z0-9-]+/[\w+/-]{1,300}/\d+x\d+/n(?P<bucket>\d{1,2})",
    re.ASCII,
)


def kind_of_key(text: str) -> Kind:
    """The kind of launch that a key names.

    Raises:
        ValueError: the text is no key, or names a kind that this version does not know.
    """
    match = _KEY.fullmatch(text)
    kind = KINDS.get(match["kind"]) if match else None
    if match is None or kind is None or kind.direction != match["direction"]:
        raise ValueError(f"{text[:80]!r} is no key of a launch")
    return kind


def near(text: str) -> list[str]:
    """A key, then those of the nearest batches, larger ones first: a full GPU stays full."""
    prefix, _, bucket = text.rpartition("n")
    distances = [0]
    for distance in range(1, NEAR + 1):
        distances += [distance, -distance]
    return [f"{prefix}n{int(bucket) + d}" for d in distances if int(bucket) + d >= 0]


def most_samples(text: str) -> int:
    """The largest batch that a key stands for."""
    return 1 << int(text.rpartition("n")[2])


@dataclass(frozen=True)
class Stamp:
    """The code that a config was made for: under any other it is not used."""

    triton: str
    kernels: str


@lru_cache
def stamp() -> Stamp:
    """The stamp of the installed Triton and of this package's kernels."""
    return Stamp(installed_triton() or "none", kernels_hash())


@lru_cache
def kernels_hash() -> str:
    """Hash of the kernels' sources."""
    digest = hashlib.sha256()
    for file in sorted(Path(str(kernels.__file__)).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def gpu_slug(gpu: str, processors: int) -> str:
    """A GPU as a file name: "NVIDIA H100 80GB HBM3" with 132 SMs is "nvidia-h100-80gb-hbm3-132"."""
    return "-".join((*re.findall(r"[a-z0-9]+", gpu.lower()), str(processors)))
