"""Memory that is kept from call to call, for one stream's launches: neither allocated nor cleared for each."""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from ..kernels.lasting import is_capturing, lasting

Stream = tuple[torch.device, int]
"""A device and the handle of a stream there, 0 where there are none."""

# Bytes. A larger workspace takes the device longer than Python takes to allocate it.
MAX_SCRATCH = 8 << 20

_kept: dict[Stream, tuple[Tensor, Tensor]] = {}
_lock = threading.Lock()
# Pop and append are atomic.
_idle: dict[Stream, list[Tensor]] = {}


def kept_exchange(counters: int, words: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Counters (int32) and tagged words (int64), at least so many: zero at first, then used by one stream's launches.

    A stream's launches run one after another, so one pair serves them all; it is replaced as a pair, since the tags
    count the launches that the counters have seen. A CUDA graph may be replayed on any stream: while one is captured,
    and where there are no streams, the pair is new, and the graph clears it at every replay.
    """
    if device.type != "cuda" or is_capturing(device):
        return _zeros(counters, words, device)
    stream = stream_of(device)
    with _lock:
        kept = _kept.get(stream)
        if kept is None or kept[0].numel() < counters or kept[1].numel() < words:
            if kept is not None:
                # It lives on in recorded calls (`replay`), if any.
                counters, words = max(counters, kept[0].numel()), max(words, kept[1].numel())
            kept = _kept[stream] = lasting(functools.partial(_zeros, counters, words, device), device)
    return kept


def stream_of(device: torch.device) -> Stream:
    """The device's current stream."""
    return device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def borrow(nbytes: int, stream: Stream) -> Tensor:
    """At least so many bytes without values, for launches on `stream`, the current one.

    Whoever has started them gives the memory back: what the stream runs next may use it, whichever thread starts it.
    Not for a capture, whose launches a graph may replay on any stream.
    """
    device, _ = stream
    if nbytes > MAX_SCRATCH:
        return _bytes(nbytes, device)
    try:
        memory = _idle[stream].pop()
    except (KeyError, IndexError):
        memory = None
    if memory is None or memory.numel() < nbytes:
        rounded = 1 << (nbytes - 1).bit_length()
        memory = lasting(functools.partial(_bytes, rounded, device), device)
    return memory


def give_back(memory: Tensor, stream: Stream) -> None:
    """Keep what :func:`borrow` gave for the stream's next launches, unless it is large."""
    if memory.numel() <= MAX_SCRATCH:
        _idle.setdefault(stream, []).append(memory)


def _bytes(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)


def _zeros(counters: int, words: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(counters, dtype=torch.int32, device=device),
        torch.zeros(words, dtype=torch.int64, device=device),
    )
