"""The pass over one chunk in NumPy: the specification of what is counted, and what serves small files.

Values are looked at in units of 32 elements (16 where a scale serves only 16); a float tensor's rows are cut into
units of 32, the last of a row may be shorter. What cannot be exact is added in a fixed order: the squares of a unit
lane by lane (element i and element i + half, and again), the units of a block and the blocks of a row one after
the other. The compiled pass (`kernels.py`) does the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ggufkit import quants
from ggufkit.quants import QuantType, Unpacked
from ggufkit.quants.bits import F32, U8, halves, words
from ggufkit.quants.fingerprint import marked
from ggufkit.stats.chunk import Chunk, Scanned, keys_of
from ggufkit.stats.layout import (
    BAD_BLOCKS,
    BAD_LEVEL,
    BINS,
    EQUAL_BLOCKS,
    FIRST_INF,
    FIRST_NAN,
    GRID_FIRST,
    MARKED,
    MAX,
    MAX_AT,
    MIN,
    MIN_AT,
    N_INF,
    N_KEPT,
    N_NAN,
    N_ZERO,
    OFF_BF16,
    OFF_F16,
    TINY_MINUS,
    TINY_PLUS,
    TINY_SCALE,
    UNIFORM,
    UNMARKED_BLOCKS,
    ZERO_BLOCKS,
)

F64 = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def scan(chunk: Chunk, raw: U8, pivot: float, sampled: int) -> Scanned:
    """Scan a chunk's bytes (uint8 [nbytes], little-endian).

    Args:
        pivot: what the sums of powers are taken about.
        sampled: one key in how many is kept, a power of two.
    """
    with np.errstate(all="ignore"):
        result = (_scan_blocks if chunk.type.is_block else _scan_numbers)(chunk, raw, pivot)
    _count_blocks(result, sampled)
    return result


def _count_blocks(result: Scanned, sampled: int) -> None:
    """What is counted block by block, once levels, flags and keys are known."""
    ints, keys = result.ints, np.where(result.flags & UNIFORM, np.uint64(0), result.keys)
    ints[ZERO_BLOCKS] = np.count_nonzero(result.levels == 0)
    ints[BAD_BLOCKS] = np.count_nonzero(result.levels == BAD_LEVEL)
    ints[UNMARKED_BLOCKS] = np.count_nonzero(result.flags & MARKED == 0)
    ints[EQUAL_BLOCKS] = np.count_nonzero((keys[1:] == keys[:-1]) & (keys[1:] != 0))
    kept = np.flatnonzero((keys & np.uint64(sampled - 1) == 0) & (keys != 0))
    ints[N_KEPT] = len(kept)
    result.keys, result.kept, result.kept_at = keys, keys[kept], kept


# Blocks


def _scan_blocks(chunk: Chunk, raw: U8, pivot: float) -> Scanned:
    blocks = raw.reshape(-1, chunk.type.type_size)
    parts = quants.unpack(chunk.type, raw)
    units = Unpacked(*(None if part is None else part.reshape(-1) for part in parts))  # type: ignore[arg-type]
    repeat = chunk.type.group // chunk.unit
    codes = units.codes.reshape(-1, chunk.unit)
    scales = np.repeat(units.scales, repeat)
    mins = np.full_like(scales, -0.0) if units.mins is None else np.repeat(units.mins, repeat)
    values = scales[:, None] * codes + mins[:, None]
    result = Scanned.empty(chunk)
    result.d, result.dmin = stored_scales(chunk.type, blocks, units)
    result.keys = keys_of(blocks)
    codes_by_block = codes.reshape(len(blocks), -1)
    flags = UNIFORM * (codes_by_block == codes_by_block[:, :1]).all(axis=1)
    bears = marked(chunk.type, blocks)
    result.flags[:] = flags + MARKED * (True if bears is None else bears)
    finite = np.isfinite(values)
    _count(result, values, finite)
    fine = finite.all(axis=1) & ((np.abs(scales) > TINY_SCALE) | (scales == 0))
    squares = np.where(fine, _coded_squares(codes, scales, mins), _tree(_squares(values, finite)))
    _blocks_and_rows(chunk, result, values, finite, squares, chunk.type.block_size)
    # the sums are those of scale · code + min itself; only at the ends of float32 those of the rounded values
    exact = scales[:, None].astype(np.float64) * codes + mins[:, None]
    _powers(result, np.where(fine[:, None], exact, values)[finite], pivot)
    return result


def stored_scales(qtype: QuantType, blocks: U8, parts: Unpacked) -> tuple[F32 | None, F32 | None]:
    """The scales and mins of the blocks as the file stores them, float32 [n]; of the groups where it stores none."""
    if qtype.name == "Q8_K":
        return words(blocks[:, :4], "u4").view(np.float32)[:, 0], None
    if qtype.d is None:
        return parts.scales.reshape(-1), None
    return halves(blocks, qtype.d)[:, 0], None if qtype.dmin is None else halves(blocks, qtype.dmin)[:, 0]


def _coded_squares(codes: npt.NDArray[np.int8], scales: F32, mins: F32) -> F64:
    """Sum of the squares of each unit, from exact sums over its codes."""
    wide = codes.astype(np.float64)
    s, m = scales.astype(np.float64), mins.astype(np.float64)
    s1, s2 = wide.sum(axis=1), (wide * wide).sum(axis=1)
    result: F64 = s * s * s2 + 2.0 * m * (s * s1) + codes.shape[1] * (m * m)
    return result


# Plain numbers


def _scan_numbers(chunk: Chunk, raw: U8, pivot: float) -> Scanned:
    values = quants.dequantize(chunk.type, raw).reshape(chunk.n_rows, chunk.row_length)
    width = chunk.blocks_per_row * 32
    padded = np.zeros((chunk.n_rows, width), np.float32)
    padded[:, : chunk.row_length] = values
    there = np.zeros((chunk.n_rows, width), np.bool_)
    there[:, : chunk.row_length] = True
    units, present = padded.reshape(-1, 32), there.reshape(-1, 32)
    finite = np.isfinite(units) & present
    result = Scanned.empty(chunk)
    result.keys = keys_of_runs(chunk, raw)
    low = np.where(present, units, np.inf).min(axis=1)
    high = np.where(present, units, -np.inf).max(axis=1)
    result.flags[:] = MARKED + UNIFORM * ((low == high) & np.isfinite(low))
    flat = values.reshape(-1)
    whole = np.isfinite(flat)
    _count(result, flat, whole)
    _grids(result, flat, whole)
    _blocks_and_rows(chunk, result, units, finite, _tree(_squares(units, finite)), present.sum(axis=1), present)
    _powers(result, flat[whole], pivot)
    return result


def keys_of_runs(chunk: Chunk, raw: U8) -> npt.NDArray[np.uint64]:
    """The keys of the runs of 32 numbers; 0 for a shorter last run of a row, which is compared with nothing."""
    size = chunk.type.type_size
    keys = np.zeros((chunk.n_rows, chunk.blocks_per_row), np.uint64)
    full = chunk.row_length // 32
    rows = raw.reshape(chunk.n_rows, chunk.row_length * size)[:, : full * 32 * size]
    keys[:, :full] = keys_of(rows.reshape(-1, 32 * size)).reshape(chunk.n_rows, full)
    return keys.reshape(-1)


def _grids(result: Scanned, values: F32, finite: Flags) -> None:
    """Which values bfloat16 and f16 cannot hold."""
    off_bf16 = np.flatnonzero((values.view(np.uint32) & 0xFFFF != 0) & finite)
    off_f16 = np.flatnonzero((values.astype(np.float16).astype(np.float32) != values) & finite)
    result.ints[OFF_BF16], result.ints[OFF_F16] = len(off_bf16), len(off_f16)
    result.remember_off(values, off_bf16[:GRID_FIRST], off_f16[:GRID_FIRST])


# Both


def _squares(values: F32, finite: Flags) -> F64:
    wide = np.where(finite, values, np.float32(0)).astype(np.float64)
    return wide * wide


def _tree(terms: F64) -> F64:
    """Add up the last axis (a power of two): element i and element i + half, and again."""
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def _in_order(terms: F64) -> F64:
    """Add up the last axis one after the other."""
    return np.cumsum(terms, axis=-1)[..., -1]


def _count(result: Scanned, values: F32, finite: Flags) -> None:
    """Everything that is counted element by element, and the extremes with their places."""
    flat, whole, ints = values.reshape(-1), finite.reshape(-1), result.ints
    patterns = flat.view(np.uint32)
    result.histogram[:] = np.bincount(patterns[whole & (flat != 0)] >> 21, minlength=BINS)
    ints[TINY_PLUS], ints[TINY_MINUS] = result.histogram[0], result.histogram[BINS // 2]
    ints[N_ZERO] = np.count_nonzero(flat == 0)
    nan, inf = np.isnan(flat), np.isinf(flat)
    ints[N_NAN], ints[N_INF] = np.count_nonzero(nan), np.count_nonzero(inf)
    ints[FIRST_NAN] = nan.argmax() if nan.any() else -1
    ints[FIRST_INF] = inf.argmax() if inf.any() else -1
    if whole.any():
        low, high = np.where(whole, flat, np.inf), np.where(whole, flat, -np.inf)
        ints[MIN_AT], ints[MAX_AT] = low.argmin(), high.argmax()
        result.sums[MIN], result.sums[MAX] = low.min(), high.max()


def _blocks_and_rows(
    chunk: Chunk,
    result: Scanned,
    values: F32,
    finite: Flags,
    squares: F64,
    elements: int | npt.NDArray[np.int64],
    present: Flags | None = None,
) -> None:
    """Levels of the blocks, and the rows, from units [u, 32 or 16] and the sum of the squares of each."""
    block_square = _in_order(squares.reshape(chunk.n_blocks, -1))
    whole = finite if present is None else finite | ~present
    bad = ~whole.all(axis=1).reshape(chunk.n_blocks, -1).all(axis=1)
    levels = (block_square / elements).view(np.uint64) >> np.uint64(49)
    result.levels[:] = np.where(bad, BAD_LEVEL, levels.astype(np.int16))
    result.row_square[:] = _in_order(block_square.reshape(chunk.n_rows, -1))
    rows, fine = values.reshape(chunk.n_rows, -1), finite.reshape(chunk.n_rows, -1)
    result.row_min[:] = np.where(fine, rows, np.inf).min(axis=1)
    result.row_max[:] = np.where(fine, rows, -np.inf).max(axis=1)
    result.row_bad[:] = np.count_nonzero(~whole.reshape(chunk.n_rows, -1), axis=1)


def _powers(result: Scanned, values: F32 | F64, pivot: float) -> None:
    y = values.astype(np.float64) - pivot
    y2 = y * y
    result.sums[:4] = y.sum(), y2.sum(), (y2 * y).sum(), (y2 * y2).sum()
