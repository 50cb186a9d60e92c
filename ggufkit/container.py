"""What an opened GGUF file holds, as data: fields, tensors, shards, and the problems met while reading.

Nothing here parses a header (that is `reader`); values of arrays and long strings are decoded from the file
when they are asked for, so that a vocabulary of 152,000 tokens costs nothing until somebody needs it.
Shapes are always NumPy's, slowest dimension first: (out_features, in_features). `Tensor.dims` keeps the
file's own order, fastest first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from ggufkit.errors import FormatError, NewerThanTool, UsageError
from ggufkit.quants import REMOVED, QuantType
from ggufkit.source import Source

if TYPE_CHECKING:  # `inspect` needs no NumPy: it is loaded by whoever asks for an array
    import numpy as np

ByteOrder = Literal["little", "big"]


class ValueType(IntEnum):
    """The types of a metadata value, with the format's numbers."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


#: the struct code of each scalar type; its size in bytes follows
SCALAR_CODES: dict[ValueType, str] = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
SCALAR_SIZES: dict[ValueType, int] = {type_: struct.calcsize("=" + code) for type_, code in SCALAR_CODES.items()}

#: arrays may hold arrays in the specification, not in llama.cpp; deeper than this nobody reads on
MAX_ARRAY_DEPTH = 4

#: type numbers from here on belong to no version or fork of the format; the field is damaged
PLAUSIBLE_TYPES = 1_000


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong that the reader met; it went on unless `fatal`.

    Attributes:
        kind: what it is, a key of `reader.PROBLEMS`.
        message: what was found and what was expected, in a sentence.
        offset: byte offset in the shard's file.
        fatal: the rest of this shard's header could not be read.
    """

    kind: str
    message: str
    offset: int | None = None
    key: str | None = None
    tensor: str | None = None
    shard: int = 0
    fatal: bool = False


#: an array of strings is marked every so many elements
MARK_STEP = 1024


@dataclass(frozen=True, slots=True)
class Field:
    """One key of the metadata, with its place in the file; the value itself is read through `Metadata`.

    Attributes:
        offset: where the key begins.
        value_offset: where the value begins (for arrays, after the element type and the count).
        nbytes: bytes that the value takes from `value_offset`.
        element_type, count: of an array.
        scalar: the value, when it is a number or a bool.
        marks: of an array of strings, where every `MARK_STEP`-th begins: one is found without stepping over all.
    """

    key: str
    type: ValueType
    offset: int
    value_offset: int
    nbytes: int
    shard: int = 0
    element_type: ValueType | None = None
    count: int | None = None
    scalar: int | float | bool | None = None
    marks: tuple[int, ...] = ()

    @property
    def type_name(self) -> str:
        """`uint32`, or `string[151936]` for an array."""
        if self.type is not ValueType.ARRAY or self.element_type is None:
            return self.type.name.lower()
        return f"{self.element_type.name.lower()}[{self.count}]"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the tensor table.

    Attributes:
        dims: sizes in the file's order, fastest first (ggml's `ne`).
        type: the block type; None when the number `type_id` is not known.
        offset: of the data, in bytes from the beginning of the shard's file.
        relative_offset: as the file says it, from the beginning of the data section.
        nbytes: of the data; None when type or shape do not allow to tell.
        info_offset: where this entry of the table begins.
    """

    name: str
    dims: tuple[int, ...]
    type_id: int
    type: QuantType | None
    offset: int
    relative_offset: int
    nbytes: int | None
    info_offset: int
    shard: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """NumPy's order, slowest first: (out_features, in_features) for a matrix."""
        return self.dims[::-1]

    @property
    def n_elements(self) -> int:
        return math.prod(self.dims)

    @property
    def n_rows(self) -> int:
        """Rows of `dims[0]` elements, over all slower dimensions."""
        return math.prod(self.dims[1:])

    @property
    def type_name(self) -> str:
        return self.type.name if self.type else f"type {self.type_id}"

    @property
    def is_newer(self) -> bool:
        """Whether the type may be one that a newer version of the format has; a removed or absurd one is not."""
        return self.type is None and self.type_id not in REMOVED and self.type_id < PLAUSIBLE_TYPES


@dataclass(slots=True)
class Shard:
    """One file of the set, as its own header tells it."""

    source: Source
    version: int
    byteorder: ByteOrder
    alignment: int = 32
    n_kv: int = 0
    n_tensors: int = 0
    header_end: int = 0
    fields: dict[str, Field] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    complete: bool = False

    @property
    def data_start(self) -> int:
        """The header's end, rounded up to the alignment."""
        return -(-self.header_end // self.alignment) * self.alignment


class Metadata(Mapping[str, Any]):
    """The metadata of a file as a mapping from key to value.

    Scalars are Python's int, float and bool; strings are str (bytes that are no UTF-8 survive as surrogate
    escapes); arrays of numbers are NumPy arrays of the file's type, arrays of strings are lists, and both
    are decoded at the first access.
    """

    def __init__(self, fields: Mapping[str, Field], shards: list[Shard]) -> None:
        self._fields = fields
        self._shards = shards
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        entry = self._fields[key]
        if entry.scalar is not None:
            return entry.scalar
        if key not in self._decoded:
            self._decoded[key] = decode(entry, self._shards[entry.shard])
        return self._decoded[key]

    def __contains__(self, key: object) -> bool:
        return key in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


class GGUF:
    """An opened file or split set. Close it, or use it as a context manager.

    Attributes:
        path: what was opened.
        shards: the files, in order.
        fields: the first shard's metadata with types and places.
        metadata: the same as values.
        tensors: by name, over all shards; of two with one name the first.
        problems: what was wrong, in the order of the file; empty for a healthy header.
    """

    def __init__(self, path: Path, shards: list[Shard], problems: list[Problem]) -> None:
        self.path = path
        self.shards = shards
        self.problems = problems
        self.fields = shards[0].fields
        self.metadata: Mapping[str, Any] = Metadata(self.fields, shards)
        self.tensors: dict[str, Tensor] = {}
        for shard in shards:
            for tensor in shard.tensors:
                self.tensors.setdefault(tensor.name, tensor)

    @property
    def version(self) -> int:
        return self.shards[0].version

    @property
    def byteorder(self) -> ByteOrder:
        return self.shards[0].byteorder

    @property
    def size(self) -> int:
        """Bytes of all the files."""
        return sum(shard.source.size for shard in self.shards)

    @property
    def complete(self) -> bool:
        """Whether every header was read to its end."""
        return all(shard.complete for shard in self.shards)

    @property
    def architecture(self) -> str | None:
        """`general.architecture`, when it is a string."""
        name = self.metadata.get("general.architecture")
        return name if isinstance(name, str) else None

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            UsageError: there is none.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise UsageError(
                f"there is no tensor named {name!r}", path=str(self.path), help="`inspect --tensors` lists them"
            ) from None

    def read(self, tensor: Tensor, start: int = 0, count: int | None = None) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The packed bytes [start, start + count) of `tensor`, uint8; by default all from `start` on.

        Raises:
            NewerThanTool: the tensor's type is not known.
            FormatError: its shape is impossible, or the file ends before it.
            UsageError: the range leaves the tensor.
        """
        import numpy as np

        count = self._nbytes(tensor) - start if count is None else count
        self._check(tensor, start, count)
        buffer = np.empty(count, np.uint8)
        self.read_into(tensor, buffer.data, start)
        return buffer

    def read_into(self, tensor: Tensor, buffer: memoryview, start: int = 0) -> None:
        """Fill `buffer` with packed bytes of `tensor` from its byte `start` on. May be called from many threads.

        Raises: as `read`.
        """
        buffer = buffer.cast("B")
        self._check(tensor, start, len(buffer))
        source = self.shards[tensor.shard].source
        if source.read_into(tensor.offset + start, buffer) != len(buffer):
            raise self._outside(tensor, source)  # it shrank after it was opened

    def close(self) -> None:
        for shard in self.shards:
            shard.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, tensor: Tensor, start: int, count: int) -> None:
        """Raise unless these bytes belong to the tensor and lie in the file: nothing is allocated before that."""
        nbytes = self._nbytes(tensor)
        if start < 0 or count < 0 or start + count > nbytes:
            raise UsageError(f"bytes {start}..{start + count} of {tensor.name!r} do not exist: it has {nbytes}")
        source = self.shards[tensor.shard].source
        if tensor.offset + start + count > source.size:
            raise self._outside(tensor, source)

    def _nbytes(self, tensor: Tensor) -> int:
        if not self.shards[tensor.shard].complete:
            raise FormatError(
                f"tensor {tensor.name!r} cannot be read: the header breaks off before it says where the data begins",
                path=self.shards[tensor.shard].source.name,
            )
        if tensor.nbytes is not None:
            return tensor.nbytes
        if tensor.is_newer:
            raise NewerThanTool(f"tensor {tensor.name!r} has the unknown type {tensor.type_id}", path=str(self.path))
        raise FormatError(
            f"tensor {tensor.name!r} of {tensor.type_name} and shape {tensor.shape} cannot exist",
            path=str(self.path),
            offset=tensor.info_offset,
        )

    def _outside(self, tensor: Tensor, source: Source) -> FormatError:
        return FormatError(
            f"tensor {tensor.name!r} ({tensor.nbytes:,} bytes) leaves the file, which ends at byte {source.size:,}",
            path=source.name,
            offset=tensor.offset,
            help="the download was cut short, or the file is damaged: fetch it again",
        )


def decode(entry: Field, shard: Shard) -> Any:
    """The value of a string or an array, read from the file.

    Strings become str, arrays of numbers NumPy arrays in the machine's byte order, arrays of strings lists,
    nested arrays lists of those.

    Raises:
        FormatError: the file got shorter since its header was read.
    """
    data = shard.source.read(entry.value_offset, entry.nbytes)
    if len(data) != entry.nbytes:
        raise FormatError("the file ends inside a metadata value", path=shard.source.name, offset=entry.value_offset)
    if entry.type is ValueType.STRING:
        return text(data[8:])
    assert entry.element_type is not None
    assert entry.count is not None
    return _array(data, 0, entry.element_type, entry.count, "<" if shard.byteorder == "little" else ">")[0]


def text(data: bytes) -> str:
    """UTF-8, with every byte that is none kept as a surrogate escape, so that nothing is lost."""
    return data.decode("utf-8", "surrogateescape")


def _array(data: bytes, at: int, type_: ValueType, count: int, order: str) -> tuple[Any, int]:
    """Decode `count` elements from `at`; the value and where it ends. Recursion ends at MAX_ARRAY_DEPTH,
    which the reader has checked."""
    if type_ is ValueType.STRING:
        return _strings(data, at, count, order)
    if type_ is ValueType.ARRAY:
        return _nested(data, at, count, order)
    import numpy as np

    size = SCALAR_SIZES[type_]
    values = np.frombuffer(data, order + SCALAR_CODES[type_], count, at)
    native = values.astype(values.dtype.newbyteorder("="))
    return (native != 0 if type_ is ValueType.BOOL else native), at + count * size


def _strings(data: bytes, at: int, count: int, order: str) -> tuple[list[str], int]:
    length = struct.Struct(order + "Q").unpack_from
    values = []
    for _ in range(count):
        end = at + 8 + length(data, at)[0]
        values.append(data[at + 8 : end].decode("utf-8", "surrogateescape"))
        at = end
    return values, at


def _nested(data: bytes, at: int, count: int, order: str) -> tuple[list[Any], int]:
    values = []
    for _ in range(count):
        type_id, inner = struct.unpack_from(order + "IQ", data, at)
        value, at = _array(data, at + 12, ValueType(type_id), inner, order)
        values.append(value)
    return values, at
