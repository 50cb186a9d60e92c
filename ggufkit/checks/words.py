"""A file's tokens as the rules see them: read with no other belief than their types, so that whatever is wrong with
one key does not hide what is wrong with another. (`vocabulary.Vocabulary` is what an engine uses; it stops at the
first error.)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from ggufkit.container import GGUF, Field, ValueType
from ggufkit.errors import GgufkitError
from ggufkit.vocabulary import ID_KEYS, Vocabulary

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_KEY = "tokenizer.ggml."
#: -1 as an unsigned number: the file says that there is no such token
_NO_TOKEN = 0xFFFF_FFFF


class Words:
    """The tokenizer's keys of one file that has an array of tokens.

    Attributes:
        model: tokenizer.ggml.model, or None.
        pre: tokenizer.ggml.pre, or None.
    """

    def __init__(self, gguf: GGUF) -> None:
        self._gguf = gguf
        self.model = self._string("model")
        self.pre = self._string("pre")

    @cached_property
    def tokens(self) -> list[str]:
        """The text of every token."""
        tokens: list[str] = self._gguf.metadata[_KEY + "tokens"]
        return tokens

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Text → id; of equal texts the first."""
        return dict(zip(reversed(self.tokens), range(len(self.tokens) - 1, -1, -1), strict=True))

    @cached_property
    def types(self) -> npt.NDArray[np.int32] | None:
        """int32 [tokens], when the key is there, of that type, and as long."""
        field = self.field("token_type")
        if field is None or field.element_type is not ValueType.INT32 or field.count != len(self.tokens):
            return None
        types: npt.NDArray[np.int32] = self._gguf.metadata[field.key]
        return types

    @cached_property
    def merges(self) -> list[str] | None:
        """The merges, when they are there as strings."""
        field = self.field("merges")
        if field is None or field.element_type is not ValueType.STRING:
            return None
        merges: list[str] = self._gguf.metadata[field.key]
        return merges

    @cached_property
    def special(self) -> Mapping[str, int]:
        """Key → id, for every key of a special token that holds an id at all, in range or not."""
        found = {}
        for key in ID_KEYS:
            field = self._gguf.fields.get(key)
            value = field.scalar if field else None
            if isinstance(value, int) and not isinstance(value, bool) and value not in (_NO_TOKEN, -1):
                found[key] = value
        return found

    @cached_property
    def is_utf8(self) -> bool:
        """Whether every token is text: none holds a byte that is no UTF-8."""
        try:
            "".join(self.tokens).encode()
        except UnicodeEncodeError:
            return False
        return True

    @cached_property
    def vocabulary(self) -> Vocabulary | GgufkitError:
        """What an engine would use, or why it cannot."""
        try:
            return Vocabulary.from_metadata(self._gguf.metadata)
        except GgufkitError as error:
            return error

    def field(self, name: str) -> Field | None:
        """`tokenizer.ggml.NAME`."""
        return self._gguf.fields.get(_KEY + name)

    def type_of(self, token: int) -> int | None:
        """The type of a token, when types are there."""
        return None if self.types is None else int(self.types[token])

    def shown(self, token: int) -> str:
        """`151645 '<|im_end|>'`."""
        return f"{token} {self.tokens[token][:40]!r}"

    def _string(self, name: str) -> str | None:
        field = self.field(name)
        return str(self._gguf.metadata[field.key]) if field and field.type is ValueType.STRING else None
