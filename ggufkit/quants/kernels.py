"""The source of the compiled unpackers: the codecs again, block by block, for the processor.

Each kernel takes `n` blocks apart. For block b it writes its codes, the scales and mins of its groups, its own
scale `d` and min `dmin` as the file stores them, a byte of flags, and a key for finding repeated blocks: 64 bits
mixed from the first eight and the middle eight bytes. The flag MARKED says that d and the sub-scales bear the
quantizer's mark (see `fingerprint`), as far as they have to; the codes are looked at later. EXEMPT is set where d is
zero. The layouts are drawn in `legacy.py`, `k.py`, `iq.py`, `ternary.py` and `fp4.py`.

This module imports numba and is itself imported only to compile; see `jit`.
"""

# Only numba knows the types in here: raw pointers and what LLVM makes of them.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit, types

from ggufkit.simd import (
    affine16,
    fives32,
    from_bits,
    half,
    merge32,
    read_f32,
    read_u16,
    read_u32,
    read_u64,
    signs32,
    spread16,
    spread32,
)

MARKED, EXEMPT = 1, 2

i8, u8, f32, u64 = np.int8, np.uint8, np.float32, np.uint64

inline = njit(inline="always", error_model="numpy")

_BYTES, _CODES, _FLOATS = types.CPointer(types.uint8), types.CPointer(types.int8), types.CPointer(types.float32)

#: raw, n, codes, scales, mins, d, dmin, flags, keys, table (int8, of the types that look their values up)
SIGNATURE = types.void(
    _BYTES, types.int64, _CODES, _FLOATS, _FLOATS, _FLOATS, _FLOATS, _BYTES, types.CPointer(types.uint64), _CODES
)

SIGNATURES = {
    "affine": types.void(_CODES, _FLOATS, _FLOATS, types.int64, types.int64, types.int64, _FLOATS),
}


@inline
def key_of(raw, at, size):
    """See `stats.chunk.keys_of`, the specification."""
    mixed = (read_u64(raw, at) * u64(0x9E3779B97F4A7C15) + read_u64(raw, at + size // 2)) * u64(0xC2B2AE3D27D4EB4F)
    return mixed ^ (mixed >> u64(32))


@inline
def flags_of(marked, d):
    return u8((MARKED if marked else 0) + (EXEMPT if d == f32(0) else 0))


@inline
def look_up(table, codes, to, count):
    """Replace the codes of nibbles by the values that they stand for."""
    for j in range(to, to + count):
        codes[j] = table[codes[j]]


# One scale a block


def q4_0(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 18, b * 32
        scales[b] = d[b] = half(raw, at)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 18)
        spread16(raw, at + 2, 0, 15, 8, codes, to)
        spread16(raw, at + 2, 4, 15, 8, codes, to + 16)


def q4_1(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 20, b * 32
        scales[b] = d[b] = half(raw, at)
        mins[b] = dmin[b] = half(raw, at + 2)
        flags[b] = flags_of(d[b] >= 0, d[b])
        keys[b] = key_of(raw, at, 20)
        spread16(raw, at + 4, 0, 15, 0, codes, to)
        spread16(raw, at + 4, 4, 15, 0, codes, to + 16)


def q5_0(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 22, b * 32
        scales[b] = d[b] = half(raw, at)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 22)
        fives32(raw, at + 6, at + 2, 16, codes, to)


def q5_1(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 24, b * 32
        scales[b] = d[b] = half(raw, at)
        mins[b] = dmin[b] = half(raw, at + 2)
        flags[b] = flags_of(d[b] >= 0, d[b])
        keys[b] = key_of(raw, at, 24)
        fives32(raw, at + 8, at + 4, 0, codes, to)


def q8_0(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 34, b * 32
        scales[b] = d[b] = half(raw, at)
        flags[b] = flags_of(d[b] >= 0, d[b])
        keys[b] = key_of(raw, at, 34)
        spread32(raw, at + 2, 0, 255, 0, codes, to)


def q1_0(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 18, b * 128
        scales[b] = d[b] = half(raw, at)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 18)
        for part in range(4):
            signs32(raw, at + 2 + 4 * part, codes, to + 32 * part)


def q2_0(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 18, b * 64
        scales[b] = d[b] = half(raw, at)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 18)
        for j in range(64):
            codes[to + j] = i8((raw[at + 2 + j // 4] >> (2 * (j % 4)) & 3) - 1)


# K: super-blocks of 256


@inline
def six_scale(raw, at, g):
    """Scale g of the twelve bytes at `at` in Q4_K and Q5_K."""
    if g < 4:
        return raw[at + g] & 63
    return raw[at + 4 + g] & 15 | raw[at + g - 4] >> 6 << 4


@inline
def six_min(raw, at, g):
    """Min g of the same twelve bytes."""
    if g < 4:
        return raw[at + 4 + g] & 63
    return raw[at + 4 + g] >> 4 | raw[at + g] >> 6 << 4


@inline
def two_scales_marked(d, dmin, top, top_min, end):
    """The mark of Q2_K, Q4_K and Q5_K: the largest sub-scale and sub-min are `end`, neither d is negative."""
    return (top == end or d == 0) and (top_min == end or dmin == 0) and d >= 0 and dmin >= 0


def q2_k(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 84, b * 256
        d[b], dmin[b] = half(raw, at + 80), half(raw, at + 82)
        top = top_min = 0
        for g in range(16):
            sc, m = raw[at + g] & 15, raw[at + g] >> 4
            top, top_min = max(top, sc), max(top_min, m)
            scales[16 * b + g] = d[b] * f32(sc)
            mins[16 * b + g] = -(dmin[b] * f32(m))
        flags[b] = flags_of(two_scales_marked(d[b], dmin[b], top, top_min, 15), d[b])
        keys[b] = key_of(raw, at, 84)
        for run in range(2):
            for plane in range(4):
                spread32(raw, at + 16 + 32 * run, 2 * plane, 3, 0, codes, to + 128 * run + 32 * plane)


def q3_k(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 110, b * 256
        d[b] = half(raw, at + 108)
        lowest = 0
        for g in range(16):
            low = raw[at + 96 + g % 8] >> (g // 8 * 4) & 15
            high = raw[at + 104 + g % 4] >> (g // 4 * 2) & 3
            sc = (low | high << 4) - 32
            lowest = min(lowest, sc)
            scales[16 * b + g] = d[b] * f32(sc)
        flags[b] = flags_of(lowest == -32, d[b])
        keys[b] = key_of(raw, at, 110)
        for run in range(2):
            for plane in range(4):
                here = to + 128 * run + 32 * plane
                spread32(raw, at + 32 + 32 * run, 2 * plane, 3, 0, codes, here)
                merge32(raw, at, 4 * run + plane, 1, 2, 4, codes, here)


@inline
def six_bits(raw, at, b, scales, mins, d, dmin, flags):
    """The head that Q4_K and Q5_K share: scales, mins and flags of block b at byte `at`."""
    d[b], dmin[b] = half(raw, at), half(raw, at + 2)
    top = top_min = 0
    for g in range(8):
        sc, m = six_scale(raw, at + 4, g), six_min(raw, at + 4, g)
        top, top_min = max(top, sc), max(top_min, m)
        scales[8 * b + g] = d[b] * f32(sc)
        mins[8 * b + g] = -(dmin[b] * f32(m))
    flags[b] = flags_of(two_scales_marked(d[b], dmin[b], top, top_min, 63), d[b])


def q4_k(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 144, b * 256
        six_bits(raw, at, b, scales, mins, d, dmin, flags)
        keys[b] = key_of(raw, at, 144)
        for run in range(4):
            spread32(raw, at + 16 + 32 * run, 0, 15, 0, codes, to + 64 * run)
            spread32(raw, at + 16 + 32 * run, 4, 15, 0, codes, to + 64 * run + 32)


def q5_k(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 176, b * 256
        six_bits(raw, at, b, scales, mins, d, dmin, flags)
        keys[b] = key_of(raw, at, 176)
        for g in range(8):
            spread32(raw, at + 48 + 32 * (g // 2), 4 * (g % 2), 15, 0, codes, to + 32 * g)
            merge32(raw, at + 16, g, 1, 4, 0, codes, to + 32 * g)


def q6_k(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 210, b * 256
        d[b] = half(raw, at + 208)
        lowest = 0
        for g in range(16):
            sc = i8(raw[at + 192 + g])
            lowest = min(lowest, sc)
            scales[16 * b + g] = d[b] * f32(sc)
        flags[b] = flags_of(lowest == -128, d[b])
        keys[b] = key_of(raw, at, 210)
        for run in range(2):
            for plane in range(4):
                here = to + 128 * run + 32 * plane
                spread32(raw, at + 64 * run + 32 * (plane % 2), 4 * (plane // 2), 15, 0, codes, here)
                merge32(raw, at + 128 + 32 * run, 2 * plane, 3, 4, 32, codes, here)


def q8_k(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 292, b * 256
        scales[b] = d[b] = read_f32(raw, at)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 292)
        for g in range(8):
            spread32(raw, at + 4 + 32 * g, 0, 255, 0, codes, to + 32 * g)


# Ternary and fp4


def tq1_0(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 54, b * 256
        scales[b] = d[b] = half(raw, at + 52)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 54)
        power = 1
        for digit in range(5):
            for j in range(32):
                codes[to + 32 * digit + j] = i8(((raw[at + j] * power & 255) * 3 >> 8) - 1)
            for j in range(16):
                codes[to + 160 + 16 * digit + j] = i8(((raw[at + 32 + j] * power & 255) * 3 >> 8) - 1)
            if digit < 4:
                for j in range(4):
                    codes[to + 240 + 4 * digit + j] = i8(((raw[at + 48 + j] * power & 255) * 3 >> 8) - 1)
            power *= 3


def tq2_0(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 66, b * 256
        scales[b] = d[b] = half(raw, at + 64)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 66)
        for run in range(2):
            for plane in range(4):
                spread32(raw, at + 32 * run, 2 * plane, 3, 1, codes, to + 128 * run + 32 * plane)


def iq4_nl(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 18, b * 32
        scales[b] = d[b] = half(raw, at)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 18)
        spread16(raw, at + 2, 0, 15, 0, codes, to)
        spread16(raw, at + 2, 4, 15, 0, codes, to + 16)
        look_up(table, codes, to, 32)


def iq4_xs(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 136, b * 256
        d[b] = half(raw, at)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 136)
        high = read_u16(raw, at + 2)
        for g in range(8):
            low = raw[at + 4 + g // 2] >> (4 * (g % 2)) & 15
            scales[8 * b + g] = d[b] * f32((low | (high >> (2 * g) & 3) << 4) - 32)
            spread16(raw, at + 8 + 16 * g, 0, 15, 0, codes, to + 32 * g)
            spread16(raw, at + 8 + 16 * g, 4, 15, 0, codes, to + 32 * g + 16)
        look_up(table, codes, to, 256)


def mxfp4(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 17, b * 32
        e = np.int64(raw[at])
        scales[b] = d[b] = from_bits(0x00200000 << e if e < 2 else (e - 1) << 23)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 17)
        spread16(raw, at + 1, 0, 15, 0, codes, to)
        spread16(raw, at + 1, 4, 15, 0, codes, to + 16)
        look_up(table, codes, to, 32)


def nvfp4(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 36, b * 64
        for g in range(4):
            x = np.int64(raw[at + g])
            exponent, mantissa = x >> 3 & 15, x & 7
            power = from_bits((max(exponent, 1) - 11 + 127) << 23)
            value = f32(mantissa if exponent == 0 else mantissa + 8) * power
            scales[4 * b + g] = d[4 * b + g] = f32(0) if x == 127 else value
        flags[b] = flags_of(True, f32(1))
        keys[b] = key_of(raw, at, 36)
        for g in range(4):
            for j in range(8):
                x = raw[at + 4 + 8 * g + j]
                codes[to + 16 * g + j] = table[x & 15]
                codes[to + 16 * g + 8 + j] = table[x >> 4]


# Codebooks


@inline
def eight(table, index, signs, codes, to):
    """Eight codes: row `index` of a grid of eights, negated where a bit of `signs` is set."""
    for j in range(8):
        value = table[8 * index + j]
        codes[to + j] = i8(-value if signs >> j & 1 else value)


@inline
def four(table, index, signs, codes, to):
    """Four codes of a grid of fours; the lowest four bits of `signs`."""
    for j in range(4):
        value = table[4 * index + j]
        codes[to + j] = i8(-value if signs >> j & 1 else value)


@inline
def even_signs(field):
    """Eight sign bits from seven: the eighth makes their number even."""
    x = field ^ field >> 4
    x ^= x >> 2
    x ^= x >> 1
    return field | (x & 1) << 7


def iq2_xxs(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 66, b * 256
        d[b] = half(raw, at)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 66)
        for g in range(8):
            word = np.int64(read_u32(raw, at + 6 + 8 * g))
            scales[8 * b + g] = d[b] * (f32(word >> 28) + f32(0.5)) * f32(0.25)
            for part in range(4):
                signs = even_signs(word >> (7 * part) & 127)
                eight(table, raw[at + 2 + 8 * g + part], signs, codes, to + 32 * g + 8 * part)


def iq2_xs(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 74, b * 256
        d[b] = half(raw, at)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 74)
        for g in range(16):
            scale = raw[at + 66 + g // 2] >> (4 * (g % 2)) & 15
            scales[16 * b + g] = d[b] * (f32(scale) + f32(0.5)) * f32(0.25)
        for part in range(32):
            word = np.int64(read_u16(raw, at + 2 + 2 * part))
            eight(table, word & 511, even_signs(word >> 9), codes, to + 8 * part)


def iq2_s(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 82, b * 256
        d[b] = half(raw, at)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 82)
        for g in range(16):
            scale = raw[at + 74 + g // 2] >> (4 * (g % 2)) & 15
            scales[16 * b + g] = d[b] * (f32(scale) + f32(0.5)) * f32(0.25)
        for part in range(32):
            index = raw[at + 2 + part] | (raw[at + 66 + part // 4] >> (2 * (part % 4)) & 3) << 8
            eight(table, index, raw[at + 34 + part], codes, to + 8 * part)


def iq3_xxs(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 98, b * 256
        d[b] = half(raw, at)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 98)
        for g in range(8):
            word = np.int64(read_u32(raw, at + 66 + 4 * g))
            scales[8 * b + g] = d[b] * (f32(word >> 28) + f32(0.5)) * f32(0.5)
            for part in range(4):
                signs = even_signs(word >> (7 * part) & 127)
                index, here = at + 2 + 8 * g + 2 * part, to + 32 * g + 8 * part
                four(table, raw[index], signs, codes, here)
                four(table, raw[index + 1], signs >> 4, codes, here + 4)


def iq3_s(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 110, b * 256
        d[b] = half(raw, at)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 110)
        for g in range(8):
            scale = raw[at + 106 + g // 2] >> (4 * (g % 2)) & 15
            scales[8 * b + g] = d[b] * f32(2 * scale + 1)
        for part in range(64):
            index = raw[at + 2 + part] | (raw[at + 66 + part // 8] >> (part % 8) & 1) << 8
            four(table, index, raw[at + 74 + part // 2] >> (4 * (part % 2)), codes, to + 4 * part)


@inline
def one_bit(table, index, minus, codes, to):
    """Eight codes of IQ1: eight times the grid's, and one more or less."""
    delta = -1 if minus else 1
    for j in range(8):
        codes[to + j] = i8(8 * table[8 * index + j] + delta)


def iq1_s(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 50, b * 256
        d[b] = half(raw, at)
        flags[b] = flags_of(True, d[b])
        keys[b] = key_of(raw, at, 50)
        for g in range(8):
            word = np.int64(read_u16(raw, at + 34 + 2 * g))
            scales[8 * b + g] = d[b] * f32(2 * (word >> 12 & 7) + 1) * f32(0.125)
            for part in range(4):
                index = raw[at + 2 + 4 * g + part] | (word >> (3 * part) & 7) << 8
                one_bit(table, index, word >> 15, codes, to + 32 * g + 8 * part)


def iq1_m(raw, n, codes, scales, mins, d, dmin, flags, keys, table):
    for b in range(n):
        at, to = b * 56, b * 256
        # the f16 scale, put together in the first bytes of this block's codes
        codes[to] = i8(raw[at + 49] >> 4 | raw[at + 51] & 0xF0)
        codes[to + 1] = i8(raw[at + 53] >> 4 | raw[at + 55] & 0xF0)
        whole = half(codes, to)
        for g in range(16):
            word = np.int64(read_u16(raw, at + 48 + 2 * (g // 4)))
            scale = whole * f32(2 * (word >> (3 * (g % 4)) & 7) + 1) * f32(0.125)
            scales[16 * b + g] = d[16 * b + g] = scale
        flags[b] = flags_of(True, f32(1))
        keys[b] = key_of(raw, at, 56)
        for part in range(32):
            nibble = raw[at + 32 + part // 2] >> (4 * (part % 2)) & 15
            one_bit(table, raw[at + part] | (nibble & 7) << 8, nibble >> 3, codes, to + 8 * part)


# Values


def affine(codes, scales, mins, has_min, group, n_groups, values):
    """values = scale · code + min, for groups of a multiple of sixteen. Without mins -0 is added: no change at all."""
    for g in range(n_groups):
        scale, minimum = scales[g], mins[g] if has_min else f32(-0.0)
        for at in range(g * group, (g + 1) * group, 16):
            affine16(codes, at, scale, minimum, values)
