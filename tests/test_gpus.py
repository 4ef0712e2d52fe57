"""Facts of products, by name."""

import math

import pytest

from sk_triton.bench.model import gpus
from sk_triton.bench.model.gpus import GPUS, find_gpu
from sk_triton.chips import CHIPS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h100", "H100 SXM"),
        ("H100-SXM", "H100 SXM"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("a100 40gb", "A100 40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("geforce-rtx4090", "RTX 4090"),
        ("NVIDIA L4", "L4"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_products_by_name(name, expected):
    assert find_gpu(name).name == expected


@pytest.mark.parametrize("name", ["", "H100 NVL", "RTX 3090 Ti", "L40"])
def test_a_product_that_is_not_known_is_refused_with_those_that_are(name):
    with pytest.raises(ValueError, match=r"gpu must be one of H100 SXM, .*MI300X; got"):
        find_gpu(name)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_products_state_their_sources(gpu):
    assert gpu.chip in CHIPS
    measured = {"l2 requests"} if math.isfinite(gpu.l2_requests_per_s) else set()
    assert set(gpu.sources) == {"clock", "memory", "l2", "matrix", "limits"} | measured
    assert all(gpu.sources.values())
    assert gpu.memory_bytes_per_s < gpu.l2_bytes_per_s
    assert gpu.matrix_flop_per_s["fp16"] >= 2 * gpu.matrix_flop_per_s["tf32"] * 0.98


def test_names_of_products_do_not_collide():
    names = [gpus._plain(name) for gpu in GPUS for name in {gpu.name, *gpu.device_names}]
    assert len(names) == len(set(names))
