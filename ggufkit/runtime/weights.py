"""Dequantized tensors on demand, for engines that compute in floats."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from ggufkit import quants
from ggufkit.container import GGUF, Tensor
from ggufkit.errors import UsageError
from ggufkit.runtime.engine import Edit, apply_edits
from ggufkit.threads import pool

Floats = NDArray[np.float32]

#: models up to this many bytes of float32 are kept once dequantized
KEEP_BYTES = 6 << 30
#: bytes of float32 from which on compiled kernels are worth their compiling, however small each tensor is
_LARGE = 256 << 20
#: elements that one thread unpacks at a time
_PIECE = 1 << 20


class Weights:
    """The tensors of an opened file as float32 arrays of NumPy shape.

    Args:
        gguf: stays open as long as this is used.
        keep: keep what was dequantized; by default when the whole model stays below `KEEP_BYTES`.
    """

    def __init__(self, gguf: GGUF, *, keep: bool | None = None) -> None:
        self.gguf = gguf
        total = 4 * sum(tensor.n_elements for tensor in gguf.tensors.values())
        self._keep = total <= KEEP_BYTES if keep is None else keep
        self._large = total > _LARGE
        self._kept: dict[str, Floats] = {}
        self._edits: dict[str, list[Edit]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.gguf.tensors

    def __getitem__(self, name: str) -> Floats:
        """The whole tensor, float32."""
        if name in self._kept:
            return self._kept[name]
        tensor = self.gguf.tensor(name)
        values = self._decode(name, 0, tensor.n_rows).reshape(tensor.shape)
        if self._keep:
            self._kept[name] = values
        return values

    def rows(self, name: str, ids: Sequence[int]) -> Floats:
        """Some rows of a matrix, float32 [len(ids), in_features], without dequantizing the rest."""
        if name in self._kept:
            return self._kept[name][np.asarray(ids)]
        tensor = self.gguf.tensor(name)
        unique, places = np.unique(np.asarray(ids), return_inverse=True)
        table = np.concatenate([self._decode(name, int(row), 1) for row in unique])
        return table.reshape(len(unique), tensor.dims[0])[places]

    def packed(self, name: str) -> tuple[Tensor, NDArray[np.uint8]]:
        """A tensor's entry and its packed bytes as they are run, uint8 [rows, bytes of a row]."""
        tensor = self.gguf.tensor(name)
        return tensor, self.packed_rows(name, 0, tensor.n_rows)

    def packed_rows(self, name: str, first: int, count: int) -> NDArray[np.uint8]:
        """The packed bytes of some rows as they are run, uint8 [count, bytes of a row]."""
        tensor = self.gguf.tensor(name)
        row_bytes = (tensor.nbytes or 0) // max(tensor.n_rows, 1)
        start, size = first * row_bytes, count * row_bytes
        raw = self.gguf.read(tensor, start, size)
        apply_edits(raw, edits_within(self._edits.get(name, ()), start, size))
        return raw.reshape(count, row_bytes)

    @contextmanager
    def patched(self, edits: Iterable[Edit]) -> Iterator[None]:
        """With some packed bytes replaced; see `Engine.patched`.

        Raises:
            UsageError: an edit names no tensor of the file or leaves it.
        """
        added = list(edits)
        for edit in added:
            tensor = self.gguf.tensor(edit.tensor)
            if edit.start < 0 or edit.start + len(edit.data) > (tensor.nbytes or 0):
                raise UsageError(f"an edit of {len(edit.data)} bytes at {edit.start} leaves {edit.tensor}")
        touched = {edit.tensor for edit in added}
        before, kept = self._edits, {name: self._kept.pop(name) for name in touched & self._kept.keys()}
        self._edits = before | {name: [*before.get(name, ())] for name in touched}
        for edit in added:
            self._edits[edit.tensor].append(edit)
        try:
            yield
        finally:
            self._edits = before
            for name in touched:
                self._kept.pop(name, None)
            self._kept.update(kept)

    def _decode(self, name: str, first_row: int, n_rows: int) -> Floats:
        """Some rows, in threads where there are many: NumPy unpacks without a lock."""
        tensor = self.gguf.tensor(name)
        assert tensor.type is not None  # read() has refused unknown types
        if self._large and tensor.type.is_block:
            quants.get_ready(tensor.type)
        if (step := max(_PIECE // max(tensor.dims[0], 1), 1)) >= n_rows:
            return self._decode_piece(tensor, first_row, n_rows)
        values = np.empty((n_rows, tensor.dims[0]), np.float32)

        def fill(start: int) -> None:
            count = min(step, n_rows - start)
            self._decode_piece(tensor, first_row + start, count, values[start : start + count])

        deque(pool().map(fill, range(0, n_rows, step)), maxlen=0)
        return values

    def _decode_piece(self, tensor: Tensor, first_row: int, n_rows: int, out: Floats | None = None) -> Floats:
        assert tensor.type is not None  # read() has refused unknown types
        raw = self.packed_rows(tensor.name, first_row, n_rows)
        return quants.dequantize(tensor.type, raw, byteorder=self.gguf.byteorder, out=out)


def edits_within(edits: Iterable[Edit], start: int, count: int) -> Iterator[Edit]:
    """The parts of the edits that fall into bytes [start, start + count), relative to `start`."""
    for edit in edits:
        low, high = max(edit.start, start), min(edit.start + len(edit.data), start + count)
        if low < high:
            yield Edit(edit.tensor, low - start, edit.data[low - edit.start : high - edit.start])
