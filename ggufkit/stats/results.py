"""What one pass over a tensor finds out, as frozen data: the numbers that rules judge and pictures show.

Nothing here looks at a tensor or judges. All moments and extremes are those of the finite values; NaN and
infinities are counted, with the place of the first. An element index counts in the file's order (C order of
`shape`), a block index counts blocks from the beginning of the tensor, a byte offset counts from there too.

"Octaves" are steps of a factor of two. A float tensor has no blocks of its own; where blocks are spoken of, they
are runs of 32 elements of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]

#: the first bin, without its sign, of what is not finite
_FIRST_SPECIAL = 0x7F800000 >> 21


@dataclass(frozen=True, slots=True)
class Extreme:
    """A value and where it is: an element's index, or a block's where the field says so."""

    value: float
    index: int


@dataclass(frozen=True, slots=True)
class Span:
    """`length` consecutive things (bytes, blocks, rows: the field says which) from `start`."""

    start: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Counts by magnitude, four bins to an octave, defined on the bits of a float32 and therefore exact anywhere.

    A bin holds the values whose float32 pattern without its sign agrees in the exponent and the two top bits of
    the mantissa: [1, 1.25), [1.25, 1.5), [1.5, 1.75), [1.75, 2) and so on, times any power of two. Zeros are not
    in it, nor is anything that is not finite.

    Attributes:
        first: number of the first bin; bin b begins at the float32 with the pattern b << 21.
        negative, positive: int64 [bins], counts by sign, from bin `first` on.
    """

    first: int
    negative: Counts
    positive: Counts

    @classmethod
    def of(cls, patterns: Counts) -> Histogram:
        """From counts by the eleven top bits of the float32, zeros left out: the finite bins that hold something."""
        positive, negative = (patterns[sign << 10 : (sign << 10) + _FIRST_SPECIAL] for sign in (0, 1))
        present = np.flatnonzero(positive + negative)
        first, stop = (int(present[0]), int(present[-1]) + 1) if len(present) else (0, 0)
        return cls(first, negative[first:stop].copy(), positive[first:stop].copy())

    @property
    def counts(self) -> Counts:
        """int64 [bins] by magnitude alone."""
        return self.negative + self.positive

    @property
    def edges(self) -> npt.NDArray[np.float32]:
        """float32 [bins + 1]: bin i holds edges[i] <= |value| < edges[i + 1]."""
        patterns = np.arange(self.first, self.first + len(self.positive) + 1, dtype=np.uint32) << 21
        return patterns.view(np.float32)

    @property
    def total(self) -> int:
        return int(self.negative.sum() + self.positive.sum())


@dataclass(frozen=True, slots=True)
class RowExtreme:
    """One row among the largest or smallest: its number, root mean square, and largest magnitude."""

    row: int
    rms: float
    absmax: float


@dataclass(frozen=True, slots=True, eq=False)
class RowStats:
    """The rows (the last axis), all together.

    Attributes:
        count, length: how many, of how many elements.
        n_zero: rows of nothing but zeros; longest_zero_run is the longest run of them.
        n_constant: rows that hold one value, other than zero, and are longer than one.
        first_constant: the first of them.
        n_nonfinite: rows with a NaN or infinity.
        median: median over the rows of log2(rms), to a sixteenth of an octave; rows of zeros are left out. NaN if
            there is no other.
        spread: robust standard deviation of log2(rms), in octaves (1.4826 · the median absolute deviation).
        largest, smallest: up to eight rows each by rms, most extreme first; rows of zeros are left out.
        absmax, rms: float32 [count] where they were asked for.
    """

    count: int
    length: int
    n_zero: int
    longest_zero_run: Span | None
    n_constant: int
    first_constant: int | None
    n_nonfinite: int
    median: float
    spread: float
    largest: tuple[RowExtreme, ...]
    smallest: tuple[RowExtreme, ...]
    absmax: npt.NDArray[np.float32] | None = None
    rms: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ScaleStats:
    """The scales of the blocks, or their mins, as the file stores them (a K block's d, not its sub-scales).

    MXFP4, NVFP4 and IQ1_M have no such field; there it is the scale of each group (`per_block` of them).

    Attributes:
        count: how many were looked at; index / per_block is the block.
        n_nan, n_inf: not finite; first_nonfinite is the block of the first, at byte `first_nonfinite_offset`.
        n_zero, n_negative: zero, below zero.
        smallest, largest: by magnitude among the finite ones other than zero, with the block.
        histogram: by magnitude and sign.
    """

    count: int
    per_block: int
    n_nan: int
    n_inf: int
    first_nonfinite: int | None
    first_nonfinite_offset: int | None
    n_zero: int
    n_negative: int
    smallest: Extreme | None
    largest: Extreme | None
    histogram: Histogram

    @property
    def n_nonfinite(self) -> int:
        return self.n_nan + self.n_inf


@dataclass(frozen=True, slots=True)
class BlockDeviation:
    """A block whose rms is far from what its row and its column of blocks let expect.

    Attributes:
        block: its number.
        octaves: log2(rms of the block / expected rms).
    """

    block: int
    octaves: float


@dataclass(frozen=True, slots=True, eq=False)
class BlockStats:
    """The size of the values block by block, against the block's row and column.

    Expected is: the row's level plus the column's level, both robust means of log2(rms) over a chunk of the tensor
    (see `deviation`). Healthy tensors with strong rows and columns therefore do not stand out; a scale with a
    flipped exponent bit or a stretch of foreign bytes does.

    Attributes:
        count: blocks, `elements` long each.
        n_zero: blocks whose values are all zero; longest_zero_run is the longest run of them.
        n_nonfinite: blocks with a NaN or infinity.
        deviations: int64 [256], blocks by |deviation| in sixteenths of an octave; the last bin has all beyond.
        spread: robust standard deviation of the deviation, in octaves.
        worst: up to sixteen blocks, the largest |deviation| first.
        n_outliers: blocks that deviate by `OUTLIER_OCTAVES` or more, or hold something not finite.
        first_outlier, last_outlier: the first and the last of them.
        longest_outlier_run: the longest run of them.
    """

    count: int
    elements: int
    n_zero: int
    longest_zero_run: Span | None
    n_nonfinite: int
    deviations: Counts
    spread: float
    worst: tuple[BlockDeviation, ...]
    n_outliers: int
    first_outlier: int | None
    last_outlier: int | None
    longest_outlier_run: Span | None


#: a block further than this from its row and column, in octaves of rms, belongs to an outlier run
OUTLIER_OCTAVES = 3.0


@dataclass(frozen=True, slots=True)
class MarkStats:
    """Blocks that bear the mark of ggml's quantizer: a code or sub-scale at the end of its range (`quants.MARKS`).

    Attributes:
        count: blocks, zero ones included; they count as marked.
        n_without: blocks without the mark.
        first_without, last_without: the first and the last of them.
        longest_run: the longest run of blocks without it.
    """

    count: int
    n_without: int
    first_without: int | None
    last_without: int | None
    longest_run: Span | None


@dataclass(frozen=True, slots=True)
class ByteRun:
    """Consecutive equal bytes."""

    value: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Blocks that occur twice: the `length` blocks from `second` repeat those from `first`.

    Where only every n-th block was looked at, the length is an estimate and the ends are those that were seen.
    """

    first: int
    second: int
    length: int


@dataclass(frozen=True, slots=True)
class RepeatStats:
    """Bytes that repeat. Blocks whose codes are all the same (zero blocks above all) are no repetition.

    Attributes:
        zero_bytes: the longest run of zero bytes, from 16 up.
        equal_bytes: the longest run of one byte of any value, from 16 up.
        n_consecutive: blocks equal to the one before.
        consecutive: the longest run of such blocks.
        sampled: one block in how many was compared with all others.
        n_repeated: sampled blocks that occurred before, other than right before.
        stretch: the longest piece that is a copy of an earlier piece.
    """

    zero_bytes: ByteRun | None
    equal_bytes: ByteRun | None
    n_consecutive: int
    consecutive: Span | None
    sampled: int
    n_repeated: int
    stretch: Stretch | None


@dataclass(frozen=True, slots=True)
class GridStats:
    """Which finite values of a float tensor another float type would hold exactly: where they come from.

    Attributes:
        n_off: values that are not on the grid.
        off: the first eight of them.
    """

    n_off: int
    off: tuple[Extreme, ...]


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """One slice of the first axis of a three-dimensional tensor.

    Attributes:
        n_zero_rows, n_nonfinite_rows: rows of zeros; rows with a NaN or infinity.
        absmax, rms: over the finite values.
    """

    index: int
    n_zero_rows: int
    n_nonfinite_rows: int
    absmax: float
    rms: float


@dataclass(frozen=True, slots=True, eq=False)
class TensorStats:
    """Everything that one pass over a tensor's bytes finds out.

    Attributes:
        name, type, shape: of the tensor, in NumPy's order.
        count: elements; n_nan, n_inf, n_zero of them are what the names say.
        first_nan, first_inf: element index of the first.
        min, max: of the finite values, with the first element that has it; None without any.
        mean, std, skewness, kurtosis: of the finite values; a normal distribution has kurtosis 3. NaN where they
            are not defined (no finite values; skewness and kurtosis of a constant).
        histogram: the finite values other than zero, by magnitude and sign.
        rows, blocks, repeats: see there.
        scales, mins: of the blocks; None for plain numbers, and mins for types without.
        marks: None for types whose quantizer leaves none.
        bf16, f16: how the values of a float tensor lie on these grids; None for blocks and integers.
        experts: of a three-dimensional tensor, one a slice; empty otherwise.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    count: int
    n_nan: int
    n_inf: int
    n_zero: int
    first_nan: int | None
    first_inf: int | None
    min: Extreme | None
    max: Extreme | None
    mean: float
    std: float
    skewness: float
    kurtosis: float
    histogram: Histogram
    rows: RowStats
    blocks: BlockStats
    repeats: RepeatStats
    scales: ScaleStats | None = None
    mins: ScaleStats | None = None
    marks: MarkStats | None = None
    bf16: GridStats | None = None
    f16: GridStats | None = None
    experts: tuple[ExpertStats, ...] = field(default=())

    @property
    def n_finite(self) -> int:
        return self.count - self.n_nan - self.n_inf

    @property
    def absmax(self) -> Extreme | None:
        """The finite value of the largest magnitude."""
        if self.min is None or self.max is None:
            return None
        return self.max if self.max.value >= -self.min.value else self.min

    def coordinates(self, index: int) -> tuple[int, ...]:
        """An element index as one index an axis."""
        return tuple(int(part) for part in np.unravel_index(index, self.shape)) if self.shape else ()

    def block_coordinates(self, block: int) -> tuple[int, ...]:
        """The coordinates of a block's first element."""
        per_row = max(1, -(-self.rows.length // self.blocks.elements))
        row, column = divmod(block, per_row)
        return self.coordinates(row * self.rows.length + column * self.blocks.elements)
