"""Lookup of configs: the shipped file for the chip first, the analytic choice after it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from . import analytic, kernels
from .chips import NARROW_PRODUCTS, Chip
from .environment import triton_version
from .kernels.config import BranchConfig, ColumnConfig, DepthwiseConfig, StreamConfig, TapConfig
from .kernels.geometry import ConvShape

SCHEMA = 1
_KINDS = {"stream": StreamConfig, "column": ColumnConfig, "tap": TapConfig, "depthwise": DepthwiseConfig}


def branch_config(
    shape: ConvShape,
    n: int,
    h: int,
    w: int,
    dtype: torch.dtype,
    allow_tf32: bool,
    chip: Chip,
    *,
    task: str,
) -> tuple[BranchConfig, str]:
    """The config for a branch launch that does `task` ("store", "pool" or "select") and where it came from."""
    entry = shipped(chip.name).get(key(shape, n, h, w, dtype, allow_tf32, task=task))
    if entry is not None:
        return entry, f"configs/{chip.name}.json (predicted)"
    config = analytic.branch_config(shape, n, h, w, dtype, allow_tf32, chip, task=task)
    return config, f"analytic ({chip.name})"


def key(shape: ConvShape, n: int, h: int, w: int, dtype: torch.dtype, allow_tf32: bool, *, task: str) -> str:
    """Text key of a forward branch launch; `n` counts by its power of two, rounded up."""
    branches = "+".join(f"k{k}d{d}" for k, d in zip(shape.kernels, shape.dilations, strict=True))
    precision = str(dtype).removeprefix("torch.") + ("-tf32" if allow_tf32 and dtype == torch.float32 else "")
    split = "-split" if shape.is_split else ""
    return (
        f"{task}/{precision}/c{shape.c_in}-{shape.c_out}/g{shape.groups}/{branches}/s{shape.stride}{split}"
        f"/{h}x{w}/n{(n - 1).bit_length()}"
    )


def shipped_file(chip_name: str) -> Path:
    """The file of configs that the package ships for a chip."""
    return Path(__file__).parent / "configs" / f"{chip_name}.json"


def shipped_content(chip_name: str, entries: dict[str, BranchConfig], triton_version: str) -> dict[str, Any]:
    """What a shipped file holds: configs predicted to be good, each compiled for the chip without a fault.

    The Triton version says what they were compiled with; a prediction holds for others too.
    """
    return {
        "schema": SCHEMA,
        "chip": chip_name,
        "evidence": "predicted",
        "kernels": kernels_hash(),
        "triton": triton_version,
        "branch_conv_fwd": {name: dump_entry(config) for name, config in sorted(entries.items())},
    }


def dump_entry(config: BranchConfig) -> dict[str, Any]:
    """A config as a JSON object."""
    kind = next(name for name, cls in _KINDS.items() if type(config) is cls)
    return {"kernel": kind, **asdict(config)}


@lru_cache
def kernels_hash() -> str:
    """Hash of the kernels' sources: a config made for other sources is not used."""
    digest = hashlib.sha256()
    for file in sorted(Path(str(kernels.__file__)).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@lru_cache
def shipped(chip_name: str) -> dict[str, BranchConfig]:
    """The shipped configs of a chip by key; none if they are for other kernels, or Triton is too old for them."""
    file = shipped_file(chip_name)
    if not file.is_file() or triton_version() < NARROW_PRODUCTS:
        return {}
    content = json.loads(file.read_text())
    if content["schema"] != SCHEMA or content["kernels"] != kernels_hash():
        return {}
    return {name: _load_entry(entry) for name, entry in content["branch_conv_fwd"].items()}


def _load_entry(entry: dict[str, Any]) -> BranchConfig:
    fields = dict(entry)
    return _KINDS[fields.pop("kernel")](**fields)
