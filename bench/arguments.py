"""Types of options that several subcommands have."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number from 1 on."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return value


def sizes(text: str) -> tuple[int, ...]:
    """Four whole numbers, N,C,H,W."""
    try:
        found = tuple(int(size) for size in text.split(","))
    except ValueError:
        found = ()
    if len(found) != 4:
        raise argparse.ArgumentTypeError(f"must be N,C,H,W, as in 128,128,56,56, got {text!r}")
    return found
