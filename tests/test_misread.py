"""What went wrong between a prompt and its token ids."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model

from ggufkit import misread, reader
from ggufkit.conversation import Words, message

PROMPT = "the other one"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return Words.of(reader.open(tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")))


def prompt_ids(words: Words, system: str | None = None) -> list[int]:
    turns = [*([message("system", system)] if system else []), message("user", PROMPT)]
    return words.tokenizer.encode(words.render(turns))


def test_the_right_ids_are_no_mistake(words):
    assert misread.explain(words, PROMPT, None, prompt_ids(words)) is None
    assert misread.explain(words, PROMPT, "be kind", prompt_ids(words, "be kind")) is None


def ids_with(mistake: str, words: Words) -> list[int]:
    """The ids that an engine with this mistake runs."""
    encode, ids = words.tokenizer.encode, prompt_ids(words)
    text = words.render([message("user", PROMPT)])
    return {
        "bos_added": [11, *ids],
        "bos_missing": ids[1:],
        "token_appended": [*ids, ids[0]],
        "special_tokens_split": encode(text, parse_special=False),
        "trailing_newline_missing": encode(text[:-1]),
        "leading_space": encode(" " + text),
        "template_missing": encode(PROMPT),
        "generation_prompt_missing": encode(text[: text.rindex("<|im_start|>")]),
        "wrong_template": encode(f"[INST] {PROMPT} [/INST]"),
        "tokens_differ": [*ids[:4], 40, *ids[5:]],
    }[mistake]


@pytest.mark.parametrize(
    "mistake",
    [
        *("bos_added", "bos_missing", "token_appended", "special_tokens_split", "trailing_newline_missing"),
        *("leading_space", "template_missing", "generation_prompt_missing", "wrong_template", "tokens_differ"),
    ],
)
def test_a_mistake_is_named(words, mistake):
    found = misread.explain(words, PROMPT, None, ids_with(mistake, words))
    assert found is not None
    assert found.name == mistake
    assert found.expected != found.found


def test_a_missing_system_turn_is_named(words):
    found = misread.explain(words, PROMPT, "be kind", prompt_ids(words))
    assert found is not None
    assert found.name == "system_turn_missing"


def test_the_first_difference_is_shown_as_tokens(words):
    ids = prompt_ids(words)
    found = misread.explain(words, PROMPT, None, [*ids[:4], 40, *ids[5:]])
    assert found is not None
    assert found.position == 4
    assert found.expected[0] == words.tokenizer.decode([ids[4]])
    assert found.found[0] == words.tokenizer.decode([40])


@pytest.mark.real_model
def test_qwens_default_system_turn_is_missed(real_model):
    words = Words.of(reader.open(real_model))
    bare = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    found = misread.explain(words, PROMPT, None, words.tokenizer.encode(bare))
    assert found is not None
    assert found.name == "system_turn_missing"
