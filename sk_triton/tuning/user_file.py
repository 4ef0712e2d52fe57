"""The user's file of tuned entries: read when it changes, written by replacing it whole, under a lock.

Nothing that is wrong with it stops a run: a warning, once, and the file or the entry counts as absent.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import stat
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .entries import (
    MAX_BYTES,
    SCHEMA,
    BrokenFileError,
    Entries,
    NewerFileError,
    Origin,
    Sections,
    dump_entry,
    load_raw,
    load_sections,
    to_json,
)

FOLDER_VARIABLE = "SK_TRITON_CACHE_DIR"
FILE_NAME = "tuned.json"
LOCK_SECONDS = 10.0
"""How long a process waits for another one to write."""

changes = 0
"""How often this process changed which entries there are."""

_warned: set[str] = set()
_listeners: list[Callable[[], object]] = []
_read: tuple[tuple[Any, ...], Sections] | None = None


def path() -> Path:
    """Where the file is: in the folder ``SK_TRITON_CACHE_DIR``, else in the platform's folder for caches.

    Raises:
        OSError: the folder is in somebody's home, and there is none.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        try:
            return Path(folder).expanduser() / FILE_NAME
        except RuntimeError as error:
            raise OSError(f"{FOLDER_VARIABLE} must name a folder, got {folder!r}: {error}") from None
    from platformdirs import user_cache_path

    return user_cache_path("sk_triton", appauthor=False) / FILE_NAME


def read() -> Sections:
    """All sound entries; none, and a warning, where the file cannot be used. Read again only once it has changed."""
    global _read
    try:
        file = path()
        found = file.stat()
    except FileNotFoundError:
        return {}
    except OSError as error:
        warn_once(f"tuned configs are not used: {error}")
        return {}
    version = (file, found.st_mtime_ns, found.st_size, found.st_ino)
    if _read is None or _read[0] != version:
        _read = version, _sections(file)
    return _read[1]


def inspect() -> tuple[Sections, list[str]]:
    """As :func:`read`, anew and without a warning: all sound entries, and a complaint for each other one.

    Raises:
        OSError: the file is there and cannot be read.
        BrokenFileError: it is no file of tuned entries.
    """
    try:
        text = read_text(path())
    except FileNotFoundError:
        return {}, []
    return load_sections(text)


def _sections(file: Path) -> Sections:
    try:
        sections, complaints = load_sections(read_text(file))
    except (OSError, ValueError) as error:
        warn_once(f"tuned configs of {file} are not used: {error}")
        return {}
    if complaints:
        warn_once(f"{len(complaints)} entries of {file} are not used; the first: {complaints[0]}")
    return sections


def read_text(file: Path) -> str:
    """The text of a file of tuned entries.

    Raises:
        OSError: it cannot be read.
        BrokenFileError: it is no plain file, too large, or not in UTF-8.
    """
    with open(file, "rb", buffering=0, opener=_open_without_waiting) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise BrokenFileError("it is no plain file")
        content = stream.read(MAX_BYTES + 1) or b""
    if len(content) > MAX_BYTES:
        raise BrokenFileError(f"it is larger than {MAX_BYTES >> 20} MiB")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise BrokenFileError("it is no text in UTF-8") from None


def save(origin: Origin, entries: Entries) -> bool:
    """Adds entries to the file, over those of the same keys; all others stay, those of other processes too.

    Returns whether they are kept; where they are not, a warning says why.
    """
    return merge({origin: entries})


def merge(sections: Sections) -> bool:
    """Adds the entries of another file, as :func:`save`."""

    def add(raw: dict[str, Any]) -> None:
        for origin, entries in sections.items():
            _section(raw, origin)["entries"].update({key: dump_entry(e) for key, e in entries.items()})

    return _change(add)


def clear(keep: Callable[[Origin], bool] = lambda origin: False) -> bool:
    """Removes the sections that are not to be kept, as :func:`save`; the file stays, without any if none is kept."""

    def remove(raw: dict[str, Any]) -> None:
        raw["sections"] = [section for section in raw["sections"] if keep(_origin(section))]

    return _change(remove)


def when_changed(forget: Callable[[], object]) -> None:
    """Calls `forget` whenever this process changes which entries there are."""
    _listeners.append(forget)


def changed() -> None:
    """Makes this process look up every config anew."""
    global changes
    changes += 1
    for forget in _listeners:
        forget()


def warn_once(message: str) -> None:
    """A RuntimeWarning, the first time that this process has it to say."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"sk_triton: {message}", RuntimeWarning, stacklevel=3)


def _change(edit: Callable[[dict[str, Any]], None]) -> bool:
    import filelock

    try:
        file = Path(os.path.realpath(path()))  # a link stays one
    except OSError as error:
        warn_once(f"tuned configs are not kept: {error}")
        return False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{file}.lock", timeout=LOCK_SECONDS):
            raw = _raw(file)
            edit(raw)
            _replace(file, _limited(file, raw))
    except filelock.Timeout:
        warn_once(f"tuned configs are not kept: another process has held {file}.lock for {LOCK_SECONDS:g} s")
        return False
    except (OSError, NotImplementedError, NewerFileError) as error:
        warn_once(f"tuned configs are not kept in {file}: {error}")
        return False
    changed()
    return True


def _raw(file: Path) -> dict[str, Any]:
    """The file's content to add to; one that is broken is put aside.

    Raises:
        NewerFileError: a newer version wrote it, and would lose what this one does not know.
    """
    try:
        return load_raw(read_text(file))
    except FileNotFoundError:
        pass
    except NewerFileError:
        raise
    except BrokenFileError as error:
        aside = _unused(file.with_suffix(".broken"))
        os.replace(file, aside)
        warn_once(f"{file} was put aside as {aside.name}: {error}")
    return {"schema": SCHEMA, "sections": []}


def _limited(file: Path, raw: dict[str, Any]) -> str:
    """The text to write: without what other versions measured, if it would be too large to be read again.

    Raises:
        OSError: it still would.
    """
    text = to_json(raw)
    if len(text) > MAX_BYTES:
        kept = [section for section in raw["sections"] if _origin(section).is_current]
        if len(kept) < len(raw["sections"]):
            warn_once(f"{file} was full: what was tuned for other versions of the kernels is dropped from it")
            text = to_json({**raw, "sections": kept})
    if len(text) > MAX_BYTES:
        raise OSError(f"it would be larger than {MAX_BYTES >> 20} MiB; `sk-triton configs clear` empties it")
    return text


def _unused(file: Path) -> Path:
    """The file's name, with a number where there is such a file already."""
    numbered = (file.with_name(f"{file.name}{i}") for i in itertools.count(1))
    return next(name for name in itertools.chain([file], numbered) if not os.path.lexists(name))


def _replace(file: Path, text: str) -> None:
    """Writes a file so that nobody ever sees half of it; who may read it stays as it is."""
    name = file.with_name(f".{file.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(name, "x", encoding="utf-8") as stream:  # with the rights that the user's new files have
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.chmod(name, stat.S_IMODE(os.stat(file).st_mode))
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _section(raw: dict[str, Any], origin: Origin) -> dict[str, Any]:
    for section in raw["sections"]:
        if _origin(section) == origin:
            return section
    section = {**asdict(origin), "entries": {}}
    raw["sections"].append(section)
    return section


def _origin(section: dict[str, Any]) -> Origin:
    return Origin(**{name: value for name, value in section.items() if name != "entries"})


def _open_without_waiting(name: str, flags: int) -> int:
    # A pipe in the file's place must not block the run.
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def forget() -> None:
    """Forgets what was read and what was warned of, as a new process."""
    global _read
    _read = None
    _warned.clear()
