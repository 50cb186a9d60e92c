"""Running an engine with its steps recorded: into memory, into a file, or into a few numbers each.

What will be recorded is known before anything is run: which steps a model has follows from its Config, their
shapes from the number of tokens. So the rows of a step go straight to where they belong, whether all positions
come at once or one by one through the cache, and nothing else is kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ggufkit.arch import Config
from ggufkit.errors import Unsupported, UsageError
from ggufkit.runtime.engine import Engine, Which
from ggufkit.runtime.reference import layer_plan
from ggufkit.steps import BY_NAME, Array, Recorder, full_name, parse_name
from ggufkit.trace import Trace, Writer, as_float32, padded

_SHOWN = 3  # values that a summary shows of each end
_SUMMED = 1 << 20  # elements that a summary of a stored trace looks at together


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run and what to keep of it.

    Args:
        ids: the whole sequence, from position 0 on.
        steps: shell globs, of full names (`q_*-3`) or bare ones (`l_out`).
        layers: only these; None for all.
        decode: run position by position through the cache.
        positions: consecutive ones; None for all.
        prompt, system, model: for the trace's metadata.

    Raises:
        UsageError: nothing to run or to record, a layer or position that is not there.
    """

    ids: Sequence[int]
    steps: Sequence[str] = ("*",)
    layers: Sequence[int] | None = None
    decode: bool = False
    positions: range | None = None
    prompt: str | None = None
    system: str | None = None
    model: str | None = None

    @property
    def rows(self) -> range:
        """The positions that are recorded."""
        rows = range(len(self.ids)) if self.positions is None else self.positions
        if not rows or rows.step != 1 or rows[0] < 0 or rows[-1] >= len(self.ids):
            raise UsageError(f"there is nothing to record at {rows}: the prompt has {len(self.ids)} tokens")
        return rows

    def shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """The full name and shape of every step that will be recorded, in the order of the pass."""
        beyond = [layer for layer in self.layers or () if not 0 <= layer < config.n_layer]
        if beyond:
            raise UsageError(f"there is no layer {beyond[0]}", expected=f"0 to {config.n_layer - 1}")
        wanted = Recorder(self.steps, self.layers)
        names = [full_name(*place) for place in _places(config) if wanted.wants(*place)]
        if not names:
            raise UsageError(f"no step of this model is called {' or '.join(self.steps)}", help="see the trace's table")
        sizes = config.sizes() | {"T": len(self.rows), "S": self.rows.stop, "H": config.n_head, "K": config.n_head_kv}
        return {name: _shape(name, sizes) for name in names}

    def empty(self, engine: Engine) -> Trace:
        """The trace without its arrays."""
        return Trace(
            {},
            tuple(int(token) for token in self.ids),
            self.rows.start,
            "decode" if self.decode else "prefill",
            engine.name,
            str(np.dtype(engine.dtype)),
            self.prompt,
            self.system,
            self.model,
        )


def record(engine: Engine, plan: Plan) -> Trace:
    """Run a plan and keep what it asks for in memory.

    Raises:
        UsageError: as `Plan`, or an id outside the vocabulary.
        Unsupported: the engine does not show a step.
    """
    arrays = {name: np.zeros(shape, np.float32) for name, shape in plan.shapes(engine.config).items()}
    _run(engine, plan, _Arrays(arrays))
    return replace(plan.empty(engine), arrays=arrays)


def write(path: str | Path, engine: Engine, plan: Plan) -> None:
    """Run a plan straight into a trace file, whose size memory does not have to hold.

    Raises:
        SourceError: the file cannot be written.
        UsageError, Unsupported: as `record`.
    """
    with Writer(path, plan.shapes(engine.config), plan.empty(engine).metadata()) as writer:
        _run(engine, plan, writer)


def summarize(engine: Engine, plan: Plan) -> list[Summary]:
    """Run a plan and keep a few numbers of each step; the same as `summary` of its trace.

    Raises: as `record`.
    """
    sums = _Sums(plan.shapes(engine.config))
    _run(engine, plan, sums)
    return sums.summaries()


def summary(trace: Trace) -> list[Summary]:
    """A few numbers of each step of a trace, in the order of the pass."""
    sums = _Sums({name: trace.arrays[name].shape for name in trace.arrays})
    for name, array in trace.arrays.items():
        step = max(1, _SUMMED * len(array) // array.size)
        for row in range(0, len(array), step):
            sums.put(name, row, array[row : row + step])
    return sums.summaries()


@dataclass(frozen=True, slots=True)
class Summary:
    """One step in a few numbers.

    Attributes:
        mean, std, absmax: of its finite elements; NaN without any.
        not_finite: how many are NaN or infinite.
        first, last: its first and last values in C order.
        checksum: of its float32 bytes, little-endian: the first 16 hex digits of their sha256.
    """

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float
    absmax: float
    not_finite: int
    first: tuple[float, ...]
    last: tuple[float, ...]
    checksum: str


# --- running ---------------------------------------------------------------------------------------------------


class _Sink(Protocol):
    def put(self, name: str, row: int, rows: Array) -> None:
        """Take `rows` [n, …] of a step, from its row `row` on; rows of a step come in order."""


class _Arrays:
    """Keeps the rows in arrays."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays

    def put(self, name: str, row: int, rows: Array) -> None:
        self._arrays[name][row : row + len(rows), ..., : rows.shape[-1]] = as_float32(rows)


class _Feed:
    """A tap that hands the wanted rows of one call to a sink."""

    def __init__(self, sink: _Sink, missing: dict[str, int], call: range, wanted: range) -> None:
        self._sink = sink
        self._missing = missing
        low, high = max(call.start, wanted.start), min(call.stop, wanted.stop)
        self._rows = slice(low - call.start, high - call.start)
        self._first = low - wanted.start

    def wants(self, step: str, layer: int | None) -> bool:
        return full_name(step, layer) in self._missing

    def __call__(self, step: str, layer: int | None, array: Array) -> None:
        name, rows = full_name(step, layer), array[self._rows]
        self._sink.put(name, self._first, rows)
        self._missing[name] -= len(rows)


def _run(engine: Engine, plan: Plan, sink: _Sink) -> None:
    """One pass, or one a position, with the wanted steps given to `sink`."""
    missing = {name: shape[0] for name, shape in plan.shapes(engine.config).items()}
    ids, rows = plan.ids[: plan.rows.stop], plan.rows
    which: Which = "all" if missing.keys() & {"result_norm", "result_output"} else "last"
    cache, size = engine.new_cache(len(ids)), 1 if plan.decode else len(ids)
    for start in range(0, len(ids), size):
        call = range(start, start + size)
        tap = _Feed(sink, missing, call, rows) if call.stop > rows.start else None
        engine.forward(ids[call.start : call.stop], cache, logits=which, tap=tap)
    if absent := [name for name, rows_missing in missing.items() if rows_missing]:
        raise Unsupported(f"the engine {engine.name} does not show {', '.join(absent[:5])}", help="use the reference")


def _places(config: Config) -> Iterator[tuple[str, int | None]]:
    """Every step of a model, in the order of the pass."""
    yield "embd", None
    for layer in range(config.n_layer):
        yield from ((step, layer) for step in layer_plan(config) if step in BY_NAME)
    yield "result_norm", None
    yield "result_output", None


def _shape(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    parsed = parse_name(name)
    assert parsed is not None  # it comes from _places
    return tuple(sizes[letter] for letter in BY_NAME[parsed[0]].shape.split(","))


# --- summaries -------------------------------------------------------------------------------------------------


@dataclass
class _Sum:
    """The numbers of one step while its rows come."""

    shape: tuple[int, ...]
    n: int = 0
    not_finite: int = 0
    sum: float = 0.0
    squares: float = 0.0
    absmax: float = math.nan
    first: tuple[float, ...] = ()
    last: tuple[float, ...] = ()
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, rows: Array) -> None:
        values = as_float32(padded(rows, self.shape[-1]))
        self.digest.update(values.astype("<f4", copy=False).tobytes())
        flat = values.reshape(-1)
        self.first = self.first or tuple(flat[:_SHOWN].tolist())
        self.last = tuple(flat[-_SHOWN:].tolist())
        finite = flat[np.isfinite(flat)].astype(np.float64)
        self.n += finite.size
        self.not_finite += flat.size - finite.size
        self.sum += float(finite.sum())
        self.squares += float(finite @ finite)
        self.absmax = float(np.fmax(self.absmax, np.abs(finite).max(initial=0) if finite.size else math.nan))

    def summary(self, name: str) -> Summary:
        mean = self.sum / self.n if self.n else math.nan
        std = math.sqrt(max(self.squares / self.n - mean * mean, 0.0)) if self.n else math.nan
        checksum = self.digest.hexdigest()[:16]
        return Summary(name, self.shape, mean, std, self.absmax, self.not_finite, self.first, self.last, checksum)


class _Sums:
    """Keeps a few numbers of each step."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._sums = {name: _Sum(shape) for name, shape in shapes.items()}

    def put(self, name: str, row: int, rows: Array) -> None:
        self._sums[name].add(rows)

    def summaries(self) -> list[Summary]:
        return [step.summary(name) for name, step in self._sums.items()]
