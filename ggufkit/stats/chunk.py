"""A chunk of a tensor, and what scanning it fills.

How a tensor is cut depends on its type and shape alone, never on the machine or the number of threads; that and
adding up in order is why the same file gives the same numbers everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ggufkit.quants import QuantType
from ggufkit.quants.bits import F32, U8
from ggufkit.stats.layout import BINS, FIRST_INF, FIRST_NAN, MAX, MAX_AT, MIN, MIN_AT, N_INTS, N_SUMS

#: bytes of a chunk, at most: large enough for the work per chunk to vanish, small enough for the cache and for
#: many cores to share one tensor
CHUNK_BYTES = 4 << 20

#: elements of a chunk, at most: a byte of a one-bit type unpacks to seven times its size
CHUNK_ELEMENTS = 1 << 23


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole rows of a tensor, or a piece of one row that is longer than a chunk.

    Attributes:
        type: of the tensor.
        row: number of the first row.
        column: of the first element in that row; 0 unless it is a piece.
        n_rows, row_length: rows, and elements in each (in the piece).
        full_row: elements in a row of the tensor.
        blocks_per_row: blocks in each; runs of 32 elements for plain numbers, the last may be shorter.
        first_block: number of the first block, counted from the beginning of the tensor.
        offset, nbytes: its bytes, from the beginning of the tensor.
        first_element: number of the first element.
    """

    type: QuantType
    row: int
    column: int
    n_rows: int
    row_length: int
    full_row: int
    blocks_per_row: int
    first_block: int
    offset: int
    nbytes: int
    first_element: int

    @property
    def ends_row(self) -> bool:
        """Whether the last element of the chunk is the last of a row; only in a piece it may be another."""
        return self.column + self.row_length == self.full_row

    @property
    def n_blocks(self) -> int:
        return self.n_rows * self.blocks_per_row

    @property
    def n_elements(self) -> int:
        return self.n_rows * self.row_length

    @property
    def block_elements(self) -> int:
        """Elements of a block, or of a run of plain numbers."""
        return self.type.block_size if self.type.is_block else 32

    @property
    def block_bytes(self) -> int:
        return self.block_elements // self.type.block_size * self.type.type_size

    @property
    def unit(self) -> int:
        """Elements that are looked at together: those of a scale, but 32 at most."""
        return min(self.type.group, 32) if self.type.is_block else 32


def chunks(qtype: QuantType, n_rows: int, row_length: int) -> Iterator[Chunk]:
    """Cut a tensor of `n_rows` rows of `row_length` elements."""
    if n_rows == 0 or row_length == 0:
        return
    elements = qtype.block_size if qtype.is_block else 32
    block_bytes = elements // qtype.block_size * qtype.type_size
    most = max(1, min(CHUNK_BYTES // block_bytes, CHUNK_ELEMENTS // elements))  # blocks in a chunk
    blocks_per_row = -(-row_length // elements)
    row_bytes = qtype.nbytes(row_length)
    rows, columns = max(1, most // blocks_per_row), min(most, blocks_per_row)
    for row in range(0, n_rows, rows):
        for block in range(0, blocks_per_row, columns):
            column = block * elements
            count, length = min(rows, n_rows - row), min(columns * elements, row_length - column)
            yield Chunk(
                qtype,
                row,
                column,
                count,
                length,
                row_length,
                -(-length // elements),
                row * blocks_per_row + block,
                row * row_bytes + qtype.nbytes(column),
                count * qtype.nbytes(length),
                row * row_length + column,
            )


@dataclass(slots=True)
class Scanned:
    """What scanning a chunk finds; places and indices count from the beginning of the chunk.

    Attributes:
        ints, sums: single numbers, at the places that `layout` names.
        histogram: int64 [BINS], finite values other than zero by the eleven top bits of the float32.
        levels: int16 [blocks], the twelve exponent bits and three mantissa bits of the mean square (float64).
        flags: uint8 [blocks], see `layout`.
        keys: uint64 [blocks], see `keys_of`; 0 where all values are equal: such blocks are no repetition.
        kept, kept_at: the keys that were sampled, and their places.
        row_min, row_max: float32 [rows], of the finite values; +inf and -inf where there are none.
        row_square: float64 [rows], the sum of the squares of the finite values.
        row_bad: int64 [rows], how many are not finite.
        d, dmin: float32 [blocks], scales and mins as the file stores them; None for plain numbers.
        off_bf16, off_f16: the first elements off these grids, at most GRID_FIRST, with their values.
    """

    ints: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]
    histogram: npt.NDArray[np.int64]
    levels: npt.NDArray[np.int16]
    flags: U8
    keys: npt.NDArray[np.uint64]
    kept: npt.NDArray[np.uint64]
    kept_at: npt.NDArray[np.int64]
    row_min: F32
    row_max: F32
    row_square: npt.NDArray[np.float64]
    row_bad: npt.NDArray[np.int64]
    off_bf16: list[tuple[int, float]]
    off_f16: list[tuple[int, float]]
    d: F32 | None = None
    dmin: F32 | None = None

    @classmethod
    def empty(cls, chunk: Chunk) -> Scanned:
        """Room for what a scan of `chunk` finds."""
        blocks, rows = chunk.n_blocks, chunk.n_rows
        ints, sums = np.zeros(N_INTS, np.int64), np.zeros(N_SUMS)
        ints[[FIRST_NAN, FIRST_INF, MIN_AT, MAX_AT]] = -1
        sums[[MIN, MAX]] = np.inf, -np.inf
        return cls(
            ints,
            sums,
            np.zeros(BINS, np.int64),
            np.empty(blocks, np.int16),
            np.zeros(blocks, np.uint8),
            np.empty(blocks, np.uint64),
            np.empty(0, np.uint64),
            np.empty(0, np.int64),
            np.empty(rows, np.float32),
            np.empty(rows, np.float32),
            np.empty(rows, np.float64),
            np.empty(rows, np.int64),
            [],
            [],
        )

    def remember_off(self, values: F32, off_bf16: npt.NDArray[np.int64], off_f16: npt.NDArray[np.int64]) -> None:
        """Keep the elements at these places of `values` as those off the grids."""
        self.off_bf16 = list(zip(off_bf16.tolist(), values[off_bf16].tolist(), strict=True))
        self.off_f16 = list(zip(off_f16.tolist(), values[off_f16].tolist(), strict=True))

    def forget_blocks(self) -> None:
        """Drop what was needed by block: the arrays may be buffers that the next chunk will fill."""
        self.levels, self.flags, self.keys = self.levels[:0], self.flags[:0], self.keys[:0]
        self.d = self.dmin = None


def keys_of(blocks: U8) -> npt.NDArray[np.uint64]:
    """64 bits for each block, mixed from its first eight bytes and eight in the middle: uint8 [n, size] -> [n].

    Enough to tell apart the blocks of any healthy tensor; whoever finds two equal keys compares the bytes.
    """
    middle = blocks.shape[1] // 2
    first = np.ascontiguousarray(blocks[:, :8]).view("<u8")[:, 0]
    second = np.ascontiguousarray(blocks[:, middle : middle + 8]).view("<u8")[:, 0]
    mixed = (first * np.uint64(0x9E3779B97F4A7C15) + second) * np.uint64(0xC2B2AE3D27D4EB4F)
    result: npt.NDArray[np.uint64] = mixed ^ mixed >> np.uint64(32)
    return result
