"""Row by row: from the sums of a chunk's rows to what is kept of them, and adding that up.

A row is the last axis of a tensor: the weights of one output, or one token's embedding. The slices of a
three-dimensional tensor, one an expert, are runs of rows and are added up here too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ggufkit.quants.bits import F32
from ggufkit.stats.layout import LEVELS_PER_OCTAVE
from ggufkit.stats.results import ExpertStats, RowExtreme, RowStats
from ggufkit.stats.runs import Runs

Ints = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

#: how many of the largest and of the smallest rows are kept
ROWS_KEPT = 8

#: the most slices of a three-dimensional tensor that are told apart; llama.cpp allows 512 experts
MOST_EXPERTS = 4096

#: a robust standard deviation from a median absolute deviation, for normal distributions
MAD = 1.4826


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


class RowTotal:
    """Row by row. The pieces of a long row are put together before it is looked at."""

    def __init__(self, keep: bool) -> None:
        self.count = 0
        self.zero = Runs()
        self.n_constant, self.first_constant, self.n_bad = 0, -1, 0
        self.levels = np.zeros(1 << 14, np.int64)
        self.extremes: list[tuple[float, int, float]] = []  # mean square, row, absmax
        self.kept: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] | None = [] if keep else None
        self.piece: Rows | None = None

    def add_piece(self, piece: Rows, ends_row: bool) -> None:
        """The next piece of a long row."""
        self.piece = piece if self.piece is None else _join(self.piece, piece)
        if ends_row:
            self.add(digest_rows(self.piece))
            self.piece = None

    def add(self, part: RowDigest) -> None:
        """The next whole rows."""
        rows = part.rows
        if self.first_constant < 0 <= part.first_constant:
            self.first_constant = rows.first + part.first_constant
        self.count += len(rows.low)
        self.zero += part.zero
        self.n_constant += part.n_constant
        self.n_bad += part.n_bad
        np.add.at(self.levels, part.levels, 1)
        square, absmax = rows.mean_square, rows.absmax
        self.extremes += [(float(square[i]), rows.first + int(i), float(absmax[i])) for i in part.extreme]
        if len(self.extremes) > 8 * ROWS_KEPT:
            self.extremes = [*self._largest(), *self._smallest()]
        if self.kept is not None:
            self.kept.append((absmax, np.sqrt(square).astype(np.float32)))

    def _largest(self) -> list[tuple[float, int, float]]:
        return sorted(set(self.extremes), key=lambda item: (-item[0], item[1]))[:ROWS_KEPT]

    def _smallest(self) -> list[tuple[float, int, float]]:
        return sorted(set(self.extremes), key=lambda item: (item[0], item[1]))[:ROWS_KEPT]

    def finish(self, row_length: int) -> RowStats:
        median, spread = _median_and_spread(self.levels)
        kept = None if self.kept is None else [np.concatenate(arrays) for arrays in zip(*self.kept, strict=True)]
        return RowStats(
            count=self.count,
            length=row_length,
            n_zero=self.zero.count,
            longest_zero_run=self.zero.span,
            n_constant=self.n_constant,
            first_constant=self.first_constant if self.first_constant >= 0 else None,
            n_nonfinite=self.n_bad,
            median=median,
            spread=spread,
            largest=tuple(RowExtreme(row, math.sqrt(square), absmax) for square, row, absmax in self._largest()),
            smallest=tuple(RowExtreme(row, math.sqrt(square), absmax) for square, row, absmax in self._smallest()),
            absmax=kept[0] if kept else None,
            rms=kept[1] if kept else None,
        )


def _join(a: Rows, b: Rows) -> Rows:
    """Two neighbouring pieces of one row."""
    low, high = np.minimum(a.low, b.low), np.maximum(a.high, b.high)
    return Rows(a.first, a.length + b.length, low, high, a.square + b.square, a.bad + b.bad)


def _median_and_spread(levels: Ints) -> tuple[float, float]:
    """Of log2(rms), from how often each level occurs: the middle of the median's step, and 1.4826 · MAD in octaves."""
    present = np.flatnonzero(levels)
    if len(present) == 0:
        return math.nan, math.nan
    counts = levels[present]
    median = _weighted_median(present, counts)
    spread = _weighted_median(np.abs(present - median), counts)
    exponent, eighths = divmod(median, LEVELS_PER_OCTAVE // 2)
    mean_square = exponent - 1023 + math.log2(1 + (eighths + 0.5) / (LEVELS_PER_OCTAVE // 2))
    return mean_square / 2, MAD * spread / LEVELS_PER_OCTAVE


def _weighted_median(values: Ints, counts: Ints) -> int:
    order = np.argsort(values, kind="stable")
    below = np.cumsum(counts[order])
    return int(values[order][np.searchsorted(below, (below[-1] + 1) // 2)])


class ExpertTotal:
    """The slices of the first axis, each of `rows` rows."""

    def __init__(self, count: int, rows: int) -> None:
        self.per_expert = max(rows, 1)
        self.n_zero, self.n_bad, self.n_bad_values = (np.zeros(count, np.int64) for _ in range(3))
        self.absmax, self.square = np.zeros(count, np.float32), np.zeros(count)

    def add(self, rows: Rows) -> None:
        which = (rows.first + np.arange(len(rows.low))) // self.per_expert
        absmax = rows.absmax
        np.maximum.at(self.absmax, which, absmax)
        np.add.at(self.square, which, rows.square)
        np.add.at(self.n_bad_values, which, rows.bad)
        np.add.at(self.n_zero, which, (absmax == 0) & (rows.bad == 0))
        np.add.at(self.n_bad, which, rows.bad > 0)

    def finish(self, row_length: int) -> tuple[ExpertStats, ...]:
        n = np.maximum(self.per_expert * row_length - self.n_bad_values, 1)
        rms = np.sqrt(self.square / n)
        columns = (self.n_zero, self.n_bad, self.absmax, rms)
        return tuple(
            ExpertStats(index, *values) for index, values in enumerate(zip(*(c.tolist() for c in columns), strict=True))
        )
