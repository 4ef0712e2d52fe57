"""When a user's entries must not be looked up, and how the ranks of a distributed run come to use the same ones."""

from __future__ import annotations

import torch
import torch.distributed as dist

from . import cache
from .entries import Sections, dump_sections, load_sections

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
        RuntimeError: ``torch.distributed`` is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("sync_configs() needs torch.distributed.init_process_group() first")
    text = [dump_sections(cache.read()) if dist.get_rank() == src else ""]
    dist.broadcast_object_list(text, src=src, group=group)
    global _agreed
    _agreed, _ = load_sections(text[0])
    cache.changed()


def user_sections() -> Sections:
    """The user's entries: those that the ranks agreed on, else those of the file."""
    return cache.read() if _agreed is None else _agreed


def pinning_reason() -> str:
    """Why a user's entries are left alone at this moment, or ""."""
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for"
    if _agreed is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return "sk_triton.sync_configs() was not called"
    return ""
