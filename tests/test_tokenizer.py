"""Ids against llama.cpp's (golden files), special tokens, decoding and streaming, and damaged metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggufkit.reader
from ggufkit.errors import FormatError, GgufkitError, NewerThanTool, Unsupported, UsageError
from ggufkit.pretokenizers import PRE
from ggufkit.tokenizer import Tokenizer
from ggufkit.vocabulary import ID_KEYS, TokenType

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


TEXTS: dict[str, str] = golden("texts.json")
SMALL = golden("vocabulary.json")
BY_PRE = golden("tokens_pre.json")

N, C, U, X = TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED


def bpe(special: Mapping[str, TokenType] | None = None, **keys: Any) -> dict[str, Any]:
    """Metadata of the small byte-level vocabulary with more tokens at its end; `keys` without their prefix."""
    special = special or {}
    tokens = [*SMALL["bpe"]["tokens"], *special]
    types = [N] * len(SMALL["bpe"]["tokens"]) + list(special.values())
    values = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "merges": SMALL["bpe"]["merges"],
    } | keys
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def spm(**keys: Any) -> dict[str, Any]:
    """Metadata of the small SentencePiece vocabulary."""
    values = {
        "model": "llama",
        "tokens": SMALL["spm"]["tokens"],
        "token_type": np.array(SMALL["spm"]["types"], np.int32),
        "scores": np.array(SMALL["spm"]["scores"], np.float32),
    } | keys
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def texts_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_text(token) for token in ids]


# ---------------------------------------------------------------------- the same ids as llama.cpp


@pytest.mark.parametrize("pre", PRE)
def test_every_pre_tokenizer_gives_llama_cpps_ids(pre: str) -> None:
    wanted = next(row["ids"] for row in BY_PRE["bpe"] if pre in row["pre"])
    tokenizer = Tokenizer.from_metadata(bpe(pre=pre))
    got = {name: tokenizer.encode(text, parse_special=False, add_bos=False) for name, text in TEXTS.items()}
    assert got == wanted


def test_sentencepiece_gives_llama_cpps_ids() -> None:
    tokenizer = Tokenizer.from_metadata(spm())
    got = {name: tokenizer.encode(text, parse_special=False, add_bos=False) for name, text in TEXTS.items()}
    assert got == BY_PRE["spm"]


@pytest.mark.real_model
@pytest.mark.parametrize(("fixture", "file"), [("real_model", "qwen2"), ("smol_model", "smollm")])
def test_a_real_vocabulary_gives_llama_cpps_ids(fixture: str, file: str, request: pytest.FixtureRequest) -> None:
    wanted = golden(f"tokens_{file}.json")
    with ggufkit.reader.open(request.getfixturevalue(fixture)) as gguf:
        tokenizer = Tokenizer.from_metadata(gguf.metadata)
        for kind, parse_special in (("plain", False), ("special", True)):
            got = {name: tokenizer.encode(text, parse_special=parse_special) for name, text in TEXTS.items()}
            assert got == wanted[kind]
            assert {name: tokenizer.decode(ids) for name, ids in got.items()} == TEXTS
        facts = {name: getattr(tokenizer, name) for name in ("n_vocab", "bos_id", "eos_id", "add_bos")}
        assert facts == {name: wanted[name] for name in facts}
        assert sorted(tokenizer.stop_ids) == wanted["stop_ids"]


@pytest.mark.real_model
def test_the_real_qwen_file_pads_its_vocabulary(real_model: Path) -> None:
    with ggufkit.reader.open(real_model) as gguf:
        tokenizer = Tokenizer.from_metadata(gguf.metadata)
    assert tokenizer.padding_ids == set(range(151665, 151936))
    assert tokenizer.token_text(151936 - 1) == "[PAD151935]"
    assert texts_of(tokenizer, sorted(tokenizer.stop_ids))[1:3] == ["<|endoftext|>", "<|im_end|>"]


# ---------------------------------------------------------------------- special tokens


@pytest.mark.parametrize(
    ("special", "text", "parsed", "plain"),
    [
        ({"<|im_end|>": C}, "a<|im_end|>b", "a <|im_end|> b", "a < | i m _ e n d | > b"),
        ({"<tool>": U}, "a<tool>b", "a <tool> b", "a <tool> b"),
        ({"<x>": C, "<x><x>": C}, "<x><x><x>", "<x><x> <x>", "< x > < x > < x >"),
        ({"ab": C, "bcd": C}, "abcd", "a bcd", "a b c d"),  # the longest first, not the leftmost
        ({"<|im_end|>": N}, "<|im_end|>", "<|im_end|>", "< | i m _ e n d | >"),  # its text says that it ends a turn
        ({"<pad>": X}, "<pad>", "< p a d >", "< p a d >"),
    ],
)
def test_special_tokens(special: dict[str, TokenType], text: str, parsed: str, plain: str) -> None:
    tokenizer = Tokenizer.from_metadata(bpe(special, merges=[]))
    assert texts_of(tokenizer, tokenizer.encode(text)) == parsed.split()
    assert texts_of(tokenizer, tokenizer.encode(text, parse_special=False)) == plain.split()


def test_phi_3_special_tokens_swallow_the_white_space_after_them() -> None:
    metadata = bpe({"<|user|>": C, "<s>": C}, merges=[]) | {"general.name": "Phi-3 mini"}
    tokenizer = Tokenizer.from_metadata(metadata)
    ids = tokenizer.encode("<|user|> \n<|user|>a<s> b")
    assert texts_of(tokenizer, ids) == ["<|user|>", "<|user|>", "a", "<s>", "Ġ", "b"]


def test_bos_is_added_when_the_file_says_so_or_the_caller() -> None:
    special = {"<s>": C}
    bos = len(SMALL["bpe"]["tokens"])
    silent = Tokenizer.from_metadata(bpe(special, bos_token_id=bos))
    saying = Tokenizer.from_metadata(bpe(special, bos_token_id=bos, add_bos_token=True))
    llama3 = Tokenizer.from_metadata(bpe(special, bos_token_id=bos, pre="llama-bpe"))
    assert [t.encode("")[:1] for t in (silent, saying, llama3)] == [[], [bos], [bos]]
    assert silent.encode("", add_bos=True) == [bos]
    assert saying.encode("", add_bos=False) == []


def test_a_bos_that_the_file_does_not_name_is_an_error() -> None:
    tokenizer = Tokenizer.from_metadata(bpe(add_bos_token=True))
    with pytest.raises(FormatError, match="bos_token_id"):
        tokenizer.encode("x")


@pytest.mark.parametrize(
    ("special", "keys", "stops"),
    [
        ({}, {}, []),
        ({"<|im_end|>": C, "<|endoftext|>": C, "<|im_start|>": C}, {}, ["<|im_end|>", "<|endoftext|>"]),
        ({"<end_of_turn>": U, "<eos>": C}, {}, ["<end_of_turn>", "<eos>"]),
        ({"<stop>": C}, {"eos_token_id": "<stop>"}, ["<stop>"]),
        ({"<stop>": C, "<|eot_id|>": C}, {"eot_token_id": "<stop>"}, ["<stop>", "<|eot_id|>"]),
        ({"<|fim_pad|>": U, "<|fim_prefix|>": U, "<|file_sep|>": U}, {}, ["<|fim_pad|>", "<|file_sep|>"]),
        ({"<|end|>": C, "<|return|>": C, "<|call|>": C}, {}, ["<|return|>", "<|call|>"]),
        ({"<|end|>": C, "<|user|>": C}, {}, ["<|end|>"]),
        ({"</s>": N, "<|tool_response>": C}, {}, ["<|tool_response>"]),
    ],
)
def test_what_ends_an_answer(special: dict[str, TokenType], keys: dict[str, str], stops: list[str]) -> None:
    position = {text: len(SMALL["bpe"]["tokens"]) + i for i, text in enumerate(special)}
    metadata = bpe(special, **{key: position[text] for key, text in keys.items()})
    assert Tokenizer.from_metadata(metadata).stop_ids == {position[text] for text in stops}


def test_padding_is_what_is_unused_or_called_so() -> None:
    tokenizer = Tokenizer.from_metadata(bpe({"[PAD7]": N, "[PADDED]": N, "<unused>": X}))
    assert texts_of(tokenizer, sorted(tokenizer.padding_ids)) == ["[PAD7]", "<unused>"]


def test_an_empty_token_matches_nothing() -> None:
    tokenizer = Tokenizer.from_metadata(bpe({"": C}))
    assert tokenizer.decode(tokenizer.encode("ab c")) == "ab c"
    assert tokenizer.token_text(tokenizer.n_vocab - 1) == f"[EMPTY_{tokenizer.n_vocab - 1}]"


# ---------------------------------------------------------------------- decoding

BPE, SPM = Tokenizer.from_metadata(bpe({"<|im_end|>": C})), Tokenizer.from_metadata(spm())


@given(st.text(st.characters(codec="utf-8")))
@settings(max_examples=300, deadline=None)
def test_decoding_inverts_encoding(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text
    # SentencePiece spells a space with a character that therefore comes back as a space
    spelled = SPM.encode(text, parse_special=False)
    assert SPM.decode(spelled, skip_special=True) == text.replace("▁", " ")


@given(st.lists(st.integers(0, BPE.n_vocab - 1)))
@settings(deadline=None)
def test_a_stream_says_what_decode_says(ids: list[int]) -> None:
    stream = BPE.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == BPE.decode(ids)


def test_a_stream_holds_back_half_a_character() -> None:
    ids = [SMALL["bpe"]["tokens"].index(letter) for letter in "ðŁ¦Ļa"]  # the four bytes of a llama, and an a
    stream = BPE.stream()
    assert [stream.push(token) for token in ids] == ["", "", "", "🦙", "a"]
    assert stream.flush() == ""


def test_a_stream_replaces_what_never_became_a_character() -> None:
    first, letter = (SMALL["bpe"]["tokens"].index(text) for text in "ða")
    stream = BPE.stream()
    assert [stream.push(first), stream.push(letter), stream.push(first)] == ["", "\ufffda", ""]
    assert [stream.flush(), stream.flush()] == ["\ufffd", ""]


def test_special_tokens_can_be_left_out_of_the_text() -> None:
    ids = BPE.encode("ab<|im_end|>c")
    stream = BPE.stream(skip_special=True)
    assert BPE.decode(ids) == "ab<|im_end|>c"
    assert BPE.decode(ids, skip_special=True) == "".join(map(stream.push, ids)) == "abc"


@pytest.mark.parametrize(
    ("tokenizer", "text", "data"),
    [
        (BPE, "Ġ", b" "),
        (BPE, "<|im_end|>", b"<|im_end|>"),
        (BPE, "Ċ", b"\n"),
        (SPM, "<0x0A>", b"\n"),
        (SPM, "▁a", b" a"),
        (SPM, "</s>", b"</s>"),
        (Tokenizer.from_metadata(bpe({"日本": N})), "日本", "日本".encode()),  # not spelled in bytes
        (Tokenizer.from_metadata(bpe({"\udcff": N})), "\udcff", b"\xff"),  # no UTF-8 in the file
        (Tokenizer.from_metadata(bpe({"<0x-1>": TokenType.BYTE})), "<0x-1>", b"<0x-1>"),
    ],
)
def test_token_bytes(tokenizer: Tokenizer, text: str, data: bytes) -> None:
    token = tokenizer.id_of(text)
    assert token is not None
    assert tokenizer.token_bytes(token) == data


@pytest.mark.parametrize("token", [-1, BPE.n_vocab])
def test_an_id_outside_the_vocabulary_is_refused(token: int) -> None:
    for use in (BPE.token_text, BPE.token_bytes, BPE.is_special, BPE.stream().push, lambda i: BPE.decode([i])):
        with pytest.raises(UsageError, match="outside the vocabulary"):
            use(token)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(UsageError, match=r"character 2 .* U\+D83E"):
        BPE.encode("ab\ud83e")


# ---------------------------------------------------------------------- damaged metadata

LAST = len(SMALL["bpe"]["tokens"]) - 1


@pytest.mark.parametrize(
    ("metadata", "error", "words"),
    [
        ({}, Unsupported, "tokenizer.ggml.model is missing"),
        (bpe(model=3), FormatError, "tokenizer.ggml.model is a int"),
        (bpe(model="bert"), Unsupported, "'bert'"),
        (bpe(model="quantum"), NewerThanTool, "'quantum'"),
        (bpe(pre="of-tomorrow"), NewerThanTool, "'of-tomorrow'"),
        (bpe(pre="kimi-k2"), Unsupported, "'kimi-k2'"),
        (bpe(pre=["qwen2"]), FormatError, "tokenizer.ggml.pre is a list"),
        (bpe(tokens=None), FormatError, "tokenizer.ggml.tokens is missing"),
        (bpe(tokens=[]), FormatError, "tokenizer.ggml.tokens is empty"),
        (bpe(tokens=["a", 7]), FormatError, "tokenizer.ggml.tokens is a list"),
        (bpe(tokens=np.zeros(3)), FormatError, "tokenizer.ggml.tokens is an array of float64"),
        (bpe(token_type=np.zeros(LAST + 1, np.uint8)), FormatError, "token_type is an array of uint8"),
        (bpe(token_type=np.zeros(LAST, np.int32)), FormatError, f"token_type has {LAST:,} values"),
        (bpe(token_type=np.zeros((LAST + 1, 1), np.int32)), FormatError, "token_type has"),
        (bpe(token_type=3), FormatError, "token_type is a int"),
        (bpe(add_bos_token=1), FormatError, "add_bos_token is a int"),
        (bpe(eos_token_id=True), FormatError, "eos_token_id is a bool"),
        (bpe(eos_token_id=1.0), FormatError, "eos_token_id is a float"),
        (bpe(merges=None), FormatError, "merges is missing"),
        (bpe(merges="a b"), FormatError, "merges is a str"),
        (bpe(merges=["a b", "ab"]), FormatError, "merge 1 of tokenizer.ggml.merges is 'ab'"),
        (bpe(merges=["a "]), FormatError, "merge 0"),
        (bpe(merges=["i n", "q zz"]), FormatError, "merge 1 of .*'q zz', needs 'zz'"),
        (bpe(merges=["ÿ ÿ"]), FormatError, "merge 0 .* needs 'ÿÿ'"),
        (bpe(merges=["a \udcff"]), FormatError, "merge 0 .*udcff"),
        (spm(scores=None), FormatError, "scores is missing"),
        (spm(scores=np.zeros(5, np.float32)), FormatError, "scores has 5 values"),
        (spm(scores=np.zeros(10_000, np.int8)), FormatError, "scores is an array of int8"),
        (spm(scores=np.full(10_000, np.nan, np.float32)), FormatError, r"scores\[0\] is NaN"),
        (spm(add_space_prefix="yes"), FormatError, "add_space_prefix is a str"),
    ],
)
def test_damage_is_named(metadata: dict[str, Any], error: type[GgufkitError], words: str) -> None:
    with pytest.raises(error, match=words):
        Tokenizer.from_metadata(metadata).encode("x")


@pytest.mark.parametrize("key", ID_KEYS)
def test_every_id_is_checked_against_the_vocabulary(key: str) -> None:
    for outside in (LAST + 1, 2**32 - 2, -7):
        with pytest.raises(FormatError, match=f"{key} is {outside}"):
            Tokenizer.from_metadata(bpe() | {key: outside})
    Tokenizer.from_metadata(bpe() | {key: LAST})
    Tokenizer.from_metadata(bpe() | {key: 2**32 - 1})  # -1: there is no such token


def test_default_ids_outside_a_tiny_vocabulary_are_dropped() -> None:
    tiny = spm(tokens=["<unk>", "a"], token_type=np.array([2, 1], np.int32), scores=np.zeros(2, np.float32))
    tokenizer = Tokenizer.from_metadata(tiny)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, None)
    with pytest.raises(FormatError, match="no token for the byte 0xE2"):
        tokenizer.encode("é", add_bos=False)


def test_broken_merges_do_not_hinder_decoding() -> None:
    tokenizer = Tokenizer.from_metadata(bpe(merges=["nonsense"]))
    assert tokenizer.decode([SMALL["bpe"]["tokens"].index("a")]) == "a"


def test_of_equal_merges_the_first_counts() -> None:
    repeated = [*SMALL["bpe"]["merges"], *SMALL["bpe"]["merges"][::-1]]
    text = TEXTS["prose"]
    assert Tokenizer.from_metadata(bpe(merges=repeated)).encode(text) == BPE.encode(text)


def test_unknown_types_count_as_undefined() -> None:
    types = np.full(LAST + 1, 77, np.int32)
    assert set(Tokenizer.from_metadata(bpe(token_type=types)).types.tolist()) == {TokenType.UNDEFINED}
