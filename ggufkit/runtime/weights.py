"""Dequantized tensors on demand, for engines that compute in floats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from ggufkit import quants
from ggufkit.container import GGUF, Tensor
from ggufkit.errors import UsageError
from ggufkit.runtime.engine import Edit, apply_edits

Floats = NDArray[np.float32]

#: models up to this many bytes of float32 are kept once dequantized
KEEP_BYTES = 6 << 30
#: bytes of float32 from which on compiled kernels are worth their compiling, however small each tensor is
_LARGE = 256 << 20


class Weights:
    """The tensors of an opened file as float32 arrays of NumPy shape.

    Args:
        gguf: stays open as long as this is used.
        keep: keep what was dequantized; by default when the whole model stays below `KEEP_BYTES`.
        reuse: dequantize each tensor to where the last one of its shape was, for those who are done with it by then:
            half of the time goes into memory that is touched for the first time.
    """

    def __init__(self, gguf: GGUF, *, keep: bool | None = None, reuse: bool = False) -> None:
        self.gguf = gguf
        total = 4 * sum(tensor.n_elements for tensor in gguf.tensors.values())
        self._keep = total <= KEEP_BYTES if keep is None else keep
        self._large = total > _LARGE
        self._reuse = reuse
        self._buffers: dict[tuple[int, ...], Floats] = {}
        self._kept: dict[str, Floats] = {}
        self._edits: dict[str, list[Edit]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.gguf.tensors

    def __getitem__(self, name: str) -> Floats:
        """The whole tensor, float32."""
        if name in self._kept:
            return self._kept[name]
        tensor = self.gguf.tensor(name)
        out = self._buffer((tensor.n_rows, tensor.dims[0])) if self._reuse else None
        values = self._decode(name, 0, tensor.n_rows, out).reshape(tensor.shape)
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

    def _decode(self, name: str, first_row: int, n_rows: int, out: Floats | None = None) -> Floats:
        tensor = self.gguf.tensor(name)
        assert tensor.type is not None  # read() has refused unknown types
        if self._large and tensor.type.is_block:
            quants.get_ready(tensor.type)
        raw = self.packed_rows(name, first_row, n_rows)
        return quants.dequantize(tensor.type, raw, byteorder=self.gguf.byteorder, out=out)

    def _buffer(self, shape: tuple[int, ...]) -> Floats:
        return self._buffers.setdefault(shape, np.empty(shape, np.float32))


def edits_within(edits: Iterable[Edit], start: int, count: int) -> Iterator[Edit]:
    """The parts of the edits that fall into bytes [start, start + count), relative to `start`."""
    for edit in edits:
        low, high = max(edit.start, start), min(edit.start + len(edit.data), start + count)
        if low < high:
            yield Edit(edit.tensor, low - start, edit.data[low - edit.start : high - edit.start])
