"""Recording an engine's steps: in memory, in a file, as summaries; all at once or one by one."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import safetensors
from tiny_models import NARROW, tiny_model

from ggufkit import reader, trace
from ggufkit.errors import Unsupported, UsageError
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


def same(a, b):
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


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
