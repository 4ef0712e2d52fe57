"""PyTorch's switches for fp32 convolutions, in processes of their own: some cannot be put back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

INHERITED = """
import torch
from sk_triton import SelectiveKernel, use_backend
from sk_triton.precision import allows_tf32
torch.backends.cudnn.conv.fp32_precision = "none"
found = [allows_tf32()]
torch.backends.fp32_precision = "tf32"
found.append(allows_tf32())
torch.backends.fp32_precision = "ieee"
found.append(allows_tf32())
layer, x = SelectiveKernel(16, groups=4).eval().half(), torch.randn(1, 16, 7, 5).half()
with use_backend("triton"), torch.no_grad():
    layer(x)
print(*found)
"""


@pytest.mark.interpret
@pytest.mark.skipif(
    not hasattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision"), reason="torch before 2.9"
)
def test_a_precision_that_is_inherited_is_what_pytorch_says():
    done = subprocess.run(
        [sys.executable, "-c", INHERITED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True", "False"]


@pytest.mark.interpret
def test_only_fp32_asks_for_it(monkeypatch):
    from sk_triton import workload
    from sk_triton.bench.grid import paper_unit

    monkeypatch.setattr(workload, "allows_tf32", lambda: pytest.fail("asked"))
    x = torch.empty(1, 128, 7, 7, dtype=torch.float16)
    assert not workload.workload_of(x, paper_unit(128)).allow_tf32
    monkeypatch.setattr(workload, "allows_tf32", lambda: True)
    assert workload.workload_of(x.float(), paper_unit(128)).allow_tf32
