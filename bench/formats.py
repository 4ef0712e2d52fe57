"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Callable

NOTHING = "-"
"""A cell without a value."""


def three_digits(value: float) -> str:
    """Three significant digits at any scale from microseconds to minutes."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def ratio(value: float) -> str:
    """A speed against another: 0.95x, 2.13x, 14.2x."""
    return f"{value:.2f}x" if value < 9.995 else f"{value:.1f}x"


def byte_size(count: float, digits: Callable[[float], str] = three_digits) -> str:
    """Bytes in the largest binary unit that leaves at least one."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{digits(count / size)} {unit}"
    return f"{count:.0f} B"


def microseconds(seconds: float | None) -> str:
    """Microseconds as people read them; a cell without a value for what the code does not say."""
    if seconds is None:
        return NOTHING
    return f"{seconds * 1e6:.0f}" if seconds >= 100e-6 else f"{seconds * 1e6:.1f}"


def thousands(value: float) -> str:
    """A count in the shortest of its usual forms: 950, 12k, 3.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
