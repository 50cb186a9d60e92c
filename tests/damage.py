"""Damage as it happens to files, described on an opened header so that it fits any model: a tiny one or the real one.

A damage is a set of patches (byte offset → new bytes) and maybe a new size. `Patched` shows a file through them
without copying it, `apply` writes a damaged copy.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ggufkit import reader
from ggufkit.container import GGUF, Tensor
from ggufkit.source import Source


@dataclass(frozen=True)
class Damage:
    """Patches by byte offset, and the size after it; None leaves the size alone."""

    patches: Mapping[int, bytes] = field(default_factory=dict)
    size: int | None = None


Make = Callable[[GGUF], Damage]


@dataclass(frozen=True)
class Case:
    """One kind of damage.

    Attributes:
        codes: rules of which at least one must find it.
        place: the tensor or key that must be named, or None.
    """

    name: str
    make: Make
    codes: tuple[str, ...]
    place: str | None = None
    status: int = 1


class Patched(Source):
    """A file as if it had been damaged."""

    damage = Damage()

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        if self.damage.size is not None:
            self.size = min(self.size, self.damage.size)

    def read(self, offset: int, count: int) -> bytes:
        buffer = bytearray(max(0, min(count, self.size - offset)))
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        count = super().read_into(offset, buffer[: max(0, self.size - offset)])
        for at, data in self.damage.patches.items():
            start, stop = max(at, offset), min(at + len(data), offset + count)
            if start < stop:
                buffer[start - offset : stop - offset] = data[start - at : stop - at]
        return count


def patched(damage: Damage) -> type[Patched]:
    """A `Source` that shows this damage; put it where the reader looks for `Source`."""
    return type("Damaged", (Patched,), {"damage": damage})


def apply(path: Path, make: Make, target: Path) -> Path:
    """Write a damaged copy."""
    data = bytearray(path.read_bytes())
    with reader.open(path) as gguf:
        damage = make(gguf)
    for at, patch in damage.patches.items():
        data[at : at + len(patch)] = patch
    target.write_bytes(data[: damage.size])
    return target


# -- where things are --------------------------------------------------------------------------------------------------


def offset_field(tensor: Tensor) -> int:
    """Where the header holds the tensor's offset: the last eight bytes of its entry."""
    return type_field(tensor) + 4


def type_field(tensor: Tensor) -> int:
    return tensor.info_offset + 8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.dims)


def value(gguf: GGUF, key: str) -> int:
    """Where the value of a scalar key is."""
    return gguf.fields[key].value_offset


def block(tensor: Tensor, number: int, byte: int = 0) -> int:
    """Where byte `byte` of a block is."""
    assert tensor.type is not None
    return tensor.offset + number * tensor.type.type_size + byte


# -- the kinds of damage -----------------------------------------------------------------------------------------------


def cut(share: float) -> Make:
    return lambda gguf: Damage(size=int(gguf.size * share))


def at(offset: int, data: bytes) -> Make:
    return lambda gguf: Damage({offset: data})


def scalar(key: str, code: str, number: float) -> Make:
    return lambda gguf: Damage({value(gguf, key): struct.pack("<" + code, number)})


def element(name: str, index: int, number: float) -> Make:
    """One value of an F32 tensor."""
    return lambda gguf: Damage({gguf.tensors[name].offset + 4 * index: struct.pack("<f", number)})


def offset(name: str, number: Callable[[GGUF], int]) -> Make:
    return lambda gguf: Damage({offset_field(gguf.tensors[name]): struct.pack("<Q", number(gguf))})


def renamed(name: str) -> Make:
    """The last letter of a tensor's name changed."""
    return lambda gguf: Damage({gguf.tensors[name].info_offset + 8 + len(name) - 1: b"x"})


def stretch(name: str, count: int, data: Callable[[int], bytes], share: float = 0.4) -> Make:
    """`count` bytes somewhere inside a tensor overwritten; of a small one no more than a quarter."""

    def make(gguf: GGUF) -> Damage:
        tensor = gguf.tensors[name]
        assert tensor.nbytes is not None
        return Damage({tensor.offset + int(tensor.nbytes * share) // 4 * 4: data(min(count, tensor.nbytes // 4))})

    return make


def noise(count: int) -> bytes:
    return np.random.default_rng(1).bytes(count)


def scale(name: str, number: int, bits: int) -> Make:
    """The f16 scale of a block replaced by the pattern `bits`."""

    def make(gguf: GGUF) -> Damage:
        tensor = gguf.tensors[name]
        assert tensor.type is not None
        assert tensor.type.d is not None
        return Damage({block(tensor, number, tensor.type.d): struct.pack("<H", bits)})

    return make
