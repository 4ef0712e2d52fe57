"""When a user's entries must not be looked up, and how the ranks of a distributed run come to use the same ones."""

from __future__ import annotations

import torch
import torch.distributed as dist

from . import user_file
from .entries import Sections

_agreed: Sections | None = None


def sync_configs(group: dist.ProcessGroup | None = None, *, src: int = 0) -> None:
    """Give every rank the tuned configs of rank `src`; all ranks of `group` must call it.

    Call it once after ``torch.distributed.init_process_group``. Until then a process of a distributed run takes what
    the package ships and the analytic choice, which are the same for all: users' files may differ from host to host, or
    change while the ranks start. Ranks with other GPUs than rank `src` use that rank's entries for theirs.

    Args:
        group: the ranks that take part; None for all.
        src: global rank whose file counts.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised, or rank `src` could not read its configs.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("sync_configs() needs torch.distributed.init_process_group() first")
    found: list[Sections | str] = [""]
    if dist.get_rank() == src:
        try:
            found = [user_file.read()]
        except Exception as error:  # as a warning that is an error: the others wait for what this rank sends
            found = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(found, src=src, group=group)
    (agreed,) = found
    if isinstance(agreed, str):
        raise RuntimeError(f"sync_configs() found no tuned configs on rank {src}: {agreed}")
    global _agreed
    _agreed = agreed
    user_file.changed()


def user_sections() -> Sections:
    """The user's entries: those that the ranks agreed on, else those of the file."""
    return user_file.read() if _agreed is None else _agreed


def pinning_reason() -> str:
    """Why a user's entries are left alone at this moment, or ""."""
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for"
    if _agreed is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return "sk_triton.sync_configs() was not called"
    return ""
