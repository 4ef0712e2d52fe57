"""Dataclasses as JSON files: with the version of their schema inside, written in one atomic step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def text_of(value: DataclassInstance) -> str:
    """A dataclass as JSON."""
    return json.dumps(dataclasses.asdict(value), indent=1, ensure_ascii=False) + "\n"


def write(value: DataclassInstance, path: Path) -> None:
    """Writes `text_of` a dataclass, so that an interrupted write leaves no half file, nor do two at a time."""
    partial = path.with_name(f"{path.name}-{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        partial.write_text(text_of(value), encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def fields_of(text: str, schema: int, what: str) -> dict[str, Any]:
    """What `text_of` made a text of, its dataclasses as dictionaries.

    Raises:
        ValueError: the text is not `what`, or of another schema version.
    """
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not a {what}: {error}") from None
    found = data.get("schema") if isinstance(data, dict) else None
    if found != schema:
        raise ValueError(f"schema must be {schema}, got {found!r}")
    return data
