"""Scanning chunks with the compiled kernels: `plain.scan` and the loops of `digest`, at the speed of memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ggufkit import jit, quants
from ggufkit.quants import QuantType
from ggufkit.quants.bits import F32, U8
from ggufkit.quants.compiled import Buffers, Unpacker
from ggufkit.quants.compiled import is_kept as unpacker_is_kept
from ggufkit.stats.blocks import BLOCKS_KEPT, Deviations
from ggufkit.stats.chunk import Chunk, Scanned
from ggufkit.stats.deviation import Levels
from ggufkit.stats.layout import (
    BIN_ROOM,
    BINS,
    CODE_MARKS,
    DEVIATION_BINS,
    GRID_FIRST,
    HISTOGRAM_STRIDE,
    LANES,
    N_KEPT,
    N_ZERO,
    OFF_BF16,
    OFF_F16,
    TINY_MINUS,
    TINY_PLUS,
    Mark,
)
from ggufkit.stats.plain import keys_of_runs
from ggufkit.stats.results import ByteRun
from ggufkit.stats.runs import SHORTEST_BYTE_RUN, ByteRuns
from ggufkit.stats.scales import ScaleDigest

_MODULE = "ggufkit.stats.kernels"

#: how the arguments of each kernel are passed
ARGUMENTS = {
    "scan_codes": "PPPLLLLLLDLLLL" + "P" * 18,
    "scan_values": "PLLDL" + "P" * 20,
    "deviate": "PLLL" + "P" * 11,
    "scan_scales": "PLPPP",
    "byte_runs": "PLLP",
    "widen_f16": "PLP",
    "widen_bf16": "PLP",
}
_WIDEN = {"F16": "widen_f16", "BF16": "widen_bf16"}


def kernels_for(qtype: QuantType) -> list[str]:
    """Names of the kernels that a tensor of this type needs, besides its unpacker."""
    scan = ["scan_codes", "scan_scales"] if qtype.is_block else ["scan_values"]
    return [*scan, "deviate", "byte_runs", *([_WIDEN[qtype.name]] if qtype.name in _WIDEN else [])]


def is_kept(types: set[QuantType]) -> bool:
    """Whether everything that tensors of these types need can be had without compiling."""
    names = {name for qtype in types for name in kernels_for(qtype)}
    unpackers = all(unpacker_is_kept(qtype) for qtype in types if qtype.is_block)
    return unpackers and all(jit.is_kept(_MODULE, name) for name in names)


def _kernel(name: str, announce: jit.Announce | None = None) -> jit.Kernel:
    return jit.kernel(_MODULE, name, ARGUMENTS[name], announce)


def _address(array: npt.NDArray[Any]) -> int:
    return array.ctypes.data


@dataclass(slots=True)
class _ByBlock:
    """Room for what the kernels keep by block. One more than blocks: the keys are kept before they are looked at."""

    squares: npt.NDArray[np.float64]
    lows: npt.NDArray[np.int8]
    highs: npt.NDArray[np.int8]
    kept: npt.NDArray[np.uint64]
    kept_at: npt.NDArray[np.int64]

    @classmethod
    def of(cls, n: int) -> _ByBlock:
        dtypes = (np.float64, np.int8, np.int8, np.uint64, np.int64)
        return cls(*(np.empty(n + 1, dtype) for dtype in dtypes))  # type: ignore[arg-type]


@dataclass(slots=True)
class Scanner:
    """One thread's scanner with its buffers, which are used again from chunk to chunk.

    Attributes:
        unpackers: by type name, shared by all threads.
    """

    unpackers: dict[str, Unpacker]
    _buffers: dict[str, Buffers] = field(default_factory=dict)
    _values: F32 = field(default_factory=lambda: np.empty(0, np.float32))
    _scratch: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(32))
    _bins: npt.NDArray[np.uint16] = field(default_factory=lambda: np.empty(BIN_ROOM, np.uint16))
    _lanes: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(4 * LANES))
    _by_block: _ByBlock = field(default_factory=lambda: _ByBlock.of(0))
    _padded: npt.NDArray[np.int16] = field(default_factory=lambda: np.empty(0, np.int16))
    _histogram: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(4 * HISTOGRAM_STRIDE, np.uint32))

    @classmethod
    def prepare(cls, types: set[QuantType], announce: jit.Announce | None = None) -> dict[str, Unpacker]:
        """Load, or compile, everything that tensors of these types need; returns the unpackers."""
        for name in sorted({name for qtype in types for name in kernels_for(qtype)}):
            _kernel(name, announce)
        blocks = sorted((qtype for qtype in types if qtype.is_block), key=lambda qtype: qtype.id)
        return {qtype.name: Unpacker(qtype, announce) for qtype in blocks}

    def scan(self, chunk: Chunk, raw: U8, pivot: float, sampled: int) -> Scanned:
        """See `plain.scan`; `raw` is C-contiguous and little-endian."""
        self._histogram[:] = 0
        if len(self._by_block.lows) <= chunk.n_blocks:
            self._by_block = _ByBlock.of(chunk.n_blocks)
        result = Scanned.empty(chunk)
        (self._scan_blocks if chunk.type.is_block else self._scan_numbers)(chunk, raw, pivot, sampled - 1, result)
        ints, counts = result.ints, self._histogram.reshape(4, HISTOGRAM_STRIDE)[:, :BINS].sum(axis=0, dtype=np.int64)
        ints[N_ZERO] += counts[0] + counts[BINS // 2] - ints[TINY_PLUS] - ints[TINY_MINUS]
        counts[[0, BINS // 2]] = ints[[TINY_PLUS, TINY_MINUS]]
        result.histogram = counts
        n = int(ints[N_KEPT])
        result.kept, result.kept_at = self._by_block.kept[:n].copy(), self._by_block.kept_at[:n].copy()
        return result

    def _outputs(self, result: Scanned) -> list[int]:
        """Addresses of the scratch memory and of what both kernels write."""
        room = self._by_block
        own = (self._scratch, self._bins, self._lanes, room.squares, room.lows, room.highs, self._histogram)
        blocks = (result.levels, result.flags, result.keys, room.kept, room.kept_at)
        rows = (result.row_min, result.row_max, result.row_square, result.row_bad)
        return [_address(array) for array in (*own, *blocks, *rows, result.ints, result.sums)]

    def _scan_blocks(self, chunk: Chunk, raw: U8, pivot: float, mask: int, result: Scanned) -> None:
        qtype, n = chunk.type, chunk.n_blocks
        parts = self._room(qtype, n)
        self.unpackers[qtype.name](raw, parts)
        result.flags, result.keys = parts.flags[:n], parts.keys[:n]
        result.d = parts.d[: n if qtype.d is not None else n * (qtype.block_size // qtype.group)]
        result.dmin = parts.dmin[:n] if qtype.has_min else None
        mark = CODE_MARKS.get(qtype.name, Mark(0))
        _kernel("scan_codes")(
            _address(parts.codes),
            _address(parts.scales),
            _address(parts.mins),
            int(qtype.has_min),
            chunk.unit,
            (qtype.group // chunk.unit).bit_length() - 1,
            qtype.block_size // chunk.unit,
            chunk.blocks_per_row,
            chunk.n_rows,
            pivot,
            *mark,
            mask,
            *self._outputs(result),
        )

    def _room(self, qtype: QuantType, n_blocks: int) -> Buffers:
        room = self._buffers.get(qtype.name)
        if room is None or len(room.flags) < n_blocks:
            self._buffers.clear()  # of one type at a time; a tensor's chunks come one after the other
            room = self._buffers[qtype.name] = Buffers.of(qtype, n_blocks)
        return room

    def _scan_numbers(self, chunk: Chunk, raw: U8, pivot: float, mask: int, result: Scanned) -> None:
        values = self._widen(chunk, raw)
        result.keys = keys_of_runs(chunk, raw)
        off_bf16, off_f16 = np.empty(GRID_FIRST, np.int64), np.empty(GRID_FIRST, np.int64)
        outputs = (*self._outputs(result), _address(off_bf16), _address(off_f16))
        _kernel("scan_values")(_address(values), chunk.row_length, chunk.n_rows, pivot, mask, *outputs)
        result.remember_off(values, off_bf16[: result.ints[OFF_BF16]], off_f16[: result.ints[OFF_F16]])

    def _widen(self, chunk: Chunk, raw: U8) -> F32:
        """The values as float32 [n]; of F32 the bytes themselves."""
        if chunk.type.name == "F32":
            return raw.view(np.float32)
        if len(self._values) < chunk.n_elements:
            self._values = np.empty(chunk.n_elements, np.float32)
        values = self._values[: chunk.n_elements]
        if chunk.type.name in _WIDEN:
            _kernel(_WIDEN[chunk.type.name])(_address(raw), chunk.n_elements, _address(values))
        else:
            quants.dequantize(chunk.type, raw, out=values)
        return values

    def deviate(self, levels: Levels) -> Deviations:
        """See `digest.Tools.deviate`."""
        n_rows, n_columns = levels.shape
        width = -(-n_columns // 32) * 32
        if len(self._padded) < n_rows * width:
            self._padded = np.empty(n_rows * width, np.int16)
        off, histogram = np.empty_like(levels), np.zeros(DEVIATION_BINS, np.int64)
        rows, row_counts = np.empty(n_rows, np.int16), np.empty(n_rows, np.int32)
        narrow, wide = np.empty((2, width), np.int16), np.empty((2, width), np.int32)
        worst = np.empty((2, BLOCKS_KEPT), np.int64)
        outputs = [
            _address(array) for array in (rows, *narrow, *wide, row_counts, self._padded, off, histogram, *worst)
        ]
        _kernel("deviate")(_address(levels), n_rows, n_columns, BLOCKS_KEPT, *outputs)
        return Deviations(off, histogram, worst[1][worst[1] >= 0])

    def byte_runs(self, data: U8) -> ByteRuns:
        """See `digest.Tools.byte_runs`."""
        found = np.empty(6, np.int64)
        _kernel("byte_runs")(_address(data), len(data), SHORTEST_BYTE_RUN, _address(found))
        start, length, zero_start, zero_length, before, after = found.tolist()
        return ByteRuns(
            len(data),
            ByteRun(int(data[0]), 0, before),
            ByteRun(int(data[-1]), len(data) - after, after),
            ByteRun(int(data[start]), start, length) if length else None,
            ByteRun(0, zero_start, zero_length) if zero_length else None,
        )

    def scan_scales(self, d: F32) -> ScaleDigest:
        """See `digest.Tools.scan_scales`."""
        histogram, ints, extremes = np.zeros(BINS, np.uint32), np.empty(6, np.int64), np.empty(2, np.float32)
        _kernel("scan_scales")(_address(d), len(d), _address(histogram), _address(ints), _address(extremes))
        n_nan, n_inf, first, n_zero, least_at, most_at = ints.tolist()
        least, most = extremes.tolist()
        counts = histogram.astype(np.int64)
        counts[[0, BINS // 2]] = 0
        return ScaleDigest(len(d), n_nan, n_inf, first, n_zero, least, least_at, most, most_at, counts)
