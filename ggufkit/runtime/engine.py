"""What every engine offers, and nothing else: the protocol that generation, probes, traces and benchmarks use.

An engine knows token ids; text, templates and samplers stay outside. Damage is tried out, and mended, through
`patched`: an `Edit` replaces packed bytes of a tensor, which says the same thing to every engine and for every
block type, and is undone exactly.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ggufkit.arch import Config, expected_tensors, read_config
from ggufkit.container import GGUF, Tensor
from ggufkit.errors import FormatError, UsageError
from ggufkit.runtime.sampling import Choice, Sampler
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
    def name(self) -> str:
        """`reference`, `cpu` or `cuda`, as traces are signed."""

    @property
    def dtype(self) -> Any:
        """The NumPy dtype, or its name, that activations are computed in (`float32`)."""

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


@runtime_checkable
class Follower(Protocol):
    """What an engine may offer besides: saying many tokens without coming back for each."""

    def follow(self, token: int, cache: Any, n: int, sampler: Sampler) -> Generator[Choice, None, None]:
        """Feed `token`, then always what `sampler` chooses: the same tokens that `forward` and it would give.

        Args:
            n: how many tokens to say, at most.

        Yields:
            each token said. When the iterator is closed the cache holds `token` and all but the last of the tokens
            that were taken from it.

        Raises:
            UsageError: as `Engine.forward`.
            NotFinite: the logits after a token are not finite.
        """


def runnable(gguf: GGUF) -> Config:
    """The Config of a file whose tensors are all there in the right shapes: what every engine loads first.

    Raises:
        Unsupported: the architecture, or its rope scaling, is not modelled here.
        NewerThanTool: a tensor's type is not known.
        FormatError: the metadata is wrong, or a tensor is missing, misshapen or outside the file.
    """
    config = read_config(gguf)
    for name, expected in expected_tensors(config).items():
        tensor = gguf.tensors.get(name)
        if tensor is None and not expected.required:
            continue
        if tensor is None:
            raise FormatError(f"the tensor {name!r} is missing", path=str(gguf.path), help="convert the model again")
        if tensor.shape != expected.shape:
            message = f"tensor {name!r} has the shape {tensor.shape}, which its metadata contradicts"
            raise FormatError(message, path=str(gguf.path), offset=tensor.info_offset, expected=str(expected.shape))
        gguf.read(tensor, max((tensor.nbytes or 1) - 1, 0), 1)  # refuses unknown types and impossible places
    return config


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
    """One element of a float tensor as its bytes in the file, rounded to nearest even.

    Raises:
        UsageError: the tensor packs elements into blocks, or a finite value is too large for its type.
    """
    code = {"F32": "f4", "F16": "f2", "F64": "f8", "BF16": "f4"}.get(tensor.type_name)
    if code is None:
        raise UsageError(f"{tensor.name} is {tensor.type_name}: its elements cannot be set one by one")
    with np.errstate(over="ignore"):
        element = np.array(value, code)
    if tensor.type_name == "BF16":
        element = _to_bf16(element)
    if np.isfinite(value) and not _is_finite(element):
        raise UsageError(f"{value:g} does not fit into {tensor.name}, which is {tensor.type_name}")
    return (element if byteorder == sys.byteorder else element.byteswap()).tobytes()


def _to_bf16(element: NDArray[Any]) -> NDArray[Any]:
    """The upper half of a float32, uint16; a NaN stays one."""
    bits = int(element.view(np.uint32))
    upper = (bits >> 16) | 1 if np.isnan(element) else (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.array(upper, np.uint16)


def _is_finite(element: NDArray[Any]) -> bool:
    """Of a float, or of a bfloat16's bits."""
    if element.dtype == np.uint16:
        return (int(element) & 0x7F80) != 0x7F80
    return bool(np.isfinite(element))


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
