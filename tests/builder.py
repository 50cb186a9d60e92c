"""GGUF files byte by byte, for tests: everything a file can have, and everything that can be wrong with it.

`File` is a plain, editable picture of one file; `encode` writes exactly what the picture says, so that a test makes
a malformed file by changing the one thing it is about:

    file = File(); file.n_kv = -1                       # any field of the header overridden
    file.set("general.alignment", i32(32))              # a key with the wrong type
    file.tensor("w", np.ones((4, 32), "f4")).offset = 7 # a misaligned tensor

Shapes are given in NumPy's order, slowest first; `Entry.dims` is the file's order. `model()` is a complete small
qwen2 model to damage, `File.read` makes any existing file editable. It is our own writing of the format's
specification and shares no code with the reader that it tests.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

#: scalar type → (number, struct code)
SCALARS: dict[str, tuple[int, str]] = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "B"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
STRING, ARRAY = 8, 9

#: tensor type → (number, elements of a block, bytes of a block), as far as tests build them
TENSOR_TYPES: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "BF16": (30, 1, 2),
    "F64": (28, 1, 8),
    "I8": (24, 1, 1),
    "I16": (25, 1, 2),
    "I32": (26, 1, 4),
    "I64": (27, 1, 8),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
    "Q6_K": (14, 256, 210),
}

_NUMPY_TYPES = {"f4": "F32", "f2": "F16", "f8": "F64", "i1": "I8", "i2": "I16", "i4": "I32", "i8": "I64"}


@dataclass(frozen=True)
class Value:
    """A metadata value: its type's number and how its bytes are made for a byte order (`<` or `>`)."""

    type: int
    encode: Callable[[str], bytes]


def scalar(kind: str, value: float) -> Value:
    """A number of the type `kind` (`u32`, `f64`, `bool` …)."""
    number, code = SCALARS[kind]
    return Value(number, lambda order: struct.pack(order + code, value))


def u8(value: int) -> Value:
    return scalar("u8", value)


def u16(value: int) -> Value:
    return scalar("u16", value)


def u32(value: int) -> Value:
    return scalar("u32", value)


def u64(value: int) -> Value:
    return scalar("u64", value)


def i32(value: int) -> Value:
    return scalar("i32", value)


def f32(value: float) -> Value:
    return scalar("f32", value)


def boolean(value: int) -> Value:
    """A bool with any byte."""
    return scalar("bool", value)


def string(value: str | bytes, *, length: int | None = None) -> Value:
    """A string; `length` overrides the length that is written."""
    return Value(STRING, lambda order: _string(value, order, length))


def array(kind: str, values: Sequence[Any], *, count: int | None = None) -> Value:
    """An array of `kind` (a scalar type or `string`); `count` overrides the count that is written."""
    number = STRING if kind == "string" else SCALARS[kind][0]

    def encode(order: str) -> bytes:
        head = struct.pack(order + "IQ", number, len(values) if count is None else count)
        if kind == "string":
            return head + b"".join(_string(value, order) for value in values)
        return head + struct.pack(f"{order}{len(values)}{SCALARS[kind][1]}", *values)

    return Value(ARRAY, encode)


def nested(*arrays: Value, count: int | None = None) -> Value:
    """An array of arrays."""

    def encode(order: str) -> bytes:
        head = struct.pack(order + "IQ", ARRAY, len(arrays) if count is None else count)
        return head + b"".join(inner.encode(order) for inner in arrays)

    return Value(ARRAY, encode)


def raw(type_: int, data: bytes) -> Value:
    """Any type number with any bytes behind it."""
    return Value(type_, lambda order: data)


def infer(value: Any) -> Value:
    """The value that converters write for a Python object: int → u32, negative → i32, float → f32 …"""
    match value:
        case Value():
            return value
        case bool():
            return boolean(value)
        case int():
            return u32(value) if value >= 0 else i32(value)
        case float():
            return f32(value)
        case str() | bytes():
            return string(value)
        case [str() | bytes(), *_]:
            return array("string", value)
        case [float(), *_]:
            return array("f32", value)
        case [bool(), *_]:
            return array("bool", value)
        case [int(), *_] | []:
            return array("i32", value)
    raise TypeError(f"no metadata type for {value!r}")


def _string(value: str | bytes, order: str, length: int | None = None) -> bytes:
    data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    return struct.pack(order + "Q", (len(data) if length is None else length) & (2**64 - 1)) + data


@dataclass
class Entry:
    """One tensor: its line of the table and its data.

    Attributes:
        dims: fastest first; numbers are written modulo 2^64, so -1 is possible.
        type: the type's number.
        data: as stored, in the file's byte order.
        offset: overrides the offset into the data section; the data stays where the layout puts it.
        n_dims, name_length: override what is written.
    """

    name: str | bytes
    dims: tuple[int, ...]
    type: int
    data: bytes = b""
    offset: int | None = None
    n_dims: int | None = None
    name_length: int | None = None

    def encode(self, order: str, offset: int) -> bytes:
        n_dims = len(self.dims) if self.n_dims is None else self.n_dims
        where = offset if self.offset is None else self.offset
        numbers = [dim % 2**64 for dim in self.dims]
        return (
            _string(self.name, order, self.name_length)
            + struct.pack(order + "I", n_dims % 2**32)
            + struct.pack(f"{order}{len(numbers)}Q", *numbers)
            + struct.pack(order + "IQ", self.type % 2**32, where % 2**64)
        )

    def values(self) -> npt.NDArray[np.float32]:
        """The data of an F32 tensor as a writable array of its shape; see `assign`."""
        assert self.type == 0
        return np.frombuffer(self.data, "<f4").reshape(self.dims[::-1]).copy()

    def assign(self, values: npt.NDArray[np.float32]) -> None:
        """Replace the data of an F32 tensor."""
        self.data = values.astype("<f4").tobytes()


@dataclass
class File:
    """One GGUF file. Every field is written as it stands; None means "what is right".

    Attributes:
        kv: key and value in the file's order; a list, so that a key can occur twice.
        tensors: in the file's order.
        layout: what the data is really aligned to.
        pad: the padding byte. `pad_last`: whether padding follows the last tensor.
        tail: bytes behind everything.
    """

    magic: bytes = b"GGUF"
    version: int = 3
    big: bool = False
    n_tensors: int | None = None
    n_kv: int | None = None
    kv: list[tuple[str | bytes, Value]] = field(default_factory=list)
    tensors: list[Entry] = field(default_factory=list)
    layout: int = 32
    pad: bytes = b"\0"
    pad_last: bool = True
    tail: bytes = b""

    # -- editing ----------------------------------------------------------------------------------------------

    def add(self, key: str | bytes, value: Any) -> File:
        """Append a pair, even if the key is there already."""
        self.kv.append((key, infer(value)))
        return self

    def set(self, key: str, value: Any) -> File:
        """Replace the value of a key where it stands, or append it."""
        places = [place for place, (name, _) in enumerate(self.kv) if name == key]
        if not places:
            return self.add(key, value)
        self.kv[places[0]] = (key, infer(value))
        return self

    def drop(self, *keys: str) -> File:
        """Remove keys."""
        assert set(keys) <= {name for name, _ in self.kv}, keys
        self.kv = [(name, value) for name, value in self.kv if name not in keys]
        return self

    def tensor(
        self,
        name: str | bytes,
        data: npt.NDArray[Any] | bytes = b"",
        *,
        shape: Sequence[int] | None = None,
        type: str | int | None = None,  # noqa: A002 - the field's name
    ) -> Entry:
        """Append a tensor and return it.

        Args:
            data: an array of plain numbers, or packed bytes (then `shape` and `type` are needed).
            shape: NumPy's order; by default that of the array.
            type: name or number; by default that of the array.
        """
        if isinstance(data, np.ndarray):
            shape = data.shape if shape is None else shape
            type = _NUMPY_TYPES[data.dtype.str[1:]] if type is None else type  # noqa: A001
            data = data.astype(data.dtype.newbyteorder(">" if self.big else "<")).tobytes()
        assert shape is not None
        assert type is not None
        number = TENSOR_TYPES[type][0] if isinstance(type, str) else type
        entry = Entry(name, tuple(shape)[::-1], number, data)
        self.tensors.append(entry)
        return entry

    def __getitem__(self, name: str) -> Entry:
        """The tensor of this name."""
        return next(entry for entry in self.tensors if entry.name == name)

    def remove(self, *names: str) -> File:
        """Remove tensors, table line and data."""
        assert set(names) <= {entry.name for entry in self.tensors}, names
        self.tensors = [entry for entry in self.tensors if entry.name not in names]
        return self

    # -- writing ----------------------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """The whole file."""
        header = self.header()
        return header + self._padding(len(header)) + self._data() + self.tail

    def header(self) -> bytes:
        """Everything before the padding that precedes the data."""
        order = ">" if self.big else "<"
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_kv = len(self.kv) if self.n_kv is None else self.n_kv
        parts = [self.magic, struct.pack(order + "IQQ", self.version, n_tensors % 2**64, n_kv % 2**64)]
        parts += [
            _string(key, order) + struct.pack(order + "I", value.type) + value.encode(order) for key, value in self.kv
        ]
        parts += [entry.encode(order, offset) for entry, offset in zip(self.tensors, self._offsets(), strict=True)]
        return b"".join(parts)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.encode())
        return path

    def data_offset(self, name: str) -> int:
        """Where in the file the data of a tensor is written."""
        start = len(self.header())
        index = next(index for index, entry in enumerate(self.tensors) if entry.name == name)
        return start + len(self._padding(start)) + list(self._offsets())[index]

    def _offsets(self) -> Iterator[int]:
        offset = 0
        for entry in self.tensors:
            yield offset
            offset += len(entry.data) + len(self._padding(len(entry.data)))

    def _data(self) -> bytes:
        parts = []
        for index, entry in enumerate(self.tensors):
            last = index == len(self.tensors) - 1
            parts += [entry.data, b"" if last and not self.pad_last else self._padding(len(entry.data))]
        return b"".join(parts)

    def _padding(self, size: int) -> bytes:
        return self.pad * (-size % self.layout)

    # -- reading ----------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: Path) -> File:
        """An existing little-endian file as an editable one; all its data is held in memory."""
        from ggufkit import reader

        file = cls()
        with reader.open(path) as gguf:
            source = gguf.shards[0].source
            file.layout = gguf.shards[0].alignment
            for entry in gguf.fields.values():
                at, count = entry.value_offset, entry.nbytes
                if entry.element_type is not None:
                    at, count = at - 12, count + 12  # the element type and the count are part of the value
                file.add(entry.key, raw(entry.type, source.read(at, count)))
            for tensor in gguf.tensors.values():
                file.tensors.append(Entry(tensor.name, tensor.dims, tensor.type_id, gguf.read(tensor).tobytes()))
        return file


# -- a complete model ------------------------------------------------------------------------------------------------


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level BPE vocabulary, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (0x100 + number for number in range(256))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "h e", "Ġ t", "Ġt he", "i n", "e r", "a n", "o n", "r e", "Ġ a", "o u", "an d", "Ġ w")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def vocabulary(*, rows: int = 288) -> dict[str, Any]:
    """The tokenizer's metadata: 256 bytes, the results of the merges, three control tokens, padding up to `rows`."""
    tokens = [*byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
    types = [1] * len(tokens) + [3] * len(SPECIAL)
    tokens += SPECIAL
    types += [5] * (rows - len(tokens))
    tokens += [f"[PAD{number}]" for number in range(len(tokens), rows)]
    end = tokens.index("<|im_end|>")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def model(*, seed: int = 0, n_layer: int = 2, big: bool = False, metadata: Mapping[str, Any] | None = None) -> File:
    """A small, complete and healthy qwen2 model in F32: 64 wide, 4 query and 2 key heads of 16, random weights."""
    file = File(big=big)
    keys: dict[str, Any] = {
        "general.architecture": "qwen2",
        "general.name": "Tiny Qwen2 Instruct",
        "general.quantization_version": 2,
        "general.file_type": 0,
        "qwen2.block_count": n_layer,
        "qwen2.context_length": 128,
        "qwen2.embedding_length": 64,
        "qwen2.feed_forward_length": 96,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen2.rope.freq_base": 1e6,
        **vocabulary(),
        **(metadata or {}),
    }
    for key, value in keys.items():
        file.add(key, value)
    for name, values in _weights(np.random.default_rng(seed), n_layer):
        file.tensor(name, values)
    return file


def _weights(rng: np.random.Generator, n_layer: int) -> Iterable[tuple[str, npt.NDArray[np.float32]]]:
    def matrix(out: int, in_: int) -> npt.NDArray[np.float32]:
        return (rng.standard_normal((out, in_)) / np.sqrt(in_)).astype(np.float32)

    def vector(size: int, mean: float, spread: float) -> npt.NDArray[np.float32]:
        return (mean + spread * rng.standard_normal(size)).astype(np.float32)

    yield "token_embd.weight", matrix(288, 64)
    for layer in range(n_layer):
        yield f"blk.{layer}.attn_norm.weight", vector(64, 1, 0.1)
        for part, width in (("q", 64), ("k", 32), ("v", 32)):
            yield f"blk.{layer}.attn_{part}.weight", matrix(width, 64)
            yield f"blk.{layer}.attn_{part}.bias", vector(width, 0, 1)
        yield f"blk.{layer}.attn_output.weight", matrix(64, 64)
        yield f"blk.{layer}.ffn_norm.weight", vector(64, 1, 0.1)
        yield f"blk.{layer}.ffn_gate.weight", matrix(96, 64)
        yield f"blk.{layer}.ffn_up.weight", matrix(96, 64)
        yield f"blk.{layer}.ffn_down.weight", matrix(64, 96)
    yield "output_norm.weight", vector(64, 1, 0.1)
    yield "output.weight", matrix(288, 64)


def write_split(file: File, folder: Path, parts: Sequence[Sequence[str]], *, name: str = "model") -> list[Path]:
    """Write `file` as a split set: `parts` names the tensors of each part; the metadata goes into the first.

    Every part has split.no, split.count and split.tensors.count as llama-gguf-split writes them.
    """
    shards = split(file, parts)
    paths = [folder / f"{name}-{number + 1:05d}-of-{len(parts):05d}.gguf" for number in range(len(parts))]
    return [shard.write(path) for shard, path in zip(shards, paths, strict=True)]


def split(file: File, parts: Sequence[Sequence[str]]) -> list[File]:
    """The parts of a split set, to be damaged before they are written."""
    total = sum(len(names) for names in parts)
    shards = []
    for number, names in enumerate(parts):
        shard = File(big=file.big, kv=list(file.kv) if number == 0 else [])
        shard.tensors = [file[tensor_name] for tensor_name in names]
        shard.add("split.no", u16(number)).add("split.count", u16(len(parts))).add("split.tensors.count", i32(total))
        shards.append(shard)
    return shards
