"""Which tokens each setting can choose, how often, and what is refused."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from ggufkit.errors import NotFinite, UsageError
from ggufkit.runtime.sampling import GREEDY, Sampler, SamplingParams, candidates, log_sum_exp

SHARES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
LOGITS = np.log(SHARES).astype(np.float32) + 3


@pytest.mark.parametrize(
    ("params", "left"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 99}, [1, 3, 4, 2, 0]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.64}, [1, 3]),
        ({"top_p": 0.66}, [1, 3, 4]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.999999}, [1, 3, 4, 2, 0]),
        ({"min_p": 0.49}, [1, 3, 4]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "top_p": 0.48}, [1, 3]),  # top-p is of what top-k left: 0.4 of 0.85 is 0.47
        ({"top_k": 3, "top_p": 0.46}, [1]),
        ({"top_k": 4, "min_p": 0.6}, [1, 3]),
        ({"top_p": 0.66, "min_p": 0.6}, [1, 3]),
    ],
    ids=str,
)
def test_what_the_filters_leave(params, left):
    kept = candidates(LOGITS, SamplingParams(temperature=1, **params))
    assert kept.tolist() == left


def test_filters_look_at_the_logits_before_the_temperature():
    for temperature in (0.1, 1.0, 10.0):
        assert candidates(LOGITS, SamplingParams(temperature, top_p=0.64)).tolist() == [1, 3]


@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_of_equal_tokens_the_smaller_id_comes_first(params):
    assert candidates(np.zeros(6, np.float32), SamplingParams(temperature=1, **params)).tolist() == [0, 1, 2]


def test_top_p_of_a_flat_distribution_keeps_its_share():
    kept = candidates(np.zeros(10_000, np.float32), SamplingParams(temperature=1, top_p=0.9))
    assert len(kept) == pytest.approx(9000, abs=1)


@given(st_numpy.arrays(np.float32, st.integers(1, 40), elements=st.floats(-50, 50, width=32)), st.data())
def test_filters_never_leave_nothing_and_keep_the_likeliest(logits, data):
    params = SamplingParams(
        temperature=1,
        top_k=data.draw(st.integers(0, 50)),
        top_p=data.draw(st.floats(1e-6, 1)),
        min_p=data.draw(st.floats(0, 1)),
    )
    kept = candidates(logits, params)
    assert len(kept)
    assert int(np.argmax(logits)) in kept
    assert len(set(kept.tolist())) == len(kept)
    assert logits[kept].min() >= np.sort(logits)[-len(kept)]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temperature": 1.0}, SHARES),
        ({"temperature": 2.0}, np.sqrt(SHARES)),
        ({"temperature": 0.5}, SHARES**2),
        ({"temperature": 1.0, "top_k": 2}, [0, 0.4, 0, 0.25, 0]),
        ({"temperature": 1.0, "min_p": 0.3}, [0, 0.4, 0, 0.25, 0.2]),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_their_probability(params, expected):
    n = 5_000
    sampler = Sampler(SamplingParams(seed=5, **params))
    drawn = Counter(sampler(LOGITS).id for _ in range(n))
    expected = np.array(expected) / np.sum(expected)
    for token, share in enumerate(expected):
        assert drawn[token] / n == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / n))


def test_a_seed_repeats_a_run_and_is_told_when_it_was_drawn():
    params = SamplingParams(temperature=1, seed=3)
    first, again = Sampler(params), Sampler(params)
    assert [first(LOGITS) for _ in range(20)] == [again(LOGITS) for _ in range(20)]
    drawn = Sampler(SamplingParams(temperature=1))
    ids = [drawn(LOGITS).id for _ in range(20)]
    repeated = Sampler(SamplingParams(temperature=1, seed=drawn.seed))
    assert ids == [repeated(LOGITS).id for _ in range(20)]


@pytest.mark.parametrize("temperature", [0.0, 1e-12], ids=["greedy", "nearly"])
def test_no_temperature_takes_the_likeliest(temperature):
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1))
    assert {sampler(LOGITS).id for _ in range(50)} == {1}


def test_greedy_needs_no_seed():
    assert Sampler().seed is None


def test_greedy_takes_the_first_of_equals():
    assert Sampler()(np.array([0, 2, 2, 1], np.float32)).id == 1


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=3, top_k=2, seed=1)], ids=["greedy", "drawn"])
def test_the_log_probability_is_the_unfiltered_one(params):
    choice = Sampler(params)(LOGITS)
    assert choice.logprob == pytest.approx(math.log(SHARES[choice.id]), abs=1e-6)


@pytest.mark.parametrize("logits", [[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0]], ids=str)
def test_extreme_logits_stay_finite(logits):
    with np.errstate(all="raise", under="ignore"):
        choice = Sampler(SamplingParams(temperature=0.7, seed=0))(np.array(logits, np.float32))
    assert choice.logprob == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_is_chosen_from_logits_that_are_not_finite(bad):
    logits = LOGITS.copy()
    logits[2] = bad
    with pytest.raises(NotFinite, match=r"of 5 logits \d are NaN and \d infinite"):
        Sampler()(logits)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 2},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_log_sum_exp_is_exact_enough():
    logits = np.random.default_rng(0).normal(0, 4, (3, 150_000)).astype(np.float32)
    exact = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    assert np.abs(log_sum_exp(logits) - exact).max() < 1e-6
