"""The generation loop: when it ends, what it reuses, and that its numbers are what they say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import NARROW, tiny_model

from ggufkit import reader
from ggufkit.errors import NotFinite, UsageError
from ggufkit.runtime.engine import element_edits
from ggufkit.runtime.generate import Session, default_n_ctx, distinct, generate, repetition
from ggufkit.runtime.reference import REFERENCE, ReferenceEngine
from ggufkit.runtime.sampling import SamplingParams, log_sum_exp

IDS = [72, 105, 257, 3, 200]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    with reader.open(tiny_model(tmp_path_factory.mktemp("generate") / "m.gguf")) as opened:
        yield opened


@pytest.fixture
def engine(gguf):
    return ReferenceEngine(gguf)


class Counting(ReferenceEngine):
    """Remembers how many tokens each call ran, and whether it was watched."""

    def __init__(self, gguf):
        super().__init__(gguf)
        self.calls = []

    def forward(self, ids, cache, *, logits="last", tap=None):
        self.calls.append((len(ids), tap is not None))
        return super().forward(ids, cache, logits=logits, tap=tap)


def greedy(engine, ids, n):
    """The same without a cache: the whole sequence again for every token."""
    ids = list(ids)
    for _ in range(n):
        logits = engine.forward(ids, engine.new_cache(len(ids)))
        ids.append(int(np.argmax(logits[0])))
    return tuple(ids[-n:])


def test_greedy_tokens_are_the_argmax_of_whole_passes(engine):
    assert generate(engine, IDS, n_predict=12).finish().ids == greedy(engine, IDS, 12)


def test_tokens_come_one_by_one_and_the_summary_at_any_time(engine):
    answer = generate(engine, IDS, n_predict=9)
    first = next(answer)
    assert answer.summary.ids == (first.id,)
    assert answer.summary.stop == "interrupted"
    rest = [token.id for token in answer]
    assert answer.summary.ids == (first.id, *rest)
    assert answer.summary.stop == "length"


def test_ends_at_a_stop_token_which_is_not_part_of_the_answer(engine):
    said = greedy(engine, IDS, 6)
    end = next(token for token in said if token != said[0])
    got = generate(engine, IDS, n_predict=20, stop_ids={end}).finish()
    assert (got.stop, got.stop_id) == ("end of turn", end)
    assert got.ids == said[: said.index(end)]


@pytest.mark.parametrize(
    ("n_predict", "n_ctx", "n_said", "stop"),
    [
        (4, 64, 4, "length"),
        (0, 64, 0, "length"),
        (99, 9, 5, "context full"),
        (None, 5, 1, "context full"),
        (1, 5, 1, "length"),
    ],
)
def test_ends_at_the_length_or_where_the_context_is_full(engine, n_predict, n_ctx, n_said, stop):
    got = generate(engine, IDS, n_predict=n_predict, n_ctx=n_ctx).finish()
    assert (len(got.ids), got.stop, got.stop_id) == (n_said, stop, None)


@pytest.mark.parametrize(
    ("ids", "words"),
    [([], "no tokens"), ([1] * 9, "prompt has 9 tokens, the context 8 positions"), ([NARROW.n_vocab], "vocabulary")],
    ids=["none", "too-long", "outside"],
)
def test_impossible_prompts_are_refused(engine, ids, words):
    with pytest.raises(UsageError, match=words):
        generate(engine, ids, n_ctx=8, n_predict=1).finish()


def test_runs_nothing_more_than_it_needs(gguf):
    engine = Counting(gguf)
    generate(engine, IDS, n_predict=3).finish()
    assert engine.calls == [(4, False), (1, True), (1, False), (1, False)]


def test_long_prompts_run_in_pieces(gguf):
    engine = Counting(gguf)
    ids = [i % 250 for i in range(1100)]
    generate(engine, ids, n_predict=1, n_ctx=2000).finish()
    assert [n for n, _ in engine.calls] == [512, 512, 75, 1]


class Following(ReferenceEngine):
    """Says what `generate` asks for by itself, some tokens ahead of it."""

    def __init__(self, gguf):
        super().__init__(gguf)
        self.taken = 0

    def follow(self, token, cache, n, sampler):
        start, said = cache.length, []
        try:
            for _ in range(n):
                said.append(sampler(self.forward([token], cache)[0]))
                token = said[-1].id
                self.taken += 1
                yield said[-1]
        finally:
            cache.length = start + len(said)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.5, top_k=20, seed=3)], ids=str)
@pytest.mark.parametrize("n_predict", [0, 1, 2, 9, None])
def test_an_engine_that_follows_gives_the_same_answer(gguf, engine, params, n_predict):
    following = Following(gguf)
    expected = generate(engine, IDS, params, n_predict=n_predict, n_ctx=16).finish()
    got = generate(following, IDS, params, n_predict=n_predict, n_ctx=16).finish()
    assert (got.ids, got.stop, got.mean_logprob) == (expected.ids, expected.stop, expected.mean_logprob)
    assert following.taken == max(len(got.ids) - 1, 0)


def test_a_followed_answer_that_is_left_leaves_the_session_at_what_was_run(gguf, engine):
    session = Session(Following(gguf), 64)
    answer = generate(session.engine, IDS, n_predict=20, session=session)
    said = [next(answer).id for _ in range(4)]
    del answer
    assert session.ids == [*IDS, *said[:3]]
    assert session.cache.length == len(session.ids)
    again = generate(session.engine, [*IDS, *said], n_predict=3, session=session).finish()
    assert again.n_reused == len(IDS) + 3
    assert again.ids == greedy(engine, [*IDS, *said], 3)


def test_a_followed_answer_that_is_no_longer_finite_says_where(gguf):
    engine = Following(gguf)
    answer = generate(engine, IDS, n_predict=9, n_ctx=32)
    next(answer)
    with (
        engine.patched(element_edits(gguf, "blk.0.attn_norm.weight", {0: float("nan")})),
        pytest.raises(NotFinite, match="attn_norm-0"),
    ):
        next(answer)


# --- sessions --------------------------------------------------------------------------------------------------


def test_the_next_turn_runs_only_what_is_new(gguf):
    engine = Counting(gguf)
    session = Session(engine, 64)
    first = generate(engine, IDS, n_predict=4, session=session).finish()
    turn = [*IDS, *first.ids, 9, 8, 7]
    engine.calls.clear()
    got = generate(engine, turn, n_predict=3, session=session).finish()
    assert got.n_reused == len(IDS) + 3  # the last token said was never run
    assert [n for n, _ in engine.calls] == [3, 1, 1, 1]
    assert got.ids == greedy(ReferenceEngine(gguf), turn, 3)


@pytest.mark.parametrize(
    "turn", [IDS, IDS[:3], [*IDS[:2], 50, 51], [9, *IDS]], ids=["same", "shorter", "forked", "other"]
)
def test_a_changed_conversation_is_run_again_from_where_it_differs(engine, turn):
    session = Session(engine, 64)
    generate(engine, IDS, n_predict=4, session=session).finish()
    assert generate(engine, turn, n_predict=5, session=session).finish().ids == greedy(engine, turn, 5)


def test_a_session_survives_an_interrupted_answer(engine):
    session = Session(engine, 64)
    next(generate(engine, IDS, n_predict=9, session=session))
    assert session.cache.length == len(session.ids)
    assert generate(engine, IDS, n_predict=5, session=session).finish().ids == greedy(engine, IDS, 5)


@pytest.mark.parametrize(
    ("trained", "n_prompt", "n_predict", "n_ctx"),
    [(32768, 10, 100, 4096), (32768, 5000, 100, 5100), (2048, 10, None, 2048), (2048, 5000, 1, 2048)],
)
def test_the_usual_context(engine, trained, n_prompt, n_predict, n_ctx):
    assert default_n_ctx(replace(engine.config, n_ctx_train=trained), n_prompt, n_predict) == n_ctx


# --- numbers ---------------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_tokens_said(engine):
    params = SamplingParams(temperature=2.0, top_k=50, seed=4)
    got = generate(engine, IDS, params, n_predict=8).finish()
    logits = engine.forward([*IDS, *got.ids], engine.new_cache(32), logits="all")[len(IDS) - 1 : -1]
    expected = [row[token] - log_sum_exp(row) for row, token in zip(logits, got.ids, strict=True)]
    assert got.mean_logprob == pytest.approx(np.mean(expected), abs=1e-4)
    assert got.min_logprob == pytest.approx(min(expected), abs=1e-4)
    assert got.seed == 4


def test_padding_that_was_said_is_told(engine):
    said = greedy(engine, IDS, 6)
    got = generate(engine, IDS, n_predict=6, padding_ids={said[2]}).finish()
    assert got.padding == (said[2],) * said.count(said[2])


def test_rates_count_only_what_was_run(engine):
    got = generate(engine, IDS, n_predict=4).finish()
    assert got.prompt_rate > 0
    assert got.decode_rate > 0
    assert 0 < got.seconds_to_first < 60
    nothing = generate(engine, IDS, n_predict=0).finish()
    assert (nothing.decode_rate, nothing.seconds_to_first, nothing.mean_logprob) == (None, None, None)


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [([1, 2, 3, 4], 1, 1.0), ([1, 1, 1, 1], 1, 0.25), ([1, 2, 1, 2, 1], 2, 0.5), ([1, 2], 3, 1.0), ([], 1, 1.0)],
)
def test_distinct(ids, n, share):
    assert distinct(ids, n) == share


def test_repetition_is_near_one_in_a_loop_and_zero_in_prose():
    assert repetition(list(range(50))) == 0
    assert repetition([1, 2, 3] * 50) > 0.95


# --- finiteness ------------------------------------------------------------------------------------------------


def test_every_step_of_the_last_prompt_position_is_watched(engine):
    got = generate(engine, IDS, n_predict=2).finish()
    assert (got.steps_watched, got.not_finite) == (3 + 20 * NARROW.n_layer, None)
    assert generate(engine, IDS, n_predict=2, watch=False).finish().steps_watched == 0


def test_what_an_engine_launders_is_still_told(gguf):
    """An engine that turns NaN into 0 before its output says plausible things; the watch does not believe it."""

    def laundered(state):
        return np.nan_to_num(REFERENCE["ffn_inp"](state))

    def broken(state):
        made = REFERENCE["q_bias"](state)
        return np.where(state.positions[:, None] == 1, np.nan, made) if state.layer == 1 else made

    engine = ReferenceEngine(gguf, steps={**REFERENCE, "ffn_inp": laundered, "q_bias": broken})
    got = generate(engine, IDS[:2], n_predict=2).finish()
    assert got.stop == "length"
    assert got.not_finite.name == "q_bias-1"
    assert got.not_finite.position == 1


def test_logits_that_are_not_finite_name_the_step_that_made_them(gguf, engine):
    edits = element_edits(gguf, "blk.1.ffn_norm.weight", {3: math.nan})
    expected = r"\d+ are NaN and 0 infinite.* first step that is not finite is ffn_norm-1 at position 0 \(5 NaN"
    with engine.patched(edits), pytest.raises(NotFinite, match=expected):
        generate(engine, IDS, n_predict=2).finish()
