"""Whole units through schedule "resident", interpreted as one program, and when it is taken."""

import math
import random

import pytest
import torch

from sk_triton import SelectiveKernel, SKConv, plans, use_backend
from sk_triton.bench.grid import paper_unit, seed_unit
from sk_triton.chips import CHIPS
from sk_triton.workload import Workload

from .test_store import compare

LAYERS = {
    "seed": lambda: SKConv(16, M=2, G=4, r=4, L=8),
    "seed, one branch": lambda: SKConv(16, M=1, G=4, r=4, L=8),
    "seed, three branches": lambda: SKConv(8, M=2, G=2, r=2, L=8),
    "paper": lambda: SelectiveKernel(16, groups=4, split_input=False),
    "paper, stride 2": lambda: SelectiveKernel(16, groups=4, split_input=False, stride=2),
    "split, groups": lambda: SelectiveKernel(16, groups=4),
    "dilation 2": lambda: SelectiveKernel(16, groups=4, dilation=2, split_input=False),
    "16 channels per group": lambda: SelectiveKernel(32, groups=2, split_input=False),
    "odd channels": lambda: SelectiveKernel(24, groups=8, split_input=False),
    "depthwise": lambda: SelectiveKernel(16, groups=16, split_input=False),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, memory_format):
    layer = LAYERS[name]().half()
    x = torch.randn(2, layer.spec.in_channels, 7, 5).half().contiguous(memory_format=memory_format)
    compare(layer, x, "resident")
