"""Each rule on the tokenizer and on the chat template: what it finds in a damaged file, and that sound ones pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builder import TEMPLATE, File, array, boolean, model, vocabulary
from test_checks_metadata import Case

from ggufkit import checks
from ggufkit.findings import Report

K = "tokenizer.ggml."
TOKENS: list[str] = vocabulary()[K + "tokens"]
TYPES: list[int] = vocabulary()[K + "token_type"]
END = TOKENS.index("<|im_end|>")


def tokens(**changes: str) -> Callable[[File], object]:
    """Replace tokens: `tokens(t65="B")`."""
    texts = list(TOKENS)
    for place, text in changes.items():
        texts[int(place[1:])] = text
    return lambda file: file.set(K + "tokens", texts)


def types(start: int, kind: int, count: int = 1) -> Callable[[File], object]:
    return lambda file: file.set(K + "token_type", [*TYPES[:start], *[kind] * count, *TYPES[start + count :]])


def template(text: str) -> Callable[[File], object]:
    return lambda file: file.set("tokenizer.chat_template", text)


def spm(**changes: Any) -> Callable[[File], object]:
    """A SentencePiece vocabulary: <unk>, <s>, </s>, 256 bytes, a few pieces."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(f"▁{n}" for n in range(29))]
    keys: dict[str, Any] = {
        "model": "llama",
        "tokens": texts,
        "token_type": [2, 3, 3, *[6] * 256, *[1] * 29],
        "scores": [float(-n) for n in range(288)],
        "eos_token_id": 2,
        "bos_token_id": 1,
        "padding_token_id": 0,
        **changes,
    }

    def change(file: File) -> None:
        file.drop(K + "merges", K + "pre", "tokenizer.chat_template")
        for key, value in keys.items():
            if value is not None:
                file.set(K + key, value)

    return change


def qwen_vocabulary(**changes: Any) -> Callable[[File], object]:
    """As many tokens as Qwen2 has, with its end of text in its place."""
    texts = [
        *TOKENS[: END - 2],
        *(f"x{number}" for number in range(END - 2, 151_643)),
        *("<|endoftext|>", "<|im_start|>"),
    ]
    texts += ["<|im_end|>"]
    kinds = [1] * 151_643 + [3] * 3

    def change(file: File) -> None:
        file.tensors = []
        file.set(K + "tokens", array("string", texts)).set(K + "token_type", array("i32", kinds))
        file.set(K + "eos_token_id", 151_645).set(K + "padding_token_id", 151_643)
        for key, value in changes.items():
            file.set(K + key, value)

    return change


CASES = [
    Case("no tokenizer", lambda f: f.drop(*(k for k, _ in f.kv if str(k).startswith(K))), "T101", "error",
         K + "model", "no tokenizer"),
    Case("no tokens", lambda f: f.drop(K + "tokens"), "T101", "error", K + "tokens", "no tokens"),
    Case("another kind", lambda f: f.set(K + "model", "bert"), "T101", "info", K + "model", "'bert'"),
    Case("unknown kind", lambda f: f.set(K + "model", "quantumwords"), "T101", "info", K + "model", "'quantumwords'"),
    Case("unknown pattern", lambda f: f.set(K + "pre", "qwen99"), "T101", "info", K + "model", "'qwen99'"),
    Case("no pattern", lambda f: f.drop(K + "pre"), "T102", "warning", K + "pre", "missing"),
    Case("wrong pattern", qwen_vocabulary(pre="llama-bpe"), "T102", "warning", K + "pre", "'llama-bpe'"),
    Case("types too short", lambda f: f.set(K + "token_type", TYPES[:-5]), "T103", "error", K + "token_type",
         "283 entries"),
    Case("scores too long", lambda f: f.set(K + "scores", [0.5] * 290), "T103", "error", K + "scores", "290 entries"),
    Case("no types", lambda f: f.drop(K + "token_type"), "T104", "warning", K + "token_type", "missing"),
    Case("type 9", types(70, 9), "T104", "error", K + "token_type", "token 70 'F' has the type 9"),
    Case("type 0", types(70, 0), "T104", "error", K + "token_type", "has the type 0"),
    Case("EOS out of range", lambda f: f.set(K + "eos_token_id", 288), "T105", "error", K + "eos_token_id", "288"),
    Case("padding out of range", lambda f: f.set(K + "padding_token_id", 10**6), "T105", "error",
         K + "padding_token_id", "1,000,000"),
    Case("FIM out of range", lambda f: f.set(K + "fim_pre_token_id", 999), "T105", "error", K + "fim_pre_token_id",
         "999"),
    Case("no EOS", lambda f: f.drop(K + "eos_token_id"), "T106", "error", K + "eos_token_id", "loaders take 11"),
    Case("BOS wanted, none there", lambda f: f.set(K + "add_bos_token", True), "T106", "warning", K + "bos_token_id",
         "a BOS is wanted"),
    Case("EOS is a letter", lambda f: f.set(K + "eos_token_id", 70), "T107", "warning", K + "eos_token_id", "70 'F'"),
    Case("EOS is normal", types(END, 1), "T107", "warning", K + "eos_token_id", "of type normal"),
    Case("no merges", lambda f: f.drop(K + "merges"), "T108", "error", K + "merges", "missing"),
    Case("merges empty", lambda f: f.set(K + "merges", array("string", [])), "T108", "error", K + "merges", "empty"),
    Case("token damaged", tokens(t256="tj"), "T108", "error", K + "merges", "'th', which is no token"),
    Case("merge damaged", lambda f: f.set(K + "merges", ["t h", "he"]), "T108", "error", K + "merges", "no two parts"),
    Case("token twice", tokens(t70="E"), "T109", "error", K + "tokens", "69 and 70 are both 'E'"),
    Case("padding is normal", types(280, 1, 8), "T110", "warning", K + "token_type", "8 padding tokens"),
    Case("padding is user-defined", types(280, 4, 8), "T110", "info", K + "token_type", "8 padding tokens"),
    Case("BOS for Qwen", lambda f: f.set(K + "add_bos_token", boolean(1)), "T111", "warning", K + "add_bos_token",
         "no BOS"),
    Case("no letter F", tokens(t70="FF"), "T112", "error", K + "tokens", "0x46"),
    Case("no byte 41", spm(tokens=[f"▁{n}" for n in range(288)]), "T112", "error", K + "tokens", "bytes have no token"),
    Case("byte token without a byte", types(258, 6), "T113", "error", K + "tokens", "spells none"),
    Case("byte -1", lambda f: types(258, 6)(f) and tokens(t258="<0x-1>")(f), "T113", "error", K + "tokens", "<0x-1>"),
    Case("no scores", spm(scores=None), "T114", "error", K + "scores", "missing"),
    Case("NaN score", spm(scores=[float("nan")] + [1.0] * 287), "T114", "error", K + "scores", "token 0 is nan"),
    Case("equal scores", spm(scores=[0.0] * 288), "T114", "warning", K + "scores", "all 288 scores"),
    Case("no UTF-8", lambda f: f.set(K + "tokens", array("string", [b"\xff", *TOKENS[1:]])), "T115", "warning",
         K + "tokens", "no UTF-8"),
    Case("empty token", tokens(t281=""), "T115", "info", K + "tokens", "empty, first 281"),
    Case("EOS is the turn's start", qwen_vocabulary(eos_token_id=151_644), "T116", "warning", K + "eos_token_id",
         "<|im_start|>"),
    Case("no token at all", lambda f: f.set(K + "tokens", array("string", [])), "T199", "error", None, "is empty"),
    Case("no template", lambda f: f.drop("tokenizer.chat_template"), "C101", "warning", "tokenizer.chat_template",
         "'Tiny Qwen2 Instruct'"),
    Case("template empty", template(" "), "C101", "warning", "tokenizer.chat_template", "no chat template"),
    Case("template cut off", template(TEMPLATE[:-20]), "C102", "error", "tokenizer.chat_template", "template"),
    Case("template of parentheses", template("{{" + "(" * 6000 + ")" * 6000 + "}}"), "C102", "error",
         "tokenizer.chat_template", "deep"),
    Case("template endless", template("x" * 300_000), "C102", "error", "tokenizer.chat_template", "300,000"),
    Case("template with a foreign tag", template("{% banana %}"), "C102", "warning", "tokenizer.chat_template",
         "banana"),
    Case("template of another model", template(TEMPLATE.replace("im_start", "start_header_id")), "C103", "warning",
         "tokenizer.chat_template", "'<|start_header_id|>'"),
    Case("template with an extra marker", template(TEMPLATE + "<|thing|>"), "C103", "info", "tokenizer.chat_template",
         "'<|thing|>'"),
    Case("turn start is normal", types(END - 1, 1), "C103", "warning", "tokenizer.chat_template", "of type normal"),
    Case("end token damaged", tokens(**{f"t{END}": "<|im_enf|>"}), "C103", "warning", "tokenizer.chat_template",
         "'<|im_end|>'"),
    Case("BOS twice", lambda f: f.set(K + "add_bos_token", True).set(K + "bos_token_id",
         269) and template("{{bos_token}}" + TEMPLATE)(f),
         "C104", "info", "tokenizer.chat_template", "without adding BOS"),
    Case("uncommon filter", template(TEMPLATE + "{{ messages | xmlattr }}"), "C105", "info",
         "tokenizer.chat_template", "xmlattr"),
    Case("template is a file name", template("chat_template.jinja"), "C106", "warning", "tokenizer.chat_template",
         "the messages"),
    Case("EOS of the base model", lambda f: f.set(K + "eos_token_id", END - 2), "C107", "info", K + "eos_token_id",
         "'<|im_end|>'"),
]  # fmt: skip


def report(tmp_path: Path, damage: Callable[[File], object], **options: Any) -> Report:
    file = model()
    damage(file)
    return checks.run(file.write(tmp_path / "case.gguf"), **options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage_is_found_and_named(tmp_path: Path, case: Case) -> None:
    found = [f for f in report(tmp_path, case.damage, select=["T", "C"]).findings if f.code == case.code]
    assert found, f"{case.code} found nothing"
    assert case.place in {None, found[0].key, found[0].tensor}
    assert case.names in found[0].message
    assert str(found[0].severity) == case.severity


@pytest.mark.parametrize(
    "change",
    [spm(), qwen_vocabulary(), lambda file: file.set(K + "bos_token_id", 0xFFFF_FFFF)],
    ids=["SentencePiece", "Qwen2's vocabulary", "no BOS, said as -1"],
)
def test_sound_tokenizers_pass(tmp_path: Path, change: Callable[[File], object]) -> None:
    found = report(tmp_path, change, select=["T", "C"], ignore=["C101"]).findings
    assert found == ()


def test_an_unknown_tokenizer_is_newer_than_the_tool(tmp_path: Path) -> None:
    for key in ("model", "pre"):
        result = report(tmp_path, lambda file, key=key: file.set(K + key, "of-tomorrow"))
        assert (str(result.verdict), result.exit_code()) == ("newer-than-tool", 3)


def test_every_named_template_is_read(tmp_path: Path) -> None:
    key = "tokenizer.chat_template.tool_use"
    found = report(tmp_path, lambda file: file.set(key, "{% if %}"), select=["C"]).findings
    assert [(finding.code, finding.key) for finding in found] == [("C102", key)]


def test_a_template_is_never_run(tmp_path: Path) -> None:
    """One that would run for hours is judged at once."""
    text = "{% for a in range(10**9) %}{% for b in range(10**9) %}{{ messages }}{% endfor %}{% endfor %}"
    assert report(tmp_path, template(text), select=["C"]).findings == ()


def test_many_broken_merges_are_counted(tmp_path: Path) -> None:
    found = report(tmp_path, lambda file: file.set(K + "merges", ["qq zz"] * 40), select=["T108"]).findings
    assert len(found) == 6
    assert "40 of 40 merges" in found[-1].message
