"""Assesses candidates in processes that compile, and goes on without those that such a process does not survive."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, Executor, Future
from typing import Any

from sk_triton.tuning.entries import Choice, Trial

from ..compiled.processes import compiling_processes
from ..model.gpus import Gpu
from .targets import Settled, Target, assess

KILLED = "the process that compiled it ended"
"""What `Trial.dropped` says where not even a process of its own survived."""

MakePool = Callable[[int], Executor]
"""Makes an executor of so many processes."""
Task = tuple[Target, Choice, Settled]


def assess_singly(tasks: Iterable[Task], gpu: Gpu, make_pool: MakePool = compiling_processes) -> list[Trial]:
    """:func:`.targets.assess`, one task after the other, in a new process after each that ended one."""
    trials = []
    pool: Executor | None = None
    try:
        for target, choice, settled in tasks:
            pool = pool or make_pool(1)
            try:
                trials.append(pool.submit(assess, target, choice, settled, gpu).result())
            except BrokenExecutor:
                trials.append(Trial(choice, None, None, KILLED))
                pool.shutdown(wait=False)
                pool = None
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
    return trials


class Assessor:
    """Assesses in `workers` processes what it is told to begin with, in that order; its caller does other work."""

    def __init__(self, gpu: Gpu, workers: int, make_pool: MakePool = compiling_processes) -> None:
        self._gpu, self._workers, self._make_pool = gpu, workers, make_pool
        self._pool = make_pool(workers)
        self._tasks: dict[tuple[str, Choice], Task] = {}
        self._futures: dict[tuple[str, Choice], Future[Trial]] = {}

    def begin(self, target: Target, choice: Choice, settled: Settled) -> None:
        """Has a candidate assessed, if that was not begun before."""
        key = target.key, choice
        if key not in self._tasks:
            self._tasks[key] = target, choice, settled
            self._submit(key)

    def trial(self, target: Target, choice: Choice, settled: Settled) -> Trial:
        """What was found of a candidate, once it is; it is begun with if that was not done before."""
        self.begin(target, choice, settled)
        while True:
            try:
                return self._futures[target.key, choice].result()
            except BrokenExecutor:
                self._mend()

    def close(self) -> None:
        """Gives up what is not done yet."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, key: tuple[str, Choice]) -> None:
        try:
            self._futures[key] = self._pool.submit(assess, *self._tasks[key], self._gpu)
        except BrokenExecutor as error:
            self._futures[key] = Future()
            self._futures[key].set_exception(error)

    def _mend(self) -> None:
        """One process that ends takes all others along: what they were at is done again singly, the rest anew."""
        self.close()
        lost = [key for key, future in self._futures.items() if is_lost(future)]
        # An executor hands out one task more than it has processes, in order.
        suspects, others = lost[: self._workers + 1], lost[self._workers + 1 :]
        trials = assess_singly([self._tasks[key] for key in suspects], self._gpu, self._make_pool)
        for key, trial in zip(suspects, trials, strict=True):
            self._futures[key] = Future()
            self._futures[key].set_result(trial)
        self._pool = self._make_pool(self._workers)
        for key in others:
            self._submit(key)


def is_lost(future: Future[Any]) -> bool:
    """Whether a future of a broken executor has no result."""
    return not future.done() or future.cancelled() or isinstance(future.exception(), BrokenExecutor)
