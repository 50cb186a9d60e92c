"""Bytes to `GGUF`: the header of a file, read once, front to back, believing nothing.

The rules that make this safe are few. Every length and count is compared with the bytes that are left before
anything is allocated or looped over; all arithmetic is on Python's integers; nothing recurses on what the file
says; duplicates are found with sets. Arrays are skipped, not decoded. What is wrong is gathered as `Problem`s
and reading goes on wherever the next byte's meaning is still known; an exception is raised only when the file
is no GGUF, of a version that is not understood, or cannot be read at all.

Layout (little or big endian throughout; the format has no flag for it):
    "GGUF"  u32 version  u64 n_tensors  u64 n_kv
    n_kv    × string key, u32 type, value        (string: u64 length, bytes; array: u32 type, u64 count, elements)
    n_tens. × string name, u32 n_dims, n_dims × u64 size (fastest first), u32 type, u64 offset into the data
    padding to general.alignment, then the data
"""

from __future__ import annotations

import math
import os
import struct
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ggufkit import quants
from ggufkit.container import (
    GGUF,
    MARK_STEP,
    MAX_ARRAY_DEPTH,
    SCALAR_CODES,
    SCALAR_SIZES,
    ByteOrder,
    Field,
    Problem,
    Shard,
    Tensor,
    ValueType,
    text,
)
from ggufkit.errors import FormatError, GgufkitError, NewerThanTool, NotGGUF, SourceError
from ggufkit.sniff import SNIFF_BYTES, identify
from ggufkit.source import Source, shard_paths

__all__ = ["LIMITS", "PROBLEMS", "Limits", "open"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the reader accepts at most. Real files stay far below; hostile ones are stopped here."""

    kv_pairs: int = 100_000
    tensors: int = 1_000_000
    dims: int = 4
    tensor_name: int = 63  # ggml's GGML_MAX_NAME without its NUL; the specification says 64
    key: int = 65_535
    string: int = 64 << 20
    alignment: int = 1 << 20
    header: int = 1 << 30
    problems: int = 10_000


LIMITS = Limits()

#: every kind of problem, and what it means
PROBLEMS: dict[str, str] = {
    "header-truncated": "the file ends inside its header",
    "header-too-long": "the header is longer than any real one",
    "header-hopeless": "the header has more problems than anybody reads",
    "kv-count": "the number of metadata pairs cannot be true",
    "tensor-count": "the number of tensors cannot be true",
    "key-empty": "a metadata key is empty",
    "key-too-long": "a metadata key is longer than the format allows",
    "key-not-utf8": "a metadata key is not UTF-8",
    "key-duplicate": "a metadata key occurs twice",
    "value-type": "a metadata value has a type that does not exist",
    "string-too-long": "a string is longer than what is left of the file, or than any real one",
    "string-not-utf8": "a metadata string is not UTF-8",
    "array-too-long": "an array is longer than what is left of the file",
    "array-nested": "an array of arrays",
    "array-too-deep": "arrays nested deeper than anybody reads",
    "bool-value": "a bool that is neither 0 nor 1",
    "alignment-type": "general.alignment is not a uint32",
    "alignment-value": "general.alignment is no power of two, or absurdly large",
    "name-empty": "a tensor has no name",
    "name-too-long": "a tensor name is longer than the format allows",
    "name-not-utf8": "a tensor name is not UTF-8",
    "name-duplicate": "a tensor name occurs twice",
    "dims-count": "a tensor has more dimensions than the format allows",
    "dims-value": "a tensor dimension is negative or too large",
    "shape-too-large": "a tensor has more elements or bytes than any address space",
    "shape-block": "a tensor's row length is no multiple of its type's block",
    "type-removed": "a tensor has a type that was removed from the format",
    "type-unknown": "a tensor has a type that is newer than this tool",
    "shard-missing": "a file of the split set is missing",
    "shard-unreadable": "a file of the split set cannot be read",
}

_HEADER_BYTES = 24
_MIN_KV_BYTES = 8 + 4 + 1  # length of the key, type, the smallest value
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # length of the name, n_dims, type, offset
_NEWEST_VERSION = 3
# what claims more than these and does not fit into the file is damaged; what claims less was cut off
_PLAUSIBLE_COUNT = 10_000  # metadata pairs, tensors
_PLAUSIBLE_ARRAY = 1_000_000
_PLAUSIBLE_STRING = 1 << 16
_PLAUSIBLE_VERSION = 99  # beyond it the field is damaged rather than new
_SIGNED_MAX = (1 << 63) - 1
_WINDOW = 1 << 20


def open(path: str | os.PathLike[str], *, limits: Limits = LIMITS) -> GGUF:  # noqa: A001 - the public name is ggufkit.open
    """Open a GGUF file, or the whole split set that it is a part of.

    Args:
        path: a file; for a split set any of its files (`NAME-00001-of-00003.gguf`).
        limits: what to accept at most.

    Returns:
        The opened file; `problems` lists what is wrong with its header.

    Raises:
        SourceError: the file cannot be opened or read.
        NotGGUF: it is something else; the message names it.
        NewerThanTool: its version is newer than this reader.
        FormatError: its fixed header is damaged beyond reading, or it is GGUF version 1.
    """
    shards: list[Shard] = []
    problems: list[Problem] = []
    paths = shard_paths(path)
    try:
        for number, part in enumerate(paths):
            try:
                shards.append(_open_shard(part, len(shards), problems, limits))
            except GgufkitError as error:
                if part == Path(path):
                    raise
                problems.append(_unopened(error, f"part {number + 1} of {len(paths)}", len(shards)))
    except BaseException:
        for shard in shards:
            shard.source.close()
        raise
    return GGUF(Path(path), shards, problems)


def _open_shard(path: Path, number: int, problems: list[Problem], limits: Limits) -> Shard:
    source = Source(path)
    try:
        return _Parser(source, number, problems, limits).parse()
    except BaseException:
        source.close()
        raise


def _unopened(error: GgufkitError, which: str, shard: int) -> Problem:
    """A part of the set, other than the one asked for, that is missing or broken."""
    kind = "shard-missing" if isinstance(error, SourceError) else "shard-unreadable"
    return Problem(kind, f"{which}: {error}", error.offset, shard=shard)


class _Stop(Exception):
    """The rest of the header cannot be read; carries why."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem


class _Cursor:
    """Sequential, bounded reading through a window of the file."""

    def __init__(self, source: Source, byteorder: ByteOrder, limits: Limits, shard: int) -> None:
        self.source = source
        self.order = "<" if byteorder == "little" else ">"
        self.position = _HEADER_BYTES
        self.shard = shard
        self._limits = limits
        self._end = min(source.size, limits.header)
        self._window = b""
        self._base = 0
        self._u32 = struct.Struct(self.order + "I").unpack
        self._u64 = struct.Struct(self.order + "Q").unpack

    @property
    def left(self) -> int:
        """Bytes of the file after the position."""
        return self.source.size - self.position

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes; `what` names them in the problem when they are not there."""
        start = self.position - self._base
        if start + count > len(self._window):
            self.check(count, what)
            self._fill(count)
            start = 0
        self.position += count
        return self._window[start : start + count]

    def u32(self, what: str) -> int:
        return int(self._u32(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(self._u64(self.take(8, what))[0])

    def skip(self, count: int, what: str) -> None:
        self.check(count, what)
        self.position += count

    def string_length(self, what: str, limit: int, *, key: str | None = None) -> int:
        """The length of the string that starts here, checked against what is left."""
        at = self.position
        length = self.u64(f"the length of {what}")
        if length > limit or length > self.left:
            raise self._long_string(length, limit, what, at, key)
        return length

    def skip_strings(self, count: int, key: str) -> tuple[int, ...]:
        """Step over an array of strings; returns where every `MARK_STEP`-th begins.

        This is the one loop that a large vocabulary's header spends its time in.
        """
        length_at = struct.Struct(self.order + "Q").unpack_from
        limit, index, marks = self._limits.string, 0, []
        while index < count:
            if self.position + 8 > self._base + len(self._window) or self.position < self._base:
                self.check(8, f"string {index} of {key!r}")
                self._fill(_WINDOW)
            if index % MARK_STEP == 0:
                marks.append(self.position)
            window, at, stop = (
                self._window,
                self.position - self._base,
                min(count, (index // MARK_STEP + 1) * MARK_STEP),
            )
            start, length = at, 0
            with suppress(struct.error):  # the next length lies behind the window
                while index < stop:
                    (length,) = length_at(window, at)
                    if length > limit:
                        break
                    start = at
                    at += 8 + length
                    index += 1
            if length > limit:
                raise self._too_long(at, length, index, key)
            if self._base + at > self._end:
                raise self._too_long(start, length, index - 1, key)
            self.position = self._base + at
        return tuple(marks)

    def _too_long(self, at: int, length: int, index: int, key: str) -> _Stop:
        """The complaint about a string that begins at `at` of the window."""
        self.position = self._base + at + 8
        limit, what = self._limits.string, f"string {index} of {key!r}"
        return self._long_string(length, limit, what, self._base + at, key)

    def _fill(self, count: int) -> None:
        """Move the window to the position; it never reaches beyond where the header must end."""
        self._window = self.source.read(self.position, min(max(count, _WINDOW), self._end - self.position))
        self._base = self.position

    def check(self, count: int, what: str) -> None:
        """Stop unless `count` more bytes are there."""
        if self.position + count <= self._end:
            return
        if self.position + count > self.source.size:
            raise self.stop(
                "header-truncated",
                f"the file ends inside its header: {what} needs {count:,} bytes and {max(self.left, 0):,} are left",
                self.position,
            )
        limit = self._limits.header
        raise self.stop("header-too-long", f"the header is longer than {limit:,} bytes (at {what})", self.position)

    def stop(self, kind: str, message: str, offset: int, *, key: str | None = None) -> _Stop:
        return _Stop(Problem(kind, message, offset, key, shard=self.shard, fatal=True))

    def _long_string(self, length: int, limit: int, what: str, offset: int, key: str | None) -> _Stop:
        left = max(self.left, 0)
        if length <= min(_PLAUSIBLE_STRING, limit):  # a real string, and the file ends inside it
            message = f"the file ends inside {what}: of its {length:,} bytes {left:,} are there"
            return self.stop("header-truncated", message, offset, key=key)
        message = f"{what} claims {length:,} bytes; {left:,} are left in the file and {limit:,} are allowed"
        return self.stop("string-too-long", message, offset, key=key)


class _Parser:
    """One file's header."""

    def __init__(self, source: Source, shard: int, problems: list[Problem], limits: Limits) -> None:
        self.source = source
        self.problems = problems
        self.limits = limits
        self.number = shard

    def parse(self) -> Shard:
        head = self.source.read(0, SNIFF_BYTES)
        version, byteorder = _version(head, self.source)
        counts = head[8:_HEADER_BYTES]
        if len(counts) < _HEADER_BYTES - 8:
            raise FormatError(
                f"the file ends after {self.source.size} bytes, inside its fixed header of {_HEADER_BYTES}",
                path=self.source.name,
                offset=self.source.size,
                help="the download was cut short: fetch it again",
            )
        n_tensors, n_kv = struct.unpack(("<" if byteorder == "little" else ">") + "QQ", counts)
        shard = Shard(self.source, version, byteorder, n_kv=n_kv, n_tensors=n_tensors, header_end=_HEADER_BYTES)
        self.cursor = _Cursor(self.source, byteorder, self.limits, self.number)
        self.shard = shard
        try:
            self._fields()
            self._alignment()
            self._tensors()
            shard.complete = True
        except _Stop as stop:
            self.problems.append(stop.problem)
        return shard

    def _report(
        self, kind: str, message: str, offset: int, *, key: str | None = None, tensor: str | None = None
    ) -> None:
        """Note a problem and go on; a header with endlessly many of them is given up."""
        self.problems.append(Problem(kind, message, offset, key, tensor, self.number))
        if len(self.problems) >= self.limits.problems:
            message = f"more than {self.limits.problems:,} things are wrong with this header; reading stops here"
            raise self.cursor.stop("header-hopeless", message, offset)

    def _check_count(self, kind: str, what: str, count: int, at: int, least: int, limit: int) -> None:
        """Stop when `count` entries of `least` bytes cannot fit into what is left, or are more than `limit`."""
        fit = self.cursor.left // least
        if count <= min(fit, limit):
            return
        if count <= min(_PLAUSIBLE_COUNT, limit):  # a real header, and the file ends behind its first bytes
            message = f"the header announces {count:,} {what}, but only {self.cursor.left:,} bytes follow"
            raise self.cursor.stop("header-truncated", message, self.source.size)
        message = f"the header claims {count:,} {what}; at most {fit:,} fit into the file and {limit:,} are allowed"
        raise self.cursor.stop(kind, message, at)

    def _fields(self) -> None:
        self._check_count("kv-count", "metadata pairs", self.shard.n_kv, 16, _MIN_KV_BYTES, self.limits.kv_pairs)
        for index in range(self.shard.n_kv):
            field = self._field(index)
            first = self.shard.fields.setdefault(field.key, field)
            if first is not field:
                self._report(
                    "key-duplicate",
                    f"the key {field.key!r} occurs twice: at byte {first.offset:,} and at byte {field.offset:,}",
                    field.offset,
                    key=field.key,
                )
            self.shard.header_end = self.cursor.position

    def _field(self, index: int) -> Field:
        cursor = self.cursor
        offset = cursor.position
        key = self._key(index)
        type_ = self._value_type(f"the type of {key!r}", key)
        start = cursor.position
        if type_ is ValueType.ARRAY:
            return self._array_field(key, offset)
        if type_ is ValueType.STRING:
            self._string_value(key)
            return Field(key, type_, offset, start, cursor.position - start, self.number)
        return Field(key, type_, offset, start, SCALAR_SIZES[type_], self.number, scalar=self._scalar(key, type_))

    def _key(self, index: int) -> str:
        cursor = self.cursor
        offset = cursor.position
        length = cursor.string_length(f"the key of metadata pair {index}", self.limits.string)
        if length > self.limits.key:
            self._report("key-too-long", f"key {index} has {length:,} bytes; {self.limits.key:,} are allowed", offset)
        raw = cursor.take(length, "a key")
        key = text(raw)
        if not key:
            self._report("key-empty", f"the key of metadata pair {index} is empty", offset)
        if _is_not_utf8(raw):
            self._report("key-not-utf8", f"the key of metadata pair {index} is not UTF-8", offset, key=key)
        return key

    def _value_type(self, what: str, key: str) -> ValueType:
        offset = self.cursor.position
        number = self.cursor.u32(what)
        try:
            return ValueType(number)
        except ValueError:
            message = f"{what} is {number}; the types are 0 to 12"
            raise _Stop(Problem("value-type", message, offset, key, shard=self.number, fatal=True)) from None

    def _scalar(self, key: str, type_: ValueType) -> int | float | bool:
        offset = self.cursor.position
        raw = self.cursor.take(SCALAR_SIZES[type_], f"the value of {key!r}")
        value: int | float = struct.unpack(self.cursor.order + SCALAR_CODES[type_], raw)[0]
        if type_ is not ValueType.BOOL:
            return value
        if value not in (0, 1):
            self._report("bool-value", f"the bool {key!r} has the value {value}; only 0 and 1 exist", offset, key=key)
        return value != 0

    def _string_value(self, key: str) -> None:
        offset = self.cursor.position
        length = self.cursor.string_length(f"the value of {key!r}", self.limits.string, key=key)
        if _is_not_utf8(self.cursor.take(length, f"the value of {key!r}")):
            self._report("string-not-utf8", f"the value of {key!r} is not UTF-8", offset, key=key)

    def _array_field(self, key: str, offset: int) -> Field:
        cursor = self.cursor
        element = self._value_type(f"the element type of {key!r}", key)
        count = cursor.u64(f"the length of {key!r}")
        start = cursor.position
        marks: tuple[int, ...] = ()
        if element is ValueType.ARRAY:
            self._report("array-nested", f"{key!r} is an array of arrays, which llama.cpp refuses", offset, key=key)
            self._skip_nested(key, count)
        else:
            marks = self._skip_elements(key, element, count)
        nbytes = cursor.position - start
        return Field(key, ValueType.ARRAY, offset, start, nbytes, self.number, element, count, marks=marks)

    def _skip_elements(self, key: str, element: ValueType, count: int) -> tuple[int, ...]:
        """Step over them; returns where every `MARK_STEP`-th string begins."""
        cursor = self.cursor
        size = 8 if element is ValueType.STRING else SCALAR_SIZES[element]
        if count > cursor.left // size:
            message = f"{key!r} claims {count:,} elements of {size} bytes or more; {cursor.left:,} bytes are left"
            kind = "header-truncated" if count <= _PLAUSIBLE_ARRAY else "array-too-long"
            raise cursor.stop(kind, message, cursor.position - 8, key=key)
        if element is ValueType.STRING:
            return cursor.skip_strings(count, key)
        cursor.skip(count * size, repr(key))
        return ()

    def _skip_nested(self, key: str, count: int) -> None:
        """Step over arrays in arrays with a stack of how many are left on each level."""
        cursor = self.cursor
        stack = [count]
        while stack:
            if stack[-1] == 0:
                stack.pop()
                continue
            if stack[-1] > cursor.left // 12:
                raise cursor.stop("array-too-long", f"{key!r} claims {stack[-1]:,} arrays", cursor.position, key=key)
            stack[-1] -= 1
            element = self._value_type(f"an element type in {key!r}", key)
            inner = cursor.u64(f"a length in {key!r}")
            if element is not ValueType.ARRAY:
                self._skip_elements(key, element, inner)
            elif len(stack) + 1 >= MAX_ARRAY_DEPTH:
                message = f"{key!r} nests arrays deeper than {MAX_ARRAY_DEPTH}"
                raise cursor.stop("array-too-deep", message, cursor.position, key=key)
            else:
                stack.append(inner)

    def _alignment(self) -> None:
        field = self.shard.fields.get("general.alignment")
        if field is None:
            return
        value = field.scalar
        if field.type is not ValueType.UINT32:
            message = f"general.alignment is a {field.type_name}; it must be a uint32"
            self._report("alignment-type", message, field.offset, key=field.key)
        elif not isinstance(value, int) or value & (value - 1) or not 1 <= value <= self.limits.alignment:
            message = f"general.alignment is {value}; it must be a power of two up to {self.limits.alignment:,}"
            self._report("alignment-value", message, field.value_offset, key=field.key)
        else:
            self.shard.alignment = value

    def _tensors(self) -> None:
        self._check_count("tensor-count", "tensors", self.shard.n_tensors, 8, _MIN_TENSOR_BYTES, self.limits.tensors)
        names: dict[str, int] = {}
        entries = self.shard.tensors  # what was read before a stop stays listed, though it has no place yet
        for index in range(self.shard.n_tensors):
            entries.append(self._tensor(index, names))
        self.shard.header_end = self.cursor.position
        start = self.shard.data_start
        entries[:] = [replace(entry, offset=start + entry.relative_offset) for entry in entries]

    def _tensor(self, index: int, names: dict[str, int]) -> Tensor:
        cursor = self.cursor
        offset = cursor.position
        name = self._tensor_name(index)
        if (first := names.setdefault(name, offset)) != offset:
            message = f"two tensors are named {name!r}: at byte {first:,} and at byte {offset:,} of the header"
            self._report("name-duplicate", message, offset, tensor=name)
        dims = self._dims(name)
        type_id = cursor.u32(f"the type of tensor {name!r}")
        relative = cursor.u64(f"the offset of tensor {name!r}")
        type_ = self._tensor_type(name, type_id, offset)
        nbytes = self._nbytes(name, dims, type_, offset)
        return Tensor(name, dims, type_id, type_, relative, relative, nbytes, offset, self.number)

    def _tensor_name(self, index: int) -> str:
        offset = self.cursor.position
        length = self.cursor.string_length(f"the name of tensor {index}", self.limits.key)
        raw = self.cursor.take(length, "a tensor name")
        name = text(raw)
        if not name:
            self._report("name-empty", f"tensor {index} has no name", offset)
        if length > self.limits.tensor_name:
            message = f"the name of tensor {index} has {length} bytes; {self.limits.tensor_name} are allowed"
            self._report("name-too-long", message, offset, tensor=name)
        if _is_not_utf8(raw):
            self._report("name-not-utf8", f"the name of tensor {index} is not UTF-8", offset, tensor=name)
        return name

    def _dims(self, name: str) -> tuple[int, ...]:
        offset = self.cursor.position
        count = self.cursor.u32(f"the number of dimensions of {name!r}")
        if count > self.limits.dims:
            message = f"tensor {name!r} claims {count:,} dimensions; at most {self.limits.dims} are allowed"
            if count > 4 * self.limits.dims:
                raise self.cursor.stop("dims-count", message, offset)
            self._report("dims-count", message, offset, tensor=name)
        dims = tuple(self.cursor.u64(f"a dimension of {name!r}") for _ in range(count))
        if any(dim > _SIGNED_MAX for dim in dims):
            message = f"tensor {name!r} has the dimensions {list(dims)}; one is negative or beyond 2^63"
            self._report("dims-value", message, offset, tensor=name)
        return dims

    def _tensor_type(self, name: str, number: int, offset: int) -> quants.QuantType | None:
        type_ = quants.TYPES.get(number)
        if type_ is not None:
            return type_
        if number in quants.REMOVED:
            message = f"tensor {name!r} has type {number}, removed from the format: {quants.REMOVED[number]}"
            self._report("type-removed", message, offset, tensor=name)
        else:
            message = f"tensor {name!r} has type {number}, which this version of ggufkit does not know"
            self._report("type-unknown", message, offset, tensor=name)
        return None

    def _nbytes(self, name: str, dims: tuple[int, ...], type_: quants.QuantType | None, offset: int) -> int | None:
        """The bytes of the data, or None with a problem reported; exact, since Python's integers do not wrap."""
        elements = math.prod(dims)
        if type_ is None:
            return None
        row = dims[0] if dims else 1
        if row % type_.block_size:
            message = (
                f"tensor {name!r} has rows of {row:,} elements; {type_.name} packs them in blocks of {type_.block_size}"
            )
            self._report("shape-block", message, offset, tensor=name)
            return None
        nbytes = elements // type_.block_size * type_.type_size
        if max(elements, nbytes) > _SIGNED_MAX:
            message = f"tensor {name!r} of shape {list(dims[::-1])} would have {elements:,} elements, {nbytes:,} bytes"
            self._report("shape-too-large", message, offset, tensor=name)
            return None
        return nbytes


def _is_not_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def _version(head: bytes, source: Source) -> tuple[int, ByteOrder]:
    """The version and the byte order, which is guessed: read the wrong way, a version is implausible."""
    if head[:4] != b"GGUF":
        kind = identify(head, source.size)
        message = f"not a GGUF file: it is {kind}" if kind else f"not a GGUF file: it begins with {head[:4]!r}"
        raise NotGGUF(message, path=source.name, offset=0, expected=None if kind else "b'GGUF'", looks_like=kind)
    if len(head) < 8:
        raise FormatError(f"the file ends after {source.size} bytes, inside its magic and version", path=source.name)
    readings: tuple[ByteOrder, ByteOrder] = ("little", "big")
    little, big = (int.from_bytes(head[4:8], order) for order in readings)
    version, byteorder = (big, readings[1]) if little > _PLAUSIBLE_VERSION >= big else (little, readings[0])
    if version in (2, 3):
        return version, byteorder
    raise _bad_version(version, source.name)


def _bad_version(version: int, path: str) -> GgufkitError:
    if version == 1:
        return FormatError(
            "GGUF version 1, which was replaced in August 2023 and is no longer read by anybody",
            path=path,
            offset=4,
            help="download a current conversion of the model, or convert it again",
        )
    if _NEWEST_VERSION < version <= _PLAUSIBLE_VERSION:
        return NewerThanTool(
            f"GGUF version {version} is newer than this version of ggufkit, which reads 2 and 3",
            path=path,
            offset=4,
            help="update ggufkit",
        )
    return FormatError(f"the version field is {version}", path=path, offset=4, expected="2 or 3")
