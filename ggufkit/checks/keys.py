"""Rules on the metadata's keys one by one: are those there that a loader needs, of the type it reads, with values that
can be true.
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
from ggufkit.findings import Confidence, Severity
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
