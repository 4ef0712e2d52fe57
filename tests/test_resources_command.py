"""What `sk-triton resources` writes; what the kernels use is tested in `test_compile.py`."""

from __future__ import annotations

import dataclasses
import json

from sk_triton import environment
from sk_triton.bench import resources_command
from sk_triton.bench.compiled import resources
from sk_triton.bench.grid import CASES
from sk_triton.tuning import shipped

from . import fake_code


def test_shipped_configs_name_the_triton_that_amds_pytorch_brings(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.setattr(shipped, "shipped", lambda chip: {})
    monkeypatch.setattr(environment, "version", {"pytorch-triton-rocm": "3.5.0+rocm"}.get)
    used = dataclasses.replace(fake_code.resources({}), target="gfx942")
    resources_command.write_configs([resources.Row(CASES[0], "select", "", used, None, None)])
    assert json.loads((tmp_path / "gfx942.json").read_text())["triton"] == "3.5.0+rocm"
