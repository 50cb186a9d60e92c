"""Other people's traces: whatever layout the numbers were dumped in, brought into the contract's shapes.

An engine's author dumps what lies in memory: heads flattened or split, heads before positions, a matrix transposed,
rows padded to a multiple of 64 or 256, a batch dimension in front, the last position alone. None of that is an
error of the engine, so each is recognised by its sizes, put right, and said. What cannot be recognised is left out
and said too.

A printf is a trace as well. In a text file each line is a step, the place, and numbers:

    # token_ids: 151644 872 198
    q_bias-0[3,0:4]: -0.0150 0.0255 1.5 -2
    l_out-23[3]: 0.25 0.5 …            (one position, from element 0 on)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ggufkit import trace as traces
from ggufkit.arch import Config
from ggufkit.errors import SourceError, TraceError
from ggufkit.runtime.diagnose import Part
from ggufkit.runtime.evaluate import Graph, Place
from ggufkit.steps import BY_NAME, Array, full_name, parse_name
from ggufkit.trace import Trace

_MAX_TEXT = 64 << 20
_LINE = re.compile(r"\s*(?P<name>[a-z_]+(?:-\d+)?)\s*\[(?P<place>[0-9:, ]+)\]\s*[:=]\s*(?P<numbers>.*)")
_IDS = re.compile(r"#?\s*token_ids\s*[:=]\s*\[?(?P<ids>[0-9, \t]+)\]?\s*")


@dataclass(slots=True)
class Arranged:
    """A trace in the contract's shapes.

    Attributes:
        known: whole steps, float32 [T, …] for all T tokens.
        parts: steps of which some numbers are there.
        notes: what was put right or left out, in sentences.
    """

    known: dict[Place, Array] = field(default_factory=dict)
    parts: dict[Place, Part] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Numbers:
    """A trace in text form.

    Attributes:
        lines: full step name → place (a slice an axis, as written) and values, in the order of the file.
    """

    token_ids: tuple[int, ...]
    lines: tuple[tuple[str, tuple[slice, ...], Array], ...]


def load(path: str | Path, token_ids: tuple[int, ...] | None = None) -> Trace | Numbers:
    """A trace file of either form.

    Args:
        token_ids: for a text that does not say them itself.

    Raises:
        SourceError: the file cannot be read.
        TraceError: it is neither form, or damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise SourceError(f"cannot be opened: {error.strerror or error}", path=str(path)) from error
    if len(head) > 8 and head[8:9] == b"{":
        return traces.load(path)
    return _read_text(path, token_ids)


def arrange(trace: Trace | Numbers, config: Config) -> Arranged:
    """Bring a trace into the contract's shapes.

    Raises:
        TraceError: a token id is outside the vocabulary.
    """
    bad = [token for token in trace.token_ids if token >= config.n_vocab]
    if bad:
        raise TraceError(f"the token id {bad[0]} is outside the vocabulary of {config.n_vocab:,} rows")
    if isinstance(trace, Numbers):
        return _arrange_numbers(trace, config)
    return _arrange_arrays(trace, config)


# --- whole arrays ------------------------------------------------------------------------------------------------


def _arrange_arrays(trace: Trace, config: Config) -> Arranged:
    arranged = Arranged()
    graph = Graph(config)
    n, first = len(trace.token_ids), trace.first_position
    said: dict[str, list[str]] = {}
    for name in trace.arrays:
        place = parse_name(name)
        if place is None or place not in graph.order:
            said.setdefault("left out: this model has no such step", []).append(name)
            continue
        found = _fit(trace.arrays[name], place, config, n, n - first)
        if found is None:
            shape = tuple(trace.arrays[name].shape)
            said.setdefault(f"left out: the shape {shape} is none of this step's layouts", []).append(name)
            continue
        rows, how = found
        if how:
            said.setdefault(how, []).append(name)
        start = first if len(rows) == n - first else n - len(rows)
        if len(rows) == n:
            arranged.known[place] = rows
        else:
            arranged.parts[place] = Part((slice(start, start + len(rows)),), rows)
    if trace.unknown:
        said.setdefault("left out: no step has this name", []).extend(trace.unknown)
    arranged.notes = [f"{_few(names)}: {what}" for what, names in said.items()]
    return arranged


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def step_shape(step: str, config: Config, n_keys: int) -> tuple[int, ...]:
    """The contract's shape of a step without its positions: (H, D), (E,) …"""
    sizes = {**config.sizes(), "H": config.n_head, "K": config.n_head_kv, "S": n_keys}
    return tuple(sizes[letter] for letter in BY_NAME[step].shape.split(",")[1:])


def _fit(array: Array, place: Place, config: Config, n: int, n_rows: int) -> tuple[Array, str] | None:
    """The array as [rows, …] of the contract and what was done to it, or None. Rows are all of the trace's positions
    or, as some engines keep of their last steps, the last one alone."""
    rest = step_shape(place[0], config, n)
    array = np.asarray(array, np.float32)
    squeezed = array.reshape([size for size in array.shape if size != 1] or [1])
    for rows in dict.fromkeys((n_rows, n, 1)):
        shape = (rows, *rest)
        if array.shape == shape:
            return array, ""
        for how, attempt in _LAYOUTS:
            made = attempt(squeezed, shape)
            if made is not None and made.shape == shape:
                return np.ascontiguousarray(made), how if rows > 1 or made.size != array.size else ""
    return None


Layout = Callable[[Array, tuple[int, ...]], Array | None]


def _no_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1) or (1,)


def _same(array: Array, shape: tuple[int, ...]) -> Array | None:
    """The same order of numbers: heads flattened or split, dimensions of one left out or added."""
    regrouped = {_no_ones(shape), _no_ones((shape[0], math.prod(shape[1:])))}
    if len(shape) == 2:  # split heads of a step that the contract has flat
        regrouped |= {_no_ones((shape[0], *split)) for split in _splits(shape[1], array.shape[1:])}
    return array.reshape(shape) if array.shape in regrouped else None


def _splits(size: int, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if len(shape) == 2 and math.prod(shape) == size:
        yield shape


def _heads_first(array: Array, shape: tuple[int, ...]) -> Array | None:
    """[heads, positions, channels]."""
    if len(shape) == 3 and array.shape == (shape[1], shape[0], shape[2]) and shape[0] != shape[1]:
        return array.transpose(1, 0, 2)
    if (
        len(shape) == 2
        and array.ndim == 3
        and array.shape[1] == shape[0]
        and array.shape[0] * array.shape[2] == shape[1]
    ):
        return array.transpose(1, 0, 2).reshape(shape)
    return None


def _transposed(array: Array, shape: tuple[int, ...]) -> Array | None:
    """[features, positions]: column-major."""
    flat = (shape[0], math.prod(shape[1:]))
    if array.ndim == 2 and array.shape == flat[::-1] and flat[0] != flat[1]:
        return array.T.reshape(shape)
    if array.ndim == 3 and len(shape) == 3 and array.shape == shape[::-1] and shape[0] != shape[2]:
        return array.transpose(2, 1, 0)
    return None


def _padded(array: Array, shape: tuple[int, ...]) -> Array | None:
    """More rows or columns than there is anything in: what is beyond is cut off."""
    if array.ndim != len(shape) or any(have < want for have, want in zip(array.shape, shape, strict=True)):
        return None
    if all(have < want + 257 for have, want in zip(array.shape, shape, strict=True)):
        return array[tuple(slice(size) for size in shape)]
    return None


_LAYOUTS: tuple[tuple[str, Layout], ...] = (
    ("", _same),
    ("dumped heads first, [heads, positions, channels]", _heads_first),
    ("dumped transposed, [features, positions]", _transposed),
    ("padded; what is beyond the model's sizes was cut off", _padded),
    ("dumped heads first and padded", lambda a, s: _padded(a.transpose(1, 0, 2), s) if a.ndim == 3 else None),
)


# --- text --------------------------------------------------------------------------------------------------------


def _read_text(path: Path, token_ids: tuple[int, ...] | None) -> Numbers:
    try:
        if path.stat().st_size > _MAX_TEXT:
            raise TraceError(f"a text trace of more than {_MAX_TEXT >> 20} MiB", path=str(path))
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror or error}", path=str(path)) from error
    except UnicodeDecodeError as error:
        message = "neither a safetensors file nor text"
        raise TraceError(message, path=str(path), offset=error.start, expected="a trace, see docs/trace.md") from error
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if ids := _IDS.fullmatch(line):
            token_ids = tuple(int(token) for token in ids["ids"].replace(",", " ").split())
        elif (parsed := _parse_line(line, f"line {number} of {path}")) is not None:
            lines.append(parsed)
    if not lines:
        raise TraceError("no line of it is a step with numbers", path=str(path), expected="q_bias-0[3,0:4]: 0.5 …")
    if not token_ids:
        expected = "a line such as `# token_ids: 151644 872 198`, or the prompt (-p)"
        raise TraceError("it does not say which tokens were run", path=str(path), expected=expected)
    return Numbers(token_ids, tuple(lines))


def _parse_line(line: str, where: str) -> tuple[str, tuple[slice, ...], Array] | None:
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    values = []
    for word in match["numbers"].replace(",", " ").split():
        try:
            values.append(float(word.strip("…[]")))
        except ValueError:
            if word.strip(".…[]"):
                raise TraceError(f"{where}: {word[:40]!r} is no number") from None
    place = tuple(_slice(part, where) for part in match["place"].split(","))
    return match["name"], place, np.array(values, np.float32)


def _slice(part: str, where: str) -> slice:
    bounds = part.strip().split(":")
    if len(bounds) > 2 or not all(len(bound) < 10 for bound in bounds):
        raise TraceError(f"{where}: {part!r} is no place", expected="an index such as 3, or a range such as 0:10")
    first = int(bounds[0] or 0)
    if len(bounds) == 1:
        return slice(first, first + 1)
    return slice(first, int(bounds[1]) if bounds[1].strip() else None)


def _arrange_numbers(numbers: Numbers, config: Config) -> Arranged:
    arranged = Arranged()
    graph = Graph(config)
    for name, at, values in numbers.lines:
        place = parse_name(name)
        if place is None or place not in graph.order:
            arranged.notes.append(f"{name}: left out: this model has no such step")
            continue
        part = _part(place, at, values, config, len(numbers.token_ids))
        if part is None:
            arranged.notes.append(f"{name}: left out: {len(values)} numbers do not fit their place")
        elif place in arranged.parts:
            arranged.notes.append(f"{full_name(*place)}: left out: only the first line of a step is used")
        else:
            arranged.parts[place] = part
    return arranged


def _part(place: Place, at: tuple[slice, ...], values: Array, config: Config, n: int) -> Part | None:
    """A line's numbers as a part of the contract's array. Places of a step with heads may also count its channels
    through (`q_rope-0[3,0:10]`); what a place leaves open begins at 0."""
    shape = (n, *step_shape(place[0], config, n))
    if len(at) == len(shape) - 1 and len(shape) == 3:
        at = (at[0], slice(0, 1), at[1]) if (at[1].stop or 0) <= shape[2] else at
    full = at + tuple(slice(0, None) for _ in shape[len(at) :])
    bounds = [range(*piece.indices(size)) for piece, size in zip(full, shape, strict=False)]
    if len(full) != len(shape) or any(not piece for piece in bounds):
        return None
    sizes = [len(piece) for piece in bounds]
    if math.prod(sizes) > len(values) > 0 and len(values) % math.prod(sizes[:-1]) == 0:
        sizes[-1] = len(values) // math.prod(sizes[:-1])  # fewer numbers than the place has: its first ones
    if math.prod(sizes) != len(values) or (sizes[0] > 1 and math.prod(sizes[1:]) == 0):
        return None
    slices = tuple(slice(piece.start, piece.start + size) for piece, size in zip(bounds, sizes, strict=True))
    return Part(slices, values.reshape(sizes))
