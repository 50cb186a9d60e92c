"""Rules against something known to be good: another file of the same model, or a manifest of this one.

Another quantization of the same model shares its float tensors bit for bit, and its matrices up to the rounding that
the two types explain. That rounding is known block by block from the scales, so that a block which differs by more is
found and named whatever its values look like. A manifest sees everything, down to the single bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufkit import manifest, quants
from ggufkit.checks.context import Context
from ggufkit.checks.rule import Found, Need, rule
from ggufkit.container import GGUF, Tensor
from ggufkit.errors import GgufkitError
from ggufkit.findings import Confidence, Evidence, Judgement, Severity

Floats = NDArray[np.float32]

_FETCH_AGAIN = "fetch the file again, or compare it with a third copy to see which of the two is damaged"
#: elements compared at a time
_CHUNK = 1 << 20
#: values that share one verdict: the largest block there is
_BLOCK = 256
#: the root mean square of rounding to a step of 1
_ROUNDING = 12**-0.5
#: a block whose difference is this many times what rounding explains, and as many times the tensor's typical, is bad
_FAR = 6.0
_NAMED = 5

#: the keys that make a model; others (names, dates, who quantized it) may differ
_SUFFIXES = (
    *("embedding_length", "block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv"),
    *("attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count", "rope.scaling.type"),
    *("rope.scaling.factor", "attention.layer_norm_rms_epsilon", "expert_count", "expert_used_count", "context_length"),
)
_WORDS = (
    *("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"),
    *("tokenizer.ggml.token_type", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.bos_token_id"),
    *("tokenizer.ggml.add_bos_token", "tokenizer.chat_template"),
)


@rule("R101", "reference-metadata", Severity.WARNING, needs=[Need.REFERENCE])
def reference_metadata(context: Context) -> Iterator[Found]:
    """Metadata that changes what the model says differs from the reference.

    What. Architecture, hyperparameters, tokenizer, special tokens and chat template, key by key.

    Why. Two files of one model differ in weights' precision, not in these. A changed end-of-turn token or RoPE base
    is as bad as damaged weights.

    Case. A re-upload with a repaired chat template: the older file never stops.

    Fix. Prefer the newer file, or find out which of the two follows the original model.
    """
    mine, theirs = context.gguf.metadata, _reference(context).metadata
    arch = context.architecture or ""
    for key in ("general.architecture", *(f"{arch}.{suffix}" for suffix in _SUFFIXES), *_WORDS):
        if (key in mine) != (key in theirs):
            where = "only in this file" if key in mine else "only in the reference"
            yield Found(f"{key} is {where}", key=key, severity=Severity.INFO)
        elif key in mine and (difference := _difference(mine[key], theirs[key])):
            yield Found(f"{key} {difference}", key=key, offset=context.place(key), value=_short(mine[key]))


def _difference(mine: Any, theirs: Any) -> str:
    if isinstance(mine, list | np.ndarray) and isinstance(theirs, list | np.ndarray):
        if len(mine) != len(theirs):
            return f"has {len(mine):,} entries; the reference has {len(theirs):,}"
        at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
        return "" if at is None else f"differs from entry {at} on: {_short(mine[at])} here, {_short(theirs[at])} there"
    return "" if mine == theirs else f"is {_short(mine)}; the reference has {_short(theirs)}"


def _short(value: Any) -> str:
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 60 else text[:57] + "…"


@rule("R102", "reference-tensors", Severity.ERROR, needs=[Need.REFERENCE])
def reference_tensors(context: Context) -> Iterator[Found]:
    """A tensor that only one of the two files has, or whose shape differs.

    What. The tensor lists, by name and shape. A head that only one of the files stores is no difference when the model
    is tied.

    Why. Two files of one model hold the same tensors.

    Case. A conversion that lost the biases of one layer.

    Fix. Convert the model again.
    """
    mine, theirs = context.gguf.tensors, _reference(context).tensors
    for name in sorted(mine.keys() ^ theirs.keys()):
        where = "not in the reference" if name in mine else "missing: the reference has it"
        tied = name == "output.weight"
        yield Found(f"{name} is {where}", tensor=name, severity=Severity.INFO if tied else None)
    for name in mine.keys() & theirs.keys():
        if mine[name].dims != theirs[name].dims:
            message = f"{name} has the shape {mine[name].shape}; in the reference it is {theirs[name].shape}"
            yield Found(message, tensor=name, offset=mine[name].info_offset)


@rule("R103", "reference-values", Severity.ERROR, needs=[Need.REFERENCE, Need.DATA])
def reference_values(context: Context) -> Iterator[Found]:
    """Weights differ from the reference by more than their types' rounding.

    What. Tensors of one type byte by byte; tensors of different types value by value, block by block, against the
    rounding that the blocks' own scales explain.

    Why. It sees what nothing else can: exchanged blocks, a scale's sign, a stretch of another model's weights.

    Case. A -34 planted in a key bias where 0.3 belongs.

    Fix. Fetch the file again, or compare with a third copy to see which of the two is damaged.
    """
    reference = _reference(context)
    for name, tensor in context.gguf.tensors.items():
        other = reference.tensors.get(name)
        if other is None or other.dims != tensor.dims or tensor.type is None or other.type is None:
            continue
        try:
            found = _compare(context.gguf, tensor, reference, other)
        except GgufkitError as error:
            context.skip(f"tensor {name} against the reference", error.message)
            continue
        if found is not None:
            yield found


def _compare(gguf: GGUF, tensor: Tensor, reference: GGUF, other: Tensor) -> Found | None:
    if tensor.type_id == other.type_id and gguf.byteorder == reference.byteorder:
        same = _differing_blocks(gguf, tensor, reference, other)
        if same is None:
            return None
        if same.share < 0.5:  # most of it is the same data: the rest was changed
            return _changed(tensor, same)
    return _beyond_rounding(gguf, tensor, reference, other)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks that differ: how many of how many, and the first few."""

    n: int
    of: int
    first: tuple[int, ...]

    @property
    def share(self) -> float:
        return self.n / max(self.of, 1)


def _differing_blocks(gguf: GGUF, tensor: Tensor, reference: GGUF, other: Tensor) -> _Blocks | None:
    """Which blocks of two tensors of one type differ in any byte; None when they are the same."""
    assert tensor.type is not None
    size, nbytes = tensor.type.type_size, tensor.nbytes or 0
    step = max(_CHUNK // size, 1) * size
    count, first = 0, list[int]()
    for start in range(0, nbytes, step):
        length = min(step, nbytes - start)
        differ = gguf.read(tensor, start, length) != reference.read(other, start, length)
        if differ.any():
            blocks = np.flatnonzero(differ.reshape(-1, size).any(axis=1))
            count += len(blocks)
            first += [start // size + int(block) for block in blocks[: _NAMED - len(first)]]
    return _Blocks(count, nbytes // size, tuple(first)) if count else None


def _changed(tensor: Tensor, blocks: _Blocks) -> Found:
    assert tensor.type is not None
    block = blocks.first[0]
    what = "blocks" if tensor.type.is_block else "values"
    index = np.unravel_index(block * tensor.type.block_size, tensor.shape)
    return Found(
        f"{tensor.name}: {blocks.n:,} of {blocks.of:,} {what} differ from the reference, all others are the same bytes",
        tensor=tensor.name,
        index=tuple(int(part) for part in index),
        offset=tensor.offset + block * tensor.type.type_size,
        value=blocks.n,
        evidence=(Evidence("reference", f"the first: {', '.join(map(str, blocks.first))}", {"first": blocks.first}),),
        judgement=Judgement.CORRUPT,
        help=_FETCH_AGAIN,
    )


def _beyond_rounding(gguf: GGUF, tensor: Tensor, reference: GGUF, other: Tensor) -> Found | None:
    """The blocks whose difference is far above what rounding explains, and far above the tensor's typical one."""
    ratios = np.concatenate(list(_ratios(gguf, tensor, reference, other)))
    typical = max(float(np.median(ratios)), 1.0)
    bad = np.flatnonzero(~(ratios <= _FAR * typical))  # NaN is bad
    if typical > _FAR:
        return _other_model(tensor, typical)
    if not len(bad):
        return None
    worst = int(bad[np.argmax(np.nan_to_num(ratios[bad], nan=np.inf))])
    index = np.unravel_index(worst * _BLOCK, tensor.shape) if worst * _BLOCK < tensor.n_elements else (0,)
    return Found(
        f"{tensor.name}: {len(bad):,} of {len(ratios):,} stretches of {_BLOCK} values differ from the reference by up "
        f"to {ratios[worst]:.3g} times what {tensor.type_name} and {other.type_name} explain",
        tensor=tensor.name,
        index=tuple(int(part) for part in index),
        value=float(ratios[worst]),
        evidence=(
            Evidence(
                "reference",
                f"typical for this tensor is {typical:.2f}; the worst stretch begins at element {worst * _BLOCK:,}",
                {"typical": typical, "worst": float(ratios[worst]), "element": worst * _BLOCK},
            ),
        ),
        judgement=Judgement.CORRUPT,
        help=_FETCH_AGAIN,
    )


def _other_model(tensor: Tensor, typical: float) -> Found:
    return Found(
        f"{tensor.name} differs from the reference by {typical:.3g} times what rounding explains, throughout",
        tensor=tensor.name,
        value=typical,
        confidence=Confidence.MEDIUM,
        help="make sure that both files are of the same model and version",
    )


def _ratios(gguf: GGUF, tensor: Tensor, reference: GGUF, other: Tensor) -> Iterator[NDArray[np.float64]]:
    """For every stretch of `_BLOCK` values the RMS of the difference over that of the rounding, chunk by chunk."""
    row = tensor.dims[0] if tensor.dims else 1
    rows = max(_CHUNK // max(row, 1), 1)
    if row % _BLOCK:  # let stretches end where a number of rows ends
        rows = -(-rows // _BLOCK) * _BLOCK
    for first in range(0, tensor.n_rows, rows):
        count = min(rows, tensor.n_rows - first)
        mine, step = _values(gguf, tensor, first, count)
        theirs, other_step = _values(reference, other, first, count)
        difference = mine.astype(np.float64) - theirs
        explained = _ROUNDING * np.hypot(step, other_step)
        yield _rms(difference) / np.maximum(_rms(explained), 1e-30 + 1e-7 * _rms(theirs))


def _rms(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Over stretches of `_BLOCK`; the last one may be shorter."""
    padded = np.pad(values.astype(np.float64), (0, -len(values) % _BLOCK)).reshape(-1, _BLOCK)
    sizes = np.full(len(padded), _BLOCK)
    sizes[-1] -= -len(values) % _BLOCK
    return np.sqrt((padded**2).sum(axis=1) / sizes)


def _values(gguf: GGUF, tensor: Tensor, first_row: int, n_rows: int) -> tuple[Floats, Floats]:
    """The values of some rows, flat, and for each the step that its type rounds to."""
    type_ = tensor.type
    assert type_ is not None
    row_bytes = (tensor.nbytes or 0) // max(tensor.n_rows, 1)
    raw = gguf.read(tensor, first_row * row_bytes, n_rows * row_bytes)
    values = quants.dequantize(type_, raw, byteorder=gguf.byteorder).reshape(-1)
    if type_.is_block:
        scales = np.abs(quants.unpack(type_, raw, gguf.byteorder).scales.reshape(-1))
        return values, np.repeat(scales, type_.group)
    mantissa = {"F16": 10, "BF16": 7}.get(type_.name, 23)
    return values, np.abs(values) * np.float32(2.0**-mantissa)


# --- manifest ------------------------------------------------------------------------------------------------------


@rule("R201", "manifest-header", Severity.ERROR, needs=[Need.MANIFEST])
def manifest_header(context: Context) -> Iterator[Found]:
    """The header is not the one that the manifest was made of.

    What. The sha256 of all bytes before the data.

    Why. A changed key changes the model as surely as changed weights do.

    Case. A tool that "fixed" the chat template in place.

    Fix. If you changed metadata on purpose, write a new manifest.
    """
    known = context.manifest
    assert known is not None
    found = manifest.header_digest(context.gguf)
    if found != known.header:
        yield Found(
            "the header differs from the manifest's",
            offset=0,
            value=found,
            evidence=(Evidence("manifest", f"sha256 {found}; the manifest has {known.header}"),),
            help="fetch the file again, or write a new manifest if metadata was changed on purpose",
        )


@rule("R202", "manifest-tensors", Severity.ERROR, needs=[Need.MANIFEST])
def manifest_tensors(context: Context) -> Iterator[Found]:
    """A tensor is not the one that the manifest was made of.

    What. The sha256 of each tensor's packed bytes, tensors that are missing, and tensors that are new.

    Why. It is the one check that sees every change, and it names the tensor.

    Case. A single flipped bit in 491 MB.

    Fix. Fetch the file again.
    """
    known = context.manifest
    assert known is not None
    for name in known.tensors.keys() - context.gguf.tensors.keys():
        yield Found(f"{name} is missing: the manifest has it", tensor=name)
    for name, tensor in context.gguf.tensors.items():
        if name not in known.tensors:
            yield Found(f"{name} is not in the manifest", tensor=name, offset=tensor.info_offset)
            continue
        try:
            found = manifest.tensor_digest(context.gguf, tensor)
        except GgufkitError as error:
            context.skip(f"tensor {name} against the manifest", error.message)
            continue
        if found != known.tensors[name]:
            yield Found(
                f"the bytes of {name} differ from the manifest's",
                tensor=name,
                offset=tensor.offset,
                value=found,
                evidence=(Evidence("manifest", f"sha256 {found}; the manifest has {known.tensors[name]}"),),
                judgement=Judgement.CORRUPT,
                help="fetch the file again",
            )


def _reference(context: Context) -> GGUF:
    assert context.reference is not None  # Need.REFERENCE
    return context.reference
