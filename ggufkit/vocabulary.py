"""What a file's metadata says about its tokens: their texts and types, the special ones, where an answer ends.

Nothing in the metadata is believed: element types, lengths and every id are checked, and an error names the
key. The rules by which tokens become special follow llama.cpp, because a GGUF is run with those: besides the
keys, well-known texts (`<|im_end|>`) make a token an end of turn whatever the file calls it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ggufkit.errors import FormatError, NewerThanTool, Unsupported
from ggufkit.pretokenizers import PRE, UNSUPPORTED_PRE

__all__ = ["ID_KEYS", "TokenType", "Vocabulary"]

_KEY = "tokenizer.ggml."


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


#: values of `tokenizer.ggml.model` that are real, and not built here
_OTHER_MODELS = frozenset(
    {"bert", "t5", "rwkv", "plamo2", "gemma4", "hybriddna", "whitespace", "replit", "no_vocab", "none", "test"}
)

_ROLES = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "cls", "mask")  # spelled as the format does
_FIM_ROLES = ("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep")
_OLD_FIM_ROLES = {"prefix": "fim_pre", "suffix": "fim_suf", "middle": "fim_mid"}
#: every key that holds the id of a token, and the token's role
ID_KEYS = {f"{_KEY}{role}_token_id": role for role in (*_ROLES, *_FIM_ROLES, *_OLD_FIM_ROLES)}
#: -1 written as an unsigned number: there is no such token
_NO_TOKEN = 0xFFFF_FFFF
#: the ids of a SentencePiece vocabulary whose keys are missing
_SPM_DEFAULTS = {"bos": 1, "eos": 2, "unknown": 0}

#: texts that have a role when no key names a token for it, the best first; such a token counts as control token
_ROLE_TEXTS: dict[str, tuple[str, ...]] = {
    "eot": (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>"),
        *("_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>"),
    ),
    "eom": ("<|eom_id|>",),
    "fim_pre": (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
        *("<|code_prefix|>", "<|prefix|>"),
    ),
    "fim_suf": (
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
        *("<|code_suffix|>", "<|suffix|>"),
    ),
    "fim_mid": (
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
        *("<|code_middle|>", "<|middle|>"),
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
#: roles after whose token nothing more is to be said
_STOP_ROLES = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
#: texts that end an answer in whichever vocabulary they occur
_STOP_TEXTS = (
    *_ROLE_TEXTS["eot"],
    *("<|eom_id|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "[EOS]", "<eos>", "<turn|>"),
    *("<|tool_response>", "[e~["),
)
#: markers inside an answer of the harmony format; they are matched and shown like user-defined tokens
_HARMONY_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
#: where all of these end an answer, `<|end|>` only ends a part of it
_PART_ENDS = (
    {"<|return|>", "<|call|>"},
    {"<|return|>", "<|calls|>"},
    {"<|flush|>", "<|call|>"},
    {"<|flush|>", "<|calls|>"},
)
#: where one of these ends an answer, `</s>` is an ordinary word
_PLAIN_S = {"<|tool_response>", "<|plamo:eos|>"}

_PADDING_TEXT = re.compile(r"\[PAD\d+\]")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one file.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
        pre: the name of the pre-tokenizer, a key of `PRE`; `default` where the file names none.
        tokens: the text of each token as the file spells it.
        ids: text to id; of equal texts the last.
        types: int32 (n_vocab,), a `TokenType` each as an engine treats it: end-of-turn and fill-in-the-middle tokens
            are control tokens even where the file calls them something else.
        roles: role (`bos`, `eos`, `eot`, `fim_pre` …) to id, by the keys and by well-known texts.
        stop_ids: every id that ends an answer.
        add_bos: whether a BOS is put in front of a text.
        space_prefix: whether a SentencePiece text gets a space in front.
        swallows: special tokens that swallow the white space after them.
        metadata: where all this came from.
    """

    model: str
    pre: str
    tokens: list[str]
    ids: dict[str, int]
    types: npt.NDArray[np.int32]
    roles: dict[str, int]
    stop_ids: frozenset[int]
    add_bos: bool
    space_prefix: bool
    swallows: frozenset[int]
    metadata: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """Read and check a file's tokenizer keys.

        Args:
            metadata: the file's keys; string arrays are lists of str, number arrays are NumPy arrays.

        Raises:
            FormatError: a key is missing, of the wrong type or length, or an id is outside the vocabulary.
            NewerThanTool: a tokenizer or pre-tokenizer that this version does not know.
            Unsupported: a known kind of tokenizer that is not built here, or none at all.
        """
        model = _model(metadata)
        pre = _pre(metadata) if model == "gpt2" else "default"
        tokens = _tokens(metadata)
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
        types = _types(metadata, len(tokens))
        roles = _role_ids(metadata, model, len(tokens))
        stop_ids = _apply_texts(ids, types, roles)
        add_bos = _flag(metadata, "add_bos_token", default=model == "llama" or PRE[pre].add_bos)
        space_prefix = _flag(metadata, "add_space_prefix", default=model == "llama")
        swallows = _swallows(metadata, ids, types)
        return cls(model, pre, tokens, ids, types, roles, stop_ids, add_bos, space_prefix, swallows, metadata)

    @cached_property
    def padding_ids(self) -> frozenset[int]:
        """Ids that only fill the embedding up to a round size; no healthy model ever says one."""
        unused = np.flatnonzero(self.types == TokenType.UNUSED).tolist()
        named = (i for i, text in enumerate(self.tokens) if text[:4] == "[PAD" and _PADDING_TEXT.fullmatch(text))
        return frozenset(unused).union(named)

    def merges(self) -> list[tuple[str, str]]:
        """The halves of every merge by rank; of equal merges only the first.

        Raises:
            FormatError: the key is missing, no array of strings, or a merge has no two halves.
        """
        merges = _strings(self.metadata, "merges")
        if len(set(merges)) != len(merges):
            merges = list(dict.fromkeys(merges))
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        if not all(map(all, pairs)):
            index = next(i for i, pair in enumerate(pairs) if not all(pair))
            raise FormatError(
                f"merge {index} of {_KEY}merges is {merges[index]!r}", expected="two tokens with a space between them"
            )
        return pairs

    def scores(self) -> npt.NDArray[np.float32]:
        """float32 (n_vocab,): the higher, the earlier a SentencePiece token is merged.

        Raises:
            FormatError: the key is missing, too short, of another type, or holds a NaN.
        """
        scores = _numbers(self.metadata, "scores", ("f4", "i4"), len(self.tokens))
        if scores is None:
            raise FormatError(f"{_KEY}scores is missing", expected="a float32 for every SentencePiece token")
        scores = scores.astype(np.float32)
        bad = np.flatnonzero(np.isnan(scores))
        if bad.size:
            raise FormatError(f"{_KEY}scores[{bad[0]}] is NaN", expected="a number to order merges by")
        return scores


# ---------------------------------------------------------------------- what well-known texts mean


def _apply_texts(ids: dict[str, int], types: npt.NDArray[np.int32], roles: dict[str, int]) -> frozenset[int]:
    """Complete `roles` and correct `types` by the texts of tokens; return the ids that end an answer."""

    def find(texts: Iterable[str]) -> list[int]:
        return [ids[text] for text in texts if text in ids]

    for role, texts in _ROLE_TEXTS.items():
        if role not in roles and (found := find(texts)):
            roles[role] = found[0]
            types[found[0]] = TokenType.CONTROL
    stops = {text: ids[text] for text in _STOP_TEXTS if text in ids}
    types[list(stops.values())] = TokenType.CONTROL
    types[find(_HARMONY_TEXTS)] = TokenType.USER_DEFINED
    stop_ids = set(stops.values()) | {roles[role] for role in _STOP_ROLES if role in roles}
    for text, kind in _no_stops(stops.keys()).items():
        types[ids[text]] = kind
        stop_ids.discard(ids[text])
    return frozenset(stop_ids)


def _no_stops(texts: Iterable[str]) -> dict[str, TokenType]:
    """Texts that end an answer elsewhere but not beside these others, and what they are instead."""
    present = set(texts)
    plain = {}
    if "<|end|>" in present and any(ends <= present for ends in _PART_ENDS):
        plain["<|end|>"] = TokenType.USER_DEFINED
    if "</s>" in present and present & _PLAIN_S:
        plain["</s>"] = TokenType.NORMAL
    return plain


def _swallows(metadata: Mapping[str, Any], ids: dict[str, int], types: npt.NDArray[np.int32]) -> frozenset[int]:
    """Phi-3's special tokens swallow white space; only the model's name tells."""
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    special = np.flatnonzero(np.isin(types, (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)))
    keep = {ids.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")}
    return frozenset({*special.tolist(), ids.get("</s>", -1)} - keep)


# ---------------------------------------------------------------------- reading the keys


def _model(metadata: Mapping[str, Any]) -> str:
    model = metadata.get(_KEY + "model")
    if model is None:
        raise Unsupported(f"the file has no tokenizer: {_KEY}model is missing")
    if not isinstance(model, str):
        raise _wrong_type("model", model, "a string")
    if model in _OTHER_MODELS:
        raise Unsupported(
            f"{_KEY}model is {model!r}: this kind of tokenizer is not built here",
            expected="gpt2 (byte-level BPE) or llama (SentencePiece)",
        )
    if model not in ("gpt2", "llama"):
        raise NewerThanTool(f"{_KEY}model is {model!r}, a tokenizer that this version does not know")
    return model


def _pre(metadata: Mapping[str, Any]) -> str:
    pre = metadata.get(_KEY + "pre", "default")
    if not isinstance(pre, str):
        raise _wrong_type("pre", pre, "a string")
    if pre in UNSUPPORTED_PRE:
        raise Unsupported(f"{_KEY}pre is {pre!r}: this way of cutting words is not built here")
    if pre not in PRE:
        raise NewerThanTool(f"{_KEY}pre is {pre!r}, a pre-tokenizer that this version does not know")
    return pre


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = _strings(metadata, "tokens")
    if not tokens:
        raise FormatError(f"{_KEY}tokens is empty", expected="at least one token")
    if "" in tokens:  # an empty text would match everywhere
        tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
    return tokens


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = metadata.get(_KEY + name)
    if values is None:
        raise FormatError(f"{_KEY}{name} is missing", expected="an array of strings")
    if not isinstance(values, list) or set(map(type, values)) - {str}:
        raise _wrong_type(name, values, "an array of strings")
    return values


def _numbers(metadata: Mapping[str, Any], name: str, kinds: Sequence[str], n_vocab: int) -> npt.NDArray[Any] | None:
    """An array with a number for every token, of one of the `kinds` (NumPy's letter and size); None without the key."""
    values = metadata.get(_KEY + name)
    if values is None:
        return None
    if not isinstance(values, np.ndarray) or f"{values.dtype.kind}{values.dtype.itemsize}" not in kinds:
        raise _wrong_type(name, values, "an array of " + " or ".join(str(np.dtype(kind)) for kind in kinds))
    if values.ndim != 1 or len(values) < n_vocab:
        raise FormatError(f"{_KEY}{name} has {len(values):,} values", expected=f"{n_vocab:,}, one for every token")
    return values[:n_vocab]


def _types(metadata: Mapping[str, Any], n_vocab: int) -> npt.NDArray[np.int32]:
    values = _numbers(metadata, "token_type", ("i4",), n_vocab)
    if values is None:
        return np.full(n_vocab, TokenType.NORMAL, np.int32)
    types = values.astype(np.int32)
    types[(types < TokenType.UNDEFINED) | (types > TokenType.BYTE)] = TokenType.UNDEFINED
    return types


def _role_ids(metadata: Mapping[str, Any], model: str, n_vocab: int) -> dict[str, int]:
    """The ids that the keys name, by role; every one is inside the vocabulary."""
    defaults = _SPM_DEFAULTS if model == "llama" else {}
    roles = {role: token for role, token in defaults.items() if token < n_vocab}
    for key, role in ID_KEYS.items():
        token = metadata.get(key, _NO_TOKEN)
        if not isinstance(token, int) or isinstance(token, bool):
            raise _wrong_type(key.removeprefix(_KEY), token, "an unsigned integer")
        if token in (_NO_TOKEN, -1):
            continue
        if not 0 <= token < n_vocab:
            raise FormatError(
                f"{key} is {token}, outside the vocabulary of {n_vocab:,} tokens", expected=f"0 … {n_vocab - 1}"
            )
        roles[_OLD_FIM_ROLES.get(role, role)] = token
    return roles


def _flag(metadata: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = metadata.get(_KEY + name, default)
    if not isinstance(value, bool):
        raise _wrong_type(name, value, "a bool")
    return value


def _wrong_type(name: str, value: object, expected: str) -> FormatError:
    found = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
    return FormatError(f"{_KEY}{name} is {found}", expected=expected)
