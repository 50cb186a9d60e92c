"""Trace files: the contract in both directions, and files that are none."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from ggufkit import reader, trace
from ggufkit.errors import GgufkitError, NewerThanTool, SourceError, TraceError
from ggufkit.runtime.record import Plan, record
from ggufkit.runtime.reference import ReferenceEngine

IDS = [72, 105, 257, 3, 200, 17]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    with reader.open(tiny_model(tmp_path_factory.mktemp("trace") / "m.gguf")) as opened:
        yield opened


@pytest.fixture(scope="module")
def engine(gguf):
    return ReferenceEngine(gguf)


@pytest.fixture(scope="module")
def whole(engine):
    return record(engine, Plan(IDS))


def stored(path, arrays, **metadata):
    safetensors.numpy.save_file(arrays, path, {key: str(value) for key, value in metadata.items()})
    return path


def same(a, b):
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


# --- the file --------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(whole, tmp_path):
    whole.save(tmp_path / "t.safetensors")
    loaded = trace.load(tmp_path / "t.safetensors")
    assert same(loaded.arrays, whole.arrays)
    assert loaded.metadata() == whole.metadata()
    assert loaded.unknown == ()


def test_the_safetensors_library_reads_it(whole, tmp_path):
    path = tmp_path / "t.safetensors"
    whole.save(path)
    read = safetensors.numpy.load_file(path)
    assert {name: (a.dtype, a.shape) for name, a in read.items()} == {
        name: (np.dtype(np.float32), a.shape) for name, a in whole.arrays.items()
    }
    assert np.array_equal(read["q_rope-1"], whole.arrays["q_rope-1"])


def test_the_digest_is_of_the_header_alone(gguf, tmp_path):
    header = gguf.path.read_bytes()[: gguf.shards[0].header_end]
    assert trace.model_digest(gguf) == hashlib.sha256(header).hexdigest()
    other = tiny_model(tmp_path / "m.gguf", seed=1)
    with reader.open(other) as opened:
        assert trace.model_digest(opened) == trace.model_digest(gguf)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("F16", np.float16), ("F64", np.float64), ("F32", np.float32)],
)
def test_other_floats_become_float32(tmp_path, dtype, bits):
    values = np.array([[1.5, -0.1], [65504, 0]], bits)
    loaded = trace.load(stored(tmp_path / "t", {"embd": values}, token_ids="[1, 2]"))
    assert loaded.arrays["embd"].dtype == np.float32
    assert np.array_equal(loaded.arrays["embd"], values.astype(np.float32))


def test_bfloat16_is_read(tmp_path):
    header = {
        "__metadata__": {"token_ids": "[7]"},
        "embd": {"dtype": "BF16", "shape": [1, 3], "data_offsets": [0, 6]},
    }
    data = np.array([1.5, -3.0, np.inf], np.float32).view(np.uint32) >> 16
    (tmp_path / "t").write_bytes(packed(header, data.astype("<u2").tobytes()))
    assert trace.load(tmp_path / "t").arrays["embd"].tolist() == [[1.5, -3.0, np.inf]]


def test_a_float64_beyond_float32_is_infinite(tmp_path):
    loaded = trace.load(stored(tmp_path / "t", {"embd": np.array([[1e300]])}, token_ids="[1]"))
    assert loaded.arrays["embd"][0, 0] == np.inf


def test_a_foreign_trace_needs_only_its_tokens(tmp_path):
    arrays = {"l_out-3": np.ones((2, 4), np.float32), "embd": np.ones((2, 4), np.float32)}
    loaded = trace.load(stored(tmp_path / "t", arrays, token_ids="[5, 6]"))
    assert list(loaded.arrays) == ["embd", "l_out-3"]
    assert (loaded.token_ids, loaded.first_position, loaded.mode) == ((5, 6), 0, "prefill")
    assert (loaded.engine, loaded.dtype, loaded.prompt, loaded.model) == (None, None, None, None)


def test_names_of_no_step_are_told_apart(tmp_path):
    arrays = {name: np.ones((1, 2), np.float32) for name in ("embd", "embd-0", "blk.0.out", "q_rope", "l_out-01")}
    loaded = trace.load(stored(tmp_path / "t", arrays | {"ids": np.array([1])}, token_ids="[1]"))
    assert list(loaded.arrays) == ["embd"]
    assert loaded.unknown == ("blk.0.out", "embd-0", "ids", "l_out-01", "q_rope")


def packed(header, data=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


EMBD = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}


def tokens(text, **more):
    return packed({"__metadata__": {"token_ids": text, **more}, "embd": EMBD}, b"\0" * 4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no safetensors"),
        (b"GGUF" + b"\0" * 60, "no safetensors"),
        (struct.pack("<Q", 1 << 60) + b"{}", "no safetensors"),
        (packed({"embd": EMBD}, b"\0" * 3), "no safetensors"),
        (packed({"embd": {**EMBD, "shape": [1 << 40, 1 << 40]}}, b"\0" * 4), "no safetensors"),
        (packed({"embd": EMBD}, b"\0" * 4), "no token_ids"),
        (tokens(""), "token_ids is ''"),
        (tokens("[]"), "token_ids"),
        (tokens("5"), "token_ids"),
        (tokens("[1.5]"), "token_ids"),
        (tokens("[true]"), "token_ids"),
        (tokens("[-1]"), "token_ids"),
        (tokens("[99999999999]"), "token_ids"),
        (tokens("[" + "9" * 5000 + "]"), "token_ids"),
        (tokens("[" * 100_000), "token_ids"),
        (tokens("[1]", first_position="1"), "first_position is '1'.*expected a position from 0 to 0"),
        (tokens("[1]", first_position="-1"), "first_position"),
        (tokens("[1]", first_position="²"), "first_position"),
        (tokens("[1]", first_position="9" * 5000), "first_position"),
        (tokens("[1]", mode="both"), "mode is 'both'"),
        (
            packed({"__metadata__": {"token_ids": "[1]"}, "embd": {**EMBD, "dtype": "I32"}}, b"\0" * 4),
            "embd is of type I32",
        ),
        (
            packed({"__metadata__": {"token_ids": "[1]"}, "embd": {**EMBD, "shape": []}}, b"\0" * 4),
            "embd has the shape",
        ),
        (
            packed({"__metadata__": {"token_ids": "[1]"}, "embd": {**EMBD, "shape": [0, 4], "data_offsets": [0, 0]}}),
            "nothing in it",
        ),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, data, words):
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(TraceError, match=words):
        trace.load(tmp_path / "t")


def test_a_later_version_is_newer_than_the_tool(tmp_path):
    (tmp_path / "t").write_bytes(tokens("[1]", **{"ggufkit.trace": "2"}))
    with pytest.raises(NewerThanTool, match="version '2'"):
        trace.load(tmp_path / "t")


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_a_path_that_cannot_be_read(tmp_path, name):
    with pytest.raises(SourceError):
        trace.load(tmp_path / name)


def test_a_file_that_shrank_is_told(whole, tmp_path):
    whole.save(tmp_path / "t")
    loaded = trace.load(tmp_path / "t")
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:-10])
    with pytest.raises(TraceError, match="ends inside result_output"):
        loaded.arrays["result_output"]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_but_never_crashes(data, tmp_path_factory):
    good = tokens("[1]", mode="prefill", first_position="0")
    at = data.draw(st.integers(0, len(good) - 1))
    damaged = good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :]
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    try:
        loaded = trace.load(path)
        assert all(array.dtype == np.float32 for array in loaded.arrays.values())
    except GgufkitError as error:
        assert error.message  # noqa: PT017 - either outcome is right


def test_a_place_that_cannot_be_written(whole, tmp_path):
    with pytest.raises(SourceError, match="cannot be written"):
        whole.save(tmp_path / "nowhere" / "t.safetensors")
