"""Dequantized tensors on demand: patched, unpatched, and row by row."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import tiny_model

from ggufkit import quants, reader
from ggufkit.runtime.engine import Edit, element_edits
from ggufkit.runtime.weights import Weights

BIAS = "blk.1.attn_v.bias"


@pytest.fixture
def gguf(tmp_path):
    with reader.open(tiny_model(tmp_path / "m.gguf", type="Q8_0")) as opened:
        yield opened


@pytest.mark.parametrize("keep", [False, True], ids=["forgets", "keeps"])
def test_a_tensor_is_its_dequantized_bytes(gguf, keep):
    weights, tensor = Weights(gguf, keep=keep), gguf.tensors["blk.0.ffn_down.weight"]
    expected = quants.dequantize(tensor.type, gguf.read(tensor)).reshape(64, 96)
    assert np.array_equal(weights[tensor.name], expected)
    assert (weights[tensor.name] is weights[tensor.name]) is keep
    assert tensor.name in weights
    assert "blk.9.ffn_down.weight" not in weights


@pytest.mark.parametrize("loaded", [False, True], ids=["unread", "read"])
def test_rows_are_rows_of_the_whole(gguf, loaded):
    weights, ids = Weights(gguf), [3, 0, 287, 3]
    whole = Weights(gguf)["token_embd.weight"]
    if loaded:
        weights["token_embd.weight"]
    assert np.array_equal(weights.rows("token_embd.weight", ids), whole[ids])


def test_patches_nest(gguf):
    weights = Weights(gguf)
    original = weights[BIAS].copy()
    with weights.patched(element_edits(gguf, BIAS, {0: 1.0, 1: 2.0})):
        with weights.patched(element_edits(gguf, BIAS, {1: 3.0})):
            assert weights[BIAS][:2].tolist() == [1.0, 3.0]
        assert weights[BIAS][:2].tolist() == [1.0, 2.0]
    assert np.array_equal(weights[BIAS], original)


@pytest.mark.parametrize("start", [0, 33, 34, 67, 68])
def test_an_edit_reaches_the_row_it_lies_in(gguf, start):
    """Rows of token_embd are 68 bytes here: two blocks of 34."""
    weights = Weights(gguf, keep=False)
    before, rows = weights.rows("token_embd.weight", [0, 1, 0]), None
    raw = gguf.read(gguf.tensors["token_embd.weight"], start, 1)
    with weights.patched([Edit("token_embd.weight", start, bytes([raw[0] ^ 0x15]))]):
        rows = weights.rows("token_embd.weight", [0, 1, 0])
    changed = [bool((a != b).any()) for a, b in zip(before, rows, strict=True)]
    assert changed == [start < 68, start >= 68, start < 68]
