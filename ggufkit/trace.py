"""The trace file: the named steps of one run, in safetensors, float32.

A trace says what went in (`token_ids`, always the whole sequence from position 0 on) and what each step made of
it from `first_position` on. It may hold any subset of steps, layers and positions. Reading is lazy, one tensor
when it is asked for, and writing goes to its place in the file as the numbers come, so that a trace may be larger
than memory. Foreign traces need nothing but `token_ids`; float16, bfloat16 and float64 are read as float32.

Layout of safetensors: u64 length of the header, the header in JSON (name → dtype, shape, data_offsets; metadata
strings under `__metadata__`), then the tensors, little-endian, without holes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import safetensors
from numpy.typing import NDArray

from ggufkit.container import GGUF
from ggufkit.errors import NewerThanTool, SourceError, TraceError
from ggufkit.steps import Array, parse_name, sort_key

VERSION = "1"
Mode = Literal["prefill", "decode"]
Shapes = Mapping[str, tuple[int, ...]]

_DTYPES = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": "<u2"}
_TEXTS = ("engine", "dtype", "prompt", "system", "model")


@dataclass(frozen=True, eq=False)
class Trace:
    """The steps of one run.

    Attributes:
        arrays: full step name → float32 [T, …] in the order of the pass; row 0 is `first_position`.
        token_ids: from position 0 on.
        mode: whether the positions were computed together or one by one through the cache. Keys that were not
            there yet have the score 0 and the probability 0.
        engine, dtype: what computed it, and in which precision.
        prompt, system: the text that became the tokens, when that is known.
        model: `model_digest` of the file.
        unknown: names in the file that are no step's; they are not in `arrays`.
    """

    arrays: Mapping[str, Array]
    token_ids: tuple[int, ...]
    first_position: int = 0
    mode: Mode = "prefill"
    engine: str | None = None
    dtype: str | None = None
    prompt: str | None = None
    system: str | None = None
    model: str | None = None
    unknown: tuple[str, ...] = ()

    def metadata(self) -> dict[str, str]:
        """The file's metadata, everything as a string."""
        texts = {key: getattr(self, key) for key in _TEXTS}
        return {
            "ggufkit.trace": VERSION,
            "token_ids": json.dumps(self.token_ids),
            "first_position": str(self.first_position),
            "mode": self.mode,
        } | {key: value for key, value in texts.items() if value is not None}

    def save(self, path: str | Path) -> None:
        """Write the file; it appears under its name when it is complete.

        Raises:
            SourceError: it cannot be written.
        """
        with Writer(path, {name: array.shape for name, array in self.arrays.items()}, self.metadata()) as writer:
            for name, array in self.arrays.items():
                writer.put(name, 0, array)


def model_digest(gguf: GGUF) -> str:
    """What a trace calls its model by: sha256, in hex, of the header of the file (of each shard in turn)."""
    digest = hashlib.sha256()
    for shard in gguf.shards:
        digest.update(shard.source.read(0, shard.header_end))
    return digest.hexdigest()


# --- writing ---------------------------------------------------------------------------------------------------


class Writer:
    """Writes tensors of known shapes in any order, rows at a time; what is never written is 0.

    Used as a context manager. An error removes the unfinished file.
    """

    def __init__(self, path: str | Path, shapes: Shapes, metadata: Mapping[str, str]) -> None:
        self._path = Path(path)
        self._part = self._path.with_name(self._path.name + ".part")
        self._shapes = shapes
        self._offsets: dict[str, int] = {}
        header, self._size = self._header(metadata)
        self._data = len(header)
        try:
            self._file = self._part.open("wb")
            self._file.write(header)
            self._file.truncate(self._data + self._size)
        except OSError as error:
            raise self._failed(error) from error

    def put(self, name: str, row: int, rows: Array) -> None:
        """Write `rows` [n, …] as the rows of `name` from `row` on; a shorter last axis (keys) is padded with 0."""
        shape = self._shapes[name]
        data = as_float32(padded(rows, shape[-1])).astype("<f4", copy=False).tobytes()
        try:
            self._file.seek(self._data + self._offsets[name] + 4 * row * int(np.prod(shape[1:])))
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            self._file.close()
            if kind is None:
                self._part.replace(self._path)
        except OSError as failure:
            raise self._failed(failure) from failure
        finally:
            with suppress(OSError):
                self._part.unlink(missing_ok=True)

    def _header(self, metadata: Mapping[str, str]) -> tuple[bytes, int]:
        """The header with its length in front, padded to 8 bytes, and the size of the data."""
        entries: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for name, shape in self._shapes.items():
            self._offsets[name], end = end, end + 4 * int(np.prod(shape))
            entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [self._offsets[name], end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text, end

    def _failed(self, error: OSError) -> SourceError:
        return SourceError(f"the trace cannot be written: {error.strerror or error}", path=str(self._path))


def padded(rows: Array, size: int) -> Array:
    """`rows` with zeros after its last axis, up to `size`."""
    missing = size - rows.shape[-1]
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)]) if missing else rows


def as_float32(values: NDArray[Any]) -> Array:
    """In the machine's byte order; a float64 that is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)


# --- reading ---------------------------------------------------------------------------------------------------


def load(path: str | Path) -> Trace:
    """Open a trace; its numbers are read when they are asked for.

    Raises:
        SourceError: the file cannot be read.
        TraceError: it is no safetensors file, or its metadata or a step in it is not as the contract has it.
        NewerThanTool: a later version of the contract.
    """
    path = Path(path)
    header = _read_header(path)
    metadata = header.pop("__metadata__", None) or {}
    if metadata.get("ggufkit.trace", VERSION) != VERSION:
        version = metadata["ggufkit.trace"]
        raise NewerThanTool(f"a trace of version {version!r}; this version of ggufkit reads {VERSION}", path=str(path))
    names = sorted((name for name in header if parse_name(name)), key=sort_key)
    fields = _fields(metadata, str(path))
    entries = {name: _entry(name, header[name], str(path)) for name in names}
    return Trace(_Arrays(path, entries), unknown=tuple(sorted(header.keys() - entries.keys())), **fields)


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Arrays(Mapping[str, Array]):
    """The arrays of a file, each read when asked for; nothing is kept and no file stays open."""

    def __init__(self, path: Path, entries: Mapping[str, _Entry]) -> None:
        self._path = path
        self._entries = entries

    def __getitem__(self, name: str) -> Array:
        dtype, shape, offset = self._entries[name]
        try:
            stored = np.fromfile(self._path, dtype, int(np.prod(shape)), offset=offset)
        except OSError as error:
            raise SourceError(f"cannot be read: {error.strerror or error}", path=str(self._path)) from error
        if stored.size != np.prod(shape):
            raise TraceError(f"the file ends inside {name}", path=str(self._path), offset=offset)
        return as_float32(_widened(stored)).reshape(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _widened(stored: NDArray[Any]) -> NDArray[Any]:
    """bfloat16, which NumPy lacks and which is read as uint16, as float32; anything else as it is."""
    return (stored.astype(np.uint32) << 16).view(np.float32) if stored.dtype.kind == "u" else stored


def _read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file that the library has found valid, with absolute offsets."""
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header: dict[str, Any] = json.loads(file.read(length))
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror or error}", path=str(path)) from error
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise TraceError(f"this is no safetensors file: {error}", path=str(path)) from error
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
    return header


def _entry(name: str, entry: Mapping[str, Any], path: str) -> _Entry:
    dtype, shape, (start, _) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in _DTYPES:
        raise TraceError(f"{name} is of type {dtype}", path=path, expected=" or ".join(_DTYPES))
    if not shape or 0 in shape:
        raise TraceError(f"{name} has the shape {shape}: there is nothing in it", path=path)
    return _Entry(_DTYPES[dtype], shape, start)


def _fields(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    """The metadata as the fields of `Trace`."""
    ids = _token_ids(metadata, path)
    first, mode = metadata.get("first_position", "0"), metadata.get("mode", "prefill")
    if not (first.isascii() and first.isdigit() and len(first) < 10 and int(first) < len(ids)):
        message = f"first_position is {first[:40]!r}"
        raise TraceError(message, path=path, expected=f"a position from 0 to {len(ids) - 1}, the last of token_ids")
    if mode not in get_args(Mode):
        raise TraceError(f"mode is {mode[:40]!r}", path=path, expected="prefill or decode")
    texts = {key: metadata.get(key) for key in _TEXTS}
    return {"token_ids": ids, "first_position": int(first), "mode": mode, **texts}


def _token_ids(metadata: Mapping[str, str], path: str) -> tuple[int, ...]:
    text = metadata.get("token_ids")
    expected = "a JSON list of the ids from position 0 on, such as [151644, 872, 198]"
    if text is None:
        raise TraceError("the metadata has no token_ids", path=path, expected=expected)
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError):
        ids = None
    if not isinstance(ids, list) or not ids or not all(type(token) is int and 0 <= token < 1 << 31 for token in ids):
        raise TraceError(f"token_ids is {text[:60]!r}", path=path, expected=expected)
    return tuple(ids)
