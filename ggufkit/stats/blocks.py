"""Block by block: sizes against their rows and columns, marks, zeros and repetitions; of a chunk, and added up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ggufkit.quants.bits import U8
from ggufkit.stats.chunk import Chunk, Scanned
from ggufkit.stats.deviation import NONE, Levels, deviations
from ggufkit.stats.layout import (
    BAD_BLOCKS,
    BAD_LEVEL,
    DEVIATION_BINS,
    EQUAL_BLOCKS,
    LEVELS_PER_OCTAVE,
    MARKED,
    OUTLIER,
    UNMARKED_BLOCKS,
    ZERO_BLOCKS,
)
from ggufkit.stats.results import BlockDeviation, BlockStats, MarkStats, RepeatStats, Stretch
from ggufkit.stats.rows import MAD
from ggufkit.stats.runs import ByteRuns, Runs

Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

#: how many of the blocks that deviate most are kept
BLOCKS_KEPT = 16

#: keys of blocks that are kept of a tensor, about
KEYS_KEPT = 1 << 17


def sampling(n_blocks: int) -> int:
    """Of how many blocks one is compared with all others: a power of two."""
    return 1 << max(0, (n_blocks - 1) // KEYS_KEPT).bit_length()


@dataclass(frozen=True, slots=True)
class Deviations:
    """`off`: int16 [rows, columns], see `deviation`; `histogram`: how many there are of each magnitude, int64
    [DEVIATION_BINS]; `worst`: the places of the `BLOCKS_KEPT` largest, of equals the earlier ones, in no order."""

    off: Levels
    histogram: Ints
    worst: Ints


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


def digest_blocks(chunk: Chunk, raw: U8, scanned: Scanned, deviate: Callable[[Levels], Deviations]) -> BlockDigest:
    """Sum up a chunk's blocks."""
    levels, flags, ints, n = scanned.levels, scanned.flags, scanned.ints, len(scanned.levels)
    found = deviate(levels.reshape(chunk.n_rows, chunk.blocks_per_row))
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


def deviate(levels: Levels) -> Deviations:
    """How far blocks [rows, columns] lie from their rows and columns."""
    off = deviations(levels)
    magnitude = np.where(off == NONE, -1, np.abs(off.astype(np.int64))).reshape(-1)
    there = np.minimum(magnitude[magnitude >= 0], DEVIATION_BINS - 1)
    worst = np.argsort(-magnitude, kind="stable")[: min(BLOCKS_KEPT, len(there))]
    return Deviations(off, np.bincount(there, minlength=DEVIATION_BINS), worst)


class BlockTotal:
    """Block by block: sizes, marks, repetitions."""

    def __init__(self, sampled: int) -> None:
        self.sampled = sampled
        self.zero, self.outlier, self.unmarked, self.equal = Runs(), Runs(), Runs(), Runs()
        self.n_bad = 0
        self.deviations = np.zeros(DEVIATION_BINS, np.int64)
        self.worst: list[tuple[int, int]] = []  # deviation, block
        self.last_key = 0
        self.keys: list[npt.NDArray[np.uint64]] = []
        self.places: list[Ints] = []

    def add(self, blocks: BlockDigest, first: int) -> None:
        """The next chunk's, whose first block is number `first`."""
        self.zero += blocks.zero
        self.outlier += blocks.outlier
        self.unmarked += blocks.unmarked
        self.n_bad += blocks.n_bad
        self.deviations += blocks.deviations
        self.worst += [(int(by), first + int(at)) for by, at in zip(blocks.worst_by, blocks.worst, strict=True)]
        self.worst = sorted(self.worst, key=lambda item: (-abs(item[0]), item[1]))[:BLOCKS_KEPT]
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
            first_outlier=place(self.outlier.first),
            last_outlier=place(self.outlier.last),
            longest_outlier_run=self.outlier.span,
        )

    def marks(self) -> MarkStats:
        runs = self.unmarked
        return MarkStats(runs.length, runs.count, place(runs.first), place(runs.last), runs.span)

    def repeats(self, runs: ByteRuns) -> RepeatStats:
        """What repeats; the runs of equal bytes were found elsewhere."""
        keys = np.concatenate([np.empty(0, np.uint64), *self.keys])
        places = np.concatenate([np.empty(0, np.int64), *self.places])
        first, second = _pairs(keys, places)
        return RepeatStats(
            zero_bytes=runs.zero,
            equal_bytes=runs.equal,
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
    return MAD * max(0.0, float(step - 0.5 + inside)) / LEVELS_PER_OCTAVE


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


def place(index: int) -> int | None:
    """A place where -1 means nowhere."""
    return index if index >= 0 else None
