"""What `inspect` shows, as data: what a file says about itself, and what follows from it without reading a weight.

Everything here comes from the header. Nothing is believed to have the type that its key promises: a value of
another type is left out (and is a finding of `validate`), so that an odd or half-readable file still gets an
overview of whatever can be told.
"""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from ggufkit.arch import ARCHITECTURES, known_models, read_config, role_of
from ggufkit.container import GGUF, MARK_STEP, SCALAR_CODES, SCALAR_SIZES, Field, Problem, Tensor, ValueType, text
from ggufkit.errors import FormatError, GgufkitError, UsageError
from ggufkit.memory import Memory, memory_needed

if TYPE_CHECKING:
    from ggufkit.chat import TemplateFacts
    from ggufkit.tokenizer import Tokenizer

T = TypeVar("T")

#: llama.cpp's `llama_ftype`: the name of the mix that a converter or quantizer was asked for
_FILE_TYPE_NAMES = (
    "F32 F16 Q4_0 Q4_1 Q4_1_SOME_F16 Q4_2 Q4_3 Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S "
    "Q5_K_M Q6_K IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 "
    "Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 MXFP4_MOE NVFP4 Q1_0"
)
FILE_TYPES: dict[int, str] = dict(enumerate(_FILE_TYPE_NAMES.split()))

#: hyperparameters in the order they are shown: name → key after the architecture's
HYPERPARAMETERS: dict[str, str] = {
    "n_layer": "block_count",
    "n_embd": "embedding_length",
    "n_head": "attention.head_count",
    "n_head_kv": "attention.head_count_kv",
    "key_length": "attention.key_length",
    "value_length": "attention.value_length",
    "n_ff": "feed_forward_length",
    "n_expert": "expert_count",
    "n_expert_used": "expert_used_count",
    "n_ctx_train": "context_length",
    "sliding_window": "attention.sliding_window",
    "rope_base": "rope.freq_base",
    "rope_dimensions": "rope.dimension_count",
    "rope_scaling": "rope.scaling.type",
    "rope_scaling_factor": "rope.scaling.factor",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
}

#: `tokenizer.ggml.token_type`
TOKEN_TYPES: dict[int, str] = {
    1: "normal",
    2: "unknown",
    3: "control",
    4: "user-defined",
    5: "unused",
    6: "byte",
}

_GENERAL = ("name", "basename", "size_label", "finetune", "version", "organization", "license", "type")
_SPECIAL_ID = "_token_id"


@dataclass(frozen=True, slots=True)
class FileFacts:
    """The container.

    Attributes:
        size: bytes of all shards.
        header_bytes, data_bytes: of all shards; data as the tensor table claims it.
        shards: the file names of a split set, one for a single file.
        complete: every header was read to its end.
    """

    path: str
    size: int
    version: int
    byteorder: str
    alignment: int
    header_bytes: int
    data_bytes: int
    n_keys: int
    n_tensors: int
    shards: tuple[str, ...]
    complete: bool


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model, by its own account.

    Attributes:
        general: the strings of `general.*`.
        n_parameters: elements of all tensors.
        file_type: the mix that `general.file_type` names.
        hyperparameters: name → number, string, or one value a layer.
        rows: of the embedding table; None without one.
        tied: the head is the embedding table; None where that cannot be told.
        modelled: `run`, `trace` and `bench` know this architecture.
        known_as: published models of exactly these dimensions.
        problem: why the hyperparameters do not make a model, though the architecture is known.
    """

    architecture: str | None
    general: dict[str, str]
    n_parameters: int
    file_type: str | None
    hyperparameters: dict[str, Any]
    rows: int | None
    tied: bool | None
    modelled: bool
    known_as: tuple[str, ...]
    problem: str | None


@dataclass(frozen=True, slots=True)
class TypeShare:
    """One block type's part of the file.

    Attributes:
        roles: what the tensors of this type are for, the largest part first.
    """

    type: str
    tensors: int
    elements: int
    nbytes: int
    bits_per_weight: float
    roles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Quantization:
    """The mix of block types, largest part of the bytes first; bits per weight over all tensors."""

    types: tuple[TypeShare, ...]
    bits_per_weight: float | None


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """One `tokenizer.ggml.<role>_token_id`; `text` is None when the id is outside the vocabulary."""

    role: str
    id: int
    text: str | None


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """The vocabulary, without its 100,000 strings.

    Attributes:
        types: how many tokens of each type.
        flags: the `tokenizer.ggml.add_*` switches.
        unused_rows: rows of the embedding beyond the vocabulary.
    """

    model: str | None
    pre: str | None
    n_tokens: int
    n_merges: int | None
    types: dict[str, int]
    special: tuple[SpecialToken, ...]
    flags: dict[str, bool]
    unused_rows: int | None


@dataclass(frozen=True, slots=True)
class Template:
    """The chat templates: their names, what the default one says about itself, or why it cannot be read."""

    names: tuple[str, ...]
    facts: TemplateFacts | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor, in both orders of dimensions: `shape` as NumPy has it, `dims` as the file has it."""

    name: str
    type: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    elements: int
    nbytes: int | None
    bits_per_weight: float | None
    offset: int
    shard: int


@dataclass(frozen=True, slots=True)
class MetadataRow:
    """One key; `value` holds the scalar or string, or the first elements of an array of `count`."""

    key: str
    type: str
    value: Any
    count: int | None
    offset: int


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One token of a text: what it stands for, as text and as bytes in hexadecimal."""

    id: int
    text: str
    bytes: str
    special: bool


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything that `inspect` knows; `problems` is what the reader met."""

    file: FileFacts
    model: ModelFacts
    quantization: Quantization
    tokenizer: TokenizerFacts | None
    template: Template | None
    memory: tuple[Memory, ...]
    memory_note: str | None
    problems: tuple[Problem, ...]


def overview(gguf: GGUF) -> Overview:
    """What the header of an opened file says.

    Raises:
        FormatError: the file changed since it was opened.
    """
    model = model_facts(gguf)
    memory, note = memory_needed(gguf, model.rows)
    return Overview(
        file=file_facts(gguf),
        model=model,
        quantization=quantization(gguf.tensors.values()),
        tokenizer=tokenizer_facts(gguf, model.rows),
        template=template_facts(gguf),
        memory=memory,
        memory_note=note,
        problems=tuple(gguf.problems),
    )


def file_facts(gguf: GGUF) -> FileFacts:
    """The container's facts."""
    first = gguf.shards[0]
    return FileFacts(
        path=str(gguf.path),
        size=gguf.size,
        version=gguf.version,
        byteorder=gguf.byteorder,
        alignment=first.alignment,
        header_bytes=sum(shard.header_end for shard in gguf.shards),
        data_bytes=sum(tensor.nbytes or 0 for tensor in gguf.tensors.values()),
        n_keys=len(gguf.fields),
        n_tensors=len(gguf.tensors),
        shards=tuple(shard.source.path.name for shard in gguf.shards),
        complete=gguf.complete,
    )


def model_facts(gguf: GGUF) -> ModelFacts:
    """The model's facts; never raises for a value of the wrong type."""
    embedding = gguf.tensors.get("token_embd.weight")
    file_type = _typed(gguf, "general.file_type", int)
    known, problem = _known_as(gguf)
    return ModelFacts(
        architecture=gguf.architecture,
        general={name: value for name in _GENERAL if (value := _typed(gguf, f"general.{name}", str))},
        n_parameters=sum(tensor.n_elements for tensor in gguf.tensors.values()),
        file_type=None if file_type is None else FILE_TYPES.get(file_type, f"number {file_type}"),
        hyperparameters=_hyperparameters(gguf),
        rows=embedding.shape[0] if embedding and len(embedding.dims) == 2 else None,
        tied=None if embedding is None else "output.weight" not in gguf.tensors,
        modelled=gguf.architecture in ARCHITECTURES,
        known_as=known,
        problem=problem,
    )


def quantization(tensors: Iterable[Tensor]) -> Quantization:
    """How many tensors, elements and bytes each block type holds."""
    groups: defaultdict[str, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.type_name].append(tensor)
    shares = sorted((_share(name, group) for name, group in groups.items()), key=lambda share: -share.nbytes)
    elements = sum(share.elements for share in shares)
    bits = 8 * sum(share.nbytes for share in shares) / elements if elements else None
    return Quantization(tuple(shares), bits)


def tokenizer_facts(gguf: GGUF, rows: int | None = None) -> TokenizerFacts | None:
    """The vocabulary's facts; None when the file has no `tokenizer.ggml.*` at all."""
    keys = [key for key in gguf.fields if key.startswith("tokenizer.ggml.")]
    if not keys:
        return None
    tokens = _array(gguf, "tokenizer.ggml.tokens", ValueType.STRING)
    merges = _array(gguf, "tokenizer.ggml.merges", ValueType.STRING)
    n_tokens = (tokens.count or 0) if tokens else 0
    return TokenizerFacts(
        model=_typed(gguf, "tokenizer.ggml.model", str),
        pre=_typed(gguf, "tokenizer.ggml.pre", str),
        n_tokens=n_tokens,
        n_merges=merges.count if merges else None,
        types=_token_types(gguf),
        special=_special_tokens(gguf, keys, tokens),
        flags={
            key.removeprefix("tokenizer.ggml."): value
            for key in keys
            if ".add_" in key and isinstance(value := gguf.fields[key].scalar, bool)
        },
        unused_rows=rows - n_tokens if rows and tokens and rows > n_tokens else None,
    )


def template_facts(gguf: GGUF) -> Template | None:
    """What the chat templates' syntax tells; None without one. A template is parsed, never rendered."""
    if not any(key.startswith("tokenizer.chat_template") for key in gguf.fields):
        return None
    from ggufkit import chat  # loads jinja2, which a file without a template need not pay for

    names: tuple[str, ...] = ()
    try:
        sources = chat.templates(gguf.metadata)
        names = tuple(sources)
        return Template(names, chat.facts(sources["default"]) if "default" in sources else None, None)
    except GgufkitError as error:
        return Template(names, None, error.message)


def tensor_rows(gguf: GGUF) -> tuple[TensorRow, ...]:
    """The tensor table, in the order of the file."""
    return tuple(
        TensorRow(
            name=tensor.name,
            type=tensor.type_name,
            shape=tensor.shape,
            dims=tensor.dims,
            elements=tensor.n_elements,
            nbytes=tensor.nbytes,
            bits_per_weight=tensor.type.bits_per_weight if tensor.type else None,
            offset=tensor.offset,
            shard=tensor.shard,
        )
        for tensor in gguf.tensors.values()
    )


def metadata_rows(gguf: GGUF, *, elements: int = 8) -> tuple[MetadataRow, ...]:
    """Every key with its value; of arrays the first few elements, without decoding the rest."""
    return tuple(
        MetadataRow(field.key, field.type_name, _preview(gguf, field, elements), field.count, field.offset)
        for field in gguf.fields.values()
    )


def metadata_value(gguf: GGUF, key: str) -> MetadataRow:
    """One key with its whole value.

    Raises:
        UsageError: there is no such key; the message names those that resemble it.
    """
    field = gguf.fields.get(key)
    if field is None:
        import difflib

        close = difflib.get_close_matches(key, gguf.fields, n=3, cutoff=0.5)
        hint = f"similar: {', '.join(close)}" if close else "`inspect --metadata` lists them"
        raise UsageError(f"there is no key {key!r}", path=str(gguf.path), help=hint)
    return MetadataRow(key, field.type_name, gguf.metadata[key], field.count, field.offset)


def token_rows(tokenizer: Tokenizer, ids: Iterable[int]) -> tuple[TokenRow, ...]:
    """What each id stands for.

    Raises:
        UsageError: an id is outside the vocabulary.
    """
    pairs = ((token, tokenizer.token_bytes(token)) for token in ids)
    return tuple(
        TokenRow(token, raw.decode("utf-8", "backslashreplace"), raw.hex(" "), tokenizer.is_special(token))
        for token, raw in pairs
    )


def strings_at(gguf: GGUF, field: Field, indices: Iterable[int]) -> dict[int, str]:
    """A few strings of an array, found by stepping over the others.

    Raises:
        FormatError: the file got shorter since its header was read.
    """
    wanted = sorted({index for index in indices if 0 <= index < (field.count or 0)})
    if not wanted:
        return {}
    length = struct.Struct(_order(gguf, field) + "Q").unpack_from
    ends = (*field.marks[1:], field.value_offset + field.nbytes)
    found = {}
    for number, group in groupby(wanted, lambda index: index // MARK_STEP):
        start = field.marks[number]
        data, at, index = _bytes(gguf, field, start, ends[number] - start), 0, number * MARK_STEP
        for target in group:
            for _ in range(target - index):
                at += 8 + length(data, at)[0]
            found[target] = text(data[at + 8 : at + 8 + length(data, at)[0]])
            index = target
    return found


def _typed(gguf: GGUF, key: str, kind: type[T]) -> T | None:
    """The value of `key`, if it has this type; a bool is no int here."""
    value = gguf.metadata.get(key)
    return value if isinstance(value, kind) and not (kind is int and isinstance(value, bool)) else None


def _array(gguf: GGUF, key: str, element: ValueType) -> Field | None:
    field = gguf.fields.get(key)
    return field if field is not None and field.element_type is element else None


def _hyperparameters(gguf: GGUF) -> dict[str, Any]:
    """Those of `HYPERPARAMETERS` that the file has: numbers, short strings, and arrays of one number a layer."""
    found = {}
    for name, suffix in HYPERPARAMETERS.items():
        field = gguf.fields.get(f"{gguf.architecture}.{suffix}")
        if field is None or field.type is ValueType.BOOL:
            continue
        if field.type is ValueType.ARRAY and field.element_type in (ValueType.STRING, ValueType.ARRAY):
            continue
        value = gguf.metadata[field.key]
        found[name] = value.tolist() if hasattr(value, "tolist") else value
    return found


def _known_as(gguf: GGUF) -> tuple[tuple[str, ...], str | None]:
    if gguf.architecture not in ARCHITECTURES or not gguf.tensors:
        return (), None
    try:
        return tuple(model.name for model in known_models(read_config(gguf))), None
    except GgufkitError as error:
        return (), error.message


def _share(name: str, group: list[Tensor]) -> TypeShare:
    elements = sum(tensor.n_elements for tensor in group)
    nbytes = sum(tensor.nbytes or 0 for tensor in group)
    by_role: Counter[str] = Counter()
    for tensor in group:
        by_role[role_of(tensor.name)[0]] += tensor.nbytes or 0
    bits = group[0].type.bits_per_weight if group[0].type else 0.0
    return TypeShare(name, len(group), elements, nbytes, bits, tuple(role for role, _ in by_role.most_common()))


def _token_types(gguf: GGUF) -> dict[str, int]:
    field = _array(gguf, "tokenizer.ggml.token_type", ValueType.INT32)
    if field is None:
        return {}
    numbers = struct.unpack(f"{_order(gguf, field)}{field.count}i", _value_bytes(gguf, field))
    return {TOKEN_TYPES.get(number, f"type {number}"): count for number, count in Counter(numbers).most_common()}


def _value_bytes(gguf: GGUF, field: Field, count: int | None = None) -> bytes:
    """The bytes of a value, or the first `count` of them, as they lie in the file.

    Raises:
        FormatError: the file got shorter since its header was read.
    """
    return _bytes(gguf, field, field.value_offset, field.nbytes if count is None else count)


def _bytes(gguf: GGUF, field: Field, offset: int, count: int) -> bytes:
    source = gguf.shards[field.shard].source
    data = source.read(offset, count)
    if len(data) != count:
        raise FormatError("the file ends inside a metadata value", path=source.name, offset=offset)
    return data


def _order(gguf: GGUF, field: Field) -> str:
    return "<" if gguf.shards[field.shard].byteorder == "little" else ">"


def _special_tokens(gguf: GGUF, keys: list[str], tokens: Field | None) -> tuple[SpecialToken, ...]:
    ids = {
        key.removeprefix("tokenizer.ggml.").removesuffix(_SPECIAL_ID): value
        for key in keys
        if key.endswith(_SPECIAL_ID) and type(value := gguf.fields[key].scalar) is int
    }
    texts = strings_at(gguf, tokens, ids.values()) if tokens else {}
    return tuple(SpecialToken(role, number, texts.get(number)) for role, number in ids.items())


def _preview(gguf: GGUF, field: Field, elements: int) -> Any:
    """A value, or the first elements of an array, without decoding the others."""
    if field.element_type is ValueType.STRING:
        first = strings_at(gguf, field, range(elements))
        return [first[index] for index in sorted(first)]
    if field.element_type in SCALAR_CODES:
        code, count = SCALAR_CODES[field.element_type], min(elements, field.count or 0)
        size = count * SCALAR_SIZES[field.element_type]
        numbers = struct.unpack(f"{_order(gguf, field)}{count}{code}", _value_bytes(gguf, field, size))
        return [bool(number) if field.element_type is ValueType.BOOL else number for number in numbers]
    value = gguf.metadata[field.key]
    return value[:elements] if field.type is ValueType.ARRAY else value
