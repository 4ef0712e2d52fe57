"""Processes that compile kernels, whatever this one does with them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor


def compiling_processes(workers: int) -> ProcessPoolExecutor:
    """`workers` new processes in which kernels are compiled, not interpreted. Ctrl-C is left to this process."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _compile_here)


@contextlib.contextmanager
def compiling_until_left(workers: int) -> Iterator[ProcessPoolExecutor]:
    """`compiling_processes` that do not outlive the block: on an error or Ctrl-C they end in the middle of a job."""
    pool = compiling_processes(workers)
    try:
        yield pool
    except BaseException:
        processes = list((pool._processes or {}).values())  # shutdown forgets them
        pool.shutdown(wait=False, cancel_futures=True)
        # Else the interpreter, when it ends, waits for the jobs in hand, which may take minutes.
        for process in processes:
            process.terminate()
        raise
    pool.shutdown()


def _compile_here() -> None:
    # Before Triton is imported: it reads the switch when a kernel, or a function of its own library, is defined.
    os.environ["TRITON_INTERPRET"] = "0"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
