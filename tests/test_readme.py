"""What the README tells a person to run does run, and what it predicts is predicted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sk_triton.bench.formats import microseconds
from sk_triton.bench.grid import paper_unit
from sk_triton.bench.model.gpus import chip_for, find_gpu
from sk_triton.bench.model.speed_of_light import MEMORY, Problem, least_steps, schedules_for
from sk_triton.bench.shapes import STAGES

from .compiling import output_of
from .versions import needs_narrow_products, needs_predicting_compiler

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SETUP = ["pip install -e '.[bench]' && sk-triton bench --quick", "pip install -e '.[test]' && pytest"]


def as_script(text: str, *languages: str) -> str:
    """The fenced blocks of some languages, dedented and each line in its place; all else is empty lines."""
    lines, fence, wanted = [], None, False
    for line in text.splitlines():
        marker = re.match(r"( *)(`{3,})\s*([\w+-]*)", line)
        kept = ""
        if fence is None:
            if marker:
                fence, wanted = marker, marker[3] in languages
        elif line.strip() == fence[2]:
            fence = None
        elif wanted:
            kept = line.removeprefix(fence[1])
        lines.append(kept)
    assert fence is None, "a fenced block is not closed"
    return "\n".join(lines) + "\n"


def commands(text: str) -> list[str]:
    """Lines of the shell blocks, without prompts."""
    script = as_script(text, "sh", "bash", "shell", "console")
    return [line.removeprefix("$ ").strip() for line in script.splitlines() if line.strip()]


def test_blocks_are_extracted():
    text = (
        "Text, `x`.\n```python\nx = 1\n\n```\nMore.\n- item\n\n  ```python\n  if x:\n      x += 1\n  ```\n"
        "```sh\n$ echo x\n```\n````python\ny = '''\n```\n'''\n````\n"
    )
    script = as_script(text, "python")
    assert script.splitlines()[2] == "x = 1"
    namespace: dict[str, object] = {}
    exec(script, namespace)
    assert (namespace["x"], namespace["y"]) == (2, "\n```\n")
    assert len(script.splitlines()) == len(text.splitlines())
    assert commands(text) == ["echo x"]


def test_python_blocks_run(tmp_path):
    """In order, in one namespace, on the CPU; a traceback's line numbers are the README's.

    A block that asks for Triton gets its interpreter.
    """
    script = tmp_path / "README.py"
    script.write_text(as_script(README.read_text(encoding="utf-8"), "python", "py"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def test_the_two_set_up_commands():
    found = commands(README.read_text(encoding="utf-8"))
    assert [line for line in found if "pip install -e" in line] == SETUP


@needs_predicting_compiler
@pytest.mark.compile
def test_the_table_of_predictions_is_the_models():
    assert output_of("predicted_table.py").strip() in README.read_text()


@needs_narrow_products
def test_predicted_passes_and_memory_are_the_models():
    """What follows from the shapes alone; the rest of the table depends on the compiler."""
    section = README.read_text().partition("### Predicted, without a GPU")[2]
    rows = re.findall(r"^\| (\d+) @ (\d+)² \| (\w+) \| (\S+) T \|[^|]*\| (\S+) µs", section, re.MULTILINE)
    assert [(int(channels), int(size)) for channels, size, *_ in rows] == list(STAGES.values())
    gpu = find_gpu("H100 SXM")
    for channels, size, schedule, passes, memory in rows:
        problem = Problem(paper_unit(int(channels)), 128, int(size), int(size), torch.float16)
        ((_, _, steps),) = schedules_for(problem, chip_for(gpu), [schedule])
        found = least_steps(steps, gpu)
        assert passes == f"{sum(step.work.memory_bytes for step in found) / problem.tensor_bytes:.2f}"
        assert memory == microseconds(sum(step.seconds[MEMORY] for step in found))
