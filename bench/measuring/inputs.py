"""Inputs of a case: random numbers, and what a real photograph looks like behind a network's stem."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import Shape

RANDOM = "random"
PHOTO = "photo"
KINDS = (RANDOM, PHOTO)

GRADIENT_SEED = 1
"""Added to a run's seed, so that the gradient is another stream of numbers than the input."""
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
CROP = 224
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def make_input(
    kind: str, batch: int, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int
) -> Tensor:
    """`[batch, channels, height, width]` in `dtype` on `device`, NCHW; the same numbers for the same seed.

    A shape without branches is a network's: it gets the photographs themselves, normalised and resized.

    Raises ValueError for an unknown `kind`.
    """
    if kind == RANDOM:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, shape.channels, shape.height, shape.width, generator=generator)
    elif kind == PHOTO and not shape.kernels:
        crops = _crops(batch, torch.Generator().manual_seed(seed))
        x = F.interpolate(crops, (shape.height, shape.width), mode="bilinear", antialias=True)
    elif kind == PHOTO:
        x = _photo_activations(batch, shape, seed)
    else:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    return x.to(device=device, dtype=dtype)


def make_gradient(size: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Random numbers in place of the gradient of an output of this size, with the seed of its input."""
    generator = torch.Generator().manual_seed(seed + GRADIENT_SEED)
    return torch.randn(tuple(size), generator=generator).to(device, dtype)


@torch.no_grad()
def _photo_activations(batch: int, shape: Shape, seed: int) -> Tensor:
    """Stem output, averaged to the shape's size, projected to its channels, ReLU, unit variance.

    Non-negative, spatially smooth and with a mean far from zero: what a unit meets in a network, and
    what random numbers are not.
    """
    features = F.adaptive_avg_pool2d(_stem(batch, seed), (shape.height, shape.width))
    generator = torch.Generator().manual_seed(seed + shape.channels)
    projection = torch.randn(shape.channels, features.shape[1], 1, 1, generator=generator)
    x = torch.relu(F.conv2d(features, projection / features.shape[1] ** 0.5))
    return x / x.std()


@functools.lru_cache(maxsize=1)
@torch.no_grad()
def _stem(batch: int, seed: int) -> Tensor:
    """Crops behind a 7x7 stride-2 convolution and a 3x3 stride-2 max-pool: `[batch, 64, 56, 56]` fp32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 3, 7, 7, generator=generator) * (2 / 147) ** 0.5
    features = torch.relu(F.conv2d(_crops(batch, generator), weight, stride=2, padding=3))
    return F.max_pool2d(features, 3, stride=2, padding=1)


def _crops(batch: int, generator: torch.Generator) -> Tensor:
    """Random crops, every second one mirrored, of the photographs in turn: `[batch, 3, 224, 224]` fp32."""
    crops = []
    for index in range(batch):
        photo = _photograph(PHOTOGRAPHS[index % len(PHOTOGRAPHS)])
        top = int(torch.randint(photo.shape[1] - CROP + 1, (), generator=generator))
        left = int(torch.randint(photo.shape[2] - CROP + 1, (), generator=generator))
        crop = photo[:, top : top + CROP, left : left + CROP]
        crops.append(crop.flip(2) if index // len(PHOTOGRAPHS) % 2 else crop)
    return torch.stack(crops)


@functools.cache
def _photograph(name: str) -> Tensor:
    """One of scikit-learn's sample photographs, normalised as for ImageNet: `[3, 427, 640]` fp32."""
    from sklearn.datasets import load_sample_image

    pixels = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
