"""What all engines share: what may be run, what may be asked, and edits that are undone exactly."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from tiny_models import NARROW, tiny_model

from ggufkit import reader
from ggufkit.errors import FormatError, NewerThanTool, Unsupported, UsageError
from ggufkit.runtime.engine import Edit, check_ids, element_edits, encode_float, runnable
from ggufkit.runtime.reference import ReferenceEngine
from ggufkit.runtime.weights import Weights

IDS = [72, 105, 257, 3]
BIAS = "blk.1.attn_v.bias"


@pytest.fixture
def gguf(tmp_path):
    with reader.open(tiny_model(tmp_path / "m.gguf", type="Q8_0")) as opened:
        yield opened


def logits(engine):
    return engine.forward(IDS, engine.new_cache(8), logits="all")


# --- what may be run -------------------------------------------------------------------------------------------


def drop(name):
    return lambda tensors: tensors.pop(name)


def cut(name):
    return lambda tensors: tensors.__setitem__(name, tensors[name][:-1])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"edit": drop("blk.1.attn_k.bias")}, FormatError, "'blk.1.attn_k.bias' is missing"),
        ({"edit": drop("output_norm.weight")}, FormatError, "'output_norm.weight' is missing"),
        ({"edit": cut("blk.0.ffn_up.weight")}, FormatError, r"'blk.0.ffn_up.weight' has the shape \(95, 64\)"),
        ({"edit": cut("blk.0.attn_q.bias")}, FormatError, r"expected \(64,\)"),
        ({"metadata": {"qwen2.attention.head_count": 8}}, FormatError, r"attn_k.weight.*expected \(16, 64\)"),
        ({"metadata": {"qwen2.attention.head_count": 3}}, FormatError, "cannot share"),
        ({"metadata": {"qwen2.rope.scaling.type": "yarn"}}, Unsupported, "yarn"),
        ({"arch": "llama"}, Unsupported, "'llama' is not modelled"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_run_is_refused_before_it_does(tmp_path, options, error, words):
    path = tiny_model(tmp_path / "m.gguf", **options)
    with reader.open(path) as opened, pytest.raises(error, match=words):
        runnable(opened)


def test_a_missing_head_is_a_tied_one(tmp_path):
    with reader.open(tiny_model(tmp_path / "m.gguf", edit=drop("output.weight"))) as opened:
        assert runnable(opened).tied


def test_a_truncated_file_is_refused_before_it_runs(tmp_path):
    path = tiny_model(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    with reader.open(path) as opened, pytest.raises(FormatError, match="leaves the file"):
        runnable(opened)


def test_an_unknown_type_is_newer_than_the_tool(tmp_path):
    path = tiny_model(tmp_path / "m.gguf")
    with reader.open(path) as opened:
        tensor = opened.tensors["blk.0.ffn_up.weight"]
        at = tensor.info_offset + 8 + len(tensor.name) + 4 + 16
    data = bytearray(path.read_bytes())
    assert data[at : at + 4] == struct.pack("<I", 0)
    data[at : at + 4] = struct.pack("<I", 99)
    path.write_bytes(data)
    with reader.open(path) as opened, pytest.raises(NewerThanTool, match="type 99"):
        runnable(opened)


# --- what may be asked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "no tokens"),
        ([NARROW.n_vocab], "outside the vocabulary"),
        ([-1], "-1 is outside"),
        ([1] * 9, "context of 8"),
    ],
    ids=["none", "too-large", "negative", "too-many"],
)
def test_impossible_requests_are_refused(gguf, ids, words):
    engine = ReferenceEngine(gguf)
    cache = engine.new_cache(8)
    with pytest.raises(UsageError, match=words):
        engine.forward(ids, cache)
    assert cache.length == 0


def test_a_full_cache_takes_nothing_more(gguf):
    engine = ReferenceEngine(gguf)
    cache = engine.new_cache(4)
    engine.forward(IDS, cache)
    with pytest.raises(UsageError, match="5 positions do not fit into a context of 4"):
        check_ids([1], cache, engine.config)


# --- edits -----------------------------------------------------------------------------------------------------

INSIDE_A_BLOCK = [Edit("blk.0.ffn_down.weight", 5, b"\x11\x22"), Edit("blk.0.ffn_down.weight", 300, b"\x01")]


@pytest.mark.parametrize("loaded", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize(
    "edits",
    [INSIDE_A_BLOCK, [Edit("token_embd.weight", 72 * 68 + 10, b"\x7f")], [Edit(BIAS, 0, b"\0\0\x80\x40")]],
    ids=["two-of-one-tensor", "embedding-row", "float"],
)
def test_edits_show_and_are_undone_exactly(gguf, edits, loaded):
    engine = ReferenceEngine(gguf)
    before = logits(engine) if loaded else None
    with engine.patched(edits):
        inside = logits(engine)
    after = logits(engine)
    assert not np.array_equal(inside, after)
    assert before is None or np.array_equal(before, after)


def test_edits_are_undone_after_an_error(gguf):
    engine = ReferenceEngine(gguf)
    before = logits(engine)
    with pytest.raises(FloatingPointError), engine.patched([Edit(BIAS, 0, b"\0\0\x80\x40")]):
        raise FloatingPointError(logits(engine))
    assert np.array_equal(before, logits(engine))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Edit("blk.9.attn_q.weight", 0, b"x"), "no tensor named"),
        (Edit(BIAS, 127, b"xx"), "leaves blk.1.attn_v.bias"),
        (Edit(BIAS, -1, b"x"), "leaves"),
    ],
    ids=["unknown", "beyond", "before"],
)
def test_impossible_edits_are_refused(gguf, edit, words):
    with pytest.raises(UsageError, match=words), ReferenceEngine(gguf).patched([edit]):
        pass


@pytest.mark.parametrize(
    ("type_name", "value", "expected"),
    [
        ("F32", -34.0, -34.0),
        ("F64", 0.1, 0.1),
        ("F16", 65504.0, 65504.0),
        ("F16", float("nan"), float("nan")),
        ("BF16", -14.4375, -14.4375),
        ("BF16", 1.00390625, 1.0),
        ("BF16", 1.01171875, 1.015625),
        ("BF16", float("inf"), float("inf")),
        ("BF16", float("-nan"), float("nan")),
    ],
)
def test_elements_are_set_as_their_type_rounds_them(tmp_path, type_name, value, expected):
    with reader.open(tiny_model(tmp_path / "m.gguf", type=type_name)) as opened:
        weights = Weights(opened)
        with weights.patched(element_edits(opened, "output.weight", {65: value})):
            np.testing.assert_equal(weights["output.weight"][1, 1], np.float32(expected))


@pytest.mark.parametrize(("type_name", "value"), [("F16", 65520.0), ("F32", 1e39), ("BF16", 3.4e38), ("BF16", 1e300)])
def test_a_value_too_large_for_its_type_is_refused(tmp_path, type_name, value):
    with reader.open(tiny_model(tmp_path / "m.gguf", type=type_name)) as opened:
        tensor = opened.tensors["output.weight"]
        with pytest.raises(UsageError, match="does not fit"):
            encode_float(tensor, value, "little")


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "F64"])
def test_the_other_byte_order_is_the_bytes_reversed(tmp_path, type_name):
    with reader.open(tiny_model(tmp_path / "m.gguf", type=type_name)) as opened:
        tensor = opened.tensors["output.weight"]
        assert encode_float(tensor, -1.7, "big") == encode_float(tensor, -1.7, "little")[::-1]


@pytest.mark.parametrize(
    ("name", "index", "words"),
    [(BIAS, 32, "no element 32"), (BIAS, -1, "no element -1"), ("output.weight", 0, "cannot be set one by one")],
)
def test_elements_that_cannot_be_set(gguf, name, index, words):
    with pytest.raises(UsageError, match=words):
        element_edits(gguf, name, {index: 1.0})
