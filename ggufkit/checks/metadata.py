"""Rules on the metadata: are the keys there that a loader needs, of the type it reads, with values that can be true,
and do they agree with each other and with what is known of published models.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from ggufkit import arch
from ggufkit.checks.context import Context
from ggufkit.checks.rule import Found, Need, rule
from ggufkit.checks.schema import INTEGERS, Key, known_keys
from ggufkit.container import Field
from ggufkit.errors import FormatError
from ggufkit.findings import Confidence, Evidence, Severity
from ggufkit.overview import FILE_TYPES
from ggufkit.quants import BY_NAME

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO

_CONVERT_AGAIN = "convert the model again with a current converter"
_REQUIRED = ("context_length", "embedding_length", "block_count")
_REQUIRED_WHERE_MODELLED = ("attention.head_count", "feed_forward_length", "attention.layer_norm_rms_epsilon")
_KEY_CHARACTERS = re.compile(r"[a-z0-9_]+(\.[a-z0-9_-]+)*")
_ARCHITECTURE_CHARACTERS = re.compile(r"[a-z0-9]+")
#: the bits a weight of a whole file may differ from its nominal type by this factor; small models fall back often
_MIX_TOLERANCE = 1.7


# -- keys, one by one --------------------------------------------------------------------------------------------


@rule("M101", "architecture", ERROR, needs=[Need.HEADER])
def architecture(context: Context) -> Iterator[Found]:
    """general.architecture is missing.

    What. The one key that says what the other keys and the tensors mean.

    Why. Every loader stops there. A file with neither weights of a language model nor their keys only gets a warning.

    Case. Metadata edited with a tool that dropped what it did not know.

    Fix. Convert the model again; or write the key back, if the prefix of the other keys shows which it was.
    """
    if context.architecture:
        return
    prefixes = sorted(key.removesuffix(".block_count") for key in context.gguf.fields if key.endswith(".block_count"))
    hint = f"the keys of this file begin with {prefixes[0]!r}: that is probably it" if prefixes else _CONVERT_AGAIN
    is_model = bool(prefixes) or context.is_model
    message = "general.architecture is missing" if is_model else "nothing says what this file is for: no architecture"
    if context.text("general.type") not in ("imatrix", "adapter"):
        yield Found(message, key="general.architecture", help=hint, severity=ERROR if is_model else WARNING)


@rule("M102", "key-missing", ERROR, needs=[Need.MODEL])
def key_missing(context: Context) -> Iterator[Found]:
    """A key that every loader needs is missing.

    What. Context length, embedding length and number of blocks; for the architectures modelled here also heads,
    feed-forward length and epsilon.

    Why. Loaders stop ("key not found in model"), or divide by a default of zero.

    Case. general.architecture changed by hand, so that all keys with the old prefix are out of sight.

    Fix. Convert the model again.
    """
    required = _REQUIRED + (_REQUIRED_WHERE_MODELLED if context.architecture in arch.ARCHITECTURES else ())
    for suffix in required if context.architecture else ():
        key = context.arch_key(suffix)
        if key not in context.gguf.fields:
            other = next((name for name in context.gguf.fields if name.endswith(f".{suffix}")), None)
            hint = f"there is {other!r}, which belongs to another architecture" if other else _CONVERT_AGAIN
            yield Found(f"the key {key!r} is missing", key=key, help=hint)


@rule("M103", "key-type", ERROR, needs=[Need.HEADER])
def key_type(context: Context) -> Iterator[Found]:
    """A known key has the wrong type.

    What. Every key of a table of some ninety, against the type that llama.cpp reads; for arrays the type of the
    elements. An integer of another width is fine by the specification.

    Why. llama.cpp refuses such a key, and once read scores and token types through a pointer of the wrong type.

    Case. token_type written as uint8; a count written as uint64.

    Fix. Write the key again with the right type.
    """
    for key, field, row in _known(context):
        if row.accepts(field):
            continue
        message = f"{key!r} is a {field.type_name}; it must be {row.type_name}"
        other_width = field.type in INTEGERS and row.type in INTEGERS
        severity = INFO if other_width and context.profile == "spec" else None
        yield Found(message, key=key, offset=field.offset, help=_CONVERT_AGAIN, severity=severity)


@rule("M104", "key-range", ERROR, needs=[Need.HEADER])
def key_range(context: Context) -> Iterator[Found]:
    """A known key has a value that cannot be true.

    What. Numbers outside the range that any loader survives, and every float that is no number at all.

    Why. Zero heads divide by zero, 513 blocks overrun llama.cpp's arrays, a NaN rope base makes every position NaN
    without a single bad weight.

    Case. block_count of 513 or more; rope.freq_base NaN, which no other tool noticed.

    Fix. Fetch the file again; if it is the same, convert it again.
    """
    table = known_keys(context.architecture)
    for key, field in context.gguf.fields.items():
        value, row = field.scalar, table.get(key)
        if isinstance(value, float) and not math.isfinite(value):
            yield _bad_value(field, f"{value}, which is no number")
        elif row is None or not row.accepts(field):
            continue
        elif value is not None and not isinstance(value, bool) and not _in_range(row, value):
            yield _bad_value(field, f"{value:,}; possible are {row.low:,} to {row.high:,}")
        elif row.choices and context.text(key) not in row.choices:
            yield _bad_value(field, f"{context.text(key)!r}; known are {', '.join(sorted(row.choices))}")


def _in_range(row: Key, value: float) -> bool:
    return (row.low is None or value >= row.low) and (row.high is None or value <= row.high)


def _bad_value(field: Field, what: str) -> Found:
    return Found(f"{field.key!r} is {what}", key=field.key, offset=field.value_offset, value=field.scalar)


def _known(context: Context) -> Iterator[tuple[str, Field, Key]]:
    for key, row in known_keys(context.architecture).items():
        field = context.gguf.fields.get(key)
        if field is not None:
            yield key, field, row


@rule("M105", "quantization-version", WARNING, spec=ERROR, needs=[Need.TENSORS])
def quantization_version(context: Context) -> Iterator[Found]:
    """general.quantization_version is missing or unknown, and tensors are quantized.

    What. Version 2 is the only one that current block formats have.

    Why. The block formats changed once; the number tells which ones these are.

    Case. Files written by scripts that copy tensors but not this key.

    Fix. Write general.quantization_version = 2, if the file was quantized after May 2023.
    """
    quantized = any(tensor.type and tensor.type.is_block for tensor in context.gguf.tensors.values())
    key = "general.quantization_version"
    value = context.scalar(key)
    if quantized and value is None:
        yield Found(f"{key} is missing although tensors are quantized", key=key)
    elif quantized and value != 2:
        yield Found(f"{key} is {value}; the block formats of today are version 2", key=key, offset=context.place(key))


@rule("M106", "file-type", INFO, confidence=Confidence.MEDIUM, needs=[Need.TENSORS])
def file_type(context: Context) -> Iterator[Found]:
    """general.file_type names another mix than the tensors have.

    What. The nominal bits a weight of the named type against those of the file, within a factor of 1.7: quantizers
    fall back to other types for rows that are no multiple of 256.

    Why. Nothing reads it but people, and they are misled about size and quality.

    Case. A requantized file that kept the key of its source.

    Fix. None is needed; correct the key if it bothers you.
    """
    key = "general.file_type"
    name = FILE_TYPES.get(context.integer(key) or -1)
    nominal = _nominal_bits(name) if name else None
    real = _bits_per_weight(context)
    if nominal and real and not nominal / _MIX_TOLERANCE <= real <= nominal * _MIX_TOLERANCE:
        types = Counter(tensor.type_name for tensor in context.gguf.tensors.values() if len(tensor.dims) > 1)
        mix = ", ".join(f"{count} × {type_}" for type_, count in types.most_common(4))
        message = f"{key} says {name} (about {nominal:.1f} bits a weight); the matrices have {real:.1f}: {mix}"
        yield Found(message, key=key, offset=context.place(key), value=context.integer(key))


def _nominal_bits(name: str) -> float | None:
    """Bits a weight of the type that the mix is named for: `Q4_K_M` → Q4_K."""
    types = [type_ for type_ in BY_NAME.values() if name == type_.name or name.startswith(type_.name + "_")]
    return max(types, key=lambda type_: len(type_.name)).bits_per_weight if types else None


def _bits_per_weight(context: Context) -> float | None:
    matrices = [tensor for tensor in context.gguf.tensors.values() if len(tensor.dims) > 1 and tensor.nbytes]
    elements = sum(tensor.n_elements for tensor in matrices)
    return 8 * sum(tensor.nbytes or 0 for tensor in matrices) / elements if elements else None


@rule("M107", "key-spelling", INFO, spec=ERROR, needs=[Need.HEADER])
def key_spelling(context: Context) -> Iterator[Found]:
    """A key, or the architecture's name, is not spelled as the specification wants.

    What. Segments of lower case letters, digits and underscores, joined by dots; the architecture has no dash.

    Why. Loaders look for exact names; real architectures do have dashes, and nobody minds.

    Case. Keys with spaces or capitals, added by hand.

    Fix. None is needed for llama.cpp, unless it is a control character: then the file was tampered with.
    """
    name = context.architecture
    if name and not _ARCHITECTURE_CHARACTERS.fullmatch(name) and context.profile == "spec":
        message = f"the architecture is called {name!r}; the specification wants [a-z0-9]+"
        yield Found(message, key="general.architecture", severity=WARNING)
    for key, field in context.gguf.fields.items():
        if not key or _KEY_CHARACTERS.fullmatch(key) or (name and key.startswith(f"{name}.")):
            continue
        odd = any(not character.isprintable() for character in key)
        what = "has characters that cannot be printed" if odd else "is not lower_case.separated_by.dots"
        yield Found(f"the key {key!r} {what}", key=key, offset=field.offset, severity=WARNING if odd else None)


@rule("M108", "not-modelled", INFO, needs=[Need.MODEL])
def not_modelled(context: Context) -> Iterator[Found]:
    """The architecture is not modelled here.

    What. The rules on hyperparameters and on the list of tensors know some architectures only.

    Why. It is no defect: structure, tokenizer, template and numbers are checked all the same. But whether all
    tensors are there, in the right shape, cannot be said.

    Case. Any of llama.cpp's hundred other architectures.

    Fix. None is needed.
    """
    error = context.config_error
    if error is not None and not isinstance(error, FormatError) and context.architecture:
        yield Found(f"not modelled here: {error.message}", key="general.architecture", value=context.architecture)


@rule("M109", "not-a-model", INFO, needs=[Need.TENSORS])
def not_a_model(context: Context) -> Iterator[Found]:
    """The file is no language model by itself.

    What. An adapter, a multimodal projector, a control vector, an importance matrix, weights of another kind.

    Why. Loading it as a model fails, and reads like damage.

    Case. mmproj-model.gguf given to a program where the model itself was wanted.

    Fix. Give it to the option that it is made for (--mmproj, --lora), next to its model.
    """
    if not context.is_model:
        kind = context.text("general.type") or context.architecture or "something unknown"
        yield Found(f"this is no language model by itself, but {kind!r}", key="general.type")


# -- keys against each other and against the tensors -----------------------------------------------------------------


@rule("M201", "heads", ERROR, needs=[Need.MODEL])
def heads(context: Context) -> Iterator[Found]:
    """The numbers of heads do not fit the attention's tensors.

    What. Rows of attn_q and attn_k are heads times channels of a head. Two of the four numbers come from metadata,
    two from the shapes; they must agree in every layer.

    Why. A wrong head count cuts the rows at the wrong places: garbage, or a load error that names a tensor.

    Case. head_count halved; head_count_kv missing, so that loaders assume as many key heads as query heads.

    Fix. The message gives the numbers that would fit.
    """
    n_head, n_kv = context.integer(context.arch_key("attention.head_count")), _kv_heads(context)
    if context.architecture not in arch.ARCHITECTURES or n_head is None or n_kv is None:
        return
    key, place = context.arch_key("attention.head_count"), context.place(context.arch_key("attention.head_count"))
    if n_head == 0 or n_kv == 0 or n_head % n_kv:
        yield Found(f"{n_head} query heads cannot share {n_kv} key heads evenly", key=key, offset=place, value=n_head)
    elif fit := heads_that_fit(context):
        yield Found(f"{key} is {n_head} and {n_kv} key heads are given, but {fit}", key=key, offset=place, value=n_head)


def heads_that_fit(context: Context) -> str | None:
    """What the shapes of layer 0 say about the heads, when metadata says something else."""
    n_head, n_kv = context.integer(context.arch_key("attention.head_count")), _kv_heads(context)
    query, key = (context.gguf.tensors.get(f"blk.0.attn_{part}.weight") for part in "qk")
    n_embd = context.integer(context.arch_key("embedding_length"))
    if not (n_head and n_kv and n_embd and query and key and len(query.dims) == len(key.dims) == 2):
        return None
    stated = context.integer(context.arch_key("attention.key_length"))
    rows_q, rows_k, size = query.shape[0], key.shape[0], stated or n_embd // n_head
    if size and (rows_q, rows_k) == (n_head * size, n_kv * size):
        return None
    seen = f"attn_q has {rows_q} rows and attn_k {rows_k}"
    fits = []
    if stated and rows_q % stated == rows_k % stated == 0:
        fits.append(f"{rows_q // stated} query and {rows_k // stated} key heads of {stated}")
    elif not stated and rows_k and rows_q * n_kv % rows_k == 0 and rows_k % n_kv == 0:
        fits.append(f"{rows_q * n_kv // rows_k} query heads of {rows_k // n_kv}")
    if not stated and rows_q % n_head == 0 and rows_k % (rows_q // n_head) == 0:
        fits.append(f"{rows_k // (rows_q // n_head)} key heads of {rows_q // n_head}")
    return f"{seen}: that would be {', or '.join(fits)}" if fits else f"{seen}, which fits no such heads"


def _kv_heads(context: Context) -> int | None:
    key = context.arch_key("attention.head_count_kv")
    if key in context.gguf.fields:
        return context.integer(key)
    return context.integer(context.arch_key("attention.head_count"))


@rule("M202", "head-count-kv", WARNING, needs=[Need.MODEL])
def head_count_kv(context: Context) -> Iterator[Found]:
    """attention.head_count_kv is missing.

    What. Loaders then assume as many key heads as query heads.

    Why. Nearly all models of today share key heads; with the default, the tensors do not fit.

    Case. A converter older than grouped-query attention.

    Fix. Convert the model again.
    """
    key = context.arch_key("attention.head_count_kv")
    if context.architecture in arch.ARCHITECTURES and key not in context.gguf.fields:
        yield Found(f"{key} is missing: loaders take it as equal to the number of query heads", key=key)


@rule("M203", "hyperparameters", ERROR, needs=[Need.MODEL])
def hyperparameters(context: Context) -> Iterator[Found]:
    """The hyperparameters contradict each other.

    What. Whatever keeps the model's configuration from being read, unless a rule on single keys says it already:
    a head size that cannot be rotated, rope.dimension_count or value_length unequal to the head size.

    Why. llama.cpp aborts on some of these and computes nonsense with others.

    Case. rope.dimension_count left over from the model that a fork of the converter was made for.

    Fix. Convert the model again.
    """
    error = context.config_error
    if not isinstance(error, FormatError):
        return
    told = {found.key for check in (key_missing, key_type, key_range, heads) for found in check(context)}
    if not any(key and key in error.message for key in told) and context.arch_key("attention.head_count") not in told:
        expected = f"; expected {error.expected}" if error.expected else ""
        yield Found(error.message + expected, offset=error.offset, help=error.help)


@rule("M204", "key-length", ERROR, needs=[Need.MODEL])
def key_length(context: Context) -> Iterator[Found]:
    """attention.key_length is missing where the head size does not follow from the other numbers.

    What. Qwen3's heads have 128 channels although embedding length over head count often gives another number.

    Why. Loaders compute the head size by that division and cut the rows at the wrong places.

    Case. Qwen3-0.6B, 4B and 32B, converted by a program made for Qwen2.

    Fix. Convert the model again with a current converter.
    """
    key = context.arch_key("attention.key_length")
    described = arch.ARCHITECTURES.get(context.architecture or "")
    if described is None or not described.qk_norm or key in context.gguf.fields:
        return
    n_embd, n_head = (context.integer(context.arch_key(name)) for name in ("embedding_length", "attention.head_count"))
    norm = context.gguf.tensors.get("blk.0.attn_q_norm.weight")
    if n_embd and n_head and norm and norm.dims[:1] != (n_embd // n_head,):
        message = f"{key} is missing; blk.0.attn_q_norm.weight shows that a head has {norm.dims[0]} channels"
        yield Found(message, key=key, help=_CONVERT_AGAIN)


# -- keys against what is known ----------------------------------------------------------------------------------


@rule("M210", "rope-base", WARNING, needs=[Need.CONFIG])
def rope_base(context: Context) -> Iterator[Found]:
    """rope.freq_base is missing, or is not what published models of these dimensions have.

    What. The base of the rotary embedding. When the key is missing every loader takes 10,000, silently.

    Why. With a wrong base the first hundred tokens look fine, and then the model loses the thread.

    Case. Qwen1.5 conversions that lost their base of 1,000,000.

    Fix. Convert again, or override it at load (llama.cpp: --rope-freq-base).
    """
    assert context.config is not None
    key = context.arch_key("rope.freq_base")
    known = arch.known_models(context.config)
    bases = sorted({base for model in known for base in model.rope_bases})
    base, missing = context.config.rope_base, key not in context.gguf.fields
    if base in bases:
        return
    expected = " or ".join(f"{value:,.0f}" for value in bases)
    names = ", ".join(model.name for model in known)
    if bases:
        found = "missing, so that loaders take 10,000" if missing else f"{base:,.0f}"
        severity = ERROR if base == arch.DEFAULT_ROPE_BASE else WARNING
        message = f"{key} is {found}; models of these dimensions ({names}) have {expected}"
        yield Found(message, key=key, offset=context.place(key), value=base, severity=severity)
    elif missing:
        yield Found(f"{key} is missing: every loader silently takes 10,000", key=key)


@rule("M211", "known-dimensions", WARNING, confidence=Confidence.MEDIUM, needs=[Need.CONFIG])
def known_dimensions(context: Context) -> Iterator[Found]:
    """The hyperparameters are nearly those of a published model.

    What. Layers, embedding and feed-forward length of a known model, but other heads, epsilon or tying of the head.

    Why. A head count that is wrong in proportion fits every tensor and is visible in nothing but the output.

    Case. 7 query and 1 key heads in a copy of Qwen2.5-0.5B, which has 14 and 2.

    Fix. Compare with the original model's config.json.
    """
    config = context.config
    assert config is not None
    for model in arch.KNOWN_MODELS:
        sizes = ("arch", "n_embd", "n_layer", "n_ff")
        if any(getattr(model, name) != getattr(config, name) for name in sizes):
            continue
        if (model.n_head, model.n_head_kv) != (config.n_head, config.n_head_kv):
            key = context.arch_key("attention.head_count")
            message = (
                f"{config.n_head} query and {config.n_head_kv} key heads; {model.name}, which has the same layers and "
                f"widths, has {model.n_head} and {model.n_head_kv}"
            )
            yield Found(message, key=key, offset=context.place(key), value=config.n_head)
        if config.tied and not model.tied:
            message = f"output.weight is missing, so that loaders take token_embd; {model.name} has a head of its own"
            yield Found(message, "output.weight", severity=ERROR)


@rule("M212", "norm-epsilon", WARNING, needs=[Need.CONFIG])
def norm_epsilon(context: Context) -> Iterator[Found]:
    """The epsilon of the norms is unusual.

    What. Published models have 1e-6 or 1e-5.

    Why. A larger one weakens every small activation, a little in each layer.

    Case. An epsilon of 1e-2 typed by hand.

    Fix. Compare with rms_norm_eps in the original model's config.json.
    """
    assert context.config is not None
    eps, key = context.config.norm_eps, context.arch_key("attention.layer_norm_rms_epsilon")
    if not 0.9e-7 <= eps <= 1.1e-4:
        yield Found(f"{key} is {eps:g}; models have 1e-6 or 1e-5", key=key, offset=context.place(key), value=eps)


@rule("M213", "rope-scaling", ERROR, needs=[Need.MODEL])
def rope_scaling(context: Context) -> Iterator[Found]:
    """The rope scaling keys are incomplete.

    What. linear and yarn need a factor; yarn also needs the context length that it extends.

    Why. Without them loaders scale by one, or guess the original length: long prompts go wrong.

    Case. A scaling type copied from another model's metadata.

    Fix. Write the missing key, or remove the scaling.
    """
    kind = context.text(context.arch_key("rope.scaling.type"))
    factor = context.arch_key("rope.scaling.factor")
    if kind in ("linear", "yarn") and context.number(factor) is None:
        yield Found(f"the rope scaling is {kind!r}, but {factor} is missing", key=factor)
    original = context.arch_key("rope.scaling.original_context_length")
    if kind == "yarn" and context.integer(original) is None:
        yield Found(f"the rope scaling is 'yarn', but {original} is missing", key=original, severity=WARNING)


@rule("M214", "experts", ERROR, needs=[Need.MODEL])
def experts(context: Context) -> Iterator[Found]:
    """The numbers of experts contradict each other or the tensors.

    What. Used experts are at least one and at most all of them; stacked expert tensors have one slice each.

    Why. The router picks beyond the last expert, or divides by zero.

    Case. expert_used_count of 0.

    Fix. Convert the model again.
    """
    count_key, used_key = context.arch_key("expert_count"), context.arch_key("expert_used_count")
    count, used = context.integer(count_key), context.integer(used_key)
    if not count:
        return
    if used is not None and not 1 <= used <= count:
        yield Found(
            f"{used_key} is {used} of {count} experts", key=used_key, offset=context.place(used_key), value=used
        )
    for tensor in context.gguf.tensors.values():
        if "_exps." in tensor.name and len(tensor.dims) == 3 and tensor.dims[2] != count:
            message = f"{tensor.name!r} holds {tensor.dims[2]} experts; {count_key} is {count}"
            yield Found(message, tensor.name, count_key, value=tensor.dims[2])


@rule("M215", "projector", WARNING, needs=[Need.TENSORS])
def projector(context: Context) -> Iterator[Found]:
    """A multimodal projector does not say what it is for.

    What. clip.projector_type (or the one of its vision or audio part) and the width that it projects to.

    Why. Without them it can be paired with any model, and blinds it.

    Case. A projector of one model size loaded with the model of another.

    Fix. Take the mmproj file that was published with the model; its projection_dim must be the model's
    embedding_length.
    """
    if context.architecture != "clip":
        return
    kinds = [key for key in context.gguf.fields if key.endswith("projector_type")]
    if not kinds:
        yield Found("the projector does not say its type (clip.projector_type)", key="clip.projector_type")
    widths = {key: context.integer(key) for key in context.gguf.fields if key.endswith("projection_dim")}
    for key, width in widths.items():
        evidence = (Evidence("context", f"pair it with a model whose embedding_length is {width}", {"width": width}),)
        yield Found(f"the projector is made for models of width {width}", key=key, evidence=evidence, severity=INFO)
