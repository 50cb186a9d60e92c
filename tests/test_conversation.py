"""Text in, text out: turns, templates, and what makes an answer untrustworthy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import builder
import pytest

from ggufkit import reader
from ggufkit.container import GGUF
from ggufkit.conversation import Conversation, Words, message, problems
from ggufkit.errors import UsageError
from ggufkit.runtime import load
from ggufkit.runtime.finite import Spot
from ggufkit.runtime.generate import Generation

HEALTHY = Generation(
    n_prompt=3,
    n_reused=0,
    ids=(1, 2),
    stop="length",
    stop_id=None,
    mean_logprob=-0.5,
    min_logprob=-1.0,
    repetition=0.0,
    distinct=(1.0, 1.0, 1.0),
    padding=(),
    steps_watched=50,
    not_finite=None,
    seconds_to_first=0.1,
    prompt_rate=10.0,
    decode_rate=10.0,
    seed=0,
)


@pytest.fixture
def gguf(tmp_path: Path) -> Iterator[GGUF]:
    with reader.open(builder.model().write(tmp_path / "model.gguf")) as opened:
        yield opened


def said(talk: Conversation, text: str) -> str:
    return "".join(talk.say(text))


def test_the_template_makes_the_prompt(gguf: GGUF) -> None:
    talk = Conversation(load(gguf), Words.of(gguf), n_predict=4)
    answer = said(talk, "the owl")
    assert talk.reply is not None
    assert talk.reply.prompt == "<|im_start|>user\nthe owl<|im_end|>\n<|im_start|>assistant\n"
    assert talk.reply.prompt_ids == tuple(Words.of(gguf).tokenizer.encode(talk.reply.prompt))
    assert talk.reply.text == answer
    assert talk.messages == [message("user", "the owl"), message("assistant", answer)]


def test_a_second_turn_reuses_what_the_cache_holds(gguf: GGUF) -> None:
    talk = Conversation(load(gguf), Words.of(gguf), n_predict=2, n_ctx=128)
    said(talk, "one")
    first = talk.reply
    said(talk, "two")
    assert first is not None
    assert talk.reply is not None
    assert talk.reply.prompt.startswith(first.prompt)
    assert talk.reply.numbers.n_reused >= first.numbers.n_prompt


def test_the_answer_does_not_depend_on_the_cache(gguf: GGUF) -> None:
    talk = Conversation(load(gguf), Words.of(gguf), n_predict=3, n_ctx=128)
    said(talk, "one")
    second = said(talk, "two")
    afresh = Conversation(load(gguf), Words.of(gguf), n_predict=3, n_ctx=128, messages=talk.messages[:2])
    assert said(afresh, "two") == second


def test_raw_texts_are_joined(gguf: GGUF) -> None:
    talk = Conversation(load(gguf), Words.of(gguf, raw=True), n_predict=3, n_ctx=128)
    first = said(talk, "the owl ")
    said(talk, " and")
    assert talk.reply is not None
    assert talk.reply.prompt == "the owl " + first + " and"


def test_a_file_without_a_template_takes_the_text_as_it_is(tmp_path: Path) -> None:
    file = builder.model().drop("tokenizer.chat_template")
    with reader.open(file.write(tmp_path / "plain.gguf")) as gguf:
        words = Words.of(gguf)
        assert not words.templated
        assert words.render([message("user", "as it is")]) == "as it is"


def test_clear_keeps_the_system_message(gguf: GGUF) -> None:
    system = message("system", "be brief")
    talk = Conversation(load(gguf), Words.of(gguf), n_predict=1, n_ctx=128, messages=[system])
    said(talk, "one")
    talk.clear()
    assert talk.messages == [system]


def test_a_prompt_beyond_the_context_says_both_lengths(gguf: GGUF) -> None:
    talk = Conversation(load(gguf), Words.of(gguf, raw=True), n_ctx=4)
    with pytest.raises(UsageError, match=r"9 tokens.*4 positions"):
        talk.say("123456789")
    assert talk.messages == []


def test_an_answer_that_is_stopped_early_is_remembered(gguf: GGUF) -> None:
    talk = Conversation(load(gguf), Words.of(gguf), n_predict=8, n_ctx=128)
    pieces = talk.say("one")
    next(pieces)
    pieces.close()
    assert talk.reply is not None
    assert talk.reply.numbers.stop == "interrupted"
    assert len(talk.messages) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"not_finite": Spot("q_bias", 3, 0, 1, 0)}, "q_bias-3"),
        ({"padding": (290,)}, "padding"),
        ({"mean_logprob": -5.6629605}, "equally likely"),  # ln 288
        ({"mean_logprob": -5.60}, None),
        ({"mean_logprob": None}, None),
        ({"repetition": 0.9}, None),  # a small healthy model may well do that
    ],
)
def test_what_no_healthy_answer_has(change: dict[str, object], expected: str | None) -> None:
    found = problems(replace(HEALTHY, **change), n_vocab=288)  # type: ignore[arg-type]
    assert (expected is None and found == ()) or (expected is not None and expected in found[0])
