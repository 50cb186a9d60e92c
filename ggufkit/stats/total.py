"""Adding up the digests of a tensor's chunks, in their order, and what comes out at the end."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ggufkit.container import Tensor
from ggufkit.quants import QuantType
from ggufkit.quants.fingerprint import MARKS
from ggufkit.stats.chunk import Chunk, Scanned
from ggufkit.stats.digest import BLOCKS_KEPT, ROWS_KEPT, Digest, Ints, RowDigest, Rows, ScaleDigest, digest_rows
from ggufkit.stats.layout import (
    BINS,
    DEVIATION_BINS,
    FIRST_INF,
    FIRST_NAN,
    GRID_FIRST,
    LEVELS_PER_OCTAVE,
    MAX,
    MAX_AT,
    MIN,
    MIN_AT,
    N_INF,
    N_INTS,
    N_NAN,
    N_ZERO,
    OFF_BF16,
    OFF_F16,
)
from ggufkit.stats.results import (
    BlockDeviation,
    BlockStats,
    ExpertStats,
    Extreme,
    GridStats,
    Histogram,
    MarkStats,
    RepeatStats,
    RowExtreme,
    RowStats,
    ScaleStats,
    Stretch,
    TensorStats,
)
from ggufkit.stats.runs import ByteRuns, Runs

#: the most slices of a three-dimensional tensor that are told apart; llama.cpp allows 512 experts
MOST_EXPERTS = 4096

#: keys of blocks that are kept of a tensor, about
KEYS_KEPT = 1 << 17

#: the first bin, without its sign, of what is not finite
_FIRST_SPECIAL = 0x7F800000 >> 21

#: a robust standard deviation from a median absolute deviation, for normal distributions
_MAD = 1.4826


def sampling(n_blocks: int) -> int:
    """Of how many blocks one is compared with all others: a power of two."""
    return 1 << max(0, (n_blocks - 1) // KEYS_KEPT).bit_length()


class Total:
    """The sum of the chunks of one tensor.

    Args:
        qtype: the tensor's type.
        pivot: what the sums of powers were taken about.
        keep_rows: keep the size of every row for the result.
    """

    def __init__(self, tensor: Tensor, qtype: QuantType, pivot: float, keep_rows: bool = False) -> None:
        self.tensor, self.type, self.pivot = tensor, qtype, pivot
        self.values = _Values()
        self.rows = _RowTotal(keep_rows)
        self.blocks = _BlockTotal(sampling(tensor.n_elements // (qtype.block_size if qtype.is_block else 32)))
        self.scales, self.mins = _ScaleTotal(), _ScaleTotal()
        shape = tensor.shape
        self.experts = _ExpertTotal(shape[0], shape[1]) if len(shape) == 3 and shape[0] <= MOST_EXPERTS else None

    @property
    def sampled(self) -> int:
        return self.blocks.sampled

    def add(self, part: Digest) -> None:
        """The next chunk."""
        self.values.add(part.chunk, part.scanned)
        self.blocks.add(part)
        self.scales.add(part.scales)
        self.mins.add(part.mins)
        self.rows.add(part)
        if self.experts is not None:
            self.experts.add(part.rows)

    def finish(self) -> TensorStats:
        """What was found out, after the last chunk."""
        values, ints = self.values, self.values.ints
        mean, std, skewness, kurtosis = values.moments(self.tensor.n_elements, self.pivot)
        block_elements = self.type.block_size if self.type.is_block else 32
        return TensorStats(
            name=self.tensor.name,
            type=self.type.name,
            shape=self.tensor.shape,
            count=self.tensor.n_elements,
            n_nan=int(ints[N_NAN]),
            n_inf=int(ints[N_INF]),
            n_zero=int(ints[N_ZERO]),
            first_nan=_place(ints[FIRST_NAN]),
            first_inf=_place(ints[FIRST_INF]),
            min=_extreme(values.sums[MIN], ints[MIN_AT]),
            max=_extreme(values.sums[MAX], ints[MAX_AT]),
            mean=mean,
            std=std,
            skewness=skewness,
            kurtosis=kurtosis,
            histogram=_histogram(values.histogram),
            rows=self.rows.finish(self.tensor),
            blocks=self.blocks.finish(block_elements),
            repeats=self.blocks.repeats(),
            scales=self.scales.finish(self.type, self.type.d),
            mins=self.mins.finish(self.type, self.type.dmin),
            marks=self.blocks.marks() if self.type.name in MARKS else None,
            bf16=values.grid(OFF_BF16) if self.type.kind == "float" else None,
            f16=values.grid(OFF_F16) if self.type.kind == "float" else None,
            experts=() if self.experts is None else self.experts.finish(self.rows.length),
        )


class _Values:
    """Element by element: counts, extremes, sums of powers, histogram, grids."""

    def __init__(self) -> None:
        self.ints = np.zeros(N_INTS, np.int64)
        self.ints[[FIRST_NAN, FIRST_INF, MIN_AT, MAX_AT]] = -1
        self.sums = np.array([0.0, 0.0, 0.0, 0.0, math.inf, -math.inf])
        self.histogram = np.zeros(BINS, np.int64)
        self.off: dict[int, list[Extreme]] = {OFF_BF16: [], OFF_F16: []}

    def add(self, chunk: Chunk, part: Scanned) -> None:
        self.histogram += part.histogram
        self.sums[:4] += part.sums[:4]
        for first in (FIRST_NAN, FIRST_INF):
            if self.ints[first] < 0 <= part.ints[first]:
                self.ints[first] = chunk.first_element + part.ints[first]
        if part.sums[MIN] < self.sums[MIN]:
            self.sums[MIN], self.ints[MIN_AT] = part.sums[MIN], chunk.first_element + part.ints[MIN_AT]
        if part.sums[MAX] > self.sums[MAX]:
            self.sums[MAX], self.ints[MAX_AT] = part.sums[MAX], chunk.first_element + part.ints[MAX_AT]
        for count in (N_ZERO, N_NAN, N_INF, OFF_BF16, OFF_F16):
            self.ints[count] += part.ints[count]
        for which, found in ((OFF_BF16, part.off_bf16), (OFF_F16, part.off_f16)):
            room = GRID_FIRST - len(self.off[which])
            self.off[which] += [Extreme(value, chunk.first_element + at) for at, value in found[:room]]

    def moments(self, count: int, pivot: float) -> tuple[float, float, float, float]:
        """Mean, standard deviation, skewness and kurtosis from the sums of powers about the pivot."""
        n = count - int(self.ints[N_NAN] + self.ints[N_INF])
        if n == 0:
            return (math.nan,) * 4
        a, b, c, d = (float(total) / n for total in self.sums[:4])
        variance = b - a * a
        if self.sums[MIN] == self.sums[MAX] or variance <= 0:
            return pivot + a, 0.0, math.nan, math.nan
        third = c - 3 * a * b + 2 * a**3
        fourth = d - 4 * a * c + 6 * a * a * b - 3 * a**4
        return pivot + a, math.sqrt(variance), third / variance**1.5, fourth / variance**2

    def grid(self, which: int) -> GridStats:
        return GridStats(int(self.ints[which]), tuple(self.off[which]))


class _RowTotal:
    """Row by row. The pieces of a long row are put together before it is looked at."""

    def __init__(self, keep: bool) -> None:
        self.count, self.length = 0, 0
        self.zero = Runs()
        self.n_constant, self.first_constant, self.n_bad = 0, -1, 0
        self.levels = np.zeros(1 << 14, np.int64)
        self.extremes: list[tuple[float, int, float]] = []  # mean square, row, absmax
        self.kept: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] | None = [] if keep else None
        self.piece: Rows | None = None

    def add(self, part: Digest) -> None:
        if part.row_digest is not None:
            self._add_rows(part.row_digest)
            return
        self.piece = part.rows if self.piece is None else _join(self.piece, part.rows)
        if part.chunk.ends_row:
            self._add_rows(digest_rows(self.piece))
            self.piece = None

    def _add_rows(self, part: RowDigest) -> None:
        rows = part.rows
        if self.first_constant < 0 <= part.first_constant:
            self.first_constant = rows.first + part.first_constant
        self.count, self.length = self.count + len(rows.low), rows.length
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

    def finish(self, tensor: Tensor) -> RowStats:
        median, spread = _median_and_spread(self.levels)
        kept = None if self.kept is None else [np.concatenate(arrays) for arrays in zip(*self.kept, strict=True)]
        return RowStats(
            count=self.count,
            length=self.length or (tensor.shape[-1] if tensor.shape else 1),
            n_zero=self.zero.count,
            longest_zero_run=self.zero.span,
            n_constant=self.n_constant,
            first_constant=_place(self.first_constant),
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
    return mean_square / 2, _MAD * spread / LEVELS_PER_OCTAVE


def _weighted_median(values: Ints, counts: Ints) -> int:
    order = np.argsort(values, kind="stable")
    below = np.cumsum(counts[order])
    return int(values[order][np.searchsorted(below, (below[-1] + 1) // 2)])


class _BlockTotal:
    """Block by block: sizes, marks, repetitions."""

    def __init__(self, sampled: int) -> None:
        self.sampled = sampled
        self.zero, self.outlier, self.unmarked, self.equal = Runs(), Runs(), Runs(), Runs()
        self.n_bad = 0
        self.deviations = np.zeros(DEVIATION_BINS, np.int64)
        self.worst: list[tuple[int, int]] = []  # deviation, block
        self.bytes = ByteRuns()
        self.last_key = 0
        self.keys: list[npt.NDArray[np.uint64]] = []
        self.places: list[Ints] = []

    def add(self, part: Digest) -> None:
        first, blocks = part.chunk.first_block, part.blocks
        self.zero += blocks.zero
        self.outlier += blocks.outlier
        self.unmarked += blocks.unmarked
        self.n_bad += blocks.n_bad
        self.deviations += blocks.deviations
        self.worst += [(int(by), first + int(at)) for by, at in zip(blocks.worst_by, blocks.worst, strict=True)]
        self.worst = sorted(self.worst, key=lambda item: (-abs(item[0]), item[1]))[:BLOCKS_KEPT]
        self.bytes += part.bytes
        same = first > 0 and blocks.first_key != 0 and blocks.first_key == self.last_key
        self.equal += Runs.of(np.array([same])) + blocks.equal
        self.last_key = blocks.last_key
        self.keys.append(blocks.keys)
        self.places.append(blocks.at + first)

    def finish(self, elements: int) -> BlockStats:
        return BlockStats(
            count=self.zero.length,
            elements=elements,
            n_zero=self.zero.count,
            longest_zero_run=self.zero.span,
            n_nonfinite=self.n_bad,
            deviations=self.deviations,
            spread=_spread(self.deviations),
            worst=tuple(BlockDeviation(block, by / LEVELS_PER_OCTAVE) for by, block in self.worst),
            n_outliers=self.outlier.count,
            first_outlier=_place(self.outlier.first),
            last_outlier=_place(self.outlier.last),
            longest_outlier_run=self.outlier.span,
        )

    def marks(self) -> MarkStats:
        runs = self.unmarked
        return MarkStats(runs.length, runs.count, _place(runs.first), _place(runs.last), runs.span)

    def repeats(self) -> RepeatStats:
        keys = np.concatenate([np.empty(0, np.uint64), *self.keys])
        places = np.concatenate([np.empty(0, np.int64), *self.places])
        first, second = _pairs(keys, places)
        return RepeatStats(
            zero_bytes=self.bytes.zero,
            equal_bytes=self.bytes.equal,
            n_consecutive=self.equal.count,
            consecutive=self.equal.span,
            sampled=self.sampled,
            n_repeated=len(second),
            stretch=_stretch(first, second, self.sampled),
        )


def _spread(deviations: Ints) -> float:
    """Robust standard deviation from how often each magnitude occurs, in octaves; interpolated within a step."""
    total = int(deviations.sum())
    if total == 0:
        return math.nan
    below = np.cumsum(deviations)
    step = int(np.searchsorted(below, total / 2))
    inside = (total / 2 - (below[step] - deviations[step])) / deviations[step]
    # step 0 holds the deviation 0 alone, step k those of -k and k: magnitudes k - 1/2 to k + 1/2
    return _MAD * max(0.0, float(step - 0.5 + inside)) / LEVELS_PER_OCTAVE


def _pairs(keys: npt.NDArray[np.uint64], places: Ints) -> tuple[Ints, Ints]:
    """Where blocks repeat: places of the earlier and of the later one, by the later, neighbours left out."""
    ordered = np.sort(keys)  # much faster than an argsort, and all that a healthy tensor needs
    if not (ordered[1:] == ordered[:-1]).any():
        return places[:0], places[:0]
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    first, second = places[order[same]], places[order[same + 1]]
    apart = second - first > 1
    by_place = np.argsort(second[apart])
    return first[apart][by_place], second[apart][by_place]


def _stretch(first: Ints, second: Ints, sampled: int) -> Stretch | None:
    """The longest series of pairs with one distance; where only some blocks were seen, with gaps."""
    if len(second) == 0:
        return None
    gap = 1 if sampled == 1 else 32 * sampled
    breaks = np.flatnonzero((np.diff(second - first) != 0) | (np.diff(second) > gap))
    begins = np.concatenate([[0], breaks + 1])
    ends = np.concatenate([breaks, [len(second) - 1]])
    best = int((second[ends] - second[begins]).argmax())
    begin, end = begins[best], ends[best]
    return Stretch(int(first[begin]), int(second[begin]), int(second[end] - second[begin]) + 1)


class _ScaleTotal:
    """A series of scales, or of mins; absent for types without."""

    def __init__(self) -> None:
        self.count, self.n_nan, self.n_inf, self.n_zero, self.first = 0, 0, 0, 0, -1
        self.smallest, self.largest = Extreme(math.inf, -1), Extreme(0.0, -1)
        self.histogram = np.zeros(BINS, np.int64)

    def add(self, part: ScaleDigest | None) -> None:
        if part is None:
            return
        if self.first < 0 <= part.first_nonfinite:
            self.first = self.count + part.first_nonfinite
        if part.smallest < self.smallest.value:
            self.smallest = Extreme(part.smallest, self.count + part.smallest_at)
        if part.largest > self.largest.value:
            self.largest = Extreme(part.largest, self.count + part.largest_at)
        self.histogram += part.histogram
        self.n_nan += part.n_nan
        self.n_inf += part.n_inf
        self.n_zero += part.n_zero
        self.count += part.count

    def finish(self, qtype: QuantType, field_offset: int | None) -> ScaleStats | None:
        if self.count == 0:
            return None
        per_block = 1 if field_offset is not None else qtype.block_size // qtype.group
        histogram = _histogram(self.histogram)
        first = None if self.first < 0 else self.first // per_block
        return ScaleStats(
            count=self.count,
            per_block=per_block,
            n_nan=self.n_nan,
            n_inf=self.n_inf,
            first_nonfinite=first,
            first_nonfinite_offset=None if first is None else first * qtype.type_size + (field_offset or 0),
            n_zero=self.n_zero,
            n_negative=int(histogram.negative.sum()),
            smallest=_by_block(self.smallest, per_block),
            largest=_by_block(self.largest, per_block),
            histogram=histogram,
        )


def _by_block(extreme: Extreme, per_block: int) -> Extreme | None:
    return None if extreme.index < 0 else Extreme(extreme.value, extreme.index // per_block)


class _ExpertTotal:
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


def _place(index: int | np.int64) -> int | None:
    return int(index) if index >= 0 else None


def _extreme(value: float | np.float64, index: int | np.int64) -> Extreme | None:
    return Extreme(float(value) + 0.0, int(index)) if index >= 0 else None  # + 0.0 turns -0 into 0


def _histogram(counts: Ints) -> Histogram:
    """From all bins by the eleven top bits of a float32 to those that hold something finite."""
    positive, negative = counts[:_FIRST_SPECIAL], counts[BINS // 2 : BINS // 2 + _FIRST_SPECIAL]
    present = np.flatnonzero(positive + negative)
    first, stop = (int(present[0]), int(present[-1]) + 1) if len(present) else (0, 0)
    return Histogram(first, negative[first:stop].copy(), positive[first:stop].copy())
