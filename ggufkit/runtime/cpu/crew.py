"""The threads of the CPU engine: jobs of many small tasks, claimed one by one by whoever is free.

A job is a kernel that claims task numbers from a shared counter until none is left. The calling thread works as
well, and a helper that wakes late finds the counter run out and nothing to do; so a busy machine makes a job
slower but never stops it, and nobody waits for a thread to start. What a task computes does not depend on who
does it: results are the same for any number of threads.

Every kernel of a job has the shape

    def kernel(ticket, n_tasks, ...):
        task = claim(ticket)
        while task < n_tasks:
            ...
            finish(ticket)
            task = claim(ticket)
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufkit.runtime.cpu.simd import fetch, fetch_add, kernel

_CLAIMED, _FINISHED = 0, 8  # a cache line apart
_SPINS = 20_000


@kernel
def claim(ticket: Any) -> Any:
    """The next task's number; at or beyond the number of tasks when all are taken."""
    return fetch_add(ticket, _CLAIMED)


@kernel
def finish(ticket: Any) -> None:
    """One task is done, and what it wrote may be read by others."""
    fetch_add(ticket, _FINISHED)


@kernel
def _all_finished(ticket: Any, n_tasks: int, spins: int) -> bool:
    while spins and fetch(ticket, _FINISHED) < n_tasks:
        spins -= 1
    return spins > 0


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel over `n_tasks` tasks."""

    kernel: Callable[..., Any]
    n_tasks: int
    arguments: tuple[Any, ...]
    ticket: NDArray[np.int64] = field(default_factory=lambda: np.zeros(16, np.int64))

    def work(self) -> None:
        """Do tasks until none is left to claim."""
        self.kernel(self.ticket, self.n_tasks, *self.arguments)

    def wait(self) -> None:
        """Until the tasks that others claimed are done as well."""
        while not _all_finished(self.ticket, self.n_tasks, _SPINS):
            time.sleep(0)


class Crew:
    """The calling thread and its helpers."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._jobs: tuple[Job, ...] = ()
        self._bells = [threading.Semaphore(0) for _ in range(threads - 1)]
        for bell in self._bells:
            threading.Thread(target=self._help, args=(bell,), name="ggufkit-cpu", daemon=True).start()

    def run(self, *jobs: Job) -> None:
        """Do all the jobs, which must not depend on each other."""
        helpers = min(len(self._bells), sum(job.n_tasks for job in jobs) - 1)
        if helpers:
            self._jobs = jobs
            for bell in self._bells[:helpers]:
                bell.release()
        for job in jobs:
            job.work()
        for job in jobs:
            job.wait()
        self._jobs = ()

    def _help(self, bell: threading.Semaphore) -> None:
        while True:
            bell.acquire()
            for job in self._jobs:
                job.work()


def available_threads() -> int:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def crew() -> Crew:
    """The process's one crew, with a thread a processor."""
    return Crew(available_threads())
