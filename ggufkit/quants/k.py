"""The K family: super-blocks of 256 whose groups have small integer scales of their own.

Layouts after block_q2_K … block_q8_K of ggml-common.h; d and dmin are f16 (f32 in Q8_K), a number after a colon
is a size in bytes. A group's scale is d · sc, its min is -dmin · m; both products are exact in float32.

    Q2_K   84  scales:16 qs:64 d:2 dmin:2               16 groups of 16; sc = low nibble, m = high nibble
    Q3_K  110  hmask:32 qs:64 scales:12 d:2             16 groups of 16; sc 6 bits less 32, codes -4 … 3
    Q4_K  144  d:2 dmin:2 scales:12 qs:128              8 groups of 32; sc and m 6 bits
    Q5_K  176  d:2 dmin:2 scales:12 qh:32 qs:128        8 groups of 32; sc and m 6 bits
    Q6_K  210  ql:128 qh:64 scales:16 d:2               16 groups of 16; sc signed bytes, codes -32 … 31
    Q8_K  292  d:4 qs:256 bsums:32                      one scale; bsums are sums of codes, redundant

The 12 bytes of 6-bit numbers of Q4_K and Q5_K hold, for the groups 0-3, sc in the low six bits of bytes 0-3 and m
in those of bytes 4-7; for the groups 4-7 the low four bits of sc and of m are the nibbles of bytes 8-11 and the
two high bits sit on top of bytes 0-3 and 4-7. Those of Q3_K hold 16 numbers: low nibbles in bytes 0-7 (low half
first), the two high bits in bytes 8-11, four planes.
"""

from __future__ import annotations

import numpy as np

from ggufkit.quants import Unpacked
from ggufkit.quants.bits import U8, halves, planes, signed, words


def _sixes(scales: U8) -> tuple[U8, U8]:
    """The 6-bit scales and mins of Q4_K and Q5_K: uint8 [n, 12] -> two of [n, 8]."""
    sc, m, both = scales[:, 0:4], scales[:, 4:8], scales[:, 8:12]
    high_sc = both & 0x0F | (sc >> 2) & 0x30
    high_m = both >> 4 | (m >> 2) & 0x30
    return np.concatenate([sc & 0x3F, high_sc], axis=1), np.concatenate([m & 0x3F, high_m], axis=1)


def q2_k(blocks: U8) -> Unpacked:
    sc, m = blocks[:, :16] & 0x0F, blocks[:, :16] >> 4
    codes = signed(planes(blocks[:, 16:80], 2, 32), 0)
    return Unpacked(codes, halves(blocks, 80) * sc, -(halves(blocks, 82) * m))


def q3_k(blocks: U8) -> Unpacked:
    low, high = planes(blocks[:, 96:104], 4, 8), planes(blocks[:, 104:108], 2, 4)
    sc = signed(low | high << np.uint8(4), 32)
    # a set bit of hmask means that 4 is *not* taken off
    codes = planes(blocks[:, 32:96], 2, 32) | planes(blocks[:, :32], 1, 32) << np.uint8(2)
    return Unpacked(signed(codes, 4), halves(blocks, 108) * sc, None)


def q4_k(blocks: U8) -> Unpacked:
    sc, m = _sixes(blocks[:, 4:16])
    codes = signed(planes(blocks[:, 16:], 4, 32), 0)
    return Unpacked(codes, halves(blocks, 0) * sc, -(halves(blocks, 2) * m))


def q5_k(blocks: U8) -> Unpacked:
    sc, m = _sixes(blocks[:, 4:16])
    codes = planes(blocks[:, 48:], 4, 32) | planes(blocks[:, 16:48], 1, 32) << np.uint8(4)
    return Unpacked(signed(codes, 0), halves(blocks, 0) * sc, -(halves(blocks, 2) * m))


def q6_k(blocks: U8) -> Unpacked:
    codes = planes(blocks[:, :128], 4, 64) | planes(blocks[:, 128:192], 2, 32) << np.uint8(4)
    return Unpacked(signed(codes, 32), halves(blocks, 208) * blocks[:, 192:208].view(np.int8), None)


def q8_k(blocks: U8) -> Unpacked:
    return Unpacked(blocks[:, 4:260].view(np.int8), words(blocks[:, :4], "u4").view(np.float32), None)
