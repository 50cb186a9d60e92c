"""Text to token ids and back, from the metadata of a file alone.

The vocabulary, the merges and `tokenizer.ggml.pre` become a `tokenizers.Tokenizer`; the older SentencePiece
vocabularies (`tokenizer.ggml.model` = llama) are merged by score here. The ids are llama.cpp's: no Unicode
normalization, special tokens cut out longest first, user-defined tokens always.

Opening is cheap; the encoder of a 152k vocabulary takes some tenths of a second and is built when a text is
first encoded, so that looking at tokens or decoding never waits for it.
"""

from __future__ import annotations

import codecs
import heapq
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ggufkit.errors import FormatError, UsageError
from ggufkit.pretokenizers import PRE
from ggufkit.vocabulary import TokenType, Vocabulary

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Stream", "TokenType", "Tokenizer"]

_BYTE_TEXT = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"  # how SentencePiece spells a space
_ASCII_SPACE = " \t\n\v\f\r"
_TEXT_TYPES = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.BYTE)


class Tokenizer:
    """The tokenizer of one file.

    Attributes:
        vocabulary: the tokens, their types and roles.
        n_vocab: the number of tokens, padding included.
        bos_id, eos_id, eot_id: the ids, or None.
        stop_ids: every id that ends an answer.
        add_bos: whether a BOS is put in front of a text.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.n_vocab = len(vocabulary.tokens)
        self.bos_id = vocabulary.roles.get("bos")
        self.eos_id = vocabulary.roles.get("eos")
        self.eot_id = vocabulary.roles.get("eot")
        self.stop_ids = vocabulary.stop_ids
        self.add_bos = vocabulary.add_bos

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that a file's metadata describes; raises what `Vocabulary.from_metadata` raises."""
        return cls(Vocabulary.from_metadata(metadata))

    @property
    def types(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """int32 (n_vocab,), a `TokenType` each."""
        return self.vocabulary.types

    @property
    def padding_ids(self) -> frozenset[int]:
        """Ids that only fill the embedding up to a round size; no healthy model ever says one."""
        return self.vocabulary.padding_ids

    def id_of(self, text: str) -> int | None:
        """The id of the token that the file spells `text`, or None."""
        return self.vocabulary.ids.get(text)

    def token_text(self, token: int) -> str:
        """A token as the file spells it, for instance `Ġthe` or `<|im_end|>`.

        Raises:
            UsageError: the id is outside the vocabulary.
        """
        return self.vocabulary.tokens[self._checked(token)]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; of a special or unused token, its text."""
        text, kind = self.token_text(token), self.types[token]
        if kind == TokenType.BYTE and (byte := _BYTE_TEXT.fullmatch(text)):
            return bytes.fromhex(byte[1])
        if kind != TokenType.NORMAL:
            return _utf8(text)
        return _utf8(text.replace(_SPACE, " ")) if self.vocabulary.model == "llama" else _despell(text)

    def is_special(self, token: int) -> bool:
        """Whether a token is no part of the text: control, unknown, unused or undefined."""
        return self.types[self._checked(token)] not in _TEXT_TYPES

    def encode(self, text: str, *, parse_special: bool = True, add_bos: bool | None = None) -> list[int]:
        """The ids of a text, equal to llama.cpp's.

        Args:
            text: any text; it is not normalized.
            parse_special: whether the text of a control token becomes that token. Without it such text is cut up
                like any other, so that a user's input cannot forge a turn. User-defined tokens always match.
            add_bos: whether to begin with the BOS token; None does what the file says.

        Raises:
            UsageError: the text holds a lone surrogate.
            FormatError: the merges or scores are damaged, or a BOS is wanted that the file does not name.
        """
        _check_text(text)
        ids = [self._bos()] if (self.add_bos if add_bos is None else add_bos) else []
        after_special = True
        for part in self._parts(text, parse_special):
            ids += [part] if isinstance(part, int) else self._encoder.encode(part, after_special)
            after_special = isinstance(part, int)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of some ids; the inverse of `encode`. Bytes that are no UTF-8 become U+FFFD.

        Raises:
            UsageError: an id is outside the vocabulary.
        """
        return b"".join(self._pieces(ids, skip_special)).decode("utf-8", "replace")

    def stream(self, *, skip_special: bool = False) -> Stream:
        """A decoder that takes ids one by one and never gives half a character."""
        return Stream(self, skip_special=skip_special)

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.n_vocab:
            raise UsageError(f"token id {token} is outside the vocabulary", expected=f"0 … {self.n_vocab - 1}")
        return token

    def _bos(self) -> int:
        if self.bos_id is None:
            raise FormatError(
                "a BOS token is to be added, but tokenizer.ggml.bos_token_id is missing",
                help="name the token, or set tokenizer.ggml.add_bos_token to false",
            )
        return self.bos_id

    @cached_property
    def _encoder(self) -> _Encoder:
        return _SentencePiece(self.vocabulary) if self.vocabulary.model == "llama" else _ByteLevel(self.vocabulary)

    @cached_property
    def _specials(self) -> list[tuple[str, int, bool]]:
        """(text, id, whether only parse_special matches it) of each special token, the longest in bytes first."""
        tokens, types = self.vocabulary.tokens, self.types
        matched = np.flatnonzero(np.isin(types, (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)))
        only_parsed = (types[matched] != TokenType.USER_DEFINED).tolist()
        rows = [(tokens[i], i, parsed) for i, parsed in zip(matched.tolist(), only_parsed, strict=True)]
        return sorted(rows, key=lambda row: len(_utf8(row[0])), reverse=True)

    def _parts(self, text: str, parse_special: bool) -> list[str | int]:
        """The text cut at its special tokens: plain parts and ids."""
        parts: list[str | int] = [text] if text else []
        for special, token, is_control in self._specials:
            if special in text and (parse_special or not is_control):
                parts = [piece for part in parts for piece in self._cut(part, special, token)]
        return parts

    def _cut(self, part: str | int, special: str, token: int) -> Iterator[str | int]:
        if isinstance(part, int):
            yield part
            return
        swallow = _ASCII_SPACE if token in self.vocabulary.swallows else ""
        first, *rest = part.split(special)
        if first:
            yield first
        for piece in rest:
            yield token
            if piece := piece.lstrip(swallow) if swallow else piece:
                yield piece

    def _pieces(self, ids: Iterable[int], skip_special: bool) -> Iterator[bytes]:
        """The bytes of each id, without the space that a SentencePiece encoder puts in front of a text."""
        prefixed = self.vocabulary.model == "llama" and self.vocabulary.space_prefix
        at_start = prefixed
        for token in ids:
            piece, special = self.token_bytes(token), self.is_special(token)
            if not (special and skip_special):
                yield piece.removeprefix(b" ") if at_start else piece
            at_start = prefixed and special


class Stream:
    """Decodes ids one by one: an incomplete character is held back until the rest of it comes."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this id completes; empty while a character is incomplete."""
        piece = self._tokenizer.token_bytes(token)
        return "" if self._skip_special and self._tokenizer.is_special(token) else self._decoder.decode(piece)

    def flush(self) -> str:
        """What was held back; an incomplete character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


# ---------------------------------------------------------------------- the two encoders


class _Encoder(Protocol):
    def encode(self, text: str, after_special: bool) -> list[int]: ...


class _ByteLevel:
    """Byte-level BPE: the words of the pre-tokenizer, spelled in bytes, merged by rank."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tokenizers import Regex, Tokenizer, pre_tokenizers

        pre = PRE[vocabulary.pre]
        self._tokenizer = Tokenizer(_bpe(vocabulary.ids, vocabulary.merges(), pre.ignore_merges))
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, spell])

    def encode(self, text: str, after_special: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _bpe(ids: dict[str, int], merges: list[tuple[str, str]], ignore_merges: bool) -> tokenizers.models.BPE:
    from tokenizers.models import BPE

    if not _is_unicode("".join(ids)):  # a token that is no UTF-8 can never match
        ids = {text: i for text, i in ids.items() if _is_unicode(text)}
    try:
        return BPE(ids, merges, ignore_merges=ignore_merges)
    except Exception as error:  # the library raises nothing more specific when a part of a merge is missing
        raise _bad_merge(ids, merges) or FormatError(f"tokenizer.ggml.merges: {error}") from error


def _bad_merge(ids: dict[str, int], merges: list[tuple[str, str]]) -> FormatError | None:
    for index, (left, right) in enumerate(merges):
        for part in (left, right, left + right):
            if part not in ids:
                return FormatError(
                    f"merge {index} of tokenizer.ggml.merges, {f'{left} {right}'!r}, needs {part!r}, which is no token",
                    expected="both halves and their union in tokenizer.ggml.tokens",
                )
    return None


class _SentencePiece:
    """SentencePiece BPE: of all neighbours that form a token, those of the highest score merge first.

    Ties go to the left; what ends up being no token is spelled in byte tokens. A BPE by rank is not the same where a
    token can be made in several ways (a run of spaces), hence not `tokenizers`.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = vocabulary.ids
        self._scores: list[float] = vocabulary.scores().tolist()
        self._space_prefix = vocabulary.space_prefix

    def encode(self, text: str, after_special: bool) -> list[int]:
        if after_special and self._space_prefix:
            text = " " + text
        ids: list[int] = []
        for symbol in self._merge(text.replace(" ", _SPACE)):
            token = self._ids.get(symbol)
            ids += [self._byte(byte) for byte in symbol.encode()] if token is None else [token]
        return ids

    def _merge(self, text: str) -> list[str]:
        """The tokens of a text: a chain of symbols, and a queue of the neighbours that could become one."""
        symbols = list(text)
        before = list(range(-1, len(symbols) - 1))
        after = [*range(1, len(symbols)), -1]
        queue: list[tuple[float, int, int, int]] = []

        def consider(left: int, right: int) -> None:
            pair = symbols[left] + symbols[right]
            if (token := self._ids.get(pair)) is not None:
                heapq.heappush(queue, (-self._scores[token], left, right, len(pair)))

        for left in range(len(symbols) - 1):
            consider(left, left + 1)
        while queue:
            _, left, right, length = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
                continue  # one of the two has merged since
            symbols[left], symbols[right] = symbols[left] + symbols[right], ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
                consider(left, after[left])
            if before[left] >= 0:
                consider(before[left], left)
        return [symbol for symbol in symbols if symbol]

    def _byte(self, byte: int) -> int:
        for text in (f"<0x{byte:02X}>", chr(byte)):
            if text in self._ids:
                return self._ids[text]
        raise FormatError(f"tokenizer.ggml.tokens has no token for the byte 0x{byte:02X}", expected=f"<0x{byte:02X}>")


# ---------------------------------------------------------------------- bytes and characters


def _byte_spelling() -> dict[str, int]:
    """How GPT-2 spells bytes: printable Latin-1 as itself, the others as the letters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_spelling()


def _despell(text: str) -> bytes:
    """The bytes that a token spells; one that is not spelled in bytes stands for itself."""
    try:
        return bytes([_BYTE_OF[character] for character in text])
    except KeyError:
        return _utf8(text)


def _utf8(text: str) -> bytes:
    """UTF-8, where bytes of the file that were none come back as they were."""
    return text.encode("utf-8", "surrogateescape")


_SURROGATE = re.compile("[\ud800-\udfff]")


def _is_unicode(text: str) -> bool:
    return not _SURROGATE.search(text)


def _check_text(text: str) -> None:
    if lone := _SURROGATE.search(text):
        raise UsageError(
            f"character {lone.start()} of the text is the lone surrogate U+{ord(lone[0]):04X}",
            expected="valid Unicode",
            help="read the input as UTF-8",
        )
