"""The known metadata keys as a table: what type each has, and which values are possible.

Types are those that llama.cpp reads, strictly: a uint64 where it wants a uint32 is refused, although the
specification asks readers to take both. `{arch}` stands for the file's architecture. Keys that are not in the table
are nobody's business here. Ranges are what a loader survives, not what is usual.
"""

from __future__ import annotations

from dataclasses import dataclass

from ggufkit.arch import MAX_EXPERTS, MAX_LAYERS
from ggufkit.container import Field, ValueType
from ggufkit.vocabulary import ID_KEYS

INTEGERS = frozenset(
    {
        *(ValueType.UINT8, ValueType.INT8, ValueType.UINT16, ValueType.INT16),
        *(ValueType.UINT32, ValueType.INT32, ValueType.UINT64, ValueType.INT64),
    }
)

_U32, _F32 = ValueType.UINT32, ValueType.FLOAT32
_BOOL, _STRING = ValueType.BOOL, ValueType.STRING
_BIG = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Key:
    """One row.

    Attributes:
        type: of the value; None when it must be an array.
        elements: types that an array of it may have; empty when it must not be one.
        low, high: of a number, inclusive.
        choices: of a string.
    """

    name: str
    type: ValueType | None
    elements: frozenset[ValueType] = frozenset()
    low: float | None = None
    high: float | None = None
    choices: frozenset[str] = frozenset()

    def accepts(self, field: Field) -> bool:
        """Whether the field has the type, or the element type, of this row."""
        if field.type is ValueType.ARRAY:
            return field.element_type in self.elements
        return field.type is self.type

    @property
    def type_name(self) -> str:
        """The types in words, for a message."""
        arrays = " or ".join(sorted(f"{element.name.lower()}[]" for element in self.elements))
        return " or ".join(filter(None, (self.type.name.lower() if self.type else "", arrays)))


def _rows(type_: ValueType, names: str, low: float | None = None, high: float | None = None) -> list[Key]:
    return [Key(name, type_, low=low, high=high) for name in names.split()]


_PER_LAYER = frozenset({ValueType.UINT32, ValueType.INT32})  # one number a layer, where layers differ
_STRINGS = frozenset({ValueType.STRING})

_ROWS: tuple[Key, ...] = (
    *_rows(
        _STRING,
        "general.architecture general.type general.name general.author general.version general.organization "
        "general.basename general.finetune general.description general.quantized_by general.size_label "
        "general.license general.license.name general.license.link general.url general.repo_url general.doi "
        "general.uuid general.source.url general.source.repo_url {arch}.tensor_data_layout tokenizer.ggml.model "
        "tokenizer.ggml.pre tokenizer.chat_template tokenizer.huggingface.json",
    ),
    *_rows(_U32, "general.quantization_version general.file_type", 0, 10_000),
    Key("general.tags", None, _STRINGS),
    Key("general.languages", None, _STRINGS),
    *_rows(_U32, "{arch}.context_length", 1, 1 << 30),
    *_rows(_U32, "{arch}.embedding_length", 1, 1 << 20),
    *_rows(_U32, "{arch}.block_count", 1, MAX_LAYERS),
    *_rows(_U32, "{arch}.vocab_size", 1, 1 << 26),
    Key("{arch}.feed_forward_length", _U32, _PER_LAYER, 0, 1 << 22),
    Key("{arch}.attention.head_count", _U32, _PER_LAYER, 0, 1 << 14),
    Key("{arch}.attention.head_count_kv", _U32, _PER_LAYER, 0, 1 << 14),
    *_rows(_U32, "{arch}.attention.key_length {arch}.attention.value_length {arch}.rope.dimension_count", 1, 1 << 14),
    *_rows(_F32, "{arch}.attention.layer_norm_epsilon {arch}.attention.layer_norm_rms_epsilon", 1e-13, 1e-2),
    *_rows(_F32, "{arch}.rope.freq_base {arch}.rope.freq_base_swa", 1.0, 1e12),
    *_rows(_F32, "{arch}.rope.scaling.factor", 1e-3, 1e6),
    *_rows(_U32, "{arch}.rope.scaling.original_context_length", 1, 1 << 30),
    Key("{arch}.rope.scaling.type", _STRING, choices=frozenset({"none", "linear", "yarn", "longrope", "su"})),
    *_rows(_BOOL, "{arch}.rope.scaling.finetuned {arch}.attention.causal {arch}.use_parallel_residual"),
    *_rows(_U32, "{arch}.expert_count {arch}.expert_used_count", 0, MAX_EXPERTS),
    *_rows(
        _U32,
        "{arch}.expert_feed_forward_length {arch}.expert_shared_feed_forward_length {arch}.leading_dense_block_count "
        "{arch}.ssm.conv_kernel {arch}.ssm.inner_size {arch}.ssm.state_size {arch}.ssm.time_step_rank "
        "{arch}.ssm.group_count {arch}.full_attention_interval {arch}.nextn_predict_layers",
        0,
        1 << 22,
    ),
    *_rows(_F32, "{arch}.expert_weights_scale {arch}.logit_scale {arch}.attention.scale"),
    Key("tokenizer.ggml.tokens", None, _STRINGS),
    Key("tokenizer.ggml.merges", None, _STRINGS),
    Key("tokenizer.ggml.scores", None, frozenset({ValueType.FLOAT32})),
    Key("tokenizer.ggml.token_type", None, frozenset({ValueType.INT32})),
    *_rows(_U32, " ".join(ID_KEYS), 0, _BIG),
    *_rows(
        _BOOL,
        "tokenizer.ggml.add_bos_token tokenizer.ggml.add_eos_token tokenizer.ggml.add_space_prefix "
        "tokenizer.ggml.remove_extra_whitespaces",
    ),
)


def known_keys(architecture: str | None) -> dict[str, Key]:
    """The table for one architecture, by full name."""
    return {row.name.replace("{arch}", architecture or "?"): row for row in _ROWS}
