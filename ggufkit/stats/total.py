"""Adding up the digests of a tensor's chunks, in their order, and what comes out at the end."""

from __future__ import annotations

import math

import numpy as np

from ggufkit.container import Tensor
from ggufkit.quants import QuantType
from ggufkit.quants.fingerprint import MARKS
from ggufkit.stats.blocks import BlockTotal, place, sampling
from ggufkit.stats.chunk import Chunk, Scanned
from ggufkit.stats.digest import Digest
from ggufkit.stats.layout import (
    BINS,
    FIRST_INF,
    FIRST_NAN,
    GRID_FIRST,
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
from ggufkit.stats.results import Extreme, GridStats, Histogram, TensorStats
from ggufkit.stats.rows import MOST_EXPERTS, ExpertTotal, RowTotal
from ggufkit.stats.runs import ByteRuns
from ggufkit.stats.scales import ScaleTotal


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
        self.rows = RowTotal(keep_rows)
        self.blocks = BlockTotal(sampling(tensor.n_elements // (qtype.block_size if qtype.is_block else 32)))
        self.scales, self.mins = ScaleTotal(), ScaleTotal()
        self.bytes = ByteRuns()
        shape = tensor.shape
        self.experts = ExpertTotal(shape[0], shape[1]) if len(shape) == 3 and shape[0] <= MOST_EXPERTS else None

    @property
    def sampled(self) -> int:
        return self.blocks.sampled

    def add(self, part: Digest) -> None:
        """The next chunk."""
        self.values.add(part.chunk, part.scanned)
        self.bytes += part.bytes
        self.blocks.add(part.blocks, part.chunk.first_block)
        self.scales.add(part.scales)
        self.mins.add(part.mins)
        if part.row_digest is None:
            self.rows.add_piece(part.rows, part.chunk.ends_row)
        else:
            self.rows.add(part.row_digest)
        if self.experts is not None:
            self.experts.add(part.rows)

    def finish(self) -> TensorStats:
        """What was found out, after the last chunk."""
        values, ints = self.values, self.values.ints
        mean, std, skewness, kurtosis = values.moments(self.tensor.n_elements, self.pivot)
        row_length = self.tensor.dims[0] if self.tensor.dims else 1
        block_elements = self.type.block_size if self.type.is_block else 32
        return TensorStats(
            name=self.tensor.name,
            type=self.type.name,
            shape=self.tensor.shape,
            count=self.tensor.n_elements,
            n_nan=int(ints[N_NAN]),
            n_inf=int(ints[N_INF]),
            n_zero=int(ints[N_ZERO]),
            first_nan=place(int(ints[FIRST_NAN])),
            first_inf=place(int(ints[FIRST_INF])),
            min=_extreme(values.sums[MIN], ints[MIN_AT]),
            max=_extreme(values.sums[MAX], ints[MAX_AT]),
            mean=mean,
            std=std,
            skewness=skewness,
            kurtosis=kurtosis,
            histogram=Histogram.of(values.histogram),
            rows=self.rows.finish(row_length),
            blocks=self.blocks.finish(block_elements),
            repeats=self.blocks.repeats(self.bytes),
            scales=self.scales.finish(self.type, self.type.d),
            mins=self.mins.finish(self.type, self.type.dmin),
            marks=self.blocks.marks() if self.type.name in MARKS else None,
            bf16=values.grid(OFF_BF16) if self.type.kind == "float" else None,
            f16=values.grid(OFF_F16) if self.type.kind == "float" else None,
            experts=() if self.experts is None else self.experts.finish(row_length),
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


def _extreme(value: float | np.float64, index: int | np.int64) -> Extreme | None:
    return Extreme(float(value) + 0.0, int(index)) if index >= 0 else None  # + 0.0 turns -0 into 0
