"""The first step that is not finite is found and named."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tiny_models import NARROW, Shape, tiny_model

from ggufkit import reader
from ggufkit.runtime.finite import FiniteWatch, first_not_finite
from ggufkit.runtime.reference import ReferenceEngine

IDS = [72, 105, 257, 3, 200]


def steps_of(n_layer):
    return 3 + 20 * n_layer


def damaged(path, tensor, index, value):
    return tiny_model(
        path, shape=Shape(n_layer=3), edit=lambda tensors: tensors[tensor].reshape(-1).__setitem__(index, value)
    )


@pytest.mark.parametrize(
    ("tensor", "index", "value", "step", "position"),
    [
        ("blk.1.attn_q.bias", 5, math.nan, "q_bias-1", 0),
        ("blk.1.attn_v.bias", 5, math.inf, "v_bias-1", 0),
        ("blk.2.ffn_norm.weight", 0, math.nan, "ffn_norm-2", 0),
        ("blk.0.ffn_down.weight", 7, -math.inf, "ffn_out-0", 0),
        ("output_norm.weight", 3, math.nan, "result_norm", 0),
        ("token_embd.weight", IDS[2] * NARROW.n_embd, math.nan, "embd", 2),
        ("blk.0.attn_k.bias", 0, 3e38, "kq-0", 1),  # finite itself; its product with a query is not
    ],
)
def test_the_first_step_that_is_not_finite_is_named(tmp_path, tensor, index, value, step, position):
    with reader.open(damaged(tmp_path / "m.gguf", tensor, index, value)) as opened:
        engine = ReferenceEngine(opened)
        spot, seen = first_not_finite(engine, IDS)
        assert (spot.name, spot.position, seen) == (step, position, steps_of(3))


def test_nothing_is_amiss_in_a_healthy_model(tmp_path):
    with reader.open(tiny_model(tmp_path / "m.gguf")) as opened:
        found = first_not_finite(ReferenceEngine(opened), [i % 250 for i in range(300)])
    assert found == (None, 3 * steps_of(NARROW.n_layer))  # in three pieces


def test_scores_of_keys_to_come_are_nobodys_input():
    watch = FiniteWatch(first_position=1)
    scores = np.zeros((2, 4, 3), np.float32)
    scores[0, :, 2] = np.nan
    watch("kq", 0, scores)
    assert watch.first is None
    scores[1, 2, 2] = np.inf
    watch("kq", 0, scores)
    assert str(watch.first) == "kq-0 at position 2 (0 NaN, 1 infinite)"
