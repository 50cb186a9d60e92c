"""The arithmetic of the CPU engine, in the operations of `simd`.

Matrices lie in blocks of sixteen rows side by side, `data[block, column, row]`, so that one load is one column of
sixteen rows. Quantized ones have a scale (and, for some types, a min) for `group` columns of each row, laid out
alike: value = scale · code + min. Codes stay codes until the sum of a group is complete when one column of
activations is multiplied (`matvec`), and are widened once for many columns when there are more (`matmul`).

Every result is summed in one order that depends on neither the threads nor the company it is computed in.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ggufkit.runtime.cpu.crew import claim, finish
from ggufkit.runtime.cpu.simd import (
    LANES,
    TILE_COLUMNS,
    TILE_VECTORS,
    add,
    divide,
    exp,
    fma,
    full,
    kernel,
    load,
    maximum,
    multiply,
    store,
    subtract,
    tile,
    where_reaches,
)

PANEL = TILE_VECTORS * LANES  # rows that a tile computes at once
STRIP_PANELS = 2  # panels that a task of `matmul` widens together, to use each piece of x twice
DEPTH = 512  # columns that it widens at once: with the strip, what fits into the second-level cache

# --- matrices --------------------------------------------------------------------------------------------------


@kernel
def interleave(rows: Any, out: Any, first_block: int) -> None:
    """Lay rows [n, columns] side by side into out [blocks, columns, LANES], from `first_block` on."""
    n_rows, n_columns = rows.shape
    for block in range((n_rows + LANES - 1) // LANES):
        for lane in range(LANES):
            row = block * LANES + lane
            if row < n_rows:
                for column in range(n_columns):
                    out[first_block + block, column, lane] = rows[row, column]
            else:
                out[first_block + block, :, lane] = 0


@kernel
def _group_sum(data: Any, at: int, x: Any, first: int, count: int) -> Any:
    """Σ data · x over `count` columns, for sixteen rows."""
    a, b, c, d = full(0.0), full(0.0), full(0.0), full(0.0)
    for j in range(0, count - 3, 4):
        place = at + j * LANES
        a = fma(load(data, place), x[first + j], a)
        b = fma(load(data, place + LANES), x[first + j + 1], b)
        c = fma(load(data, place + 2 * LANES), x[first + j + 2], c)
        d = fma(load(data, place + 3 * LANES), x[first + j + 3], d)
    for j in range(count - count % 4, count):
        a = fma(load(data, at + j * LANES), x[first + j], a)
    return add(add(a, b), add(c, d))


@kernel
def matvec(
    ticket: Any, n_tasks: int, data: Any, scales: Any, mins: Any, group: int, x: Any, sums: Any, out: Any, span: int
) -> None:
    """out [blocks · LANES] = matrix · x [columns].

    Args:
        scales, mins: float32 [blocks, groups, LANES] or None.
        sums: Σ x of each group, float32 [groups]; used with mins only.
        span: blocks in a task.
    """
    n_blocks, n_columns, _ = data.shape
    n_groups = n_columns // group
    task = claim(ticket)
    while task < n_tasks:
        for block in range(task * span, min((task + 1) * span, n_blocks)):
            total = full(0.0)
            for g in range(n_groups):
                part = _group_sum(data, (block * n_columns + g * group) * LANES, x, g * group, group)
                at = (block * n_groups + g) * LANES
                if scales is None:
                    total = add(total, part)
                else:
                    total = fma(part, load(scales, at), total)
                if mins is not None:
                    total = fma(load(mins, at), sums[g], total)
            store(out, block * LANES, total)
        finish(ticket)
        task = claim(ticket)


@kernel
def _widen(
    data: Any, scales: Any, mins: Any, group: int, block: int, first: int, count: int, panel: Any, at: int
) -> None:
    """Values of sixteen rows, `count` columns from `first` on, to every PANEL floats of `panel` from `at` on."""
    n_columns = data.shape[1]
    n_groups = n_columns // group
    for g in range(first // group, (first + count + group - 1) // group):
        place = (block * n_groups + g) * LANES
        begin, end = max(g * group, first), min((g + 1) * group, first + count)
        for column in range(begin, end):
            value = load(data, (block * n_columns + column) * LANES)
            if scales is not None:
                if mins is not None:
                    value = fma(value, load(scales, place), load(mins, place))
                else:
                    value = multiply(value, load(scales, place))
            store(panel, at + (column - first) * PANEL, value)


@kernel
def matmul(ticket: Any, n_tasks: int, data: Any, scales: Any, mins: Any, group: int, x: Any, out: Any) -> None:
    """out [tiles · TILE_COLUMNS, blocks · LANES] = x · matrixᵀ, a task a strip of rows.

    Args:
        x: as `arrange` makes it, [tiles, columns, TILE_COLUMNS].
    """
    n_blocks, n_columns, _ = data.shape
    n_tiles, width = x.shape[0], n_blocks * LANES
    strip = np.empty(STRIP_PANELS * DEPTH * PANEL, np.float32)
    task = claim(ticket)
    while task < n_tasks:
        first_panel = task * STRIP_PANELS
        n_panels = min(STRIP_PANELS, n_blocks // TILE_VECTORS - first_panel)
        for first in range(0, n_columns, DEPTH):
            depth = min(DEPTH, n_columns - first)
            for panel in range(n_panels):
                for vector in range(TILE_VECTORS):
                    block = (first_panel + panel) * TILE_VECTORS + vector
                    at = panel * DEPTH * PANEL + vector * LANES
                    _widen(data, scales, mins, group, block, first, depth, strip, at)
            for t in range(n_tiles):
                piece = (t * n_columns + first) * TILE_COLUMNS
                for panel in range(n_panels):
                    target = t * TILE_COLUMNS * width + (first_panel + panel) * PANEL
                    tile(strip, panel * DEPTH * PANEL, x, piece, TILE_COLUMNS, 1, depth, out, target, width, first == 0)
        finish(ticket)
        task = claim(ticket)


@kernel
def arrange(ticket: Any, n_tasks: int, x: Any, out: Any) -> None:
    """x [T, columns] as [tiles, columns, TILE_COLUMNS], the last tile filled up with zeros; a task a tile."""
    n_rows, n_columns = x.shape
    task = claim(ticket)
    while task < n_tasks:
        for c in range(TILE_COLUMNS):
            row = task * TILE_COLUMNS + c
            if row < n_rows:
                for column in range(n_columns):
                    out[task, column, c] = x[row, column]
            else:
                out[task, :, c] = 0
        finish(ticket)
        task = claim(ticket)


# --- attention -------------------------------------------------------------------------------------------------


@kernel
def _query_panel(q: Any, heads: int, key_head: int, first: int, panel: Any, limits: Any, position: int) -> int:
    """Fill `panel` [D, PANEL] with rows of queries, and the lanes' last visible keys; the largest of these.

    A row is one query head at one position; those that share a key head are numbered position by position.
    Lanes beyond the last row repeat it.
    """
    n_positions, _, head_dim = q.shape
    n_rows = n_positions * heads
    for lane in range(PANEL):
        row = min(first + lane, n_rows - 1)
        limits[lane] = position + row // heads
        for d in range(head_dim):
            panel[d * PANEL + lane] = q[row // heads, key_head * heads + row % heads, d]
    return position + min(first + PANEL - 1, n_rows - 1) // heads


@kernel
def _soft_max(scores: Any, n_keys: int, limits: Any, scale: Any, lane: int, total: Any) -> None:
    """Turn scores [keys, PANEL] into exponentials in place, for sixteen lanes; `total` is their sum.

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
    store(total, lane, summed)


@kernel
def _show(scores: Any, n_keys: int, heads: int, key_head: int, first: int, factors: Any, out: Any) -> None:
    """Copy scores [keys, PANEL] times a factor a lane to where a trace wants them: out [T, H, S]."""
    n_rows = out.shape[0] * heads
    for lane in range(min(PANEL, n_rows - first)):
        row = first + lane
        for key in range(n_keys):
            out[row // heads, key_head * heads + row % heads, key] = scores[key * PANEL + lane] * factors[lane]


@kernel
def attention(
    ticket: Any, n_tasks: int, q: Any, keys: Any, values: Any, position: int, out: Any, kq: Any, probs: Any
) -> None:
    """Softmax attention of queries at `position` and after over all keys up to their own; a task a panel of rows.

    Args:
        q: float32 [T, H, D].
        keys, values: float32 [K, n_ctx, D], with room behind for a tile to overshoot.
        out: float32 [T, H, D].
        kq, probs: float32 [T, H, S] for a trace, or empty.
    """
    n_positions, n_heads, head_dim = q.shape
    n_key_heads, n_ctx, _ = keys.shape
    heads = n_heads // n_key_heads
    per_head = (n_positions * heads + PANEL - 1) // PANEL
    scale = np.float32(1 / math.sqrt(head_dim))
    traced = kq.size > 0
    most = position + n_positions
    room = (most + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS
    channels = (head_dim + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS
    panel, scores = np.empty(head_dim * PANEL, np.float32), np.empty(room * PANEL, np.float32)
    result = np.empty(channels * PANEL, np.float32)
    limits, total, scales = np.empty(PANEL, np.float32), np.empty(PANEL, np.float32), np.full(PANEL, scale)
    task = claim(ticket)
    while task < n_tasks:
        key_head, first = task // per_head, task % per_head * PANEL
        last = _query_panel(q, heads, key_head, first, panel, limits, position)
        start = key_head * n_ctx * head_dim
        for key in range(0, most if traced else last + 1, TILE_COLUMNS):
            at = start + key * head_dim
            tile(panel, 0, keys, at, 1, head_dim, head_dim, scores, key * PANEL, PANEL, True)
        if traced:
            _show(scores, most, heads, key_head, first, scales, kq)
        for lane in range(0, PANEL, LANES):
            _soft_max(scores, last + 1, limits, scale, lane, total)
        for lane in range(PANEL):
            total[lane] = 1 / total[lane]
        if traced:
            _show(scores, last + 1, heads, key_head, first, total, probs)
        for d in range(0, head_dim, TILE_COLUMNS):
            tile(scores, 0, values, start + d, head_dim, 1, last + 1, result, d * PANEL, PANEL, True)
        for lane in range(min(PANEL, n_positions * heads - first)):
            row = first + lane
            for d in range(head_dim):
                out[row // heads, key_head * heads + row % heads, d] = result[d * PANEL + lane] * total[lane]
        finish(ticket)
        task = claim(ticket)


# --- rows ------------------------------------------------------------------------------------------------------


@kernel
def rms_norm(ticket: Any, n_tasks: int, x: Any, weight: Any, eps: float, out: Any) -> None:
    """x / sqrt(mean(x²) + eps) · weight of each row, the mean in double precision; a task a row."""
    width = x.shape[1]
    task = claim(ticket)
    while task < n_tasks:
        total = 0.0
        for i in range(width):
            total += np.float64(x[task, i]) * np.float64(x[task, i])
        factor = np.float32(1 / math.sqrt(total / width + eps))
        for i in range(width):
            out[task, i] = x[task, i] * factor * weight[i]
        finish(ticket)
        task = claim(ticket)


@kernel
def rotate(x: Any, cos: Any, sin: Any) -> None:
    """Turn the pairs (i, i + D/2) of x [T, heads, D] in place; cos and sin are [T, D/2]."""
    half = x.shape[2] // 2
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(half):
                low, high = x[t, h, i], x[t, h, i + half]
                x[t, h, i] = low * cos[t, i] - high * sin[t, i]
                x[t, h, i + half] = low * sin[t, i] + high * cos[t, i]


@kernel
def silu_times(ticket: Any, n_tasks: int, gate: Any, up: Any, out: Any) -> None:
    """silu(gate) · up, elementwise, silu(x) = x / (1 + e^-x); a task a row."""
    width = gate.shape[1]
    task = claim(ticket)
    while task < n_tasks:
        for i in range(0, width - LANES + 1, LANES):
            at = task * width + i
            x = load(gate, at)
            store(out, at, multiply(divide(x, add(exp(subtract(0.0, x)), 1.0)), load(up, at)))
        for i in range(width - width % LANES, width):
            x = gate[task, i]
            out[task, i] = x / (1 + math.exp(-x)) * up[task, i]
        finish(ticket)
        task = claim(ticket)
