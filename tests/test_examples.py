"""The example trains, and trains alike with the kernels."""

import functools
import runpy
from pathlib import Path

import pytest
import torch

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


def test_the_mean_of_every_epoch(example):
    assert example["epoch_means"]([1.0, 2.0, 3.0, 5.0], 2) == [1.5, 4.0]


@pytest.mark.gpu
def test_the_loss_curve_is_that_of_eager(example):
    """As close as those of PyTorch's two memory formats, or closer than one run is to any other by rounding."""
    curve = functools.partial(example["train"], device="cuda")
    runs = [
        curve("reference", memory_format=torch.channels_last),
        curve("reference"),
        curve("triton", memory_format=torch.channels_last),
    ]
    eager, other, ours = (example["epoch_means"](losses, 3) for losses, _ in runs)
    for mean, another, own in zip(eager, other, ours, strict=True):
        assert abs(own - mean) < max(3 * abs(another - mean), 0.03 * mean)
    assert runs[2][1] > 0.93
