"""Facts about the supported chips, and which of them a device is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

NARROW_PRODUCTS = (3, 6)
"""The first Triton that compiles the kernels whose products have 8 columns, on NVIDIA: 3.4 takes no fewer than 16, 3.5
takes constants of the loops around them for values of run time."""
AMD_COMPILES = (3, 5)
"""The first Triton that compiles the kernels for AMD's chips."""
UNHOISTED_LOOPS = (3, 6)
"""The oldest Triton seen to leave loop invariants in a loop that asks for it; 3.4 cannot."""
PREFETCHING = ("sm_90", "sm_100", "sm_120")
"""Architectures whose kernels fetch ahead: they have an instruction for a piece of memory, into L2."""


@dataclass(frozen=True)
class Chip:
    """One architecture, and a product with it.

    Attributes:
        name: of the architecture: "sm_90", "gfx942", …
        processors: streaming multiprocessors or compute units.
        l2_mib: L2 that all processors share, in whole MiB; 0 where dies have each their own.
        gpu: the product as its driver names it, "NVIDIA H100 80GB HBM3"; "" for a typical one, for which nothing is
            tuned.
    """

    name: str
    processors: int
    l2_mib: int
    gpu: str = ""

    @property
    def is_amd(self) -> bool:
        return is_amd(self.name)


def is_amd(name: str) -> bool:
    """Whether an architecture is one of AMD's."""
    return name.startswith("gfx")


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", processors=108, l2_mib=40),
        Chip("sm_86", processors=84, l2_mib=6),
        Chip("sm_89", processors=128, l2_mib=72),
        Chip("sm_90", processors=132, l2_mib=50),
        Chip("sm_100", processors=148, l2_mib=126),
        Chip("sm_120", processors=170, l2_mib=96),
        Chip("gfx942", processors=304, l2_mib=0),
    )
}
# Relatives without an entry of their own: the same instruction set family.
_RELATIVES = {"sm_87": "sm_86", "sm_103": "sm_100", "sm_121": "sm_120"}


@lru_cache
def chip_of(device: torch.device) -> Chip | None:
    """The chip of a CUDA or ROCm device, None if it is not supported; the CPU (interpreter) counts as sm_90."""
    if device.type == "cpu":
        return CHIPS["sm_90"]
    properties = torch.cuda.get_device_properties(device)
    cuda_name = f"sm_{properties.major}{properties.minor}"
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else cuda_name
    typical = CHIPS.get(_RELATIVES.get(name, name))
    if typical is None:
        return None
    return product_of(
        typical, properties.multi_processor_count, properties.L2_cache_size, gpu=properties.name
    )


def product_of(typical: Chip, processors: int, l2_bytes: int, gpu: str = "") -> Chip:
    """A product with a chip: with its own processors and, where dies do not have each their own, its own L2."""
    l2_mib = l2_bytes >> 20 if typical.l2_mib else 0
    return replace(typical, processors=processors, l2_mib=l2_mib, gpu=gpu)
