"""Memory that one launch leaves for the next on the same stream, ready for use: no launch is spent on clearing it."""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from .kernels.lasting import lasting

_kept: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}
_lock = threading.Lock()


def kept_exchange(counters: int, words: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Counters (int32) and tagged words (int64), at least so many: zero at first, then used by one stream's launches.

    A stream's launches run one after another, so one pair serves them all; it is replaced as a pair, since the tags
    count the launches that the counters have seen. A CUDA graph may be replayed on any stream: while one is captured,
    and where there are no streams, the pair is new, and the graph clears it at every replay.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return _zeros(counters, words, device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    with _lock:
        kept = _kept.get(key)
        if kept is None or kept[0].numel() < counters or kept[1].numel() < words:
            if kept is not None:
                # It lives on in recorded calls (`replay`), if any.
                counters, words = max(counters, kept[0].numel()), max(words, kept[1].numel())
            kept = _kept[key] = lasting(functools.partial(_zeros, counters, words, device), device)
    return kept


def _zeros(counters: int, words: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(counters, dtype=torch.int32, device=device),
        torch.zeros(words, dtype=torch.int64, device=device),
    )
