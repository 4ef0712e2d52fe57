"""Dataclasses as the text of JSON files, with the version of their schema inside."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def text_of(value: DataclassInstance) -> str:
    """A dataclass as JSON."""
    return json.dumps(dataclasses.asdict(value), indent=1, ensure_ascii=False) + "\n"


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
