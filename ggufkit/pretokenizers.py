"""How a byte-level BPE cuts a text into words before it merges anything: `tokenizer.ggml.pre`, as data.

The vocabulary and the merges of a file do not say where a word ends; this name does, and a wrong one gives
text that still decodes but was never seen in training. A row is the list of patterns for a name: each pattern
in turn isolates its matches inside the pieces that the ones before it left, and what no pattern matches stays
a piece of its own. They are written for the Oniguruma engine that `tokenizers` uses.

llama.cpp is the yardstick, because its ids are what a GGUF is run with. Where its patterns cut otherwise than
the model's own tokenizer (a capital inside a word for gpt-4o and tekken, digits of afmoe), the row follows
llama.cpp. Code points that Unicode added after version 15 may be classified differently; they are spelled in
bytes by every vocabulary of today.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRE", "UNSUPPORTED_PRE", "Pre"]


@dataclass(frozen=True, slots=True)
class Pre:
    """One way to cut.

    Attributes:
        patterns: the regular expressions, applied one after the other.
        ignore_merges: a whole word that is in the vocabulary is that token, whatever the merges say.
        add_bos: a BOS is put in front unless `tokenizer.ggml.add_bos_token` says otherwise.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


# The building stones. Upper and lower case contractions are spelled out: a case-insensitive group would also
# take the long s (U+017F) for an s.
_CONTRACTION = r"'(?:[sdmt]|ll|ve|re)"
_ANY_CONTRACTION = r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|" + _SPACES
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"

_GPT2 = rf"{_CONTRACTION}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
_QWEN2 = rf"{_ANY_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_LINES}"
_QWEN35 = (
    rf"{_ANY_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}"
)
_LLAMA3 = rf"{_ANY_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_LINES}"
_EXAONE_MOE = (
    rf"{_ANY_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACES}"
)
_JAIS2 = (
    rf"{_ANY_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+|"
    + "".join(rf"\s{{{run}}}(?!\S)|" for run in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"\s{1,2}(?!\S)|\s"
)


def _cased(letters: str) -> str:
    """Words of one capitalization with their contraction; a letter outside ASCII counts as either case."""
    upper, lower = rf"[{letters}&&[^a-z]]", rf"[{letters}&&[^A-Z]]"
    lead, end = r"[^\r\n\p{L}\p{N}]?", rf"(?:{_ANY_CONTRACTION})?"
    return f"{lead}{upper}*{lower}+{end}|{lead}{upper}+{lower}*{end}"


_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_GPT4O = _cased(r"\p{L}") + rf"|\p{{N}}{{1,3}}|{_PATHS}|{_LINES}"
_GRANITE = _cased(r"\p{L}\p{M}") + rf"|\p{{N}}{{1,3}}|{_PATHS}|{_LINES}"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*"
    rf"|\p{{N}}|{_PATHS}|{_LINES}"
)
_MARKED = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+(?:{_ANY_CONTRACTION})?"

#: groups of three digits counted from the right; the text before a number stays with its first group
_DIGITS_FROM_RIGHT = (
    r"\P{N}*+(?:\p{N}+|\z)",
    r"\A\P{N}*+\p{N}{1,2}(?=(?:\p{N}{3})*+\z)|\A\P{N}*+\p{N}{3}|\p{N}{3}",
)

_HAN_KANA = r"[一-龥\u3040-\u30FF]+"
_HAN_HANGUL = r"[[\u0800-龥가-\uD7FF]&&\S]+"
_DEEPSEEK3_WORDS = r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK3 = rf"{_DEEPSEEK3_WORDS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}"
# The cased letters of the blocks that DeepSeek's own list names: without the newer or rarer ones.
_DEEPSEEK_LETTERS = (
    r"\s?[[\p{Lu}\p{Ll}\p{Lt}]&&[^\u0560-\u0588\u10C6-\u10FF\u1C80-\u1C8F\u2D00-\u2D2F\uA790-\uA7FF\uAB30-\uAB6F"
    r"\x{10570}-\x{105BF}\x{10D40}-\x{10D8F}\x{16E40}-\x{16E7F}\x{1D400}-\x{1D7CB}\x{1DF00}-\x{1DF2F}]]+"
)
_ASIAN = (
    r"[一-\u9FFF\u3400-\u4DBF\u8C48-\uFAFF\u3040-\u30FF\uFF65-\uFF9F\u2F00-\u2FDF\u0E40-\u0EFF\u1780-\u17FF"
    r"\u1000-\u109F\uAA60-\uAA7F\uA9E0-\uA9FF\uAC00-\uD7AF\u1100-\u11FF]+"
)
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"
_YOUTU_SCRIPTS = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _HAN_KANA

_ROWS: dict[str, Pre] = {
    "default": Pre((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en "
    "jina-v2-code roberta-bpe mpt olmo jais trillion granite-docling exaone4": Pre((_GPT2,)),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": Pre((r"\p{N}", _GPT2)),
    "falcon": Pre((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": Pre((_QWEN2,)),
    "qwen35": Pre((_QWEN35,)),
    "laguna": Pre((r"[^\n]+|\n+", _QWEN2)),
    "ufakzeka": Pre((rf"{_WORD}|\p{{N}}|{_SYMBOLS}|{_LINES}",)),
    "bailingmoe bailingmoe2 llada-moe": Pre((rf"{_ANY_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}|\s*[\r\n]|{_SPACES}",)),
    "seed-coder": Pre((rf"{_ANY_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}",)),
    "exaone-moe": Pre((_EXAONE_MOE,)),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": Pre(
        (_LLAMA3,), ignore_merges=True, add_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": Pre((_LLAMA3,)),
    "glm4 glm5": Pre((_LLAMA3,), ignore_merges=True),
    "jais-2": Pre((_JAIS2,)),
    "minicpm5": Pre((r"\p{N}{1,3}", rf"{_ANY_CONTRACTION}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_LINES}"), ignore_merges=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Pre((_GPT4O,)),
    "granite-embed-multi-97m": Pre((_GRANITE,), ignore_merges=True),
    "tekken": Pre((_TEKKEN,), ignore_merges=True, add_bos=True),
    "tiny_aya cohere2moe": Pre((*_DIGITS_FROM_RIGHT, rf"{_MARKED}|\p{{N}}{{1,3}}|{_PATHS}|{_LINES}")),
    "youtu": Pre((_YOUTU_SCRIPTS, rf"{_MARKED}|\p{{N}}|{_PATHS}|{_LINES}"), ignore_merges=True),
    "afmoe": Pre((*_DIGITS_FROM_RIGHT, _ASIAN, _DEEPSEEK3)),
    "deepseek-llm": Pre(
        (
            r"[\r\n]",
            _DEEPSEEK_LETTERS,
            r"\s?[!-/:-~！-／：-～‘-‟、。]+",
            r"\s+\z",
            _HAN_HANGUL,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Pre((r"\p{N}{1,3}", _HAN_KANA, _DEEPSEEK3)),
    "spark2_5": Pre(
        (
            r"\p{N}{1,3}",
            _HAN_KANA,
            rf"{_DEEPSEEK3_WORDS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACES}",
            r"\p{N}",
        )
    ),
    "bloom poro-chat gpt3-finnish": Pre((_BLOOM,)),
    "viking": Pre((_BLOOM, r"\p{N}")),
    "chameleon": Pre(
        (
            "<sentinel:[0-9]+>",
            "IMGIMG[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
}

#: `tokenizer.ggml.pre` to its patterns
PRE: dict[str, Pre] = {name: row for names, row in _ROWS.items() for name in names.split()}

#: names that exist, whose tokenizers are no byte-level BPE over words
UNSUPPORTED_PRE = frozenset({"gemma4", "granite-embed-multi-311m", "sarvam-moe", "kimi-k2", "superbpe", "whitespace"})
