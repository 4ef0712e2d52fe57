"""What the package itself ships: predicted configs of each architecture, and tuned ones of single GPUs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..chips import NARROW_PRODUCTS
from ..environment import triton_version
from . import user_file
from .entries import Config, Sections, dump_config, load_config, load_sections
from .keys import gpu_slug, kernels_hash

SCHEMA = 2
FOLDER = Path(__file__).parents[1] / "configs"


def shipped_file(chip_name: str) -> Path:
    """The file of configs that the package ships for an architecture."""
    return FOLDER / f"{chip_name}.json"


def shipped_content(chip_name: str, configs: Mapping[str, Config], triton_version: str) -> dict[str, Any]:
    """What such a file holds: configs predicted to be good, each compiled for the chip without a fault, by key.

    The Triton version says what they were compiled with; a prediction holds for others too.
    """
    return {
        "schema": SCHEMA,
        "chip": chip_name,
        "evidence": "predicted",
        "kernels": kernels_hash(),
        "triton": triton_version,
        "configs": {name: dump_config(config) for name, config in sorted(configs.items())},
    }


@lru_cache
def shipped(chip_name: str) -> dict[str, Config]:
    """An architecture's configs by key; none if they are for other kernels, or Triton is too old for them."""
    file = shipped_file(chip_name)
    if not file.is_file() or triton_version() < NARROW_PRODUCTS:
        return {}
    content = json.loads(file.read_text())
    if content["schema"] != SCHEMA or content["kernels"] != kernels_hash():
        return {}
    return {name: load_config(config) for name, config in content["configs"].items()}


@lru_cache
def contributed(gpu: str, processors: int) -> Sections:
    """What users tuned for a GPU and the package ships, ``configs/nvidia-h100-80gb-hbm3-132.json``."""
    file = FOLDER / f"{gpu_slug(gpu, processors)}.json"
    if not file.is_file():
        return {}
    return load_sections(user_file.read_text(file))[0]
