"""Reading tensors chunk by chunk with several threads, and adding up in the order of the file.

Each thread reads into a buffer of its own, scans and digests; only what is kept of a chunk travels to the caller's
thread. At most a few chunks a thread are under way, so the memory needed does not depend on the file. Chunks and
the order of adding up depend on the tensors alone: any number of threads gives the same numbers.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ggufkit import quants
from ggufkit.container import GGUF, Tensor
from ggufkit.errors import FormatError, GgufkitError, Unsupported
from ggufkit.quants import QuantType
from ggufkit.quants.bits import U8
from ggufkit.stats import plain
from ggufkit.stats.chunk import CHUNK_BYTES, Chunk, Scanned, chunks
from ggufkit.stats.digest import Digest, Plain, Tools, digest
from ggufkit.stats.results import TensorStats
from ggufkit.stats.total import Total

#: below this many bytes NumPy is done before the compiled kernels are loaded, and below the second before they are
#: compiled, should that be necessary
TINY, SMALL = 1 << 20, 8 << 20

#: chunks that a thread may be ahead of the adding up
_AHEAD = 4

#: elements that a float tensor's pivot is estimated from
_PILOT = 1024

Progress = Callable[[int], None]
Announce = Callable[[str], None]


class Scan(Protocol):
    """How one thread scans a chunk: `plain.scan`, or a compiled scanner's."""

    def __call__(self, chunk: Chunk, raw: U8, pivot: float, sampled: int) -> Scanned: ...


def scan(
    gguf: GGUF,
    tensors: Iterable[Tensor] | None = None,
    *,
    threads: int | None = None,
    compiled: bool | None = None,
    keep_rows: bool = False,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> Iterator[tuple[Tensor, TensorStats | GgufkitError]]:
    """The statistics of tensors, one after the other, each from one pass over its bytes.

    Args:
        gguf: the opened file.
        tensors: which; by default all, in the order of the file.
        threads: how many; by default one a processor, 16 at most.
        compiled: use the compiled kernels; by default where it takes less time (see `SMALL`).
        keep_rows: keep the size of every row (`RowStats.absmax`, `rms`); 8 bytes a row.
        progress: called with the bytes done since it was last called.
        announce: called with a name when a kernel has to be compiled, which takes a second or two, once.

    Returns:
        Each tensor with its statistics, or with the error that kept it from being read: NewerThanTool (its type is
        not known), Unsupported (never stored in a file), FormatError (the file ends too early, the shape is
        impossible), SourceError (reading failed).
    """
    wanted = list(gguf.tensors.values() if tensors is None else tensors)
    types = {tensor.type for tensor in wanted if tensor.type is not None and tensor.type.decodable}
    if compiled is None:
        compiled = _is_worth_it(sum(tensor.nbytes or 0 for tensor in wanted), types)
    workers = _Workers(gguf, types if compiled else None, announce)
    count = threads or min(os.cpu_count() or 1, 16)
    with ThreadPoolExecutor(count, "ggufkit-stats") as pool:
        yield from _collect(_submit(gguf, wanted, workers, pool, keep_rows), count * _AHEAD, progress)


def measure(gguf: GGUF, tensor: Tensor, *, compiled: bool | None = None, keep_rows: bool = False) -> TensorStats:
    """The statistics of one tensor, in the caller's thread; see `scan`.

    Raises: what `scan` returns in its place.
    """
    qtype = readable_type(gguf, tensor)
    if compiled is None:
        compiled = _is_worth_it(tensor.nbytes or 0, {qtype})
    workers = _Workers(gguf, {qtype} if compiled else None, None)
    total = _total(gguf, tensor, keep_rows)
    for chunk in _chunks(tensor, qtype):
        total.add(workers.work(tensor, chunk, total.pivot, total.sampled))
    return total.finish()


def _is_worth_it(nbytes: int, types: set[QuantType]) -> bool:
    """Whether the compiled kernels are faster for that many bytes, their loading or compiling included."""
    if TINY < nbytes <= SMALL:
        from ggufkit.stats.compiled import is_kept

        return is_kept(types)
    return nbytes > SMALL


def readable_type(gguf: GGUF, tensor: Tensor) -> QuantType:
    """The tensor's type, if all its values can be read.

    Raises: see `scan`.
    """
    gguf.read(tensor, (tensor.nbytes or 0), 0)  # says what is wrong with type, shape or place
    if tensor.type is None or not tensor.type.decodable:
        raise Unsupported(
            f"tensor {tensor.name!r} has the type {tensor.type_name}, which no model file can hold",
            path=str(gguf.path),
            offset=tensor.info_offset,
        )
    return tensor.type


class _Workers:
    """What the threads do: read a chunk, scan it, digest it."""

    def __init__(self, gguf: GGUF, compiled_types: set[QuantType] | None, announce: Announce | None) -> None:
        self.gguf = gguf
        self._local = threading.local()
        self._prepared = None
        if compiled_types is not None:
            from ggufkit.stats.compiled import Scanner

            self._scanner_class = Scanner
            self._prepared = Scanner.prepare(compiled_types, announce)

    def _mine(self) -> tuple[U8, Scan, Tools]:
        """This thread's buffer and scanner."""
        local = self._local
        if not hasattr(local, "mine"):
            room = np.empty(0, np.uint8)
            if self._prepared is None:
                local.mine = room, plain.scan, Plain()
            else:
                scanner = self._scanner_class(self._prepared)
                local.mine = room, scanner.scan, scanner
        mine: tuple[U8, Scan, Tools] = local.mine
        return mine

    def work(self, tensor: Tensor, chunk: Chunk, pivot: float, sampled: int) -> Digest:
        room, scan_chunk, tools = self._mine()
        if len(room) < chunk.nbytes:
            room = np.empty(max(chunk.nbytes, CHUNK_BYTES), np.uint8)
            self._local.mine = room, scan_chunk, tools
        raw = room[: chunk.nbytes]
        self.gguf.read_into(tensor, raw.data, chunk.offset)
        if self.gguf.shards[tensor.shard].byteorder == "big":
            raw = quants.to_little(chunk.type, raw)
        return digest(chunk, raw, scan_chunk(chunk, raw, pivot, sampled), tools)


@dataclass(slots=True)
class _Work:
    """One tensor under way; `error` stops it."""

    tensor: Tensor
    total: Total | None = None
    error: GgufkitError | None = None

    @property
    def result(self) -> tuple[Tensor, TensorStats | GgufkitError]:
        if self.error is None and self.total is not None:
            return self.tensor, self.total.finish()
        return self.tensor, self.error or FormatError(f"tensor {self.tensor.name!r} could not be read")


_Item = tuple[_Work, Future[Digest] | None]


def _submit(
    gguf: GGUF, tensors: list[Tensor], workers: _Workers, pool: ThreadPoolExecutor, keep_rows: bool
) -> Iterator[_Item]:
    """Each chunk's future, and None after the last of a tensor. Submits as it is iterated."""
    for tensor in tensors:
        work = _Work(tensor)
        try:
            total = work.total = _total(gguf, tensor, keep_rows)
            for chunk in _chunks(tensor, total.type):
                if work.error is not None:
                    break
                yield work, pool.submit(workers.work, tensor, chunk, total.pivot, total.sampled)
        except GgufkitError as error:
            work.error = error
        yield work, None


def _collect(
    items: Iterator[_Item], ahead: int, progress: Progress | None
) -> Iterator[tuple[Tensor, TensorStats | GgufkitError]]:
    """Add up in order, with `ahead` chunks under way."""
    waiting: deque[_Item] = deque()
    try:
        for item in items:
            waiting.append(item)
            while len(waiting) > ahead:
                yield from _add(*waiting.popleft(), progress)
        while waiting:
            yield from _add(*waiting.popleft(), progress)
    finally:
        for _, future in waiting:
            if future is not None:
                future.cancel()


def _add(
    work: _Work, future: Future[Digest] | None, progress: Progress | None
) -> Iterator[tuple[Tensor, TensorStats | GgufkitError]]:
    if future is None:
        yield work.result
        return
    try:
        part = future.result()
    except GgufkitError as error:
        work.error = work.error or error
        return
    if work.total is not None and work.error is None:
        work.total.add(part)
    if progress is not None:
        progress(part.chunk.nbytes)


def _chunks(tensor: Tensor, qtype: QuantType) -> Iterator[Chunk]:
    return chunks(qtype, tensor.n_rows, tensor.dims[0] if tensor.dims else 1)


def _total(gguf: GGUF, tensor: Tensor, keep_rows: bool) -> Total:
    qtype = readable_type(gguf, tensor)
    return Total(tensor, qtype, _pivot(gguf, tensor, qtype), keep_rows)


def _pivot(gguf: GGUF, tensor: Tensor, qtype: QuantType) -> float:
    """A number near the mean, where the mean is far from zero.

    The sums of powers are taken about it, else the moments of norm weights (mean 1, spread 0.01) would drown in
    rounding. Quantized tensors are weights, whose mean is next to zero.
    """
    count = min(_PILOT, tensor.n_elements)
    if qtype.is_block or count == 0:
        return 0.0
    raw = gguf.read(tensor, 0, count * qtype.type_size)
    values = quants.dequantize(qtype, raw, byteorder=gguf.shards[tensor.shard].byteorder)
    finite: npt.NDArray[np.float64] = values[np.isfinite(values)].astype(np.float64)  # converting a NaN may warn
    if len(finite) == 0 or abs(finite.mean()) <= 2 * finite.std():
        return 0.0
    return float(finite.mean())
