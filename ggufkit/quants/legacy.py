"""Blocks with one scale, stored as it is: Q4_0 … Q8_1, and the newer Q1_0 and Q2_0.

Layouts after the structs block_q4_0 … block_q8_0 and block_q1_0, block_q2_0 of ggml-common.h; bytes from the
left, d and m are f16. Element j of a 4-bit block of 32 is the low nibble of byte j, element 16 + j the high one.

    Q4_0  18  d:2 qs:16                    value = d · (q - 8)
    Q4_1  20  d:2 m:2 qs:16                value = d · q + m
    Q5_0  22  d:2 qh:4 qs:16               value = d · (q - 16), bit j of qh is the fifth bit of element j
    Q5_1  24  d:2 m:2 qh:4 qs:16           value = d · q + m
    Q8_0  34  d:2 qs:32                    value = d · q, q signed
    Q1_0  18  d:2 qs:16  (128 elements)    value = d · (2 · bit - 1), lowest bit first
    Q2_0  18  d:2 qs:16  (64 elements)     value = d · (q - 1), lowest bits first
"""

from __future__ import annotations

import numpy as np

from ggufkit.quants import Unpacked
from ggufkit.quants.bits import U8, halves, planes, signed


def q4_0(blocks: U8) -> Unpacked:
    return Unpacked(signed(planes(blocks[:, 2:], 4, 16), 8), halves(blocks, 0), None)


def q4_1(blocks: U8) -> Unpacked:
    return Unpacked(signed(planes(blocks[:, 4:], 4, 16), 0), halves(blocks, 0), halves(blocks, 2))


def _five_bits(qh: U8, qs: U8) -> U8:
    return planes(qs, 4, 16) | planes(qh, 1, 1) << np.uint8(4)


def q5_0(blocks: U8) -> Unpacked:
    codes = signed(_five_bits(blocks[:, 2:6], blocks[:, 6:]), 16)
    return Unpacked(codes, halves(blocks, 0), None)


def q5_1(blocks: U8) -> Unpacked:
    codes = signed(_five_bits(blocks[:, 4:8], blocks[:, 8:]), 0)
    return Unpacked(codes, halves(blocks, 0), halves(blocks, 2))


def q8_0(blocks: U8) -> Unpacked:
    return Unpacked(blocks[:, 2:].view(np.int8), halves(blocks, 0), None)


def q1_0(blocks: U8) -> Unpacked:
    bits = planes(blocks[:, 2:], 1, 1)
    return Unpacked(signed(bits + bits, 1), halves(blocks, 0), None)


def q2_0(blocks: U8) -> Unpacked:
    return Unpacked(signed(planes(blocks[:, 2:], 2, 1), 1), halves(blocks, 0), None)
