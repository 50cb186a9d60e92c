"""Weights as the CPU engine keeps them: one byte a weight, and a scale a group, laid out for the kernels.

Every block type is value = scale · code + min with a small integer code (see `quants`), so int8 codes with the
float32 scales lose nothing and take at most 1.5 bytes a weight: with both, a scale and a min, for 16 weights.
F16 and BF16 keep their two bytes; what is wider is kept as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufkit import quants
from ggufkit.container import GGUF, Tensor
from ggufkit.runtime.cpu.interleave import interleave
from ggufkit.runtime.cpu.kernels import BFLOAT16, CODES, CODES_MINS, FLOAT16, FLOAT32, PANEL
from ggufkit.runtime.cpu.program import available_threads
from ggufkit.runtime.cpu.simd import LANES
from ggufkit.runtime.engine import Edit
from ggufkit.runtime.weights import Weights

#: called with the bytes packed so far and those to pack in all
Progress = Callable[[int, int], None]

_PIECE = 1 << 19  # weights that a thread packs at a time: temporary arrays stay small
#: two-byte floats by the integer type that tells the kernels which they are
_HALVES = {"F16": np.dtype(np.int16), "BF16": np.dtype(np.uint16)}


@dataclass(frozen=True, slots=True)
class Matrix:
    """A packed matrix of `rows` by `columns`.

    Attributes:
        data: [blocks, columns, LANES]: int8 codes, int16 (float16 bits), uint16 (bfloat16 bits) or float32.
        scales, mins: float32 [blocks, columns / group, LANES], for codes.
        group: columns that share a scale; all of them where there are none.
    """

    rows: int
    columns: int
    data: NDArray[Any]
    scales: NDArray[np.float32] | None
    mins: NDArray[np.float32] | None
    group: int

    @property
    def blocks(self) -> int:
        """Blocks of LANES rows."""
        return len(self.data)

    @property
    def layout(self) -> int:
        """How the kernels have to read it."""
        if self.data.dtype == np.int8:
            return CODES if self.mins is None else CODES_MINS
        return {np.dtype(np.int16): FLOAT16, np.dtype(np.uint16): BFLOAT16}.get(self.data.dtype, FLOAT32)

    @property
    def nbytes(self) -> int:
        """What one product with it reads."""
        return sum(part.nbytes for part in (self.data, self.scales, self.mins) if part is not None)


class PackedWeights:
    """The tensors of a model: matrices packed, vectors as float32, rows of the embedding read when asked for.

    Args:
        gguf: stays open as long as this is used.
        matrices: the names to pack.
        progress: told how far packing is.
    """

    def __init__(self, gguf: GGUF, matrices: Iterable[str], progress: Progress | None = None) -> None:
        self._floats = Weights(gguf, keep=True)
        names = tuple(matrices)
        self._matrices: dict[str, Matrix] = dict(zip(names, self._pack(names, progress), strict=True))

    def matrix(self, name: str) -> Matrix:
        return self._matrices[name]

    def vector(self, name: str) -> NDArray[np.float32]:
        return self._floats[name]

    def rows(self, name: str, ids: Any) -> NDArray[np.float32]:
        """Some rows of a matrix, float32, straight from the file."""
        return self._floats.rows(name, ids)

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self._matrices.values())

    @contextmanager
    def patched(self, edits: Iterable[Edit]) -> Iterator[None]:
        """With some packed bytes replaced; see `Engine.patched`. What was packed before is put back as it was."""
        added = list(edits)
        with self._floats.patched(added):
            before = self._matrices
            touched = tuple({edit.tensor for edit in added} & before.keys())
            self._matrices = before | dict(zip(touched, self._pack(touched), strict=True))
            try:
                yield
            finally:
                self._matrices = before

    def _pack(self, names: tuple[str, ...], progress: Progress | None = None) -> list[Matrix]:
        """Pack whole matrices in pieces of rows, on all threads."""
        tensors = [self._floats.gguf.tensor(name) for name in names]
        made = [_empty(tensor) for tensor in tensors]
        pieces = [(t, m, first, n) for t, m in zip(tensors, made, strict=True) for first, n in _pieces(t)]
        done, total = 0, sum(tensor.nbytes or 0 for tensor in tensors)
        with ThreadPoolExecutor(available_threads()) as pool:
            for nbytes in pool.map(self._fill, *zip(*pieces, strict=True)):
                done += nbytes
                if progress is not None:
                    progress(done, total)
        return made

    def _fill(self, tensor: Tensor, matrix: Matrix, first: int, count: int) -> int:
        """Put `count` rows into their place; the packed bytes that they took in the file."""
        raw = self._floats.packed_rows(tensor.name, first, count)
        parts = _take_apart(tensor, raw, self._floats.gguf.byteorder)
        for rows, out in zip(parts, (matrix.data, matrix.scales, matrix.mins), strict=True):
            if rows is not None:
                interleave(rows, out, first // LANES)
        return raw.nbytes


def _pieces(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Rows [first, first + count) that are packed together: whole panels."""
    step = max(_PIECE // tensor.dims[0] // PANEL, 1) * PANEL
    for first in range(0, tensor.n_rows, step):
        yield first, min(step, tensor.n_rows - first)


def _empty(tensor: Tensor) -> Matrix:
    """Room for a matrix; rows are filled up to whole panels, with zeros."""
    type_, (rows, columns) = tensor.type, tensor.shape
    assert type_ is not None  # engines refuse unknown types before they load
    group = type_.group if type_.is_block else columns
    dtype = np.dtype(np.int8) if type_.is_block else _HALVES.get(type_.name, np.dtype(np.float32))

    def room(width: int, dtype: Any) -> NDArray[Any]:
        blocks = -(-rows // PANEL) * (PANEL // LANES)
        made = np.empty((blocks, width, LANES), dtype)
        made[rows // LANES :] = 0
        return made

    scales = room(columns // group, np.float32) if type_.is_block else None
    mins = room(columns // group, np.float32) if type_.has_min else None
    return Matrix(rows, columns, room(columns, dtype), scales, mins, group)


def _take_apart(tensor: Tensor, raw: NDArray[np.uint8], byteorder: str) -> tuple[NDArray[Any] | None, ...]:
    """Rows of packed bytes as rows of codes (or floats), scales and mins."""
    type_ = tensor.type
    assert type_ is not None
    if type_.is_block:
        return quants.unpack(type_, raw, byteorder)
    if type_.name in _HALVES:
        little = raw if byteorder == "little" else quants.to_little(type_, raw)
        return little.view(_HALVES[type_.name]), None, None
    return quants.dequantize(type_, raw, byteorder=byteorder), None, None
