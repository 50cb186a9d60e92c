"""Weights as the CPU engine keeps them: one byte a weight, and a scale a group, laid out for the kernels.

Every block type is value = scale · code + min with a small integer code (see `quants`), so int8 codes with the
float32 scales lose nothing and take at most 1.5 bytes a weight: with both, a scale and a min, for 16 weights.
F16 and BF16 keep their two bytes; what is wider is kept as float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufkit import quants
from ggufkit.container import GGUF, Tensor
from ggufkit.quants import compiled
from ggufkit.runtime.cpu.interleave import interleave
from ggufkit.runtime.cpu.kernels import BFLOAT16, CODES, CODES_MINS, FLOAT16, FLOAT32, PANEL
from ggufkit.runtime.cpu.program import available_threads
from ggufkit.runtime.cpu.simd import LANES
from ggufkit.runtime.engine import Edit
from ggufkit.runtime.weights import Weights

#: called with the bytes packed so far and those to pack in all
Progress = Callable[[int, int], None]

Part = tuple[tuple[int, ...], np.dtype[Any]]  # shape and dtype
_LINE = 64  # bytes of a cache line
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
        arena = _Arena(part for tensor in tensors for part in _parts(tensor) if part is not None)
        made = [_empty(tensor, arena) for tensor in tensors]
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


class _Arena:
    """One large piece of memory, which the system can give in large pages: there is less to look up while reading."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._memory = np.empty(sum(map(self._room, parts)) + _LINE, np.uint8)
        self._at = -self._memory.ctypes.data % _LINE

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The next part of it, on a cache line of its own."""
        nbytes = math.prod(shape) * dtype.itemsize
        part = self._memory[self._at : self._at + nbytes].view(dtype).reshape(shape)
        self._at += self._room((shape, dtype))
        return part

    @staticmethod
    def _room(part: Part) -> int:
        shape, dtype = part
        return -(-math.prod(shape) * dtype.itemsize // _LINE) * _LINE


def _parts(tensor: Tensor) -> tuple[Part, Part | None, Part | None]:
    """Shapes and dtypes of a packed tensor's data, scales and mins; rows are filled up to whole panels."""
    type_, (rows, columns) = tensor.type, tensor.shape
    assert type_ is not None  # engines refuse unknown types before they load
    blocks = -(-rows // PANEL) * (PANEL // LANES)
    if not type_.is_block:
        return ((blocks, columns, LANES), _HALVES.get(type_.name, np.dtype(np.float32))), None, None
    scale = (blocks, columns // type_.group, LANES), np.dtype(np.float32)
    return ((blocks, columns, LANES), np.dtype(np.int8)), scale, scale if type_.has_min else None


def _empty(tensor: Tensor, arena: _Arena) -> Matrix:
    """Room for a tensor, with zeros where there are no rows."""
    rows, columns = tensor.shape
    data, scales, mins = (None if part is None else arena.take(*part) for part in _parts(tensor))
    for part in (data, scales, mins):
        if part is not None:
            part[rows // LANES :] = 0
    assert data is not None
    return Matrix(rows, columns, data, scales, mins, columns if scales is None else columns // scales.shape[1])


def _take_apart(tensor: Tensor, raw: NDArray[np.uint8], byteorder: str) -> tuple[NDArray[Any] | None, ...]:
    """Rows of packed bytes as rows of codes (or floats), scales and mins."""
    type_ = tensor.type
    assert type_ is not None
    little = raw if byteorder == "little" else quants.to_little(type_, raw)
    if type_.is_block:
        return compiled.unpack(type_, little)
    if type_.name in _HALVES:
        return little.view(_HALVES[type_.name]), None, None
    return quants.dequantize(type_, little), None, None
