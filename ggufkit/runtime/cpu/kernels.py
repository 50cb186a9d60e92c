"""The arithmetic of the CPU engine, in the operations of `simd`: one function a kind of operation.

An operation is a record of addresses and sizes (see `program`), cut into tasks that any thread may do. Matrices
lie in blocks of sixteen rows side by side, [block, column, row], so that one load is one column of sixteen rows.
Quantized ones have a scale (and, for some types, a min) for every `group` columns of each row, laid out alike:
value = scale · code + min. Codes stay codes until the sum of a group is complete where few columns of activations
are multiplied (`matvec`), and are widened once for all of them where there are many (`matmul`).

Every result is summed in one order that depends on neither the threads nor the company it is computed in.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ggufkit.runtime.cpu.simd import (
    LANES,
    TILE_COLUMNS,
    TILE_VECTORS,
    add,
    bfloat16s,
    codes,
    divide,
    element,
    exp,
    float16s,
    floats,
    fma,
    full,
    inlined,
    kernel,
    load,
    maximum,
    multiply,
    prefetch,
    spread,
    store,
    subtract,
    tile,
    where_reaches,
)

PANEL = TILE_VECTORS * LANES  # rows that a tile computes at once
STRIP = 2  # panels that a task of `matmul` widens together, to use each piece of x twice
DEPTH = 512  # columns that it widens at once: with the strip, what fits into the second-level cache

#: how the elements of a matrix are stored
CODES, CODES_MINS, FLOAT32, FLOAT16, BFLOAT16 = range(5)


def scratch_floats(head_dim: int, n_keys: int) -> int:
    """Float32 values that a thread needs for itself."""
    channels = -(-head_dim // TILE_COLUMNS) * TILE_COLUMNS
    return max(STRIP * DEPTH * PANEL, (head_dim + n_keys + TILE_COLUMNS + channels + 3) * PANEL)


# --- matrices by vectors ---------------------------------------------------------------------------------------


@inlined
def _dot(data: Any, at: int, x: Any, first: int, count: int) -> Any:
    """Σ data · x over `count` columns, for sixteen rows."""
    a, b, c, d = full(0.0), full(0.0), full(0.0), full(0.0)
    for j in range(0, count - 7, 8):
        place, column = at + j * LANES, first + j
        prefetch(data, place)
        a = fma(load(data, place), spread(x, column), a)
        b = fma(load(data, place + LANES), spread(x, column + 1), b)
        c = fma(load(data, place + 2 * LANES), spread(x, column + 2), c)
        d = fma(load(data, place + 3 * LANES), spread(x, column + 3), d)
        a = fma(load(data, place + 4 * LANES), spread(x, column + 4), a)
        b = fma(load(data, place + 5 * LANES), spread(x, column + 5), b)
        c = fma(load(data, place + 6 * LANES), spread(x, column + 6), c)
        d = fma(load(data, place + 7 * LANES), spread(x, column + 7), d)
    for j in range(count - count % 8, count):
        a = fma(load(data, at + j * LANES), spread(x, first + j), a)
    return add(add(a, b), add(c, d))


@kernel
def _rows_by_vector(
    op: Any, data: Any, scales: Any, mins: Any, first: int, last: int, x: Any, sums: Any, out: Any
) -> None:
    """Blocks [first, last) of a matrix by one x. `scales` is None for plain floats, `mins` where there are none."""
    group, width = op.group, op.width
    for block in range(first, last):
        total = full(0.0)
        for g in range(width // group):
            part = _dot(data, (block * width + g * group) * LANES, x, g * group, group)
            at = (block * (width // group) + g) * LANES
            if scales is None:
                total = add(total, part)
            else:
                total = fma(part, load(scales, at), total)
            if mins is not None:
                total = fma(load(mins, at), spread(sums, g), total)
        store(out, block * LANES, total)


@kernel
def matvec(op: Any, task: int) -> None:
    """out [n, blocks · LANES] = x [n, width] · matrixᵀ for few n; a task is `span` blocks.

    `y` holds Σ x of each group, [n, groups], where the matrix has mins.
    """
    first, last = task * op.span, min((task + 1) * op.span, op.blocks)
    size, groups = op.blocks * op.width * LANES, op.width // op.group
    scales, mins = floats(op.scales, size // op.group), floats(op.mins, size // op.group)
    for t in range(op.n):
        x, sums = floats(op.x + 4 * t * op.width, op.width), floats(op.y + 4 * t * groups, groups)
        out = floats(op.out + 4 * t * op.blocks * LANES, op.blocks * LANES)
        if op.layout == CODES:
            _rows_by_vector(op, codes(op.data, size), scales, None, first, last, x, sums, out)
        elif op.layout == CODES_MINS:
            _rows_by_vector(op, codes(op.data, size), scales, mins, first, last, x, sums, out)
        elif op.layout == FLOAT32:
            _rows_by_vector(op, floats(op.data, size), None, None, first, last, x, sums, out)
        elif op.layout == FLOAT16:
            _rows_by_vector(op, float16s(op.data, size), None, None, first, last, x, sums, out)
        else:
            _rows_by_vector(op, bfloat16s(op.data, size), None, None, first, last, x, sums, out)


@kernel
def group_sums(op: Any, task: int) -> None:
    """out [n, groups] = Σ x over each group of columns; a task a position."""
    x, groups = floats(op.x + 4 * task * op.width, op.width), op.width // op.group
    out = floats(op.out + 4 * task * groups, groups)
    for g in range(groups):
        total = np.float32(0)
        for j in range(g * op.group, (g + 1) * op.group):
            total += x[j]
        out[g] = total


# --- matrices by many columns ----------------------------------------------------------------------------------


@kernel
def _widen(op: Any, data: Any, scales: Any, mins: Any, block: int, first: int, count: int, panel: Any, at: int) -> None:
    """Values of sixteen rows, `count` columns from `first` on, to every PANEL floats of `panel` from `at` on."""
    group, width = op.group, op.width
    for g in range(first // group, (first + count + group - 1) // group):
        place = (block * (width // group) + g) * LANES
        for column in range(max(g * group, first), min((g + 1) * group, first + count)):
            value = load(data, (block * width + column) * LANES)
            if mins is not None:
                value = fma(value, load(scales, place), load(mins, place))
            elif scales is not None:
                value = multiply(value, load(scales, place))
            store(panel, at + (column - first) * PANEL, value)


@kernel
def _widen_any(op: Any, block: int, first: int, count: int, panel: Any, at: int) -> None:
    size = op.blocks * op.width * LANES
    scales, mins = floats(op.scales, size // op.group), floats(op.mins, size // op.group)
    if op.layout == CODES:
        _widen(op, codes(op.data, size), scales, None, block, first, count, panel, at)
    elif op.layout == CODES_MINS:
        _widen(op, codes(op.data, size), scales, mins, block, first, count, panel, at)
    elif op.layout == FLOAT32:
        _widen(op, floats(op.data, size), None, None, block, first, count, panel, at)
    elif op.layout == FLOAT16:
        _widen(op, float16s(op.data, size), None, None, block, first, count, panel, at)
    else:
        _widen(op, bfloat16s(op.data, size), None, None, block, first, count, panel, at)


@kernel
def matmul(op: Any, task: int, scratch: Any) -> None:
    """out [tiles · TILE_COLUMNS, blocks · LANES] = x · matrixᵀ, x as `arrange` left it; a task is a strip of rows."""
    n_tiles, height = (op.n + TILE_COLUMNS - 1) // TILE_COLUMNS, op.blocks * LANES
    x = floats(op.x, n_tiles * op.width * TILE_COLUMNS)
    out = floats(op.out, n_tiles * TILE_COLUMNS * height)
    first_panel = task * STRIP
    n_panels = min(STRIP, op.blocks // TILE_VECTORS - first_panel)
    for first in range(0, op.width, DEPTH):
        depth = min(DEPTH, op.width - first)
        for panel in range(n_panels):
            for vector in range(TILE_VECTORS):
                block = (first_panel + panel) * TILE_VECTORS + vector
                _widen_any(op, block, first, depth, scratch, panel * DEPTH * PANEL + vector * LANES)
        for t in range(n_tiles):
            piece = (t * op.width + first) * TILE_COLUMNS
            for panel in range(n_panels):
                target = t * TILE_COLUMNS * height + (first_panel + panel) * PANEL
                at = panel * DEPTH * PANEL
                tile(scratch, at, x, piece, TILE_COLUMNS, 1, depth, out, target, height, first == 0)


@kernel
def arrange(op: Any, task: int) -> None:
    """x [n, width] as [tiles, width, TILE_COLUMNS], the last tile filled up with zeros; a task is a tile."""
    x, size = floats(op.x, op.n * op.width), op.width * TILE_COLUMNS
    out = floats(op.out + 4 * task * size, size)
    first = task * TILE_COLUMNS
    rows = min(TILE_COLUMNS, op.n - first)
    for column in range(op.width):
        for c in range(rows):
            out[column * TILE_COLUMNS + c] = element(x, (first + c) * op.width + column)
        for c in range(rows, TILE_COLUMNS):
            out[column * TILE_COLUMNS + c] = 0


@kernel
def trim(op: Any, task: int) -> None:
    """x [n, blocks · LANES] without the rows that only fill up the last block: out [n, width]; a task a position."""
    x = floats(op.x + 4 * task * op.blocks * LANES, op.width)
    out = floats(op.out + 4 * task * op.width, op.width)
    for i in range(op.width):
        out[i] = x[i]


# --- attention -------------------------------------------------------------------------------------------------


@kernel
def keep(op: Any, task: int) -> None:
    """Put keys x and values y [n, heads, width] into the cache [heads, n_ctx, width] at `position`; a task a head."""
    size, start = op.n * op.width, 4 * (task * op.n_ctx + op.position) * op.width
    keys, values = floats(op.keys + start, size), floats(op.values + start, size)
    k, v = floats(op.x, size * op.heads), floats(op.y, size * op.heads)
    for t in range(op.n):
        for d in range(op.width):
            keys[t * op.width + d] = k[(t * op.heads + task) * op.width + d]
            values[t * op.width + d] = v[(t * op.heads + task) * op.width + d]


@kernel
def _query_panel(op: Any, shared: int, key_head: int, first: int, panel: Any, limits: Any) -> int:
    """Fill `panel` [D, PANEL] with rows of queries, and the lanes' last visible keys; the largest of these.

    A row is one query head at one position; those that share a key head are numbered position by position.
    Lanes beyond the last row repeat it.
    """
    q, n_rows = floats(op.x, op.n * op.heads * op.width), op.n * shared
    for lane in range(PANEL):
        row = min(first + lane, n_rows - 1)
        start = (row // shared * op.heads + key_head * shared + row % shared) * op.width
        limits[lane] = op.position + row // shared
        for d in range(op.width):
            panel[d * PANEL + lane] = q[start + d]
    return op.position + min(first + PANEL - 1, n_rows - 1) // shared


@kernel
def _soft_max(scores: Any, n_keys: int, limits: Any, scale: Any, lane: int, total: Any) -> None:
    """Turn scores [keys, PANEL] into exponentials in place, for sixteen lanes; `total` is one over their sum.

    A key beyond a lane's limit is not seen: 0. The largest score is taken off first, so that none overflows.
    """
    limit = load(limits, lane)
    largest = full(-math.inf)
    for key in range(n_keys):
        score = multiply(load(scores, key * PANEL + lane), scale)
        score = where_reaches(limit, key, score, -math.inf)
        store(scores, key * PANEL + lane, score)
        largest = maximum(score, largest)
    summed = full(0.0)
    for key in range(n_keys):
        power = where_reaches(limit, key, exp(subtract(load(scores, key * PANEL + lane), largest)), 0.0)
        store(scores, key * PANEL + lane, power)
        summed = add(summed, power)
    store(total, lane, divide(1.0, summed))


@kernel
def _show(
    op: Any, scores: Any, n_keys: int, shared: int, key_head: int, first: int, factors: Any, address: int
) -> None:
    """Copy scores [keys, PANEL] times a factor a lane to where a trace wants them, [n, heads, position + n]."""
    most = op.position + op.n
    for lane in range(min(PANEL, op.n * shared - first)):
        row = first + lane
        head = row // shared * op.heads + key_head * shared + row % shared
        out = floats(address + 4 * head * most, most)
        for key in range(most):
            out[key] = scores[key * PANEL + lane] * factors[lane] if key < n_keys else np.float32(0)


@kernel
def attend(op: Any, task: int, scratch: Any) -> None:
    """Softmax attention of queries x [n, heads, width] at `position` and after over the cache's keys up to their own.

    A task is a panel of query rows of one key head. out is [n, heads, width]; `kq` and `kq_soft_max` are where a
    trace wants the scores and the probabilities, or 0.
    """
    shared = op.heads // op.key_heads
    n_rows, most = op.n * shared, op.position + op.n
    per_head = (n_rows + PANEL - 1) // PANEL
    key_head, first = task // per_head, task % per_head * PANEL
    room = (most + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS * PANEL
    scores, panel = scratch[:room], scratch[room : room + op.width * PANEL]
    rest = scratch[room + op.width * PANEL :]
    limits, total, scales, result = (
        rest[:PANEL],
        rest[PANEL : 2 * PANEL],
        rest[2 * PANEL : 3 * PANEL],
        rest[3 * PANEL :],
    )
    scale = np.float32(1 / math.sqrt(op.width))
    scales[:] = scale
    cached = op.n_ctx * op.width
    keys = floats(op.keys + 4 * key_head * cached, cached)
    values = floats(op.values + 4 * key_head * cached, cached)
    n_keys = _query_panel(op, shared, key_head, first, panel, limits) + 1
    for key in range(0, most if op.kq else n_keys, TILE_COLUMNS):
        tile(panel, 0, keys, key * op.width, 1, op.width, op.width, scores, key * PANEL, PANEL, True)
    if op.kq:
        _show(op, scores, most, shared, key_head, first, scales, op.kq)
    for lane in range(0, PANEL, LANES):
        _soft_max(scores, n_keys, limits, scale, lane, total)
    if op.kq_soft_max:
        _show(op, scores, n_keys, shared, key_head, first, total, op.kq_soft_max)
    for d in range(0, op.width, TILE_COLUMNS):
        tile(scores, 0, values, d, op.width, 1, n_keys, result, d * PANEL, PANEL, True)
    out = floats(op.out, op.n * op.heads * op.width)
    for lane in range(min(PANEL, n_rows - first)):
        row = first + lane
        start = (row // shared * op.heads + key_head * shared + row % shared) * op.width
        for d in range(op.width):
            out[start + d] = result[d * PANEL + lane] * total[lane]


# --- rows ------------------------------------------------------------------------------------------------------


@kernel
def rms_norm(op: Any, task: int) -> None:
    """out = x / sqrt(mean(x²) + eps) · weight, the mean in double precision; a task is a row of `width`.

    The weight is at `data`, eps at `y`.
    """
    x, out = floats(op.x + 4 * task * op.width, op.width), floats(op.out + 4 * task * op.width, op.width)
    weight, eps = floats(op.data, op.width), np.float64(floats(op.y, 1)[0])
    total = 0.0
    for i in range(op.width):
        total += np.float64(x[i]) * np.float64(x[i])
    factor = np.float32(1 / math.sqrt(total / op.width + eps))
    for i in range(op.width):
        out[i] = x[i] * factor * weight[i]


@kernel
def rotate(op: Any, task: int) -> None:
    """Turn the pairs (i, i + D/2) of x [n, heads, D] in place; `y` holds cos and sin, [2, n, D/2]; a task a row."""
    half = op.width // 2
    cos, sin = floats(op.y + 4 * task * half, half), floats(op.y + 4 * (op.n + task) * half, half)
    for h in range(op.heads):
        x = floats(op.x + 4 * (task * op.heads + h) * op.width, op.width)
        for i in range(half):
            low, high = x[i], x[i + half]
            x[i] = low * cos[i] - high * sin[i]
            x[i + half] = low * sin[i] + high * cos[i]


@kernel
def plus(op: Any, task: int) -> None:
    """x += y, y being one vector or as many as there are rows (`heads`); a task is a row of `width`."""
    x, y = floats(op.x + 4 * task * op.width, op.width), floats(op.y + 4 * (task % op.heads) * op.width, op.width)
    for i in range(op.width):
        x[i] += y[i]


@kernel
def silu_times(op: Any, task: int) -> None:
    """x = silu(x) · y, silu(x) = x / (1 + e^-x); a task is a row of `width`."""
    x, y = floats(op.x + 4 * task * op.width, op.width), floats(op.y + 4 * task * op.width, op.width)
    for i in range(0, op.width - LANES + 1, LANES):
        gate = load(x, i)
        store(x, i, multiply(divide(gate, add(exp(subtract(0.0, gate)), 1.0)), load(y, i)))
    for i in range(op.width - op.width % LANES, op.width):
        x[i] = x[i] / (1 + math.exp(-x[i])) * y[i]
