"""Two traces, step by step: how far apart they are, and where they first part.

Positions are compared one by one. Position 0 of a real model is an attention sink, sixty times larger than the
others, and in one figure over all positions everything else would drown in it.

How far two healthy runs may be apart follows from how they computed. The noise of a precision is there within a
layer (the first softmax of Qwen2, whose scores reach thousands, makes most of it) and then stays about level, so
that one figure a dtype serves for all steps. Those below are about three times what Qwen2.5-0.5B shows against
float64 at the worst position of the worst step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ggufkit import again
from ggufkit.runtime.diagnose import pattern, relative_error
from ggufkit.steps import Array, full_name, future_keys, parse_name
from ggufkit.trace import Trace

#: dtype of the computation → relative error (RMS of a position) that a healthy engine stays below
NOISE: dict[str | None, float] = {
    "float64": 1e-6,  # a trace is float32
    "float32": 1e-4,
    "float16": 0.1,
    "bfloat16": 0.5,
    "int8": 0.5,  # float engines that round the inputs of their products, as llama.cpp does on a CPU
}
#: of a dtype that is not named, or not known
UNKNOWN_NOISE = 0.1

_SCORES = ("kq", "kq_soft_max")

Status = Literal["same", "close", "diverged", "shape", "apart"]


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step of two traces.

    Attributes:
        status: bit for bit the same; within the tolerance; beyond it; or not comparable, because the shapes differ
            or no position is in both.
        error: the largest relative error of a position: RMS of the difference over RMS of the second trace.
        position: the first position beyond the tolerance, or else the one of that error.
        max_abs, worst: the largest difference of an element, and its place: position first.
        cosine: of the two as vectors.
        beyond: share of the elements beyond the tolerance.
        shapes: of the two, as stored.
    """

    name: str
    status: Status
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    error: float = 0.0
    position: int | None = None
    max_abs: float = 0.0
    worst: tuple[int, ...] | None = None
    cosine: float = 1.0
    beyond: float = 0.0


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first step that differs: where, by how much, and in which positions and heads, in words."""

    step: str
    layer: int | None
    position: int
    error: float
    pattern: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found.

    Attributes:
        rows: the steps that both traces hold, in the order of the pass.
        first: the first that diverges.
        tokens_differ_at: the first position with different token ids; only positions before it are compared.
        positions: those compared, first and one past the last.
        tolerance: relative error of a position, when it follows from the dtypes.
        rtol, atol: of an element, when they were given.
        only_a, only_b: steps that one trace alone holds.
        notes: what else differs: mode, model.
        again: the smallest commands that show the first divergence again.
    """

    rows: tuple[StepRow, ...]
    first: Divergence | None
    tokens_differ_at: int | None
    positions: tuple[int, int]
    tolerance: float | None
    rtol: float | None
    atol: float | None
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    notes: tuple[str, ...]
    again: tuple[str, ...] = ()

    @property
    def agree(self) -> bool:
        """Whether something was compared and nothing was found to differ."""
        alike = all(row.status in ("same", "close") for row in self.rows)
        return alike and bool(self.rows) and self.tokens_differ_at is None


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What counts as equal: a relative error of a position, or `atol + rtol · |b|` of an element."""

    relative: float | None = None
    rtol: float = 0.0
    atol: float = 0.0

    def bounds(self, expected: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far each element may be off, [T, 1] or [T, n], for `expected` [T, n]."""
        if self.relative is None:
            return self.atol + self.rtol * np.abs(expected)
        return self.relative * np.sqrt(np.mean(expected**2, axis=1, keepdims=True))


def compare(a: Trace, b: Trace, *, rtol: float | None = None, atol: float | None = None) -> Comparison:
    """Compare every step that both traces hold, at every position that both hold; errors are relative to `b`.

    Args:
        rtol, atol: when either is given, every element must lie within atol + rtol · |b|. Otherwise the relative
            error of every position must stay below the noise of the two dtypes together.
    """
    explicit = rtol is not None or atol is not None
    relative = None if explicit else sum(NOISE.get(trace.dtype, UNKNOWN_NOISE) for trace in (a, b))
    tolerance = Tolerance(relative, rtol or 0.0, atol or 0.0)
    differ = _first_difference(a.token_ids, b.token_ids)
    common = [name for name in a.arrays if name in b.arrays]
    rows, first, span = [], None, range(0)
    for name in common:
        pair = _aligned(name, a, b, differ)
        rows.append(pair.row(tolerance))
        span = span or pair.positions
        if first is None and rows[-1].status == "diverged":
            first = pair.divergence(rows[-1])
    return Comparison(
        tuple(rows),
        first,
        differ,
        (span.start, span.stop),
        relative,
        rtol,
        atol,
        tuple(name for name in a.arrays if name not in b.arrays),
        tuple(name for name in b.arrays if name not in a.arrays),
        tuple(_notes(a, b)),
        () if first is None else again.of_two(a, b, full_name(first.step, first.layer), first.position),
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    """One step of both traces at the positions and keys that both have."""

    name: str
    positions: range
    a: Array
    b: Array
    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    def row(self, tolerance: Tolerance) -> StepRow:
        if not self.positions:
            return StepRow(self.name, "apart", self.shapes)
        if self.a.shape != self.b.shape:
            return StepRow(self.name, "shape", self.shapes)
        if np.array_equal(self.a, self.b, equal_nan=True):
            return StepRow(self.name, "same", self.shapes)
        found, expected = (array.reshape(len(array), -1).astype(np.float64) for array in (self.a, self.b))
        off = np.where(_same_infinity(found, expected), 0.0, np.abs(_difference(found, expected)))
        over = off > tolerance.bounds(np.where(np.isfinite(expected), expected, 0.0))
        errors = np.where(np.isinf(off).any(axis=1), np.inf, relative_error(self.a, self.b))
        wrong = over.any(axis=1) if tolerance.relative is None else errors > tolerance.relative
        worst = np.unravel_index(int(np.argmax(off)), self.a.shape)
        return StepRow(
            self.name,
            "diverged" if wrong.any() else "close",
            self.shapes,
            float(errors.max()),
            self.positions[int(np.argmax(wrong if wrong.any() else errors))],
            float(off.max()),
            (self.positions[int(worst[0])], *(int(index) for index in worst[1:])),
            _cosine(found, expected),
            float(over.mean()),
        )

    def divergence(self, row: StepRow) -> Divergence:
        place = parse_name(self.name)
        assert place is not None  # a trace holds only names of steps
        assert row.position is not None  # it diverges somewhere
        return Divergence(*place, row.position, row.error, pattern(self.a, self.b))


def _aligned(name: str, a: Trace, b: Trace, differ: int | None) -> _Pair:
    """The rows of a step at the positions that both traces hold, before their tokens differ."""
    both = (a.arrays[name], b.arrays[name])
    start = max(a.first_position, b.first_position)
    ends = [trace.first_position + len(array) for trace, array in zip((a, b), both, strict=True)]
    positions = range(start, max(start, min(*ends, *([] if differ is None else [differ]))))
    rows = [
        array[start - trace.first_position : positions.stop - trace.first_position]
        for trace, array in zip((a, b), both, strict=True)
    ]
    if name.startswith(_SCORES) and all(array.ndim == 3 for array in rows):
        n_keys = min(max(array.shape[-1] for array in rows), positions.stop)
        rows = [_seen_keys(array, n_keys, positions) for array in rows]
    return _Pair(name, positions, rows[0], rows[1], (both[0].shape, both[1].shape))


def _seen_keys(scores: Array, n_keys: int, positions: range) -> Array:
    """Scores or probabilities of the keys up to each position; 0 elsewhere, and where a trace has no such key."""
    scores = scores[..., :n_keys]
    scores = np.pad(scores, [(0, 0), (0, 0), (0, n_keys - scores.shape[-1])])
    return np.where(future_keys(scores, positions.start), 0, scores)


def _difference(found: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """found - expected, infinite where either is not finite."""
    both = np.isfinite(found) & np.isfinite(expected)
    return np.where(both, np.where(both, found, 0.0) - np.where(both, expected, 0.0), np.inf)


def _same_infinity(found: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where both are the same infinity, or both NaN."""
    return ~np.isfinite(found) & ((found == expected) | (np.isnan(found) & np.isnan(expected)))


def _cosine(found: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Of the two as vectors, where both are finite; 1 for two zeros, 0 for one."""
    both = np.isfinite(found) & np.isfinite(expected)
    x, y = found[both], expected[both]
    sizes = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    if 0 in sizes:
        return 1.0 if sizes[0] == sizes[1] else 0.0
    return float(x / sizes[0] @ (y / sizes[1]))


def _first_difference(a: tuple[int, ...], b: tuple[int, ...]) -> int | None:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def _notes(a: Trace, b: Trace) -> list[str]:
    """What differs between two traces besides their numbers, in words."""
    differing = [(what, getattr(a, what), getattr(b, what)) for what in ("mode", "model", "prompt", "system")]
    return [f"{what}: {x!r} against {y!r}" for what, x, y in differing if None not in (x, y) and x != y]
