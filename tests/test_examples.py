"""The example trains, and trains alike with the kernels."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rich")

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/train_digits.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


def test_digits_are_learnt(example):
    losses, accuracy = example["train"]()
    assert losses[-1] < losses[0] / 2
    assert accuracy > 0.93


@pytest.mark.interpret
def test_the_kernels_give_the_same_losses(example):
    expected, _ = example["train"]("reference", batch=8, steps=3)
    losses, _ = example["train"]("triton", batch=8, steps=3)
    assert losses == pytest.approx(expected, rel=1e-4)
