"""The marks that ggml's quantizers leave in every block, and that damage wipes out.

A quantizer chooses a block's scale so that the largest value meets the end of the code's range. So each Q8_0
block holds a code of 127 or -127 and never -128; each Q5_0 block holds the code -16; the sub-block scales of a
Q4_K block reach 63. No bit of the format demands it, and nothing goes wrong without it, but in files straight
from the quantizer it is true of every single block: 4,784,544 of 4,784,544 in a Qwen2.5-0.5B Q4_K_M. Bytes that
came from anywhere else (a bad sector, a wrong offset, another type's data) break the rule in most blocks.

Quantizing with an importance matrix weighs the errors and may leave the mark out. Whether it can be relied upon
is therefore read off each tensor: see the rule that uses this.

Source: quantize_row_*_ref and make_qkx2_quants, make_qx_quants, make_q3_quants in ggml-quants.c, read for the
bounds that follow from them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ggufkit.quants import QuantType

Blocks = NDArray[np.uint8]
Flags = NDArray[np.bool_]


def half(blocks: Blocks, at: int) -> NDArray[np.float16]:
    """The f16 field at byte `at` of each little-endian block."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0]


def _q8_0(b: Blocks) -> Flags:
    codes = b[:, 2:].view(np.int8)
    ends = ((codes == 127) | (codes == -127)).any(axis=1)
    return ends & ~(codes == -128).any(axis=1) & (half(b, 0) >= 0)


def _q4_0(b: Blocks) -> Flags:
    stored = b[:, 2:]
    return ((stored & 15 == 0) | (stored >> 4 == 0)).any(axis=1)


def _fives(b: Blocks, at: int) -> NDArray[np.uint8]:
    """The 32 stored 5-bit codes of each Q5_0 (fifth bits from byte 2) or Q5_1 (from byte 4) block."""
    fifth = np.unpackbits(b[:, at : at + 4], axis=1, bitorder="little") << 4
    low = np.concatenate([b[:, at + 4 :] & 15, b[:, at + 4 :] >> 4], axis=1)
    return fifth | low


def _q5_0(b: Blocks) -> Flags:
    return (_fives(b, 2) == 0).any(axis=1)


def _q4_1(b: Blocks) -> Flags:
    low, high = b[:, 4:] & 15, b[:, 4:] >> 4
    return ((low == 0) | (high == 0)).any(axis=1) & ((low == 15) | (high == 15)).any(axis=1) & (half(b, 0) >= 0)


def _q5_1(b: Blocks) -> Flags:
    stored = _fives(b, 4)
    return (stored == 0).any(axis=1) & (stored == 31).any(axis=1) & (half(b, 0) >= 0)


def _q2_k(b: Blocks) -> Flags:
    scales, mins = b[:, :16] & 15, b[:, :16] >> 4
    d, dmin = half(b, 80), half(b, 82)
    return ((scales.max(axis=1) == 15) | (d == 0)) & ((mins.max(axis=1) == 15) | (dmin == 0)) & (d >= 0) & (dmin >= 0)


def _q3_k(b: Blocks) -> Flags:
    low = np.concatenate([b[:, 96:104] & 15, b[:, 96:104] >> 4], axis=1)
    top = b[:, 104:108]
    high = np.concatenate([top >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    return ((low | high << 4) == 0).any(axis=1)


def _q4_k(b: Blocks) -> Flags:
    """Also Q5_K: d, dmin and the twelve bytes of 6-bit scales and mins are the same in both."""
    packed = b[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.maximum((first & 63).max(axis=1), ((third & 15) | (first >> 6 << 4)).max(axis=1))
    mins = np.maximum((second & 63).max(axis=1), ((third >> 4) | (second >> 6 << 4)).max(axis=1))
    d, dmin = half(b, 0), half(b, 2)
    return ((scales == 63) | (d == 0)) & ((mins == 63) | (dmin == 0)) & (d >= 0) & (dmin >= 0)


def _q6_k(b: Blocks) -> Flags:
    return (b[:, 192:208] == 128).any(axis=1)  # -128 as a byte


#: what each type's blocks look like when they come from the quantizer
_MARKS: dict[str, Callable[[Blocks], Flags]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q4_1": _q4_1,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q4_k,
    "Q6_K": _q6_k,
}

#: in words, for a report
MARKS: dict[str, str] = {
    "Q8_0": "a code of 127 or -127, none of -128, and a scale that is not negative",
    "Q4_0": "the code -8",
    "Q5_0": "the code -16",
    "Q4_1": "the codes 0 and 15, and a scale that is not negative",
    "Q5_1": "the codes 0 and 31, and a scale that is not negative",
    "Q2_K": "a sub-block scale of 15 and a sub-block min of 15",
    "Q3_K": "a sub-block scale of -32",
    "Q4_K": "a sub-block scale of 63 and a sub-block min of 63",
    "Q5_K": "a sub-block scale of 63 and a sub-block min of 63",
    "Q6_K": "a sub-block scale of -128",
}


def marked(type_: QuantType, blocks: Blocks) -> Flags | None:
    """Which blocks bear the quantizer's mark.

    Args:
        blocks: uint8 [n, type_size], little-endian.

    Returns:
        bool [n]; all-zero blocks and blocks with a zero scale bear it. None for types without a mark.
    """
    mark = _MARKS.get(type_.name)
    if mark is None or type_.d is None:
        return None
    return mark(blocks) | (half(blocks, type_.d) == 0)
