"""Processes that compile kernels, whatever this one does with them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor


def compiling_processes(workers: int) -> ProcessPoolExecutor:
    """`workers` new processes in which kernels are compiled, not interpreted. Ctrl-C is left to this process."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _compile_here)


def _compile_here() -> None:
    # Before Triton is imported: it reads the switch when a kernel, or a function of its own library, is defined.
    os.environ["TRITON_INTERPRET"] = "0"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
