"""Text files written in one atomic step."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_text(text: str, path: Path) -> None:
    """Writes a whole file, so that an interrupted write leaves no half one, nor do two at a time."""
    partial = path.with_name(f"{path.name}-{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
