"""The scales and mins of blocks, as a series of floats: summing up a chunk's, and adding that up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ggufkit.quants import QuantType
from ggufkit.quants.bits import F32
from ggufkit.stats.layout import BINS
from ggufkit.stats.results import Extreme, Histogram, ScaleStats

Ints = npt.NDArray[np.int64]


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


def scan_scales(d: F32) -> ScaleDigest:
    """Sum up a series of scales: float32 [n]."""
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


class ScaleTotal:
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
        histogram = Histogram.of(self.histogram)
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
