"""Trace files: the contract in both directions, recording on every path, and files that are none."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import NARROW, tiny_model

from ggufkit import reader, trace
from ggufkit.errors import GgufkitError, NewerThanTool, SourceError, TraceError, Unsupported, UsageError
from ggufkit.runtime.record import Plan, record, summarize, summary, write
from ggufkit.runtime.reference import ReferenceEngine
from ggufkit.steps import Recorder, sort_key
from ggufkit.trace import Trace

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


def test_the_metadata_is_the_contracts(gguf, engine, tmp_path):
    plan = Plan(IDS, ["l_out"], prompt="Hi ✓", system="Be brief.", model=trace.model_digest(gguf), decode=True)
    write(tmp_path / "t.safetensors", engine, plan)
    with safetensors.safe_open(tmp_path / "t.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata == {
        "ggufkit.trace": "1",
        "token_ids": json.dumps(IDS),
        "first_position": "0",
        "mode": "decode",
        "engine": "reference",
        "dtype": "float32",
        "prompt": "Hi ✓",
        "system": "Be brief.",
        "model": metadata["model"],
    }


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


# --- recording -------------------------------------------------------------------------------------------------


def test_a_recording_is_what_a_tap_sees(engine, whole):
    tap = Recorder()
    engine.forward(IDS, engine.new_cache(8), logits="all", tap=tap)
    assert same(whole.arrays, tap.arrays)
    assert whole.token_ids == tuple(IDS)


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("positions", [None, range(2, 5), range(5, 6)], ids=["all", "middle", "last"])
def test_memory_and_file_hold_the_same(engine, tmp_path, decode, positions):
    plan = Plan(IDS, decode=decode, positions=positions)
    write(tmp_path / "t.safetensors", engine, plan)
    loaded, kept = trace.load(tmp_path / "t.safetensors"), record(engine, plan)
    assert same(loaded.arrays, kept.arrays)
    assert loaded.metadata() == kept.metadata()
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_decoding_gives_the_same_steps_and_zeros_for_keys_to_come(engine, whole):
    decoded = record(engine, Plan(IDS, decode=True))
    assert decoded.mode == "decode"
    future = np.arange(len(IDS)) > np.arange(len(IDS))[:, None]
    for name, array in decoded.arrays.items():
        expected = whole.arrays[name]
        assert array.shape == expected.shape
        if name.startswith("kq-"):
            assert not array.transpose(0, 2, 1)[future].any()
            expected = np.where(future[:, None, :], 0, expected)
        assert np.abs(array - expected).max() < 1e-4, name


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_some_positions_are_the_rows_of_all(engine, decode):
    every, some = (record(engine, Plan(IDS, decode=decode, positions=rows)) for rows in (None, range(2, 5)))
    assert (some.first_position, some.token_ids) == (2, tuple(IDS))
    for name, array in some.arrays.items():
        rows = every.arrays[name][2:5]
        assert np.abs(array - (rows[..., :5] if name.startswith("kq") and "kqv" not in name else rows)).max() < 1e-4


@pytest.mark.parametrize(
    ("steps", "layers", "names"),
    [
        (["embd", "k_*"], [1], ["embd", "k_proj-1", "k_bias-1", "k_rope-1"]),
        (["l_out-0"], None, ["l_out-0"]),
        (["result_*"], None, ["result_norm", "result_output"]),
    ],
)
def test_only_what_was_asked_is_recorded(engine, steps, layers, names):
    assert list(record(engine, Plan(IDS, steps, layers)).arrays) == names


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": ["q_ropes"]}, "no step of this model is called q_ropes"),
        ({"steps": ["q_norm"]}, "no step"),
        ({"layers": [0, 2]}, "no layer 2"),
        ({"positions": range(3, 7)}, "the prompt has 6 tokens"),
        ({"positions": range(0)}, "nothing to record"),
        ({"positions": range(0, 6, 2)}, "nothing to record"),
        ({"ids": []}, "nothing to record"),
        ({"ids": [1, NARROW.n_vocab]}, "outside the vocabulary"),
    ],
    ids=str,
)
def test_impossible_plans_are_refused_and_leave_no_file(engine, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        write(tmp_path / "t.safetensors", engine, Plan(**{"ids": IDS, **options}))
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_shows_too_little_is_told(gguf, tmp_path):
    class Terse(ReferenceEngine):
        name = "terse"

        def _make(self, step, state, tap):
            super()._make(step, state, None if step == "q_rope" else tap)

    with pytest.raises(Unsupported, match="terse does not show q_rope-0, q_rope-1"):
        write(tmp_path / "t.safetensors", Terse(gguf), Plan(IDS))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(whole, tmp_path):
    with pytest.raises(SourceError, match="cannot be written"):
        whole.save(tmp_path / "nowhere" / "t.safetensors")


def test_float64_engines_write_float32(gguf):
    got = record(ReferenceEngine(gguf, np.float64), Plan(IDS, ["l_out"]))
    assert got.dtype == "float64"
    assert all(array.dtype == np.float32 for array in got.arrays.values())


def test_traces_sort_as_the_pass(whole):
    assert sorted(whole.arrays, key=sort_key) == list(whole.arrays)


# --- summaries -------------------------------------------------------------------------------------------------


def test_a_summary_says_what_numpy_says(whole):
    row = next(row for row in summary(whole) if row.name == "ffn_act-1")
    values = whole.arrays["ffn_act-1"]
    assert row.shape == values.shape
    assert (row.mean, row.std) == pytest.approx((values.mean(), values.std()), rel=1e-5)
    assert row.absmax == np.abs(values).max()
    assert row.first == tuple(values[0, :3].tolist())
    assert row.last == tuple(values[-1, -3:].tolist())
    assert row.checksum == hashlib.sha256(values.tobytes()).hexdigest()[:16]
    assert row.not_finite == 0


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_a_summary_made_while_running_is_that_of_the_trace(engine, decode):
    plan = Plan(IDS, decode=decode)
    for running, kept in zip(summarize(engine, plan), summary(record(engine, plan)), strict=True):
        assert (running.name, running.checksum, running.first, running.last) == (
            kept.name,
            kept.checksum,
            kept.first,
            kept.last,
        )
        assert running.std == pytest.approx(kept.std, rel=1e-9)


def test_a_summary_counts_what_is_not_finite_and_leaves_it_out():
    values = np.array([[1.0, np.nan], [-3.0, np.inf]], np.float32)
    (row,) = summary(Trace({"embd": values}, (1, 2)))
    assert (row.mean, row.absmax, row.not_finite) == (-1.0, 3.0, 2)
    (empty,) = summary(Trace({"embd": np.full((1, 1), np.nan, np.float32)}, (1,)))
    assert np.isnan([empty.mean, empty.std, empty.absmax]).all()
