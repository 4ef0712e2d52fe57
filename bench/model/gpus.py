"""GPU products and the figures that bound a kernel's time on them, each with its public source."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from sk_triton.chips import CHIPS, Chip, is_amd, product_of

KIB = 1024
MIB = 1024**2

# Copy bandwidth over the datasheet's, where a product's own was not published: A100 40GB reaches 0.89 and L40 0.89
# (gpu-benches, gpu-stream: "scale"), H100 SXM 0.90.
COPY_SHARE = 0.89
# Kernel to dependent kernel in one stream, with the host ahead. An estimate for all: 1 to 2 microseconds of start and
# drain plus the gap; a CUDA graph has less, a host that is behind far more.
LAUNCH_SECONDS = 2e-6
# Read bandwidth of L2 per processor and clock, from gpu-benches (gpu-l2-cache, working sets of 10 to 30 MiB, divided by
# processors and boost clock): H100 PCIe 6.9, H200 9.8, A100 5.4 TB/s are 34 to 38 bytes, L40 5.2 TB/s is 15.
_L2_DATACENTER, _L2_GEFORCE = 35, 15


@dataclass(frozen=True)
class Gpu:
    """One product. `sources` names where each figure is from; a figure that nobody published is called an estimate.

    Attributes:
        chip: architecture to compile for, a key of `sk_triton.chips.CHIPS`.
        processors: streaming multiprocessors or compute units.
        clock_hz: boost clock, or the one it is known to hold.
        memory_bytes_per_s: what a large copy moves, reads and writes counted.
        l2_bytes, l2_bytes_per_s: last-level cache that kernels share, and its read bandwidth.
        l2_requests_per_s: lines of 128 bytes that it looks up for processors, however little is asked of each; without
            end where nobody has measured it.
        matrix_flop_per_s: dense products with fp32 accumulation by precision ("fp16", "bf16", "tf32", "fp32"); a
            precision that has no tensor-core instruction is missing.
        warp_matrix_share: part of it that instructions of a single warp (HMMA) reach.
        issue_per_clock: warp instructions a processor issues per clock.
        shared_bytes_per_clock: shared memory per processor and clock.
        l2_port_bytes_per_clock: what one processor reads from L2 per clock at most.
        registers, threads, blocks, shared_bytes: what is resident on a processor at most.
        warp: threads that share an instruction.
    """

    name: str
    chip: str
    processors: int
    clock_hz: float
    memory_bytes_per_s: float
    l2_bytes: int
    l2_bytes_per_s: float
    matrix_flop_per_s: dict[str, float] = field(hash=False)
    sources: dict[str, str] = field(hash=False, repr=False)
    device_names: tuple[str, ...] = ()
    l2_requests_per_s: float = math.inf
    warp_matrix_share: float = 1.0
    issue_per_clock: int = 4
    shared_bytes_per_clock: int = 128
    l2_port_bytes_per_clock: int = 64
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    shared_bytes: int = 228 * KIB
    warp: int = 32
    launch_seconds: float = LAUNCH_SECONDS


_LIMITS = "CUDA C++ programming guide, technical specifications per compute capability"
_L2_ESTIMATE = "estimate from bytes per processor and clock of its relatives (gpu-benches, gpu-l2-cache)"
_COPY_ESTIMATE = f"datasheet x {COPY_SHARE}"
_HMMA_HOPPER = "mma.sync reaches 0.63 of the datasheet (Luo et al., arXiv 2402.13499)"
# One lookup a clock of 1.705 GHz in each of 80 slices; of 145 lookups some 45 are what a half of L2 asks of the other.
_H100_LOOKUPS, _OF_PROCESSORS = 80 * 1.705e9, 1 / 1.45
# Resident limits of a processor; those of sm_90 and sm_100 are the defaults.
_SM_80: dict[str, Any] = {"shared_bytes": 164 * KIB}
_SM_86: dict[str, Any] = {"threads": 1536, "blocks": 16, "shared_bytes": 100 * KIB}
_SM_89: dict[str, Any] = {"threads": 1536, "blocks": 24, "shared_bytes": 100 * KIB}


def _matrix(half: float, tf32: float) -> dict[str, float]:
    return {"fp16": half, "bf16": half, "tf32": tf32}


def _l2(per_clock: float, processors: int, clock_hz: float) -> float:
    return per_clock * processors * clock_hz


GPUS = (
    Gpu(
        name="H100 SXM",
        chip="sm_90",
        processors=132,
        clock_hz=1.70e9,
        memory_bytes_per_s=3.0e12,
        l2_bytes=50 * MIB,
        l2_bytes_per_s=_l2(_L2_DATACENTER, 132, 1.70e9),
        matrix_flop_per_s=_matrix(790e12, 395e12),
        warp_matrix_share=0.79,
        l2_requests_per_s=_H100_LOOKUPS * _OF_PROCESSORS,
        device_names=("H100", "H100 80GB HBM3", "H100 SXM5"),
        sources={
            "clock": "that of 28.7e12 thread-instructions per second, which the project planned with; boost 1.98 GHz",
            "memory": "a large copy, measured before this project (datasheet 3.35 TB/s)",
            "l2": _L2_ESTIMATE,
            "l2 requests": "Nsight Compute, bench/results/h100/README.md",
            "matrix": f"a large bf16 product, measured before this project (datasheet 989e12); {_HMMA_HOPPER}",
            "limits": _LIMITS,
        },
    ),
    Gpu(
        name="H100 PCIe",
        chip="sm_90",
        processors=114,
        clock_hz=1.755e9,
        memory_bytes_per_s=COPY_SHARE * 2.039e12,
        l2_bytes=50 * MIB,
        l2_bytes_per_s=6.9e12,
        matrix_flop_per_s=_matrix(0.8 * 756e12, 0.8 * 378e12),
        warp_matrix_share=0.79,
        l2_requests_per_s=_H100_LOOKUPS * _OF_PROCESSORS,
        sources={
            "clock": "Chips and Cheese, Nvidia's H100",
            "memory": _COPY_ESTIMATE,
            "l2": "measured: gpu-benches, gpu-l2-cache",
            "l2 requests": "estimate: as H100 SXM, the same chip",
            "matrix": f"datasheet x 0.8, as the SXM product; {_HMMA_HOPPER}",
            "limits": _LIMITS,
        },
    ),
    Gpu(
        name="H200",
        chip="sm_90",
        processors=132,
        clock_hz=1.70e9,
        memory_bytes_per_s=3.9e12,
        l2_bytes=50 * MIB,
        l2_bytes_per_s=9.8e12,
        matrix_flop_per_s=_matrix(790e12, 395e12),
        warp_matrix_share=0.79,
        l2_requests_per_s=_H100_LOOKUPS * _OF_PROCESSORS,
        sources={
            "clock": "as H100 SXM, the same chip",
            "memory": "measured reads and writes, each alone: gpu-benches, gpu-stream (datasheet 4.8 TB/s)",
            "l2": "measured: gpu-benches, gpu-l2-cache",
            "l2 requests": "estimate: as H100 SXM, the same chip",
            "matrix": f"as H100 SXM, the same chip; {_HMMA_HOPPER}",
            "limits": _LIMITS,
        },
    ),
    *(
        Gpu(
            name=f"A100 {size}GB",
            chip="sm_80",
            processors=108,
            clock_hz=1.41e9,
            memory_bytes_per_s=memory,
            l2_bytes=40 * MIB,
            l2_bytes_per_s=5.4e12,
            matrix_flop_per_s=_matrix(312e12, 156e12),
            device_names=names,
            sources={
                "clock": "A100 whitepaper",
                "memory": source,
                "l2": "measured: gpu-benches, gpu-l2-cache (80GB)",
                "matrix": "A100 whitepaper",
                "limits": _LIMITS,
            },
            **_SM_80,
        )
        for size, memory, source, names in (
            (
                80,
                1.73e12,
                "measured reads: gpu-benches, gpu-l2-cache (datasheet 2.04 TB/s)",
                ("A100", "A100-SXM4-80GB", "A100 80GB PCIe"),
            ),
            (
                40,
                1.38e12,
                "measured: gpu-benches, gpu-stream (datasheet 1.56 TB/s)",
                ("A100-SXM4-40GB", "A100-PCIE-40GB"),
            ),
        )
    ),
    Gpu(
        name="RTX 3090",
        chip="sm_86",
        processors=82,
        clock_hz=1.695e9,
        memory_bytes_per_s=COPY_SHARE * 936e9,
        l2_bytes=6 * MIB,
        l2_bytes_per_s=_l2(_L2_GEFORCE, 82, 1.695e9),
        matrix_flop_per_s=_matrix(71e12, 35.6e12),
        sources={
            "clock": "GA102 whitepaper",
            "memory": _COPY_ESTIMATE,
            "l2": _L2_ESTIMATE,
            "matrix": "GA102 whitepaper, fp32 accumulation",
            "limits": _LIMITS,
        },
        **_SM_86,
    ),
    Gpu(
        name="RTX 4090",
        chip="sm_89",
        processors=128,
        clock_hz=2.52e9,
        memory_bytes_per_s=COPY_SHARE * 1008e9,
        l2_bytes=72 * MIB,
        l2_bytes_per_s=_l2(_L2_GEFORCE, 128, 2.52e9),
        matrix_flop_per_s=_matrix(165.2e12, 82.6e12),
        sources={
            "clock": "Ada whitepaper",
            "memory": _COPY_ESTIMATE,
            "l2": _L2_ESTIMATE,
            "matrix": "Ada whitepaper, fp32 accumulation",
            "limits": _LIMITS,
        },
        **_SM_89,
    ),
    Gpu(
        name="L40S",
        chip="sm_89",
        processors=142,
        clock_hz=2.52e9,
        memory_bytes_per_s=COPY_SHARE * 864e9,
        l2_bytes=96 * MIB,
        l2_bytes_per_s=5.2e12,
        matrix_flop_per_s=_matrix(362e12, 183e12),
        sources={
            "clock": "datasheet",
            "memory": f"{_COPY_ESTIMATE}; L40 measured at the same share: gpu-benches, gpu-stream",
            "l2": "L40, measured: gpu-benches, gpu-l2-cache",
            "matrix": "datasheet",
            "limits": _LIMITS,
        },
        **_SM_89,
    ),
    Gpu(
        name="L4",
        chip="sm_89",
        processors=58,
        clock_hz=2.04e9,
        memory_bytes_per_s=COPY_SHARE * 300e9,
        l2_bytes=48 * MIB,
        l2_bytes_per_s=_l2(_L2_GEFORCE, 58, 2.04e9),
        matrix_flop_per_s=_matrix(121e12, 60e12),
        sources={
            "clock": "datasheet; 72 W will not hold it: an estimate from above",
            "memory": _COPY_ESTIMATE,
            "l2": _L2_ESTIMATE,
            "matrix": "datasheet, half of the sparse figure",
            "limits": _LIMITS,
        },
        **_SM_89,
    ),
    Gpu(
        name="B200",
        chip="sm_100",
        processors=148,
        clock_hz=1.85e9,
        memory_bytes_per_s=COPY_SHARE * 8.0e12,
        l2_bytes=126 * MIB,
        l2_bytes_per_s=_l2(_L2_DATACENTER, 148, 1.85e9),
        matrix_flop_per_s=_matrix(2250e12, 1125e12),
        warp_matrix_share=0.25,
        sources={
            "clock": "estimate (boost 1.965 GHz)",
            "memory": _COPY_ESTIMATE,
            "l2": f"size: Chips and Cheese, Nvidia's B200; bandwidth: {_L2_ESTIMATE}",
            "matrix": "HGX datasheet; HMMA: estimate, A100's 1024 multiply-adds per processor and clock",
            "limits": _LIMITS,
        },
    ),
    Gpu(
        name="RTX 5090",
        chip="sm_120",
        processors=170,
        clock_hz=2.407e9,
        memory_bytes_per_s=COPY_SHARE * 1792e9,
        l2_bytes=96 * MIB,
        l2_bytes_per_s=_l2(_L2_GEFORCE, 170, 2.407e9),
        matrix_flop_per_s=_matrix(209.5e12, 104.8e12),
        sources={
            "clock": "RTX Blackwell whitepaper",
            "memory": _COPY_ESTIMATE,
            "l2": _L2_ESTIMATE,
            "matrix": "RTX Blackwell whitepaper, fp32 accumulation",
            "limits": _LIMITS,
        },
        **_SM_89,
    ),
    Gpu(
        name="MI300X",
        chip="gfx942",
        processors=304,
        clock_hz=2.1e9,
        memory_bytes_per_s=0.8 * 5.3e12,
        l2_bytes=32 * MIB,
        l2_bytes_per_s=8 * 16 * 128 * 2.1e9,
        matrix_flop_per_s={"fp16": 1307e12, "bf16": 1307e12, "tf32": 654e12, "fp32": 163e12},
        registers=131072,
        threads=2048,
        shared_bytes=64 * KIB,
        warp=64,
        sources={
            "clock": "datasheet",
            "memory": "estimate: datasheet x 0.8",
            "l2": "CDNA 3 whitepaper, peak: 8 dies x 16 channels x 128 bytes; the 256 MB Infinity Cache is left out",
            "matrix": "datasheet",
            "limits": "CDNA 3 instruction set guide: 512 registers per lane and SIMD, 8 waves per SIMD, 64 KiB of LDS",
        },
    ),
)


def chip_for(gpu: Gpu) -> Chip:
    """What plans for a product are made for: its chip with its own processors and L2, for which nothing is tuned."""
    return product_of(CHIPS[gpu.chip], gpu.processors, gpu.l2_bytes)


def refuse_precision(gpu: Gpu, precision: str) -> None:
    """Raises ValueError for one that the layers never compute in on a product: see `sk_triton.precision`."""
    if precision == "tf32" and is_amd(gpu.chip):
        raise ValueError(
            f"dtype must be fp16, bf16 or fp32 on {gpu.name}, got tf32: on AMD fp32 is never rounded to it"
        )


def find_gpu(name: str) -> Gpu:
    """The product called `name`: "h100", "H100 SXM", or as PyTorch names the device, "NVIDIA H100 80GB HBM3".

    Case, spaces, hyphens and makers' names do not matter. A bare "H100" is the SXM product, a bare "A100" has 80 GB.

    Raises:
        ValueError: the product is unknown; the message lists those that are known.
    """
    wanted = _plain(name)
    for gpu in GPUS:
        if wanted in {_plain(known) for known in (gpu.name, *gpu.device_names)}:
            return gpu
    raise ValueError(f"gpu must be one of {', '.join(gpu.name for gpu in GPUS)}; got {name!r}")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|amd|geforce|instinct|rtx|[^a-z0-9]", "", name.lower())
