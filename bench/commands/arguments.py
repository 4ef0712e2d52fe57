"""Options that several subcommands have: their types, and what they may be."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch

from sk_triton.exit_codes import BAD_USAGE

from ..shapes import DIRECTIONS, INFERENCE, TRAINING

DTYPE_NAMES = ("fp16", "bf16", "fp32")
LARGEST, MOST_CHANNELS, MOST_ELEMENTS = 2**16, 2**13, 2**35
"""Of an input; 2^35 elements in fp16 take 64 GiB. What plans and predicts works on tables that grow with them."""
WEEK_SECONDS = 7 * 24 * 3600
DIRECTIONS_BY_NAME = {"forward": (INFERENCE,), "backward": (TRAINING,), "both": DIRECTIONS}


def bad_usage(command: str, reason: object) -> int:
    """The exit code of a command that does not run; prints why."""
    print(f"sk-triton {command}: {reason}", file=sys.stderr)
    return BAD_USAGE


def add_direction(parser: argparse.ArgumentParser) -> None:
    """The option that :func:`directions_of` reads."""
    parser.add_argument(
        "--direction",
        choices=tuple(DIRECTIONS_BY_NAME),
        default="forward",
        help="forward: what inference runs (default); backward: what a training step runs, its forward pass included",
    )


def directions_of(args: argparse.Namespace) -> tuple[str, ...]:
    """The directions that the command's options ask for."""
    return DIRECTIONS_BY_NAME[args.direction]


def positive(text: str) -> int:
    """A whole number from 1 to `LARGEST`."""
    return _whole(text, 1, LARGEST)


def whole_seconds(text: str) -> int:
    """A whole number of seconds, a week at most."""
    return _whole(text, 1, WEEK_SECONDS)


def seed(text: str) -> int:
    """A whole number from 0 on in 63 bits, which PyTorch takes."""
    return _whole(text, 0, 2**63 - 1)


def _whole(text: str, least: int, largest: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= largest:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {largest}, got {text!r}")
    return value


def sizes(text: str) -> tuple[int, ...]:
    """Four whole numbers from 1 on, N,C,H,W, of a tensor that is not absurdly large."""
    try:
        found = tuple(int(size) for size in text.split(","))
    except ValueError:
        found = ()
    is_sane = len(found) == 4 and min(found) >= 1 and max(found) <= LARGEST and found[1] <= MOST_CHANNELS
    if not is_sane or math.prod(found) > MOST_ELEMENTS:
        raise argparse.ArgumentTypeError(
            f"must be N,C,H,W, each from 1 to {LARGEST}, C to {MOST_CHANNELS}, with a product of at most "
            f"{MOST_ELEMENTS}, as in 128,128,56,56, got {text!r}"
        )
    return found


def choose_device(name: str) -> torch.device:
    """The device of an option `--device`, a GPU with its index. Raises ValueError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type != "cuda" and name != "cpu":
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is {name!r}, but {torch.cuda.device_count()} GPUs are visible to PyTorch")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())  # `torch.cuda.set_device` takes no other
    return device


def writable_folder(folder: Path, option: str = "--output") -> None:
    """Makes a folder where there is none. Raises ValueError if nothing can be written into it, before it is needed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} must be a folder that can be written to, got {folder}: {error.strerror}"
        ) from None
