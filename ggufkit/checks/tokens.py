"""Rules on the tokenizer: will text become the tokens that the model was trained with, and will it know where to stop.

What is checked follows llama.cpp's reading of the keys, because that is what conversions are made for and where the
defaults come from that a missing key falls back to.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ggufkit.checks.context import Context
from ggufkit.checks.keys import key_type
from ggufkit.checks.rule import Found, Need, rule
from ggufkit.checks.words import Words
from ggufkit.container import ValueType
from ggufkit.errors import FormatError, NewerThanTool, Unsupported
from ggufkit.findings import Confidence, Severity
from ggufkit.vocabulary import TokenType

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO

_KEY = "tokenizer.ggml."
_CONVERT_AGAIN = "convert the model again with a current converter and the model's own tokenizer"
#: byte-level BPE: what loaders take for BOS and EOS when the keys are missing
_BPE_DEFAULT = 11
_PADDING = re.compile(r"\[PAD(\d+)\]")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
#: characters whose tokens some healthy vocabularies lack: control characters, and bytes that UTF-8 never or hardly has
_DISPENSABLE = frozenset({*range(0x20), 0x7F, 0xC0, 0xC1, *range(0xF0, 0x100)}) - {0x09, 0x0A, 0xF0}
_SHOW = 5


@dataclass(frozen=True, slots=True)
class _Fingerprint:
    """A vocabulary that is known by one of its tokens, and the pre-tokenizers that it is used with."""

    name: str
    token: int
    text: str
    pre: frozenset[str]
    eos: frozenset[int]


_QWEN_PRE = frozenset({"qwen2", "deepseek-r1-qwen", "qwen35"})
_LLAMA_PRE = frozenset({"llama-bpe", "llama3", "llama-v3", "smaug-bpe"})
_FINGERPRINTS = (
    _Fingerprint("Qwen2", 151_643, "<|endoftext|>", _QWEN_PRE, frozenset({151_643, 151_645})),
    _Fingerprint("Llama 3", 128_000, "<|begin_of_text|>", _LLAMA_PRE, frozenset({128_001, 128_008, 128_009})),
)


@rule("T101", "tokenizer-model", ERROR, needs=[Need.HEADER])
def tokenizer_model(context: Context) -> Iterator[Found]:
    """The tokenizer is missing, or is of an unknown kind.

    What. tokenizer.ggml.model, and the tokens that go with it.

    Why. llama.cpp needs the key in every language model. A name that is not known here may be newer than this tool.

    Case. Weights converted without the tokenizer's files in the folder.

    Fix. Convert the model again with tokenizer.json (or tokenizer.model) beside the weights.
    """
    name = context.text(_KEY + "model")
    if name is None:
        if context.is_model:
            yield Found("the file has no tokenizer: tokenizer.ggml.model is missing", key=_KEY + "model")
    elif name not in ("none", "no_vocab") and _KEY + "tokens" not in context.gguf.fields:
        yield Found(f"the tokenizer {name!r} has no tokens: tokenizer.ggml.tokens is missing", key=_KEY + "tokens")
    elif not context.lacks(Need.VOCABULARY) and isinstance(
        error := context.words.vocabulary, NewerThanTool | Unsupported
    ):
        if isinstance(error, NewerThanTool):
            context.skip("the tokenizer", error.message, newer=True)
        yield Found(f"not modelled here: {error.message}", key=_KEY + "model", severity=INFO)


@rule("T102", "pre-tokenizer", WARNING, needs=[Need.VOCABULARY])
def pre_tokenizer(context: Context) -> Iterator[Found]:
    """tokenizer.ggml.pre is missing, or is not the one that this vocabulary is used with.

    What. A byte-level BPE vocabulary needs the name of the pattern that cuts text into words. Two widely used
    vocabularies are recognized by one of their tokens.

    Why. With the wrong pattern the same text becomes other tokens: answers get subtly worse, arithmetic and code most
    of all. llama.cpp warns that quality will be degraded, in capitals.

    Case. Conversions from before May 2024, and Llama 3 files with the default pattern.

    Fix. Convert again, or write the key: for Qwen2 vocabularies `qwen2`, for Llama 3 `llama-bpe`.
    """
    words = context.words
    key = _KEY + "pre"
    if words.model != "gpt2":
        return
    if words.pre is None and context.is_model:
        yield Found(f"{key} is missing: loaders fall back to a default pattern", key=key)
    for known in _recognized(words) if words.pre is not None else ():
        if words.pre not in known.pre:
            usual = " or ".join(sorted(known.pre))
            message = f"{key} is {words.pre!r}, but this is the vocabulary of {known.name}, used with {usual}"
            yield Found(message, key=key, value=words.pre, confidence=Confidence.MEDIUM)


def _recognized(words: Words) -> Iterator[_Fingerprint]:
    return (known for known in _FINGERPRINTS if words.tokens[known.token : known.token + 1] == [known.text])


@rule("T103", "tokenizer-lengths", ERROR, needs=[Need.VOCABULARY])
def tokenizer_lengths(context: Context) -> Iterator[Found]:
    """Scores or token types are not as many as tokens.

    What. tokenizer.ggml.scores and token_type against tokenizer.ggml.tokens.

    Why. Loaders read beyond the end of the shorter array, or give the last tokens no type.

    Case. Tokens added after the conversion.

    Fix. Convert the model again.
    """
    count = context.gguf.fields[_KEY + "tokens"].count
    for name in ("scores", "token_type"):
        field = context.gguf.fields.get(_KEY + name)
        if field is not None and field.count is not None and field.count != count:
            message = f"{field.key} has {field.count:,} entries for {count:,} tokens"
            yield Found(message, key=field.key, offset=field.offset, value=field.count, help=_CONVERT_AGAIN)


@rule("T104", "token-types", ERROR, needs=[Need.VOCABULARY])
def token_types(context: Context) -> Iterator[Found]:
    """Token types are missing or impossible.

    What. Every token is normal, unknown, control, user-defined, unused or byte: 1 to 6.

    Why. Without types no token is special: <|im_end|> is printed as text and nothing stops.

    Case. A vocabulary copied token by token with a script that left the types out.

    Fix. Convert the model again.
    """
    words = context.words
    if words.field("token_type") is None and context.is_model:
        yield Found("tokenizer.ggml.token_type is missing", key=_KEY + "token_type", severity=WARNING)
    if words.types is None:
        return
    for token in ((words.types < TokenType.NORMAL) | (words.types > TokenType.BYTE)).nonzero()[0].tolist():
        message = f"token {words.shown(token)} has the type {words.type_of(token)}; the types are 1 to 6"
        yield Found(message, key=_KEY + "token_type", index=(token,), value=words.type_of(token))


@rule("T105", "special-id", ERROR, needs=[Need.VOCABULARY])
def special_id(context: Context) -> Iterator[Found]:
    """The id of a special token is outside the vocabulary.

    What. Every key that holds an id (BOS, EOS, padding, fill-in-the-middle ...), against the number of tokens.

    Why. Old loaders index with it and crash; newer ones ignore it, and the model never stops.

    Case. An EOS of 151645 in a vocabulary that was cut to 32000 tokens.

    Fix. Write the right id, or convert again.
    """
    words = context.words
    for key, token in words.special.items():
        if not 0 <= token < len(words.tokens):
            message = f"{key} is {token:,}; the vocabulary has {len(words.tokens):,} tokens"
            yield Found(message, key=key, offset=context.place(key), value=token)


@rule("T106", "eos-missing", ERROR, needs=[Need.MODEL, Need.VOCABULARY])
def eos_missing(context: Context) -> Iterator[Found]:
    """The file does not say which token ends a text.

    What. tokenizer.ggml.eos_token_id of a byte-level BPE vocabulary, and of BOS where one is put in front.

    Why. llama.cpp then takes id 11, which in most vocabularies is a comma.

    Case. Answers that never end, or that begin with a comma.

    Fix. Write the id of the end-of-text token.
    """
    words = context.words
    if words.model != "gpt2" or len(words.tokens) <= _BPE_DEFAULT:
        return
    default = words.shown(_BPE_DEFAULT)
    if _KEY + "eos_token_id" not in words.special:
        yield Found(f"tokenizer.ggml.eos_token_id is missing: loaders take {default}", key=_KEY + "eos_token_id")
    uses_bos = context.flag(_KEY + "add_bos_token") or "bos_token" in (context.text("tokenizer.chat_template") or "")
    if uses_bos and _KEY + "bos_token_id" not in words.special:
        message = f"tokenizer.ggml.bos_token_id is missing, and a BOS is wanted: loaders take {default}"
        yield Found(message, key=_KEY + "bos_token_id", severity=WARNING)


@rule("T107", "special-type", WARNING, needs=[Need.VOCABULARY])
def special_type(context: Context) -> Iterator[Found]:
    """A special token is not of type control.

    What. The type of the tokens that the keys name as BOS, EOS, end of turn or end of message.

    Why. It is then matched in ordinary text and shown in the answer. llama.cpp corrects the most usual ones itself and
    calls it a bug of the model.

    Case. [PAD151643] as a normal token; </s> typed as normal after a fine-tune.

    Fix. Convert again, with added_tokens that are marked special.
    """
    words = context.words
    for role in ("bos", "eos", "eot", "eom"):
        key = f"{_KEY}{role}_token_id"
        token = words.special.get(key)
        if token is None or not 0 <= token < len(words.tokens) or words.types is None:
            continue
        kind = words.type_of(token)
        if kind in (TokenType.NORMAL, TokenType.BYTE, TokenType.UNUSED, TokenType.UNDEFINED):
            message = f"{key} is {words.shown(token)}, a token of type {_type_name(kind)}; it should be control"
            yield Found(message, key=key, index=(token,), offset=context.place(key), value=token)


def _type_name(kind: int | None) -> str:
    return TokenType(kind).name.lower() if kind is not None and 0 <= kind <= 6 else str(kind)


@rule("T116", "eos-unusual", WARNING, confidence=Confidence.MEDIUM, needs=[Need.VOCABULARY])
def eos_unusual(context: Context) -> Iterator[Found]:
    """EOS is a token that models with this vocabulary never end with.

    What. Two widely used vocabularies are recognized by one of their tokens; the ends that their models use are known.

    Why. The model says its own end token, the program waits for another one, and the answer never stops.

    Case. An EOS id shifted by one: <|im_start|> instead of <|im_end|>.

    Fix. Set tokenizer.ggml.eos_token_id to the original model's.
    """
    key = _KEY + "eos_token_id"
    eos = context.words.special.get(key)
    for known in _recognized(context.words):
        if eos is not None and 0 <= eos < len(context.words.tokens) and eos not in known.eos:
            usual = " or ".join(context.words.shown(token) for token in sorted(known.eos))
            message = (
                f"{key} is {context.words.shown(eos)}; models with the vocabulary of {known.name} end with {usual}"
            )
            yield Found(message, key=key, offset=context.place(key), value=eos)


@rule("T108", "merges", ERROR, needs=[Need.VOCABULARY])
def merges(context: Context) -> Iterator[Found]:
    """The merges are missing, or do not fit the tokens.

    What. A byte-level BPE vocabulary needs its merges; both parts of each and their joint must be tokens. That also
    shows every token whose text was changed.

    Why. Without merges every text falls apart into bytes ("cannot find tokenizer merges in model file").

    Case. A tokenizer.json in a form that the converter did not know; a flipped bit in a token's text.

    Fix. Convert again; for single ones fetch the file again.
    """
    words = context.words
    if words.model != "gpt2":
        return
    key = _KEY + "merges"
    if not words.merges:
        if words.field("merges") is None or words.merges is not None:
            yield Found(f"{key} is missing or empty: every text falls apart into bytes", key=key, help=_CONVERT_AGAIN)
        return
    broken = list(_broken_merges(words))
    for index, why in broken[:_SHOW]:
        yield Found(f"merge {index:,} ({words.merges[index][:60]!r}) {why}", key=key, index=(index,))
    if len(broken) > _SHOW:
        yield Found(
            f"{len(broken):,} of {len(words.merges):,} merges do not fit the tokens", key=key, value=len(broken)
        )


def _broken_merges(words: Words) -> Iterator[tuple[int, str]]:
    known = words.ids
    for index, merge in enumerate(words.merges or ()):
        left, space, right = merge.partition(" ")
        if left in known and right in known and left + right in known:
            continue
        if not (left and space and right):
            yield index, "has no two parts"
        else:
            missing = next(part for part in (left, right, left + right) if part not in known)
            yield index, f"speaks of {missing[:40]!r}, which is no token"


@rule("T109", "duplicate-token", ERROR, spec=WARNING, needs=[Need.VOCABULARY])
def duplicate_token(context: Context) -> Iterator[Found]:
    """Two tokens have the same text.

    What. Every text of the vocabulary; empty ones aside.

    Why. llama.cpp aborts when texts and ids are not one to one; elsewhere one of the two can never be written.

    Case. A flipped bit; a special token added twice.

    Fix. Fetch the file again, or convert again.
    """
    words = context.words
    if len(words.ids) == len(words.tokens):
        return
    for number, text in enumerate(words.tokens):
        if text and (first := words.ids[text]) != number:
            message = f"the tokens {first} and {number} are both {text[:60]!r}"
            yield Found(message, key=_KEY + "tokens", index=(number,))


@rule("T110", "padding-type", WARNING, needs=[Need.VOCABULARY])
def padding_type(context: Context) -> Iterator[Found]:
    """Padding entries are not marked as unused.

    What. Tokens named [PAD123] after their own id fill the vocabulary up to the rows of the embedding.

    Why. Marked as anything else they are matched in ordinary text or printed; a model that says one is broken, and
    that can only be seen when they are known.

    Case. Conversions of early 2024 made them user-defined, which is harmless enough to be an info; as normal tokens
    (the notorious [PAD151643]) they appear in answers.

    Fix. Convert again with a current converter.
    """
    words = context.words
    if words.types is None:
        return
    kinds = Counter(
        int(words.types[number])
        for number, token in enumerate(words.tokens)
        if token[:4] == "[PAD" and (match := _PADDING.fullmatch(token)) and int(match[1]) == number
    )
    for kind, count in kinds.items():
        if kind != TokenType.UNUSED:
            message = f"{count} padding tokens ([PAD…]) are of type {_type_name(kind)}; they should be unused"
            old_habit = kind in (TokenType.USER_DEFINED, TokenType.UNKNOWN)
            yield Found(message, key=_KEY + "token_type", value=count, severity=INFO if old_habit else None)


@rule("T111", "add-bos", WARNING, needs=[Need.VOCABULARY])
def add_bos(context: Context) -> Iterator[Found]:
    """A BOS is put in front of every text of a model that never saw one.

    What. add_bos_token is true in a vocabulary of Qwen.

    Why. Qwen was trained without BOS: its first token then stands at the wrong place and means "end of text".

    Case. A conversion with add_bos_token taken over from a Llama template.

    Fix. Set tokenizer.ggml.add_bos_token to false.
    """
    words = context.words
    if words.model == "gpt2" and (words.pre or "").startswith("qwen") and context.flag(_KEY + "add_bos_token"):
        key = _KEY + "add_bos_token"
        yield Found("add_bos_token is true; Qwen models have no BOS", key=key, offset=context.place(key), value=True)


@rule("T112", "byte-coverage", ERROR, needs=[Need.VOCABULARY])
def byte_coverage(context: Context) -> Iterator[Found]:
    """There are bytes that no token can write.

    What. A byte-level BPE vocabulary has a token for each byte, a SentencePiece one <0x00> to <0xFF>. Bytes that text
    hardly has (control characters, F1 to FF, C0 and C1) are missing in healthy vocabularies too and do not count.

    Why. Text with such a byte is cut out or becomes "unknown".

    Case. A damaged entry of the first 256; a vocabulary pruned to one language.

    Fix. Fetch the file again, or convert again.
    """
    words = context.words
    if words.model == "gpt2":
        spelling = _byte_alphabet()
    elif words.model == "llama" and words.types is not None and (words.types == TokenType.BYTE).any():
        spelling = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        return
    missing = [byte for byte in range(256) if byte not in _DISPENSABLE and spelling[byte] not in words.ids]
    if missing:
        listed = ", ".join(f"0x{byte:02X}" for byte in missing[:_SHOW]) + (" …" if len(missing) > _SHOW else "")
        yield Found(f"{len(missing)} bytes have no token: {listed}", key=_KEY + "tokens", value=len(missing))


def _byte_alphabet() -> list[str]:
    """The characters that stand for the bytes 0 to 255 in a byte-level vocabulary (GPT-2's)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@rule("T113", "byte-token", ERROR, needs=[Need.VOCABULARY])
def byte_token(context: Context) -> Iterator[Found]:
    """A token of type byte is not spelled like one.

    What. Its text is <0x00> to <0xFF>.

    Why. Loaders read the number in it and index with it: <0x-1> wrote outside an array.

    Case. A file made to attack; a shifted array of types.

    Fix. Convert the model again.
    """
    words = context.words
    if words.types is None:
        return
    for token in (words.types == TokenType.BYTE).nonzero()[0].tolist():
        if not _BYTE.fullmatch(words.tokens[token]):
            message = f"token {words.shown(token)} is of type byte, but spells none"
            yield Found(message, key=_KEY + "tokens", index=(token,))


@rule("T114", "scores", ERROR, needs=[Need.VOCABULARY])
def scores(context: Context) -> Iterator[Found]:
    """The scores of a SentencePiece vocabulary are missing or no numbers.

    What. tokenizer.ggml.scores of a vocabulary of the kind "llama": there, finite, and not all alike.

    Why. They decide which pieces are joined first. Without them every text is cut differently from training.

    Case. A conversion that took the vocabulary from tokenizer.json, which has no scores.

    Fix. Convert again with tokenizer.model beside the weights.
    """
    import numpy as np

    words = context.words
    field = words.field("scores")
    if words.model != "llama":
        return
    if field is None:
        yield Found("tokenizer.ggml.scores is missing", key=_KEY + "scores", help=_CONVERT_AGAIN)
    elif field.element_type is ValueType.FLOAT32 and field.count:
        values = context.gguf.metadata[field.key]
        for token in np.flatnonzero(~np.isfinite(values))[:_SHOW].tolist():
            yield Found(f"the score of token {token} is {values[token]}", key=field.key, index=(token,))
        if field.count > 1 and (values == values[0]).all():
            yield Found(f"all {field.count:,} scores are {values[0]:g}", key=field.key, severity=WARNING)


@rule("T115", "odd-token", WARNING, confidence=Confidence.MEDIUM, needs=[Need.VOCABULARY])
def odd_token(context: Context) -> Iterator[Found]:
    """A token's text is no UTF-8, or empty.

    What. Byte-level vocabularies spell bytes as letters; raw bytes have no place in them.

    Why. It is text that no converter writes: the entry was damaged.

    Case. A flipped top bit in a token.

    Fix. Fetch the file again.
    """
    words = context.words
    if "" in words.ids:
        first, count = words.ids[""], words.tokens.count("")
        yield Found(f"{count} tokens are empty, first {first}", key=_KEY + "tokens", index=(first,), severity=INFO)
    for number, token in enumerate(() if words.is_utf8 else words.tokens):
        if any("\udc80" <= character <= "\udcff" for character in token):
            yield Found(f"token {words.shown(number)} is no UTF-8", key=_KEY + "tokens", index=(number,))


@rule("T199", "tokenizer", ERROR, needs=[Need.VOCABULARY])
def tokenizer(context: Context) -> Iterator[Found]:
    """The tokenizer cannot be built.

    What. Whatever keeps ggufkit from using the vocabulary and is not said by a rule on a single key.

    Why. Neither `run` nor `tokenize` can work with the file.

    Case. Keys that contradict each other in a way nobody has met yet.

    Fix. As the message says.
    """
    words = context.words
    error = words.vocabulary
    if not isinstance(error, FormatError):
        return
    told = {found.key for check in (tokenizer_lengths, special_id, scores, key_type) for found in check(context)}
    if not any(key and key in error.message for key in told):
        yield Found(error.message + (f"; expected {error.expected}" if error.expected else ""), help=error.help)
