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

from ggufkit.simd import LARGEST as LARGEST_FLOAT
from ggufkit.simd import (
    bits_of,
    coded16,
    coded32,
    from_bits,
    half,
    level_of,
    read_u64,
    shifted16,
    shifted32,
    valued32,
    widen_bf16_16,
    widen_f16_16,
)
from ggufkit.stats.deviation import CLAMP, FEWEST, NONE, ROUNDS
from ggufkit.stats.layout import (
    BAD_BLOCKS,
    BIN_ROOM,
    DEVIATION_BINS,
    EQUAL_BLOCKS,
    EXEMPT,
    FIRST_INF,
    FIRST_NAN,
    GRID_FIRST,
    HISTOGRAM_STRIDE,
    LANES,
    MARKED,
    MAX,
    MAX_AT,
    MIN,
    MIN_AT,
    N_INF,
    N_INTS,
    N_KEPT,
    N_NAN,
    N_ZERO,
    OFF_BF16,
    OFF_F16,
    TINY_MINUS,
    TINY_PLUS,
    UNIFORM,
    UNMARKED_BLOCKS,
    ZERO_BLOCKS,
)

i8, u8, u32, u64, i16, i32, f32, f64 = (
    np.int8,
    np.uint8,
    np.uint32,
    np.uint64,
    np.int16,
    np.int32,
    np.float32,
    np.float64,
)

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

#: for themselves: scratch (32 float64), bins, the lanes of the sums, and by block squares, lows, highs; then what both
#: kernels write: hist, levels, flags, keys, kept, kept_at, row_min, row_max, row_square, row_bad, ints, sums
_OUT = (_F64, _U16, _F64, _F64, _I8, _I8, _U32, _I16, _U8, _U64, _U64, _I64, _F32, _F32, _F64, _I64, _I64, _F64)

SIGNATURES = {
    "scan_codes": types.void(_I8, _F32, _F32, *[_L] * 6, types.float64, *[_L] * 3, types.uint64, *_OUT),
    "scan_values": types.void(_F32, _L, _L, types.float64, types.uint64, *_OUT, _I64, _I64),
    "deviate": types.void(_I16, *[_L] * 3, _I16, _I16, _I16, _I32, _I32, _I32, _I16, _I16, _I64, _I64, _I64),
    "scan_scales": types.void(_F32, _L, _U32, _I64, _F32),
    "byte_runs": types.void(_U8, _L, _L, _I64),
    "widen_f16": types.void(_U8, _L, _F32),
    "widen_bf16": types.void(_U8, _L, _F32),
}


LARGEST = f32(LARGEST_FLOAT)


@inline
def is_finite(x):
    return abs(x) < f32(np.inf)


@inline
def count_bins(hist, bins, at):
    """Count thirty-two gathered bins. There are four histograms side by side, so that neighbours in one bin do not
    wait for each other; four bins are read at once."""
    for j in range(at, at + 32, 4):
        four = read_u64(bins, j)
        hist[four & u64(0xFFFF)] += u32(1)
        hist[u64(HISTOGRAM_STRIDE) + (four >> u64(16) & u64(0xFFFF))] += u32(1)
        hist[u64(2 * HISTOGRAM_STRIDE) + (four >> u64(32) & u64(0xFFFF))] += u32(1)
        hist[u64(3 * HISTOGRAM_STRIDE) + (four >> u64(48))] += u32(1)


@inline
def finish_bins(hist, bins, counted, fill):
    """Count what has been gathered and not counted yet: whole units of sixteen."""
    while counted != fill:
        for j in range(counted, counted + 16):
            hist[bins[j]] += u32(1)
        counted = (counted + 16) & (BIN_ROOM - 1)


@inline
def begin(ints, sums):
    for i in range(N_INTS):
        ints[i] = 0
    ints[FIRST_NAN] = ints[FIRST_INF] = ints[MIN_AT] = ints[MAX_AT] = -1
    for i in range(4):
        sums[i] = 0.0
    sums[MIN], sums[MAX] = np.inf, -np.inf


@inline
def begin_lanes(lanes):
    for i in range(4 * LANES):
        lanes[i] = 0.0


@inline
def add_lanes(sums, lanes):
    for power in range(4):
        for lane in range(LANES):
            sums[power] += lanes[LANES * power + lane]


@inline
def note_blocks(n, elements, squares, levels, flags, keys, mask, kept, kept_at, ints):
    """What is known block by block once the values have been seen: levels from the sums of the squares (below zero
    for a block with something not finite), counts, and the keys that are sampled. `flags` are final."""
    zero = bad = unmarked = equal = 0
    for i in range(n):
        square = squares[i]
        levels[i] = i16(-1 if square < 0.0 else level_of(square / elements))
        zero += square == 0.0
        bad += square < 0.0
    for i in range(n):
        unmarked += flags[i] & MARKED == 0
        keys[i] = u64(0) if flags[i] & UNIFORM else keys[i]
    for i in range(1, n):
        equal += (keys[i] == keys[i - 1]) & (keys[i] != u64(0))
    n_kept = 0
    for i in range(n):
        kept[n_kept], kept_at[n_kept] = keys[i], i
        n_kept += (keys[i] & mask == u64(0)) & (keys[i] != u64(0))
    ints[ZERO_BLOCKS], ints[BAD_BLOCKS], ints[UNMARKED_BLOCKS] = zero, bad, unmarked
    ints[EQUAL_BLOCKS], ints[N_KEPT] = equal, n_kept


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
        ints[N_ZERO] += 1  # those of the fast path are in the histogram alone
        hist[bits >> u32(21)] -= u32(1)
    elif bits & u32(0x7FFFFFFF) < u32(1 << 21):
        ints[TINY_PLUS if v > f32(0) else TINY_MINUS] += 1
    y = f64(v) - pivot
    y2 = y * y
    sums[0] += y
    sums[1] += y2
    sums[2] += y2 * y
    sums[3] += y2 * y2
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
def place_of(value, codes, at, length, unit, scales, mins, has_min, scale_shift):
    """The first of `length` elements from `at` on that has the value; it is known to be there."""
    for j in range(at, at + length):
        g = j // unit >> scale_shift
        if scales[g] * f32(codes[j]) + (mins[g] if has_min else f32(-0.0)) == value:
            return j
    return -1


@inline
def finish_flags(n, mode, low_end, high_end, lows, highs, flags):
    """The final flags of the blocks, from the unpacker's and their smallest and largest code; see `layout.Mark`."""
    for i in range(n):
        low, high = lows[i], highs[i]
        marked = True
        if mode == 1:
            marked = low == low_end
        elif mode == 2:
            marked = (low == low_end) & (high == high_end)
        elif mode == 3:
            marked = ((low == low_end) & (high <= high_end)) | ((high == high_end) & (low >= low_end))
        marked = (marked & (flags[i] & MARKED != 0)) | (flags[i] & EXEMPT != 0)
        flags[i] = u8(MARKED * marked + UNIFORM * (low == high))


def scan_codes(
    codes, scales, mins, has_min, unit, scale_shift, units_per_block, blocks_per_row, n_rows, pivot,
    mark_mode, low_end, high_end, mask,
    scratch, bins, lanes, squares, lows, highs, hist, levels, flags, keys, kept, kept_at,
    row_min, row_max, row_square, row_bad, ints, sums,
):  # fmt: skip
    begin(ints, sums)
    begin_lanes(lanes)
    n = f64(unit)
    at = fill = counted = block = g = 0
    shifted = has_min != 0 or pivot != 0.0
    for r in range(n_rows):
        bottom, top, bad_in_row, row_total = f32(np.inf), f32(-np.inf), 0, 0.0
        first = at
        for _ in range(blocks_per_row):
            square, bad, lowest, highest = 0.0, 0, 127, -128
            for _ in range(units_per_block):
                s = scales[g >> scale_shift]
                m = mins[g >> scale_shift] if has_min else f32(-0.0)
                g += 1
                if shifted:
                    c = f64(m) - pivot
                    if unit == 32:
                        ok, s1, s2, low, high, x, y = shifted32(codes, at, s, m, c, bins, fill, lanes)
                    else:
                        ok, s1, s2, low, high, x, y = shifted16(codes, at, s, m, c, bins, fill, lanes)
                elif unit == 32:
                    ok, s1, s2, low, high, x, y = coded32(codes, at, s, m, 0.0, bins, fill, lanes)
                else:
                    ok, s1, s2, low, high, x, y = coded16(codes, at, s, m, 0.0, bins, fill, lanes)
                lowest, highest = min(lowest, low), max(highest, high)
                if ok:
                    fill = (fill + unit) & (BIN_ROOM - 1)
                    # bins are counted a little later, while the processor is busy with the next unit's arithmetic
                    if (fill - counted) & (BIN_ROOM - 1) >= 64:
                        count_bins(hist, bins, counted)
                        counted = (counted + 32) & (BIN_ROOM - 1)
                    wide = f64(s)
                    part = wide * wide * f64(s2)
                    if has_min:
                        least = f64(m)
                        part = part + 2.0 * least * (wide * f64(s1)) + n * (least * least)
                    square += part
                    bottom = x if x < bottom else bottom
                    top = y if y > top else top
                else:
                    seen = ints[N_NAN] + ints[N_INF]
                    for j in range(unit):
                        v = s * f32(codes[at + j]) + m
                        scratch[j] = slow_value(v, at + j, pivot, hist, ints, sums)
                        if is_finite(v):
                            bottom, top = min(bottom, v), max(top, v)
                    bad += ints[N_NAN] + ints[N_INF] - seen
                    square += tree_sum(scratch, unit)
                at += unit
            squares[block] = -1.0 if bad else square
            lows[block], highs[block] = i8(lowest), i8(highest)
            block += 1
            row_total += square
            bad_in_row += bad
        row_min[r], row_max[r], row_square[r], row_bad[r] = bottom, top, row_total, bad_in_row
        row_length = at - first
        if bottom < sums[MIN]:
            place = place_of(bottom, codes, first, row_length, unit, scales, mins, has_min, scale_shift)
            sums[MIN], ints[MIN_AT] = bottom, place
        if top > sums[MAX]:
            place = place_of(top, codes, first, row_length, unit, scales, mins, has_min, scale_shift)
            sums[MAX], ints[MAX_AT] = top, place
    finish_bins(hist, bins, counted, fill)
    add_lanes(sums, lanes)
    finish_flags(block, mark_mode, low_end, high_end, lows, highs, flags)
    elements = f64(unit * units_per_block)
    note_blocks(block, elements, squares, levels, flags, keys, mask, kept, kept_at, ints)


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
    values, row_length, n_rows, pivot, mask,
    scratch, bins, lanes, squares, lows, highs, hist, levels, flags, keys, kept, kept_at,
    row_min, row_max, row_square, row_bad, ints, sums, off_bf16, off_f16,
):  # fmt: skip
    begin(ints, sums)
    begin_lanes(lanes)
    block = fill = counted = 0
    for r in range(n_rows):
        bottom, top, bad_in_row, row_total = f32(np.inf), f32(-np.inf), 0, 0.0
        for at in range(r * row_length, (r + 1) * row_length, 32):
            count = min(32, (r + 1) * row_length - at)
            odd, bad = 1, 0
            if count == 32:
                odd, square, x, y, n_bf16, n_f16 = valued32(values, at, pivot, bins, fill, lanes)
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
                fill = (fill + 32) & (BIN_ROOM - 1)
                if (fill - counted) & (BIN_ROOM - 1) >= 64:
                    count_bins(hist, bins, counted)
                    counted = (counted + 32) & (BIN_ROOM - 1)
                if (n_bf16 and ints[OFF_BF16] < GRID_FIRST) or (n_f16 and ints[OFF_F16] < GRID_FIRST):
                    remember_off(values, at, 32, ints, off_bf16, off_f16)
                else:
                    ints[OFF_BF16] += n_bf16
                    ints[OFF_F16] += n_f16
            bottom, top = min(bottom, x), max(top, y)
            # the sum over the shorter last run of a row is brought to the scale of a full one
            squares[block] = -1.0 if bad else square / count * 32.0
            flags[block] = u8(MARKED + (UNIFORM if x == y and not bad else 0))
            block += 1
            row_total += square
            bad_in_row += bad
        row_min[r], row_max[r], row_square[r], row_bad[r] = bottom, top, row_total, bad_in_row
        if bottom < sums[MIN]:
            sums[MIN], ints[MIN_AT] = bottom, place_of_value(bottom, values, r * row_length)
        if top > sums[MAX]:
            sums[MAX], ints[MAX_AT] = top, place_of_value(top, values, r * row_length)
    finish_bins(hist, bins, counted, fill)
    add_lanes(sums, lanes)
    note_blocks(block, 32.0, squares, levels, flags, keys, mask, kept, kept_at, ints)


def widen_f16(raw, n, values):
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        widen_f16_16(raw, 2 * i, values, i)
    for i in range(whole, n):
        values[i] = half(raw, 2 * i)


def widen_bf16(raw, n, values):
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        widen_bf16_16(raw, 2 * i, values, i)
    for i in range(whole, n):
        values[i] = from_bits(np.int64(raw[2 * i]) << 16 | np.int64(raw[2 * i + 1]) << 24)


# Blocks against their rows and columns

#: rows whose clamped residuals add up within sixteen bits
ROWS_AT_ONCE = 32767 // CLAMP


@inline
def rounded_mean(total, count):
    count = max(count, 1)
    return (2 * total + count) // (2 * count)


@inline
def residual(x, row, column):
    """A level's residual, clamped; 0 where there is no level. All in sixteen bits: levels stay below 2^14."""
    e = i16(i16(x - row) - column)
    e = e if e > i16(-CLAMP) else i16(-CLAMP)
    e = e if e < i16(CLAMP) else i16(CLAMP)
    return e if x > i16(0) else i16(0)


@inline
def note_worst(magnitude, at, worst_by, worst, n_worst):
    """Keep a block among the `n_worst` that deviate most; of equals the earlier stay."""
    out = 0
    for k in range(1, n_worst):
        if worst_by[k] < worst_by[out] or (worst_by[k] == worst_by[out] and worst[k] > worst[out]):
            out = k
    worst_by[out], worst[out] = magnitude, at
    least = worst_by[0]
    for k in range(1, n_worst):
        least = min(least, worst_by[k])
    return least


def deviate(
    levels, n_rows, n_columns, n_worst,
    rows, columns, few, totals, counts, row_counts, padded, result, hist, worst_by, worst,
):  # fmt: skip
    """See `digest.Tools.deviate`. `padded` has room for n_rows times n_columns rounded up to 32; the arrays by column
    have as many columns. Where LLVM adds up columns it does so in sixteen bits, a few hundred rows at a time."""
    width = (n_columns + 31) // 32 * 32
    total = count = 0
    for c in range(width):
        counts[c] = 0
    for r in range(n_rows):
        there, part = i32(0), i32(0)
        for c in range(n_columns, width):
            padded[r * width + c] = 0
        for c in range(n_columns):
            x = levels[r * n_columns + c]
            x = x if x > i16(0) else i16(0)
            padded[r * width + c] = x
            counts[c] += i32(x > i16(0))
            there += i32(x > i16(0))
            part += i32(x)
        total += part
        count += there
        rows[r], row_counts[r] = 0, there
    for c in range(width):
        columns[c] = i16(rounded_mean(total, count))
    for _ in range(ROUNDS):
        if n_rows >= FEWEST:
            for c in range(width):
                totals[c] = 0
            for begin in range(0, n_rows, ROWS_AT_ONCE):
                for c in range(width):
                    few[c] = 0
                for r in range(begin, min(begin + ROWS_AT_ONCE, n_rows)):
                    row = rows[r]
                    for c in range(width):
                        few[c] = i16(few[c] + residual(padded[r * width + c], row, columns[c]))
                for c in range(width):
                    totals[c] += i32(few[c])
            for c in range(width):
                columns[c] = i16(columns[c] + rounded_mean(np.int64(totals[c]), np.int64(counts[c])))
        if n_columns >= FEWEST:
            for r in range(n_rows):
                row, part = rows[r], i32(0)
                for c in range(width):
                    part += i32(residual(padded[r * width + c], row, columns[c]))
                rows[r] = i16(row + rounded_mean(np.int64(part), np.int64(row_counts[r])))
    for k in range(n_worst):
        worst_by[k], worst[k] = -1, -1
    least = np.int64(-1)
    for r in range(n_rows):
        row = rows[r]
        for c in range(n_columns):
            x = padded[r * width + c]
            result[r * n_columns + c] = i16(i16(x - row) - columns[c]) if x > i16(0) else i16(NONE)
        for at in range(r * n_columns, (r + 1) * n_columns):
            magnitude = np.int64(abs(i32(result[at])))
            if magnitude == -NONE:
                continue
            hist[min(magnitude, DEVIATION_BINS - 1)] += 1
            if magnitude > least:
                least = note_worst(magnitude, at, worst_by, worst, n_worst)


def scan_scales(d, n, hist, ints, extremes):
    """See `digest.Tools.scan_scales`; ints: n_nan, n_inf, the first of them, n_zero, where the extremes are."""
    for i in range(n):
        hist[bits_of(d[i]) >> u32(21)] += u32(1)
    special, nan, zero, least, most = u32(0x7F800000), 0, 0, u32(0xFFFFFFFF), u32(0)
    odd = 0
    for i in range(n):
        bits = bits_of(d[i]) & u32(0x7FFFFFFF)
        odd += bits >= special
        nan += bits > special
        zero += bits == u32(0)
        proper = u32(0xFFFFFFFF) if (bits == u32(0)) | (bits >= special) else bits
        least = proper if proper < least else least
        proper = u32(0) if bits >= special else bits
        most = proper if proper > most else most
    ints[0], ints[1], ints[2], ints[3], ints[4], ints[5] = nan, odd - nan, -1, zero, -1, -1
    extremes[0], extremes[1] = f32(np.inf), f32(0)
    if odd:
        while ints[2] < 0 or bits_of(d[ints[2]]) & special != special:
            ints[2] += 1
    if most > u32(0):
        for which, wanted in ((4, least), (5, most)):
            i = 0
            while bits_of(d[i]) & u32(0x7FFFFFFF) != wanted:
                i += 1
            ints[which] = i
            extremes[which - 4] = abs(d[i])


@inline
def has_equal_bytes(data, at):
    """Whether any of the next eight words consists of eight equal bytes."""
    least = ~u64(0)
    for k in range(0, 64, 8):
        word = read_u64(data, at + k)
        differs = word ^ (word >> u64(8) | word << u64(56))
        least = differs if differs < least else least
    return least == u64(0)


def byte_runs(data, n, shortest, runs):
    """See `runs.ByteRuns.of`: the start and length of the longest run of equal bytes in runs[0], runs[1], of zero
    bytes in runs[2], runs[3], and the lengths of the runs at the two ends in runs[4], runs[5]."""
    for i in range(6):
        runs[i] = 0
    at = 0
    while at + 8 <= n:
        while at + 64 <= n and not has_equal_bytes(data, at):
            at += 64
        if at + 8 > n:
            break
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
