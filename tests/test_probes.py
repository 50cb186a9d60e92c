"""Probes on models whose answers are known: healthy ones, and ones with a known fault."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from tiny_models import NARROW, tiny_model

from ggufkit import reader
from ggufkit.errors import UsageError
from ggufkit.runtime import load, probes, texts
from ggufkit.runtime.engine import element_edits
from ggufkit.runtime.reference import REFERENCE, ReferenceEngine

IDS = [72, 105, 257, 3, 200, 17, 9, 9, 31]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    with reader.open(tiny_model(tmp_path_factory.mktemp("probes") / "m.gguf")) as opened:
        yield opened


@pytest.fixture(scope="module")
def engine(gguf):
    return ReferenceEngine(gguf)


def broken(gguf, **steps):
    return ReferenceEngine(gguf, steps={**REFERENCE, **steps})


class Oracle:
    """An engine that knows what comes next: at each position a fixed logit for `say(ids so far)`, 0 for all others."""

    def __init__(self, engine, say, certainty=20.0):
        self.config, self.name, self.dtype, self.device = engine.config, "oracle", "float32", "cpu"
        self._engine, self._say, self._certainty = engine, say, certainty

    def new_cache(self, n_ctx):
        self._seen = []
        return self._engine.new_cache(n_ctx)

    def forward(self, ids, cache, *, logits="last", tap=None):
        del self._seen[cache.length :]
        made = np.zeros((len(ids), self.config.n_vocab), np.float32)
        for row, token in enumerate(ids):
            self._seen.append(token)
            made[row, self._say(self._seen)] = self._certainty
        cache.length += len(ids)
        return made if logits == "all" else made[-1:]


# --- soundness -------------------------------------------------------------------------------------------------


def test_a_healthy_model_is_finite_everywhere(engine):
    assert probes.finite(engine, IDS) == probes.Finite(3 + 20 * NARROW.n_layer, None)


def test_the_first_step_that_is_not_finite_is_found(gguf, engine):
    with engine.patched(element_edits(gguf, "blk.1.attn_v.bias", {3: math.nan})):
        assert probes.finite(engine, IDS).first.name == "v_bias-1"


def test_a_healthy_cache_changes_nothing(engine):
    shift = probes.cache_consistency(engine, IDS)
    assert shift.positions == len(IDS)
    assert shift.max_abs < 1e-4
    assert shift.max_kl < 1e-8
    assert shift.top1 == 1


def only_the_current(state):
    kept = REFERENCE["keys"](state)
    return np.where(np.arange(len(kept))[:, None, None] < state.positions[0], 0, kept)


def test_a_cache_that_forgets_shows(gguf):
    shift = probes.cache_consistency(broken(gguf, keys=only_the_current), IDS)
    assert shift.mean_kl > 0.01


def test_determinism(gguf, engine):
    assert probes.determinism(engine, IDS) == probes.Determinism(identical=True, max_abs=0.0)
    rng = np.random.default_rng(0)
    noisy = broken(gguf, ffn_act=lambda s: REFERENCE["ffn_act"](s) * (1 + 1e-3 * rng.random()))
    result = probes.determinism(noisy, IDS)
    assert not result.identical
    assert 0 < result.max_abs < 1


def test_engines_of_one_model_agree(gguf, engine):
    shift = probes.agreement(engine, ReferenceEngine(gguf, np.float64), IDS)
    assert shift.max_abs < 2e-4
    assert abs(shift.delta_nats) < 1e-4
    assert shift.top1 == 1


def test_a_wrong_engine_disagrees(gguf, engine):
    shift = probes.agreement(broken(gguf, q_bias=lambda s: s["q_proj"]), engine, IDS)
    assert shift.mean_kl > 0.01
    assert shift.max_abs > 0.1


def test_attention_rows_of_a_healthy_model(engine):
    seen = probes.attention(engine, IDS)
    assert seen.rows == NARROW.n_layer * NARROW.n_head * len(IDS)
    assert seen.sum_error < 1e-6
    assert seen.future == 0
    assert seen.least >= 0


@pytest.mark.parametrize(
    ("step", "field", "least"),
    [
        (lambda s: np.exp(s["kq"] - s["kq"].max(-1, keepdims=True)) / 9, "future", 1e-3),
        (lambda s: REFERENCE["kq_soft_max"](s) * 0.9, "sum_error", 0.09),
        (lambda s: REFERENCE["kq_soft_max"](s) * np.nan, "sum_error", math.nan),
    ],
    ids=["no-mask", "not-normalized", "nan"],
)
def test_wrong_attention_shows(gguf, step, field, least):
    found = getattr(probes.attention(broken(gguf, kq_soft_max=step), IDS), field)
    assert math.isnan(found) if math.isnan(least) else found > least


def test_padding_that_gets_probability_shows(engine):
    pad = {285, 286, 287}
    never, always = (probes.padding(Oracle(engine, lambda seen, to=to: to), IDS, pad) for to in (5, 286))
    assert (never.ids, never.argmax, always.argmax) == (3, 0, len(IDS))
    assert never.most == pytest.approx(3 * math.exp(-20), rel=1e-3)
    assert always.mean == pytest.approx(1, abs=1e-5)


def test_without_padding_there_is_nothing_to_get(engine):
    assert probes.padding(engine, IDS, set()) == probes.Padding(0, 0.0, 0.0, 0)


# --- shifts ----------------------------------------------------------------------------------------------------


def test_shift_is_what_the_textbook_says():
    p, q = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]), np.array([[0.5, 0.3, 0.2], [0.5, 0.4, 0.1]])
    shift = probes.distribution_shift(np.log(p, dtype=np.float32) + 3, np.log(q, dtype=np.float32), [1])
    kl = (p * np.log(p / q)).sum(-1)
    assert (shift.mean_kl, shift.max_kl) == pytest.approx((kl.mean(), kl.max()), abs=1e-6)
    assert shift.top1 == 0.5
    assert shift.delta_nats == pytest.approx(math.log(0.2 / 0.3), abs=1e-6)
    assert shift.max_abs == pytest.approx(np.abs(np.log(p) + 3 - np.log(q)).max(), abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_run_that_is_not_finite_is_infinitely_far(bad):
    a = np.zeros((2, 3), np.float32)
    b = a.copy()
    b[1, 0] = bad
    shift = probes.distribution_shift(a, b, [0, 0])
    assert (shift.mean_kl, shift.max_kl, shift.top1, shift.delta_nats) == (math.inf, math.inf, 0.5, math.inf)


def test_nothing_changed_is_no_shift(engine):
    logits = probes.all_logits(engine, IDS)
    shift = probes.distribution_shift(logits, logits, IDS[1:])
    assert shift == probes.Shift(len(IDS), 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)


def test_an_edit_has_an_effect_and_leaves_none(gguf, engine):
    before = probes.all_logits(engine, IDS)
    edits = element_edits(gguf, "blk.0.attn_v.bias", {4: 50.0})
    effect = probes.effect_of(engine, edits, IDS)
    assert effect.mean_kl > 0.05
    assert effect == probes.effect_of(engine, edits, IDS, before)
    assert effect.delta_nats == pytest.approx(
        likelihood_with(engine, edits) - probes.likelihood(engine, IDS).nats, abs=1e-5
    )
    assert np.array_equal(probes.all_logits(engine, IDS), before)


def likelihood_with(engine, edits):
    with engine.patched(edits):
        return probes.likelihood(engine, IDS).nats


def test_a_slow_key_channel_of_all_keys_has_no_effect(gguf, engine):
    """The softmax does not see what shifts all scores of a row alike: why huge key biases are harmless."""
    name, slowest = "blk.1.attn_k.bias", NARROW.head_dim // 2 - 1
    slow = probes.effect_of(engine, element_edits(gguf, name, {slowest: 0.0}), IDS)
    fast = probes.effect_of(engine, element_edits(gguf, name, {0: -40.0}), IDS)
    assert slow.mean_kl < fast.mean_kl / 10


# --- ability ---------------------------------------------------------------------------------------------------


def test_likelihood_is_the_mean_over_predicted_tokens(engine):
    known = Oracle(engine, lambda seen: IDS[len(seen)] if len(seen) < 5 else 0, certainty=math.log(287.0))
    found = probes.likelihood(known, IDS)  # right with probability 1/2 four times, then wrong with 1/574
    assert found.tokens == 8
    assert found.nats == pytest.approx((4 * math.log(2) + 4 * math.log(574)) / 8, abs=1e-5)
    assert found.top1 == 0.5
    assert found.bits_per_byte is None


def test_bits_per_byte_charge_every_token(engine):
    guessing = Oracle(engine, lambda seen: 0, certainty=0.0)
    found = probes.text_likelihood(guessing, lambda text: list(text.encode()), "Grün!")
    assert found.bits_per_byte == pytest.approx(math.log2(NARROW.n_vocab))


def test_likelihood_does_not_depend_on_the_pieces(engine, monkeypatch):
    whole = probes.likelihood(engine, IDS)
    monkeypatch.setattr(probes.chunks, "__defaults__", (2,))
    pieces = probes.likelihood(engine, IDS)
    assert pieces.nats == pytest.approx(whole.nats, abs=1e-5)


@pytest.mark.parametrize("ids", [[], [5]])
def test_too_short_for_a_likelihood(engine, ids):
    with pytest.raises(UsageError, match="at least two tokens"):
        probes.likelihood(engine, ids)


def test_the_copy_probe_tells_a_copier_from_a_guesser(engine):
    def copier(seen):
        return next((seen[at + 1] for at in range(len(seen) - 1) if seen[at] == seen[-1]), 0)

    found = probes.copy(Oracle(engine, copier), n=20)
    assert found.second < 0.01 < 5 < found.first
    guess = probes.copy(Oracle(engine, lambda seen: 0, certainty=0), range(10, 40), n=50, seed=2)
    assert guess.gain == pytest.approx(0, abs=1e-5)
    assert guess.first == pytest.approx(math.log(NARROW.n_vocab), abs=1e-5)


@pytest.mark.parametrize(
    ("hour", "minute", "words"),
    [
        (7, 0, "seven o'clock"),
        (19, 5, "seven oh five"),
        (7, 42, "seven forty-two"),
        (0, 10, "twelve ten"),
        (12, 19, "twelve nineteen"),
        (13, 20, "one twenty"),
        (23, 59, "eleven fifty-nine"),
    ],
)
def test_minutes_in_words(hour, minute, words):
    assert probes.minute_in_words(hour, minute) == words


def test_every_minute_of_half_a_day_has_its_own_words():
    assert len({probes.minute_in_words(hour, minute) for hour in range(12) for minute in range(60)}) == 720


@pytest.mark.parametrize(("hour", "minute"), [(24, 0), (-1, 0), (5, 60), (5, -1)])
def test_no_such_minute(hour, minute):
    with pytest.raises(UsageError, match="no time of day"):
        probes.minute_in_words(hour, minute)


@pytest.mark.parametrize(
    ("answer", "words", "said"),
    [
        ("At Seven Forty-Two\nleaves fall", "seven forty-two", True),
        ("seven\nforty—two, still dark", "seven forty-two", True),
        ("It is seven o’clock.", "seven o'clock", True),
        ("seven forty-two", "seven forty-three", False),
        ("eleven oh five", "seven oh five", False),
        ("seven oh fives", "seven oh five", False),
        ("", "one ten", False),
    ],
)
def test_whether_an_answer_contains_the_words(answer, words, said):
    assert probes.contains(answer, words) is said


def test_the_nonce_is_asked_and_found(engine):
    asked = []
    reply = list(b"At seven oh five / rain")

    def encode(text):
        asked.append(text)
        return [1, 2, 3]

    def said(seen):
        return reply[len(seen) - 3] if len(seen) - 3 < len(reply) else 287

    found = probes.nonce(Oracle(engine, said), encode, lambda ids: bytes(ids).decode(), clock=(7, 5), stop_ids={287})
    assert asked == ['Write a haiku that contains the words "seven oh five".']
    assert (found.words, found.answer, found.said) == ("seven oh five", "At seven oh five / rain", True)
    assert found.generation.stop == "end of turn"
    other = probes.nonce(Oracle(engine, said), encode, lambda ids: bytes(ids).decode(), clock=(8, 5), stop_ids={287})
    assert not other.said


def test_the_nonce_is_the_current_minute(engine, monkeypatch):
    monkeypatch.setattr(time, "localtime", lambda: (2024, 2, 29, 16, 30, 0, 0, 0, 0))
    found = probes.nonce(engine, lambda text: [1, 2], str, n_predict=1)
    assert found.words == "four thirty"


# --- the texts, and a model that can read ----------------------------------------------------------------------


@pytest.mark.parametrize("text", [texts.PROSE, texts.CODE])
def test_the_texts_are_plain(text):
    assert text.isascii()
    assert text.endswith("\n")
    assert "\t" not in text
    assert "  \n" not in text


def test_the_short_prose_begins_the_prose():
    assert texts.PROSE.startswith(texts.SHORT_PROSE.rstrip("\n"))
    assert 150 < len(texts.SHORT_PROSE.split()) < 300
    compile(texts.CODE, "texts.CODE", "exec")


@pytest.fixture(scope="module")
def real(real_model):
    from ggufkit.tokenizer import Tokenizer

    with reader.open(real_model) as gguf:
        yield load(gguf, device="cpu"), Tokenizer.from_metadata(gguf.metadata)


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), [("SHORT_PROSE", 1.5), ("CODE", 0.5), ("CHINESE", 1.6)])
def test_a_real_model_finds_the_texts_likely(real, name, bits):
    engine, tokenizer = real
    found = probes.text_likelihood(engine, tokenizer.encode, getattr(texts, name))
    assert 0.1 < found.bits_per_byte < bits


@pytest.mark.real_model
@pytest.mark.slow
def test_a_real_model_copies(real):
    found = probes.copy(real[0], range(1000, 50_000))
    assert found.gain > 5
    assert found.second < 2
