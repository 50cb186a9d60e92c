"""Comparing traces: what is aligned with what, what counts as different, and where two first part."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_models import tiny_model

from ggufkit import reader
from ggufkit.compare import NOISE, compare
from ggufkit.runtime.record import Plan, record
from ggufkit.runtime.reference import REFERENCE, ReferenceEngine
from ggufkit.trace import Trace

IDS = [72, 105, 257, 3, 200, 17]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    with reader.open(tiny_model(tmp_path_factory.mktemp("compare") / "m.gguf")) as opened:
        yield opened


@pytest.fixture(scope="module")
def whole(gguf):
    return record(ReferenceEngine(gguf), Plan(IDS))


def faulty(gguf, step, change):
    """A trace of an engine with one step replaced."""
    return record(ReferenceEngine(gguf, steps={**REFERENCE, step: change}), Plan(IDS))


def row(comparison, name):
    return next(row for row in comparison.rows if row.name == name)


def of(values, **fields):
    """A trace of one step."""
    array = np.asarray(values, np.float32)
    return Trace({"embd": array}, tuple(range(len(array))), **{"dtype": "float32", **fields})


# --- healthy ---------------------------------------------------------------------------------------------------


def test_a_trace_is_the_same_as_itself(whole):
    result = compare(whole, whole)
    assert result.agree
    assert result.first is None
    assert {row.status for row in result.rows} == {"same"}
    assert (result.positions, result.notes) == ((0, 6), ())


@pytest.mark.parametrize(
    ("other", "notes"),
    [({"decode": True}, 1), ({"positions": range(2, 5)}, 0), ({"positions": range(5, 6), "decode": True}, 1)],
    ids=["decode", "some-positions", "one-decoded"],
)
def test_healthy_runs_of_one_model_agree(gguf, whole, other, notes):
    result = compare(record(ReferenceEngine(gguf, np.float64), Plan(IDS, **other)), whole)
    assert result.agree
    assert result.tolerance == NOISE["float64"] + NOISE["float32"]
    assert len(result.notes) == notes
    rows = other.get("positions", range(6))
    assert result.positions == (rows.start, rows.stop)
    assert len(result.rows) == len(whole.arrays)


def test_rounding_to_float16_is_noise_when_the_trace_says_so(gguf, whole):
    def halved(step):
        return lambda state: REFERENCE[step](state).astype(np.float16).astype(np.float32)

    rounded = {step: halved(step) for step in REFERENCE if step not in ("keys", "values", "kq", "kq_soft_max")}
    trace = record(ReferenceEngine(gguf, steps={**REFERENCE, **rounded}), Plan(IDS))
    assert not compare(trace, whole).agree
    assert compare(replace(trace, dtype="float16"), whole).agree


# --- different -------------------------------------------------------------------------------------------------


def without_bias(state):
    return state["q_proj"]


def off_by_one(state):
    state.positions = state.positions + 1
    try:
        return REFERENCE["q_rope"](state)
    finally:
        state.positions = state.positions - 1


def wrong_last_head(state):
    made = REFERENCE["kqv"](state).copy()
    made[2:, -16:] = 0
    return made


@pytest.mark.parametrize(
    ("step", "change", "layer", "position", "words"),
    [
        ("q_bias", without_bias, 0, 0, "every position"),
        ("q_rope", off_by_one, 0, 0, "every position"),
        ("kqv", lambda s: wrong_last_head(s) if s.layer == 1 else REFERENCE["kqv"](s), 1, 2, "positions 2 on"),
        ("ffn_out", lambda s: s["ffn_act"][:, :64], 0, 0, "every position"),
    ],
    ids=["q_bias", "q_rope", "kqv", "ffn_out"],
)
def test_the_first_step_that_differs_is_named(gguf, whole, step, change, layer, position, words):
    result = compare(faulty(gguf, step, change), whole)
    assert not result.agree
    assert (result.first.step, result.first.layer, result.first.position) == (step, layer, position)
    assert words in result.first.pattern
    assert result.first.error > 0.01
    assert row(result, "embd").status == "same"


@pytest.mark.parametrize("name", ["kq-0", "kq_soft_max-0"])
def test_scores_of_keys_to_come_are_not_compared(whole, name):
    changed = whole.arrays[name].copy()
    changed[2, :, 3:] = 99.0
    other = replace(whole, arrays={**whole.arrays, name: changed})
    assert compare(other, whole).agree
    changed[2, :, 2] = 99.0
    assert compare(other, whole).first.position == 2


def test_padded_keys_are_not_compared(whole):
    wider = {
        name: np.pad(whole.arrays[name], [(0, 0), (0, 0), (0, 250)], constant_values=7) for name in ("kq-0", "kq-1")
    }
    assert compare(replace(whole, arrays={**whole.arrays, **wider}), whole).agree


def test_positions_are_judged_one_by_one():
    """An error of a tenth at position 1 is nothing against position 0, which is a thousand times larger."""
    expected = np.ones((3, 8))
    expected[0] = 1000
    found = expected.copy()
    found[1] += 0.1
    result = compare(of(found), of(expected))
    assert (result.first.position, result.first.error) == (1, pytest.approx(0.1, rel=1e-5))


def test_a_row_says_how_far_and_where():
    expected = np.full((2, 3, 4), 2.0)
    found = expected.copy()
    found[1, 2, 3] = 3.0
    tested = row(compare(of(found), of(expected)), "embd")
    assert tested.status == "diverged"
    assert (tested.max_abs, tested.worst) == (1.0, (1, 2, 3))
    assert tested.error == pytest.approx(np.sqrt(1 / 12) / 2)
    assert tested.beyond == pytest.approx(1 / 24)
    lengths = np.linalg.norm(found) * np.linalg.norm(expected)
    assert tested.cosine == pytest.approx((found * expected).sum() / lengths)


@pytest.mark.parametrize(
    ("tolerance", "agree"),
    [
        ({"atol": 0.11}, True),
        ({"atol": 0.09}, False),
        ({"rtol": 0.011}, True),
        ({"rtol": 0.009}, False),
        ({"rtol": 0.005, "atol": 0.06}, True),
        ({"rtol": 0, "atol": 0}, False),
        ({}, False),
    ],
    ids=str,
)
def test_given_tolerances_are_of_elements(tolerance, agree):
    expected = np.full((2, 1000), 10.0)
    found = expected.copy()
    found[1, 7] = 10.1
    expected[0, 0] = found[0, 0] = 100.0
    result = compare(of(found, dtype="float64"), of(expected, dtype="float64"), **tolerance)
    assert result.agree is agree
    assert (result.tolerance is None) is bool(tolerance)


@pytest.mark.parametrize(
    ("found", "expected", "agree"),
    [
        (np.inf, np.inf, True),
        (np.nan, np.nan, True),
        (np.nan, 1.0, False),
        (1.0, np.nan, False),
        (np.inf, -np.inf, False),
        (np.inf, np.nan, False),
    ],
)
def test_what_is_not_finite_equals_only_itself(found, expected, agree):
    a, b = np.ones((2, 3)), np.ones((2, 3))
    a[1, 1], b[1, 1] = found, expected
    a[0, 0] += 1e-7
    assert compare(of(a), of(b)).agree is agree
    assert compare(of(a), of(b), atol=1e-3).agree is agree


# --- not comparable --------------------------------------------------------------------------------------------


def test_only_positions_before_the_tokens_part_are_compared(gguf, whole):
    other = record(ReferenceEngine(gguf), Plan([*IDS[:4], 9, 9, 9]))
    result = compare(other, whole)
    assert (result.tokens_differ_at, result.positions, result.first) == (4, (0, 4), None)
    assert {row.status for row in result.rows} <= {"same", "close"}
    assert not result.agree


def test_a_longer_prompt_agrees_on_what_both_hold(gguf, whole):
    result = compare(record(ReferenceEngine(gguf), Plan([*IDS, 9, 9])), whole)
    assert result.agree
    assert result.positions == (0, 6)


def test_other_shapes_are_told_not_compared(whole):
    other = replace(whole, arrays={**whole.arrays, "ffn_up-0": whole.arrays["ffn_up-0"].reshape(6, 2, 48)})
    result = compare(other, whole)
    assert row(result, "ffn_up-0").status == "shape"
    assert row(result, "ffn_up-0").shapes == ((6, 2, 48), (6, 96))
    assert result.first is None
    assert not result.agree


def test_traces_with_nothing_in_common_do_not_agree(gguf, whole):
    q, late = (
        record(ReferenceEngine(gguf), Plan(IDS, **o)) for o in ({"steps": ["q_rope"]}, {"positions": range(3, 6)})
    )
    embd = replace(whole, arrays={"embd": whole.arrays["embd"]})
    result = compare(q, embd)
    assert (result.rows, result.only_a, result.only_b, result.agree) == ((), ("q_rope-0", "q_rope-1"), ("embd",), False)
    early = replace(whole, arrays={"embd": whole.arrays["embd"][:2]})
    assert row(compare(late, early), "embd").status == "apart"


def test_what_else_differs_is_noted(whole):
    result = compare(replace(whole, model="aa", prompt="Hi"), replace(whole, model="bb"))
    assert result.notes == ("model: 'aa' against 'bb'",)
