"""From the arrays of a scanned chunk to the few numbers that are kept of it.

This is the part of the pass that no longer looks at elements: it works by block and by row. Both ways of scanning
share it, except for three loops that the compiled pass replaces (`Tools`). It runs in the worker's thread; what remains
for the collector is to add up (see `total`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ggufkit.quants.bits import F32, U8
from ggufkit.stats.chunk import Chunk, Scanned
from ggufkit.stats.deviation import NONE, Levels, deviations
from ggufkit.stats.layout import (
    BAD_BLOCKS,
    BAD_LEVEL,
    BINS,
    DEVIATION_BINS,
    EQUAL_BLOCKS,
    MARKED,
    OUTLIER,
    UNMARKED_BLOCKS,
    ZERO_BLOCKS,
)
from ggufkit.stats.runs import ByteRuns, Runs

Ints = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Keys = npt.NDArray[np.uint64]

#: how many of the extreme rows and blocks are kept
ROWS_KEPT, BLOCKS_KEPT = 8, 16


@dataclass(frozen=True, slots=True)
class ScaleDigest:
    """A series of scales: the fields of `results.ScaleStats`; places count from its beginning, -1 is nowhere."""

    count: int
    n_nan: int
    n_inf: int
    first_nonfinite: int
    n_zero: int
    smallest: float
    smallest_at: int
    largest: float
    largest_at: int
    histogram: Ints  # int64 [BINS], but for the lowest bin of each sign, where the zeros would be


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows: number of the first, and by row what `chunk.Scanned` says; `length` elements each."""

    first: int
    length: int
    low: F32
    high: F32
    square: F64
    bad: Ints

    @property
    def absmax(self) -> F32:
        """float32 [n], 0 where nothing is finite."""
        return np.maximum(np.maximum(self.high, -self.low), np.float32(0))

    @property
    def mean_square(self) -> F64:
        """float64 [n], over the finite values; 0 where nothing is finite."""
        result: F64 = self.square / np.maximum(self.length - self.bad, 1)
        return result


@dataclass(frozen=True, slots=True)
class RowDigest:
    """Rows summed up; `extreme` are the indices into `rows` of those that may be among the largest or smallest."""

    rows: Rows
    zero: Runs
    n_constant: int
    first_constant: int
    n_bad: int
    levels: npt.NDArray[np.int64]
    extreme: Ints


@dataclass(frozen=True, slots=True)
class BlockDigest:
    """Blocks summed up; places count from the chunk's first block.

    `equal` leaves out the first block, which is compared with its predecessor when chunks are added up; `keys` are
    those that were sampled, `at` their places.
    """

    zero: Runs
    outlier: Runs
    n_bad: int
    unmarked: Runs
    deviations: Ints
    worst: Ints
    worst_by: Ints
    equal: Runs
    first_key: int
    last_key: int
    keys: Keys
    at: Ints


@dataclass(frozen=True, slots=True)
class Digest:
    """All that is kept of a chunk."""

    chunk: Chunk
    scanned: Scanned
    bytes: ByteRuns
    blocks: BlockDigest
    scales: ScaleDigest | None
    mins: ScaleDigest | None
    rows: Rows
    row_digest: RowDigest | None


@dataclass(frozen=True, slots=True)
class Deviations:
    """`off`: int16 [rows, columns], see `deviation`; `histogram`: how many there are of each magnitude, int64
    [DEVIATION_BINS]; `worst`: the places of the `BLOCKS_KEPT` largest, of equals the earlier ones, in no order."""

    off: Levels
    histogram: Ints
    worst: Ints


class Tools(Protocol):
    """The loops over blocks and bytes, which `Plain` does in NumPy and the compiled pass faster."""

    def deviate(self, levels: Levels) -> Deviations:
        """How far blocks [rows, columns] lie from their rows and columns."""

    def scan_scales(self, d: F32) -> ScaleDigest:
        """Sum up a series of scales: float32 [n]."""

    def byte_runs(self, data: U8) -> ByteRuns:
        """Runs of equal bytes."""


def digest(chunk: Chunk, raw: U8, scanned: Scanned, tools: Tools) -> Digest:
    """Sum up a scanned chunk."""
    s = scanned
    rows = Rows(chunk.row, chunk.row_length, s.row_min, s.row_max, s.row_square, s.row_bad)
    result = Digest(
        chunk,
        scanned,
        tools.byte_runs(raw),
        _digest_blocks(chunk, raw, scanned, tools),
        None if scanned.d is None else tools.scan_scales(scanned.d),
        None if scanned.dmin is None else tools.scan_scales(scanned.dmin),
        rows,
        digest_rows(rows) if chunk.row_length == chunk.full_row else None,
    )
    scanned.forget_blocks()
    return result


# Rows


def digest_rows(rows: Rows) -> RowDigest:
    """Sum up whole rows."""
    fine = rows.bad == 0
    same = fine & (rows.low == rows.high)
    zero = same & (rows.low == 0)
    constant = np.flatnonzero(same & ~zero) if rows.length > 1 else np.empty(0, np.int64)
    mean_square = rows.mean_square
    there = np.flatnonzero(mean_square > 0)
    return RowDigest(
        rows,
        Runs.of(zero),
        len(constant),
        int(constant[0]) if len(constant) else -1,
        int(np.count_nonzero(~fine)),
        (mean_square[there].view(np.uint64) >> np.uint64(49)).astype(np.int64),
        _extremes(mean_square, there),
    )


def _extremes(values: F64, among: Ints) -> Ints:
    """The places of the smallest and largest values, `ROWS_KEPT` of each, all if there are no more."""
    if len(among) <= 2 * ROWS_KEPT:
        return among
    order = np.argpartition(values[among], (ROWS_KEPT, len(among) - ROWS_KEPT - 1))
    return among[np.concatenate([order[:ROWS_KEPT], order[-ROWS_KEPT:]])]


# Blocks


def _digest_blocks(chunk: Chunk, raw: U8, scanned: Scanned, tools: Tools) -> BlockDigest:
    levels, flags, ints, n = scanned.levels, scanned.flags, scanned.ints, len(scanned.levels)
    found = tools.deviate(levels.reshape(chunk.n_rows, chunk.blocks_per_row))
    off = found.off.reshape(-1)
    far = found.histogram[OUTLIER:].any() or ints[BAD_BLOCKS]
    return BlockDigest(
        Runs.of(levels == 0) if ints[ZERO_BLOCKS] else Runs(n),
        Runs.of((np.abs(off) >= OUTLIER) & (off != NONE) | (levels == BAD_LEVEL)) if far else Runs(n),
        int(ints[BAD_BLOCKS]),
        Runs.of(flags & MARKED == 0) if ints[UNMARKED_BLOCKS] else Runs(n),
        found.histogram,
        found.worst,
        off[found.worst].astype(np.int64),
        _equal_neighbours(chunk, raw, scanned.keys) if ints[EQUAL_BLOCKS] else Runs(n - 1),
        int(scanned.keys[0]),
        int(scanned.keys[-1]),
        scanned.kept,
        scanned.kept_at,
    )


def _equal_neighbours(chunk: Chunk, raw: U8, keys: Keys) -> Runs:
    """Blocks 1 … n-1 that equal the one before. Equal keys are no proof yet, so the bytes are compared."""
    same = (keys[1:] == keys[:-1]) & (keys[1:] != 0)
    places = np.flatnonzero(same)
    if chunk.row_length % chunk.block_elements == 0:
        blocks = raw.reshape(-1, chunk.block_bytes)
        same[places] = (blocks[places] == blocks[places + 1]).all(axis=1)
    return Runs.of(same)


class Plain:
    """The loops in NumPy."""

    def deviate(self, levels: Levels) -> Deviations:
        off = deviations(levels)
        magnitude = np.where(off == NONE, -1, np.abs(off.astype(np.int64))).reshape(-1)
        there = np.minimum(magnitude[magnitude >= 0], DEVIATION_BINS - 1)
        worst = np.argsort(-magnitude, kind="stable")[: min(BLOCKS_KEPT, len(there))]
        return Deviations(off, np.bincount(there, minlength=DEVIATION_BINS), worst)

    def scan_scales(self, d: F32) -> ScaleDigest:
        magnitude, finite = np.abs(d), np.isfinite(d)
        proper = finite & (d != 0)
        n_nan = int(np.count_nonzero(np.isnan(d)))
        low, high = np.where(proper, magnitude, np.inf), np.where(proper, magnitude, 0)
        some = bool(proper.any())
        histogram = np.bincount(d.view(np.uint32) >> 21, minlength=BINS)
        histogram[[0, BINS // 2]] = 0
        return ScaleDigest(
            len(d),
            n_nan,
            int(np.count_nonzero(~finite)) - n_nan,
            -1 if finite.all() else int(finite.argmin()),
            int(np.count_nonzero(d == 0)),
            float(low.min()),
            int(low.argmin()) if some else -1,
            float(high.max()),
            int(high.argmax()) if some else -1,
            histogram,
        )

    def byte_runs(self, data: U8) -> ByteRuns:
        return ByteRuns.of(data)
