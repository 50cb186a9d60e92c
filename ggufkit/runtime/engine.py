"""What every engine offers, and nothing else: the protocol that generation, probes, traces and benchmarks use.

An engine knows token ids; text, templates and samplers stay outside. Damage is tried out, and mended, through
`patched`: an `Edit` replaces packed bytes of a tensor, which says the same thing to every engine and for every
block type, and is undone exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ggufkit.arch import Config
from ggufkit.container import GGUF, Tensor
from ggufkit.errors import UsageError
from ggufkit.steps import Tap

Logits = NDArray[np.float32]
Which = Literal["last", "all"]


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace the packed bytes of `tensor` from its byte `start` on by `data`."""

    tensor: str
    start: int
    data: bytes


class Cache(Protocol):
    """The keys and values of one sequence. Positions are 0 … length-1; the next token gets position `length`."""

    @property
    def n_ctx(self) -> int: ...

    @property
    def length(self) -> int: ...

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""


class Engine(Protocol):
    """One loaded model."""

    @property
    def config(self) -> Config: ...

    @property
    def device(self) -> str:
        """`cpu`, or the GPU's name."""

    def new_cache(self, n_ctx: int) -> Any:
        """An empty cache for up to `n_ctx` positions."""

    def forward(self, ids: Sequence[int], cache: Any, *, logits: Which = "last", tap: Tap | None = None) -> Logits:
        """Run `ids` after what the cache holds and add them to it.

        Args:
            ids: one or more token ids.
            logits: of the last position only, or of all.
            tap: shown each named step that it wants.

        Returns:
            float32 [1 or n, V].

        Raises:
            UsageError: an id outside the vocabulary, or more positions than the cache has room for.
        """

    def patched(self, edits: Iterable[Edit]) -> AbstractContextManager[None]:
        """Run with some bytes of the weights replaced; exactly as before once left."""


def check_ids(ids: Sequence[int], cache: Cache, config: Config) -> None:
    """What every engine asks of its arguments before anything is computed.

    Raises:
        UsageError: as `Engine.forward` says.
    """
    if not len(ids):
        raise UsageError("there are no tokens to run")
    bad = [token for token in ids if not 0 <= token < config.n_vocab]
    if bad:
        raise UsageError(f"token id {bad[0]} is outside the vocabulary of {config.n_vocab:,} rows")
    if cache.length + len(ids) > cache.n_ctx:
        raise UsageError(
            f"{cache.length + len(ids):,} positions do not fit into a context of {cache.n_ctx:,}",
            help="give a larger context (--ctx) or a shorter prompt",
        )


def element_edits(gguf: GGUF, name: str, values: Mapping[int, float]) -> list[Edit]:
    """Edits that set single elements, by flat index, of a float tensor (F32, F16, BF16, F64).

    Raises:
        UsageError: no such tensor or element, or the tensor's type packs elements into blocks.
    """
    tensor = gguf.tensor(name)
    edits = []
    for index, value in values.items():
        if not 0 <= index < tensor.n_elements:
            raise UsageError(f"{name} has {tensor.n_elements} elements; there is no element {index}")
        data = encode_float(tensor, value, gguf.byteorder)
        edits.append(Edit(name, index * len(data), data))
    return edits


def encode_float(tensor: Tensor, value: float, byteorder: str) -> bytes:
    """One element of a float tensor as its bytes in the file."""
    order = "<" if byteorder == "little" else ">"
    if tensor.type_name == "BF16":
        bits = int(np.float32(value).view(np.uint32))
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 if np.isfinite(value) else (bits >> 16) | (value != value)
        return rounded.to_bytes(2, "little" if order == "<" else "big")
    code = {"F32": "f4", "F16": "f2", "F64": "f8"}.get(tensor.type_name)
    if code is None:
        raise UsageError(f"{tensor.name} is {tensor.type_name}: its elements cannot be set one by one")
    return np.array(value, order + code).tobytes()


def apply_edits(raw: NDArray[np.uint8], edits: Iterable[Edit]) -> None:
    """Write the edits of one tensor into its packed bytes, in place.

    Raises:
        UsageError: an edit leaves the tensor.
    """
    for edit in edits:
        end = edit.start + len(edit.data)
        if edit.start < 0 or end > raw.size:
            raise UsageError(f"an edit of bytes {edit.start}..{end} leaves {edit.tensor}, which has {raw.size}")
        raw[edit.start : end] = np.frombuffer(edit.data, np.uint8)
