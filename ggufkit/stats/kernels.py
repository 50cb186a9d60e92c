"""The source of the compiled pass over values: what `plain.py` does, for the processor.

Both kernels go through a chunk row by row in units of 32 elements (16 where a scale serves only 16), a handful of
vector instructions each, and add up: the sums of the first four powers about a pivot, the extremes with their
places, the histogram, and the level (the top bits of the mean square) of each block. Sums over the codes of a unit
are exact integers; what is not exact is added in a fixed order, so that a chunk gives the same numbers anywhere.
A unit that holds something not finite takes a slow path, element by element.

This module imports numba and is itself imported only to compile; see `jit`.
"""

# Only numba knows the types in here: raw pointers and what LLVM makes of them.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit, types

from ggufkit.simd import bits_of, coded16, coded32, from_bits, half, level_of, read_u64, valued32
from ggufkit.stats.deviation import CLAMP, FEWEST, NONE
from ggufkit.stats.layout import (
    DEVIATION_BINS,
    EXEMPT,
    FIRST_INF,
    FIRST_NAN,
    GRID_FIRST,
    HISTOGRAM_STRIDE,
    MARKED,
    MAX,
    MAX_AT,
    MIN,
    MIN_AT,
    N_INF,
    N_INTS,
    N_NAN,
    N_ZERO,
    OFF_BF16,
    OFF_F16,
    OUTLIER,
    TINY_MINUS,
    TINY_PLUS,
    TINY_SCALE,
    UNIFORM,
)

u8, u32, u64, i16, i32, f32, f64 = np.uint8, np.uint32, np.uint64, np.int16, np.int32, np.float32, np.float64

inline = njit(inline="always", error_model="numpy")

_I8, _U8, _U16, _U32, _U64, _I16, _I32, _I64, _F32, _F64 = (
    types.CPointer(element)
    for element in (
        types.int8,
        types.uint8,
        types.uint16,
        types.uint32,
        types.uint64,
        types.int16,
        types.int32,
        types.int64,
        types.float32,
        types.float64,
    )
)
_L = types.int64

#: scratch and bins (32 each), then what both kernels write: hist, levels, flags, row_min, row_max, row_square,
#: row_bad, ints, sums
_OUT = (_F64, _U16, _U32, _I16, _U8, _F32, _F32, _F64, _I64, _I64, _F64)

SIGNATURES = {
    "scan_codes": types.void(_I8, _F32, _F32, *[_L] * 6, types.float64, *[_L] * 3, *_OUT),
    "scan_values": types.void(_F32, _L, _L, types.float64, *_OUT, _I64, _I64),
    "deviate": types.void(_I16, _L, _L, _L, _I32, _I32, _I32, _I32, _I16, _I64),
    "scan_scales": types.void(_F32, _L, _U32, _I64, _F32),
    "sift": types.void(_I16, _U8, _U64, _I16, _L, types.uint64, _L, _L, _I64, _I64, _U64, _I64),
    "byte_runs": types.void(_U8, _L, _L, _I64),
    "widen_f16": types.void(_U8, _L, _F32),
    "widen_bf16": types.void(_U8, _L, _F32),
}


LARGEST = f32(3.4028235e38)


@inline
def is_finite(x):
    return abs(x) < f32(np.inf)


@inline
def count_bins(hist, bins, count):
    """Four histograms side by side, so that neighbours in one bin do not wait for each other."""
    for j in range(0, count, 4):
        hist[bins[j]] += u32(1)
        hist[HISTOGRAM_STRIDE + bins[j + 1]] += u32(1)
        hist[2 * HISTOGRAM_STRIDE + bins[j + 2]] += u32(1)
        hist[3 * HISTOGRAM_STRIDE + bins[j + 3]] += u32(1)


@inline
def begin(ints, sums):
    for i in range(N_INTS):
        ints[i] = 0
    ints[FIRST_NAN] = ints[FIRST_INF] = ints[MIN_AT] = ints[MAX_AT] = -1
    for i in range(4):
        sums[i] = 0.0
    sums[MIN], sums[MAX] = np.inf, -np.inf


@inline
def slow_value(v, index, pivot, hist, ints, sums):
    """One value that may be anything: counted, binned, added. Returns its square, 0 where it is not finite."""
    if not is_finite(v):
        which, first = (N_NAN, FIRST_NAN) if v != v else (N_INF, FIRST_INF)
        ints[which] += 1
        if ints[first] < 0:
            ints[first] = index
        return 0.0
    bits = bits_of(v)
    hist[bits >> u32(21)] += u32(1)
    if v == f32(0):
        ints[N_ZERO] += 1
    elif bits & u32(0x7FFFFFFF) < u32(1 << 21):
        ints[TINY_PLUS if v > f32(0) else TINY_MINUS] += 1
    y = f64(v) - pivot
    y2 = y * y
    sums[0] += y
    sums[1] += y2
    sums[2] += y2 * y
    sums[3] += y2 * y2
    if v < sums[MIN]:
        sums[MIN], ints[MIN_AT] = v, index
    if v > sums[MAX]:
        sums[MAX], ints[MAX_AT] = v, index
    return f64(v) * f64(v)


@inline
def tree_sum(terms, count):
    """Add up in the order of `simd`: element i and element i + half, and again."""
    while count > 1:
        count //= 2
        for j in range(count):
            terms[j] += terms[j + count]
    return terms[0]


# Blocks


@inline
def place_of(value, codes, at, unit, s, m):
    """The first of the unit's elements that has the value."""
    for j in range(at, at + unit):
        if s * f32(codes[j]) + m == value:
            return j
    return -1


@inline
def is_marked(mode, low_end, high_end, low, high):
    """Whether a block's smallest and largest code lie where the quantizer puts them; see `layout.Mark`."""
    if mode == 1:
        return low == low_end
    if mode == 2:
        return low == low_end and high == high_end
    if mode == 3:
        return (low == low_end and high <= high_end) or (high == high_end and low >= low_end)
    return True


@inline
def finish_flags(flags, marked, low, high):
    """A block's flags, now that its codes are known."""
    marked = (flags & MARKED and marked) or flags & EXEMPT
    return u8((MARKED if marked else 0) + (UNIFORM if low == high else 0))


def scan_codes(
    codes, scales, mins, has_min, unit, scale_shift, units_per_block, blocks_per_row, n_rows, pivot,
    mark_mode, low_end, high_end,
    scratch, bins, hist, levels, flags, row_min, row_max, row_square, row_bad, ints, sums,
):  # fmt: skip
    begin(ints, sums)
    n = f64(unit)
    block_size = f64(unit * units_per_block)
    index = 0
    for r in range(n_rows):
        bottom, top, bad_in_row, row_total, zeros_in_row = f32(np.inf), f32(-np.inf), 0, 0.0, 0
        t1 = t2 = t3 = t4 = 0.0
        for block in range(r * blocks_per_row, (r + 1) * blocks_per_row):
            square, bad, lowest, highest = 0.0, 0, 127, -128
            for _ in range(units_per_block):
                at = index * unit
                s = scales[index >> scale_shift]
                m = mins[index >> scale_shift] if has_min else f32(-0.0)
                index += 1
                if unit == 32:
                    s1, s2, s3, s4, low, high, zeros = coded32(codes, at, s, m, bins)
                else:
                    s1, s2, s3, s4, low, high, zeros = coded16(codes, at, s, m, bins)
                lowest, highest = min(lowest, low), max(highest, high)
                x, y = s * f32(low) + m, s * f32(high) + m
                if y < x:
                    x, y = y, x
                # false for anything not finite, too
                if not (x >= -LARGEST and y <= LARGEST and (abs(s) > f32(TINY_SCALE) or s == f32(0))):
                    before = ints[N_NAN] + ints[N_INF]
                    for j in range(unit):
                        v = s * f32(codes[at + j]) + m
                        scratch[j] = slow_value(v, at + j, pivot, hist, ints, sums)
                        if is_finite(v):
                            bottom, top = min(bottom, v), max(top, v)
                    bad += ints[N_NAN] + ints[N_INF] - before
                    square += tree_sum(scratch, unit)
                    continue
                count_bins(hist, bins, unit)
                zeros_in_row += zeros
                if x < bottom:
                    bottom = x
                    if x < sums[MIN]:
                        sums[MIN], ints[MIN_AT] = x, place_of(x, codes, at, unit, s, m)
                if y > top:
                    top = y
                    if y > sums[MAX]:
                        sums[MAX], ints[MAX_AT] = y, place_of(y, codes, at, unit, s, m)
                # the sums over s·q + m from the sums over q, by the binomial formula
                wide, least = f64(s), f64(m)
                ss = wide * wide
                a1, a2, a3, a4 = wide * f64(s1), ss * f64(s2), ss * wide * f64(s3), ss * ss * f64(s4)
                square += a2 + 2.0 * least * a1 + n * (least * least)
                t1 += a1
                t2 += a2
                t3 += a3
                t4 += a4
                c = least - pivot
                if c != 0.0:
                    cc = c * c
                    t1 += n * c
                    t2 += 2.0 * c * a1 + n * cc
                    t3 += 3.0 * c * a2 + 3.0 * cc * a1 + n * (cc * c)
                    t4 += 4.0 * c * a3 + 6.0 * cc * a2 + 4.0 * (cc * c) * a1 + n * (cc * cc)
            levels[block] = i16(-1 if bad else level_of(square / block_size))
            marked = is_marked(mark_mode, low_end, high_end, lowest, highest)
            flags[block] = finish_flags(flags[block], marked, lowest, highest)
            row_total += square
            bad_in_row += bad
        row_min[r], row_max[r], row_square[r], row_bad[r] = bottom, top, row_total, bad_in_row
        ints[N_ZERO] += zeros_in_row
        sums[0] += t1
        sums[1] += t2
        sums[2] += t3
        sums[3] += t4


# Plain numbers


@inline
def is_off_f16(v):
    """Whether f16 cannot hold a finite float32."""
    bits = bits_of(v) & u32(0x7FFFFFFF)
    if bits >= u32(0x38800000):
        return bits & u32(0x1FFF) != 0 or bits > u32(0x477FE000)
    units = abs(v) * f32(2.0**24)
    return f32(np.int64(units)) != units


@inline
def remember_off(values, at, count, ints, off_bf16, off_f16):
    """Count the finite ones of `count` values that are off a grid, and keep the places of the first."""
    for j in range(at, at + count):
        if not is_finite(values[j]):
            continue
        if bits_of(values[j]) & u32(0xFFFF):
            if ints[OFF_BF16] < GRID_FIRST:
                off_bf16[ints[OFF_BF16]] = j
            ints[OFF_BF16] += 1
        if is_off_f16(values[j]):
            if ints[OFF_F16] < GRID_FIRST:
                off_f16[ints[OFF_F16]] = j
            ints[OFF_F16] += 1


@inline
def place_of_value(value, values, at):
    while values[at] != value:
        at += 1
    return at


def scan_values(
    values, row_length, n_rows, pivot,
    scratch, bins, hist, levels, flags, row_min, row_max, row_square, row_bad, ints, sums, off_bf16, off_f16,
):  # fmt: skip
    begin(ints, sums)
    block = 0
    for r in range(n_rows):
        bottom, top, bad_in_row, row_total = f32(np.inf), f32(-np.inf), 0, 0.0
        t1 = t2 = t3 = t4 = 0.0
        for at in range(r * row_length, (r + 1) * row_length, 32):
            count = min(32, (r + 1) * row_length - at)
            odd, bad = 1, 0
            if count == 32:
                odd, zeros, p1, p2, p3, p4, square, x, y, n_bf16, n_f16 = valued32(values, at, pivot, bins)
            if odd:
                x, y = f32(np.inf), f32(-np.inf)
                for j in range(count):
                    v = values[at + j]
                    scratch[j] = slow_value(v, at + j, pivot, hist, ints, sums)
                    if is_finite(v):
                        x, y = min(x, v), max(y, v)
                    else:
                        bad += 1
                for j in range(count, 32):
                    scratch[j] = 0.0
                square = tree_sum(scratch, 32)
                remember_off(values, at, count, ints, off_bf16, off_f16)
            else:
                count_bins(hist, bins, 32)
                ints[N_ZERO] += zeros
                t1 += p1
                t2 += p2
                t3 += p3
                t4 += p4
                if x < sums[MIN]:
                    sums[MIN], ints[MIN_AT] = x, place_of_value(x, values, at)
                if y > sums[MAX]:
                    sums[MAX], ints[MAX_AT] = y, place_of_value(y, values, at)
                few = ints[OFF_BF16] < GRID_FIRST or ints[OFF_F16] < GRID_FIRST
                if few and (n_bf16 or n_f16):
                    remember_off(values, at, 32, ints, off_bf16, off_f16)
                else:
                    ints[OFF_BF16] += n_bf16
                    ints[OFF_F16] += n_f16
            bottom, top = min(bottom, x), max(top, y)
            levels[block] = i16(-1 if bad else level_of(square / count))
            flags[block] = u8(MARKED + (UNIFORM if x == y and not bad else 0))
            block += 1
            row_total += square
            bad_in_row += bad
        row_min[r], row_max[r], row_square[r], row_bad[r] = bottom, top, row_total, bad_in_row
        sums[0] += t1
        sums[1] += t2
        sums[2] += t3
        sums[3] += t4


def widen_f16(raw, n, values):
    for i in range(n):
        values[i] = half(raw, 2 * i)


def widen_bf16(raw, n, values):
    for i in range(n):
        values[i] = from_bits(np.int64(raw[2 * i]) << 16 | np.int64(raw[2 * i + 1]) << 24)


# Blocks against their rows and columns


@inline
def rounded_mean(total, count):
    count = max(count, 1)
    return (2 * total + count) // (2 * count)


@inline
def clamp(x, most):
    return min(max(x, -most), most)


def deviate(levels, n_rows, n_columns, rounds, rows, columns, totals, counts, result, hist):
    """See `deviation.deviations`; also a histogram of the magnitudes, one bin a step, int64 [DEVIATION_BINS]."""
    by_row, by_column = n_columns >= FEWEST, n_rows >= FEWEST
    total, count = 0, 0
    for c in range(n_columns):
        columns[c], counts[c] = 0, 0
    for r in range(n_rows):
        rows[r] = 0
        for c in range(n_columns):
            there = i32(levels[r * n_columns + c] > 0)
            counts[c] += there
            count += there
            total += levels[r * n_columns + c] * there
    if not by_row and not by_column:
        for c in range(n_columns):
            columns[c] = i32(rounded_mean(total, count))
    for turn in range(1 + rounds):
        most = i32(CLAMP if turn else 32767)
        if by_column:
            for c in range(n_columns):
                totals[c] = 0
            for r in range(n_rows):
                row = rows[r]
                for c in range(n_columns):
                    x = i32(levels[r * n_columns + c])
                    e = clamp(i32(x - row - columns[c]), most)
                    totals[c] += e if x > 0 else i32(0)
            for c in range(n_columns):
                columns[c] += i32(rounded_mean(np.int64(totals[c]), np.int64(counts[c])))
        if by_row:
            for r in range(n_rows):
                row, total, count = rows[r], i32(0), i32(0)
                for c in range(n_columns):
                    x = i32(levels[r * n_columns + c])
                    e = clamp(i32(x - row - columns[c]), most)
                    total += e if x > 0 else i32(0)
                    count += i32(x > 0)
                rows[r] += i32(rounded_mean(np.int64(total), np.int64(count)))
    for r in range(n_rows):
        for at in range(r * n_columns, (r + 1) * n_columns):
            x = i32(levels[at])
            result[at] = i16(NONE)
            if x > 0:
                e = x - rows[r] - columns[at - r * n_columns]
                result[at] = i16(e)
                hist[min(abs(e), DEVIATION_BINS - 1)] += 1


def scan_scales(d, n, hist, ints, extremes):
    """See `digest.Tools.scan_scales`; ints: n_nan, n_inf, the first of them, n_zero, where the extremes are."""
    for i in range(6):
        ints[i] = 0
    ints[2] = ints[4] = ints[5] = -1
    least, most = f32(np.inf), f32(0)
    for i in range(n):
        hist[bits_of(d[i]) >> u32(21)] += u32(1)
        x = abs(d[i])
        if x > f32(0) and x <= LARGEST:
            if x < least:
                least, ints[4] = x, i
            if x > most:
                most, ints[5] = x, i
        elif x == f32(0):
            ints[3] += 1
        else:
            ints[0 if x != x else 1] += 1
            if ints[2] < 0:
                ints[2] = i
    extremes[0], extremes[1] = least, most


def sift(levels, flags, keys, off, n, mask, least, n_worst, counts, worst, kept, kept_at):
    """See `digest.sift`."""
    zero = bad = outlier = unmarked = equal = n_kept = n_found = n_least = 0
    before = u64(0)
    for i in range(n):
        level, deviation, key = levels[i], abs(i32(off[i])), keys[i]
        if level <= 0:
            zero += level == 0
            bad += level != 0
            deviation = i32(0)
        outlier += deviation >= OUTLIER
        if deviation >= least and level > 0:
            n_least += deviation == least
            if (deviation > least or n_least <= n_worst) and n_found < 2 * n_worst:
                worst[n_found] = i
                n_found += 1
        unmarked += flags[i] & MARKED == 0
        if flags[i] & UNIFORM:
            key = u64(0)
        equal += key == before and key != u64(0)
        before = key
        if key & mask == u64(0) and key != u64(0):
            kept[n_kept], kept_at[n_kept] = key, i
            n_kept += 1
    counts[0], counts[1], counts[2], counts[3] = zero, bad, outlier, unmarked
    counts[4], counts[5], counts[6] = equal, n_kept, n_found


def byte_runs(data, n, shortest, runs):
    """See `runs.ByteRuns.of`: the start and length of the longest run of equal bytes in runs[0], runs[1], of zero
    bytes in runs[2], runs[3], and the lengths of the runs at the two ends in runs[4], runs[5]."""
    for i in range(6):
        runs[i] = 0
    at = 0
    while at + 8 <= n:
        word = read_u64(data, at)
        if word != (word >> u64(8) | word << u64(56)):
            at += 8
            continue
        start, stop = at, at + 8
        while start > 0 and data[start - 1] == data[at]:
            start -= 1
        while stop + 8 <= n and read_u64(data, stop) == word:
            stop += 8
        while stop < n and data[stop] == data[at]:
            stop += 1
        length = stop - start
        if length >= shortest:
            if length > runs[1]:
                runs[0], runs[1] = start, length
            if data[at] == 0 and length > runs[3]:
                runs[2], runs[3] = start, length
        at += (stop - at) // 8 * 8
    length = 1
    while length < n and data[length] == data[0]:
        length += 1
    runs[4] = length
    length = 1
    while length < n and data[n - 1 - length] == data[n - 1]:
        length += 1
    runs[5] = length
