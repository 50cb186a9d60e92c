"""Ternary blocks of 256 with one f16 scale: TQ1_0 packs five digits of base 3 into a byte, TQ2_0 four of 2 bits.

Layouts after block_tq1_0 and block_tq2_0 of ggml-common.h; value = d · (digit - 1).

    TQ1_0  54  qs:48 qh:4 d:2    digits 0-159 from qs[0:32], 160-239 from qs[32:48], 240-255 from qh (four each)
    TQ2_0  66  qs:64 d:2         planes of 32, as in Q2_K

A byte b of TQ1_0 stands for the fraction b / 256 in base 3: multiplying it by 3^n (mod 256) moves digit n to the
front, where (3 · byte) >> 8 reads it.
"""

from __future__ import annotations

import numpy as np

from ggufkit.quants import Unpacked
from ggufkit.quants.bits import U8, halves, planes, signed

_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]


def _digits(field: U8, span: int, count: int) -> U8:
    """The first `count` base-3 digits of each byte, by planes of `span` bytes."""
    shifted = field.reshape(len(field), -1, 1, span) * _POWERS[:count]
    return (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(field), -1)


def tq1_0(blocks: U8) -> Unpacked:
    parts = (_digits(blocks[:, :32], 32, 5), _digits(blocks[:, 32:48], 16, 5), _digits(blocks[:, 48:52], 4, 4))
    return Unpacked(signed(np.concatenate(parts, axis=1), 1), halves(blocks, 52), None)


def tq2_0(blocks: U8) -> Unpacked:
    return Unpacked(signed(planes(blocks[:, :64], 2, 32), 1), halves(blocks, 64), None)
