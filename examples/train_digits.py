"""Trains a small selective-kernel network on scikit-learn's handwritten digits: on a CPU, in under a minute.

    python examples/train_digits.py
    TRITON_INTERPRET=1 python examples/train_digits.py --compare
    python examples/train_digits.py --compare --device cuda

The second command takes a few steps twice, with plain PyTorch and with the Triton kernels through Triton's interpreter,
and prints the losses of both. The third trains to the end in mixed precision, by PyTorch in two memory formats and by
the kernels, and prints the loss of every epoch: the kernels' should differ from PyTorch's as those of the two formats
do, by rounding. Needs the `bench` extra (scikit-learn, rich).
"""

from __future__ import annotations

import argparse
from statistics import fmean

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from sk_triton import SelectiveKernel, use_backend
from sk_triton.backend import Backend

COMPARED_STEPS = 3


class Block(nn.Module):
    """A residual bottleneck as in SKNet-50, with an SK unit in its middle."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(channels, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.select = SelectiveKernel(16, groups=4, stride=stride, split_input=False, min_channels=8)
        self.expand = nn.Sequential(nn.Conv2d(16, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.shortcut = nn.AvgPool2d(stride, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.expand(self.select(self.reduce(x))))


def network() -> nn.Sequential:
    """8 x 8 grey pixels to ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Block(32),
        Block(32, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def digits() -> list[Tensor]:
    """Training images, test images `[N, 1, 8, 8]` with mean 0 and deviation 1, and the labels of either."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train, test = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in parts[:2])
    mean, deviation = train.mean(), train.std()
    return [
        (train - mean) / deviation,
        (test - mean) / deviation,
        *(torch.tensor(part) for part in parts[2:]),
    ]


def train(
    backend: Backend = "auto",
    epochs: int = 3,
    batch: int = 64,
    steps: int | None = None,
    device: str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[list[float], float]:
    """The loss of every step, and the accuracy on the test images; `steps` ends the training early. On a GPU in float16
    and float32, as `torch.autocast` chooses."""
    torch.manual_seed(0)
    is_mixed = device != "cpu"
    images, test_images, labels, test_labels = (part.to(device) for part in digits())
    model = network().to(device, memory_format=memory_format)  # type: ignore[call-overload]
    scaler = torch.amp.GradScaler(device, enabled=is_mixed)
    total = epochs * (len(images) // batch) if steps is None else steps
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=max(total, 2))
    losses, order = [], torch.empty(0, dtype=torch.long)
    for _ in track(range(total), description=f"training with {backend!r}", transient=True):
        if len(order) < batch:
            order = torch.randperm(len(images))
        chosen, order = order[:batch], order[batch:]
        with use_backend(backend), torch.autocast(device, torch.float16, enabled=is_mixed):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    return losses, accuracy


def epoch_means(losses: list[float], epochs: int) -> list[float]:
    """The mean loss of every epoch."""
    length = len(losses) // epochs
    return [fmean(losses[i * length : (i + 1) * length]) for i in range(epochs)]


def compare_runs(epochs: int, device: str, console: Console) -> None:
    """Prints the loss curves of PyTorch, in two memory formats, and of the kernels."""
    runs = {
        "PyTorch, channels_last": train(
            "reference", epochs, device=device, memory_format=torch.channels_last
        ),
        "PyTorch, NCHW": train("reference", epochs, device=device),
        "kernels": train("triton", epochs, device=device, memory_format=torch.channels_last),
    }
    for name, (losses, accuracy) in runs.items():
        curve = " ".join(f"{mean:.4f}" for mean in epoch_means(losses, epochs))
        console.print(f"{name}: loss by epoch {curve}, {accuracy:.1%} of the test images are right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training images (default 3)")
    parser.add_argument(
        "--compare", action="store_true", help="with PyTorch and with the kernels: a few steps, on a GPU all"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    args = parser.parse_args()
    console = Console()
    if args.compare and args.device != "cpu":
        compare_runs(args.epochs, args.device, console)
        return
    if args.compare:
        expected, _ = train("reference", batch=8, steps=COMPARED_STEPS)
        losses, _ = train("triton", batch=8, steps=COMPARED_STEPS)
        for step, (loss, other) in enumerate(zip(expected, losses, strict=True), 1):
            console.print(f"step {step}: loss {loss:.6f} with PyTorch, {other:.6f} with the kernels")
        return
    losses, accuracy = train(epochs=args.epochs, device=args.device)
    console.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {accuracy:.1%} of the test images are right")


if __name__ == "__main__":
    main()
