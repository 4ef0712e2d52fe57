"""sk_triton at another git revision, imported under another name, so that both compete in the same rounds."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sk_triton import environment

from ..results import REVISION
from .sources import Ours

FOLDERS = ("sk_triton", "kernels")


class RevisionError(Exception):
    """A revision that cannot be measured, and why."""


@contextmanager
def revision_source(revision: str, repository: Path | None = None) -> Iterator[Ours]:
    """The package at `revision` beside the one that is installed; its copy lasts as long as the context.

    Its imports are relative, so that it runs under any name beside the installed one.

    Raises:
        RevisionError: no git checkout, an unknown revision, or one that does not import.
    """
    root = repository or environment.CLONE_DIR
    _git(root, "rev-parse", "--git-dir")
    try:
        found = _git(root, "rev-parse", "--verify", "--short=9", "--end-of-options", f"{revision}^{{commit}}")
    except RevisionError:
        raise RevisionError(f"revision must be a commit, tag or branch of {root}, got {revision!r}") from None
    commit = found.decode().strip()
    name = f"sk_triton_at_{commit}"
    with tempfile.TemporaryDirectory() as folder:
        archive = _git(root, "archive", "--format=zip", commit, *FOLDERS)
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            files.extractall(folder)
        package = Path(folder) / name
        (Path(folder) / "sk_triton").rename(package)
        (Path(folder) / "kernels").rename(package / "kernels")
        sys.path.insert(0, folder)
        try:
            yield _source(name, commit, revision)
        finally:
            sys.path.remove(folder)
            for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
                del sys.modules[loaded]


def _source(name: str, commit: str, revision: str) -> Ours:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # an old revision may fail in any way beside today's packages
        raise RevisionError(
            f"revision {revision!r} does not import: {type(error).__name__}: {error}"
        ) from error
    label = f"sk_triton at {commit}" + ("" if commit.startswith(revision) else f" ({revision})")
    return Ours(f"rev-{commit}", label, role=REVISION, package=module)


def _git(root: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        raise RevisionError("a revision is read by git, which is not installed") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        command = " ".join(arguments)
        raise RevisionError(f"git {command} in {root} failed: {lines[-1] if lines else 'no message'}")
    return done.stdout
