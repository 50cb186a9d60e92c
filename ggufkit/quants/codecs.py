"""From raw bytes to values, in plain NumPy: which function takes which type apart, and the two public verbs.

This is the specification of the block formats; `kernels.py` does the same faster, is tested against it, and takes
over for large arrays.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ggufkit.errors import FormatError, Unsupported
from ggufkit.quants import QuantType, Unpacked, fp4, iq, k, legacy, ternary
from ggufkit.quants.bits import F32, U8

#: each takes uint8 [n, type_size] and returns codes [n, block_size], scales and mins [n, block_size / group]
UNPACKERS: dict[str, Callable[[U8], Unpacked]] = {
    "Q4_0": legacy.q4_0,
    "Q4_1": legacy.q4_1,
    "Q5_0": legacy.q5_0,
    "Q5_1": legacy.q5_1,
    "Q8_0": legacy.q8_0,
    "Q1_0": legacy.q1_0,
    "Q2_0": legacy.q2_0,
    "Q2_K": k.q2_k,
    "Q3_K": k.q3_k,
    "Q4_K": k.q4_k,
    "Q5_K": k.q5_k,
    "Q6_K": k.q6_k,
    "Q8_K": k.q8_k,
    "IQ1_S": iq.iq1_s,
    "IQ1_M": iq.iq1_m,
    "IQ2_XXS": iq.iq2_xxs,
    "IQ2_XS": iq.iq2_xs,
    "IQ2_S": iq.iq2_s,
    "IQ3_XXS": iq.iq3_xxs,
    "IQ3_S": iq.iq3_s,
    "IQ4_NL": fp4.iq4_nl,
    "IQ4_XS": fp4.iq4_xs,
    "TQ1_0": ternary.tq1_0,
    "TQ2_0": ternary.tq2_0,
    "MXFP4": fp4.mxfp4,
    "NVFP4": fp4.nvfp4,
}

#: how the bytes of the plain numbers are read; BF16 is the upper half of a float32
NUMBERS = {
    "F32": "<f4",
    "F16": "<f2",
    "F64": "<f8",
    "I8": "i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
}

#: blocks that are taken apart at once, so that the intermediate arrays stay in the cache
_TILE = 4096

#: bytes from which on the compiled kernels are worth their compiling, and, once that is done, their loading
LARGE, MEDIUM = 4 << 20, 1 << 18


def check_whole_blocks(qtype: QuantType, raw: U8) -> None:
    """Raise `FormatError` unless the last axis holds whole blocks."""
    if raw.ndim == 0 or raw.shape[-1] % qtype.type_size:
        raise FormatError(
            f"{raw.shape[-1] if raw.ndim else 1} bytes are no whole number of {qtype.name} blocks",
            expected=f"a multiple of {qtype.type_size} bytes",
        )


def _unpacker(qtype: QuantType) -> Callable[[U8], Unpacked]:
    if qtype.name in UNPACKERS:
        return UNPACKERS[qtype.name]
    reason = "is never stored in a model file" if qtype.is_block else "holds plain numbers, not codes"
    raise Unsupported(f"{qtype.name} {reason}", expected="a block type that ggufkit decodes")


def unpack(qtype: QuantType, raw: U8, byteorder: str = "little") -> Unpacked:
    """See `ggufkit.quants.unpack`."""
    take_apart = _unpacker(qtype)
    check_whole_blocks(qtype, raw)
    blocks = np.ascontiguousarray(raw if byteorder == "little" else to_little(qtype, raw))
    if raw.nbytes >= LARGE:
        from ggufkit.quants import compiled

        return compiled.unpack(qtype, blocks)
    with np.errstate(all="ignore"):  # a NaN scale is a finding of the validator, not an accident here
        parts = take_apart(blocks.reshape(-1, qtype.type_size))
    lead = raw.shape[:-1]
    return Unpacked(*(None if part is None else part.reshape(*lead, -1) for part in parts))  # type: ignore[arg-type]


def _dequantize_blocks(qtype: QuantType, raw: U8, out: F32) -> None:
    """uint8 [n · type_size] -> float32 [n · block_size], a tile at a time."""
    if raw.nbytes >= MEDIUM:
        from ggufkit.quants import compiled

        if raw.nbytes >= LARGE or compiled.is_kept(qtype):
            compiled.dequantize(qtype, raw, out.reshape(-1))
            return
    values = out.reshape(-1, qtype.block_size // qtype.group, qtype.group)
    for start in range(0, len(values), _TILE):
        tile = values[start : start + _TILE]
        codes, scales, mins = unpack(qtype, raw[start * qtype.type_size : (start + _TILE) * qtype.type_size])
        np.multiply(codes.reshape(tile.shape), scales.reshape(len(tile), -1, 1), out=tile)
        if mins is not None:
            tile += mins.reshape(len(tile), -1, 1)


def _number_values(qtype: QuantType, raw: U8) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    if qtype.name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view(NUMBERS[qtype.name])


def dequantize(qtype: QuantType, raw: U8, *, byteorder: str = "little", out: F32 | None = None) -> F32:
    """See `ggufkit.quants.dequantize`."""
    if qtype.is_block:
        _unpacker(qtype)  # an undecodable type is refused before its sizes are looked at
    check_whole_blocks(qtype, raw)
    shape = (*raw.shape[:-1], raw.shape[-1] // qtype.type_size * qtype.block_size)
    if out is None:
        out = np.empty(shape, np.float32)
    little = np.ascontiguousarray(raw if byteorder == "little" else to_little(qtype, raw)).reshape(-1)
    with np.errstate(all="ignore"):
        if qtype.is_block:
            _dequantize_blocks(qtype, little, out)
        else:
            out.reshape(-1)[:] = _number_values(qtype, little)
    return out


def to_little(qtype: QuantType, raw: U8) -> U8:
    """See `ggufkit.quants.to_little`."""
    check_whole_blocks(qtype, raw)
    result = raw.copy()
    blocks = result.reshape(-1, qtype.type_size)
    for offset, width, times in qtype.words:
        field = blocks[:, offset : offset + width * times]
        swapped = field.reshape(len(blocks), times, width)[:, :, ::-1]
        field[:] = swapped.reshape(len(blocks), width * times)
    return result
