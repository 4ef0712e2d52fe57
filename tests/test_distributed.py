"""Two processes that train together, by SyncBatchNorm and DDP or by FSDP2, give what one process gives."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sk_triton import use_backend

from .distributed_worker import SPLIT, batch, unit
from .tolerances import assert_same, assert_typical_errors_like_eager

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


def run_two(folder, kind):
    script = Path(__file__).with_name("distributed_worker.py")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(rank), kind], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def single(dtype, backend):
    layer = copy.deepcopy(unit()).to(dtype)
    x, weight = (part.to(dtype) for part in batch())
    x.requires_grad_()
    with use_backend(backend):
        v = layer(x)
    v.backward(weight)
    found = {"v": v.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in layer.named_parameters()} | dict(layer.named_buffers())


def test_two_processes_equal_one(tmp_path):
    ranks = run_two(tmp_path, "synchronized")
    eager, exact = single(torch.float32, "reference"), single(torch.float64, "reference")
    samples = []
    for name, value in exact.items():
        if name in ("v", "x"):
            assert tuple(len(rank[name]) for rank in ranks) == SPLIT
            samples.append((torch.cat([rank[name] for rank in ranks]), eager[name], value))
        elif "running" in name:
            for rank in ranks:
                assert_same(rank[name], eager[name])
        elif "num_batches" in name:
            assert all(rank[name] == 1 for rank in ranks)
        else:
            assert torch.equal(ranks[0][name], ranks[1][name])
            samples.append((ranks[0][name], eager[name], value))
    assert_typical_errors_like_eager(samples)


def test_sharded_parameters_train(tmp_path):
    """As the reference, sharded alike: on gloo, FSDP2 of torch 2.8 adds what later ones average."""
    for rank in run_two(tmp_path, "sharded"):
        names = {name for _, name in rank}
        assert names == dict(unit().named_parameters()).keys()
        for name in names:
            assert_same(rank["triton", name], rank["reference", name])
