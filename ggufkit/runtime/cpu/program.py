"""Programs: lists of operations that all threads walk together, without Python in between.

An operation is a row of a table, a kind with its addresses and sizes, cut into tasks. Threads claim tasks one by
one from a counter of the operation and go on to the next operation when none is left, waiting there until the
tasks that others claimed are finished. So nobody waits for a thread to start or to wake: one that comes late finds
the counters run out. A busy machine makes a program slower but never stops it, and what a task computes does not
depend on who does it: results are the same for any number of threads.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ggufkit.runtime.cpu import kernels
from ggufkit.runtime.cpu.simd import fetch, fetch_add, kept, kernel, pause

NORM, SUMS, MATVEC, ARRANGE, MATMUL, TRIM, PLUS, ROTATE, KEEP, ATTEND, ACT = range(11)

#: what an operation is made of; addresses are of float32 unless a kernel says otherwise, sizes count elements
FIELDS: dict[str, str] = {
    "kind": "one of the above",
    "n_tasks": "how many tasks it is cut into",
    "apart": "1 when it needs nothing of the operations right before it, and need not wait for them",
    "n": "positions",
    "width": "columns: the length of a row",
    "heads": "heads of x, or rows of y",
    "key_heads": "heads of the cache",
    "x": "address of the input, or of what is changed in place",
    "y": "address of a second input",
    "out": "address of the result",
    "data": "address of a weight",
    "scales": "address of a matrix's scales",
    "mins": "address of a matrix's mins",
    "layout": "how a matrix is stored, see kernels",
    "group": "columns that share a scale",
    "blocks": "blocks of rows",
    "span": "blocks in a task",
    "keys": "address of the layer's keys",
    "values": "address of the layer's values",
    "n_ctx": "positions that the cache has room for",
    "position": "of the first row",
    "kq": "address for a trace's scores, or 0",
    "kq_soft_max": "address for a trace's probabilities, or 0",
}

_COUNTERS = 8  # int64 of an operation's counters: a cache line
_CLAIMED, _FINISHED = 0, 1
_PATIENCE = 4000  # pauses before a waiting thread lets others run


def _digest() -> str:
    """Of everything that is compiled into `walk`."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


#: the type of a row. Numba keeps compiled code by the types of the arguments and by one file's time stamp; with the
#: digest in the type it also notices a change of any other file
OPERATION = np.dtype([*((name, np.int64) for name in FIELDS), (f"sources_{_digest()}", np.int64)])


@kernel
def _perform(op: Any, task: int, scratch: Any) -> None:
    if op.kind == NORM:
        kernels.rms_norm(op, task)
    elif op.kind == SUMS:
        kernels.group_sums(op, task)
    elif op.kind == MATVEC:
        kernels.matvec(op, task)
    elif op.kind == ARRANGE:
        kernels.arrange(op, task)
    elif op.kind == MATMUL:
        kernels.matmul(op, task, scratch)
    elif op.kind == TRIM:
        kernels.trim(op, task)
    elif op.kind == PLUS:
        kernels.plus(op, task)
    elif op.kind == ROTATE:
        kernels.rotate(op, task)
    elif op.kind == KEEP:
        kernels.keep(op, task)
    elif op.kind == ATTEND:
        kernels.attend(op, task, scratch)
    elif op.kind == ACT:
        kernels.silu_times(op, task)


@kernel
def _finished(operations: Any, first: int, last: int, counters: Any) -> bool:
    """Wait until the operations [first, last) are finished; False when patience ran out."""
    patience = _PATIENCE
    for i in range(first, last):
        while fetch(counters, i * _COUNTERS + _FINISHED) < operations[i].n_tasks:
            if patience == 0:
                return False
            patience -= 1
            pause()
    return True


@kept
def walk(operations: Any, first: int, at: int, last: int, counters: Any, scratch_floats: int) -> int:
    """Work on the operations [at, last) of a run that began at `first`; where to go on: `last` when all is done."""
    scratch = np.empty(scratch_floats, np.float32)
    waited = first
    for i in range(at, last):
        op = operations[i]
        if not op.apart:
            if not _finished(operations, waited, i, counters):
                return i
            waited = i
        task = fetch_add(counters, i * _COUNTERS + _CLAIMED)
        while task < op.n_tasks:
            _perform(op, task, scratch)
            fetch_add(counters, i * _COUNTERS + _FINISHED)
            task = fetch_add(counters, i * _COUNTERS + _CLAIMED)
    return last if _finished(operations, waited, last, counters) else last - 1


class _Run(NamedTuple):
    """One walk through operations [first, last), shared by all who take part."""

    operations: NDArray[Any]
    first: int
    last: int
    counters: NDArray[np.int64]
    scratch_floats: int

    def take_part(self) -> None:
        """Work until everything is finished."""
        at = self.first
        while (at := walk(self.operations, self.first, at, self.last, self.counters, self.scratch_floats)) < self.last:
            time.sleep(0)


class Crew:
    """The calling thread and its helpers, which sleep until there is a program to walk."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._run: _Run | None = None
        self._bells = [threading.Lock() for _ in range(threads - 1)]
        self._ringing = threading.Lock()
        for bell in self._bells:
            bell.acquire()
            threading.Thread(target=self._help, args=(bell,), name="ggufkit-cpu", daemon=True).start()

    def run(self, operations: NDArray[Any], first: int, last: int, scratch_floats: int) -> None:
        """Walk the operations [first, last); returns when all are finished."""
        if first == last:
            return
        run = _Run(operations, first, last, np.zeros(len(operations) * _COUNTERS, np.int64), scratch_floats)
        if operations["n_tasks"][first:last].max() > 1:
            self._run = run
            self._ring()
        try:
            run.take_part()
        finally:
            run.take_part()  # after an interrupt: the helpers must not go on with buffers that are given up
            self._run = None

    def _ring(self) -> None:
        with self._ringing:
            for bell in self._bells:
                if bell.locked():
                    bell.release()

    def _help(self, bell: threading.Lock) -> None:
        while True:
            bell.acquire()
            if (run := self._run) is not None:
                run.take_part()


def available_threads() -> int:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def crew() -> Crew:
    """The process's one crew, with a thread a processor."""
    return Crew(available_threads())


def compiled() -> bool:
    """Whether the code of an earlier run is on disk."""
    kept_at = Path(walk.stats.cache_path)  # type: ignore[attr-defined]
    return any(kept_at.glob("program.walk-*.nbi"))


def table(rows: Sequence[dict[str, int]]) -> NDArray[Any]:
    """Operations as the threads read them; fields that are not named are 0."""
    made = np.zeros(len(rows), OPERATION)
    for name in FIELDS:
        made[name] = [row.get(name, 0) for row in rows]
    return made
