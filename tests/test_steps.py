"""Names of steps: how they are written and ordered, and which of them a recorder keeps."""

from __future__ import annotations

import pytest
from tiny_models import Shape, tiny_model

from ggufkit import reader
from ggufkit.runtime.reference import ReferenceEngine
from ggufkit.steps import Recorder, parse_name, sort_key

IDS = [72, 105, 257, 3]


@pytest.fixture
def gguf(tmp_path):
    with reader.open(tiny_model(tmp_path / "m.gguf")) as opened:
        yield opened


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("q_rope-3", ("q_rope", 3)),
        ("kq_soft_max-0", ("kq_soft_max", 0)),
        ("embd", ("embd", None)),
        ("embd-0", None),
        ("q_rope", None),
        ("q_rope-03", None),
        ("q_rope--3", None),
        ("keys-0", None),
        ("", None),
    ],
)
def test_names_of_steps(name, parsed):
    assert parse_name(name) == parsed


def test_names_sort_as_the_pass_makes_them(tmp_path):
    with reader.open(tiny_model(tmp_path / "m.gguf", shape=Shape(n_layer=11))) as opened:
        engine, tap = ReferenceEngine(opened), Recorder()
        engine.forward(IDS, engine.new_cache(8), tap=tap)
    assert sorted(tap.arrays, key=sort_key) == list(tap.arrays)


@pytest.mark.parametrize(
    ("patterns", "layers", "kept"),
    [
        (["q_*-1"], None, ["q_proj-1", "q_bias-1", "q_rope-1"]),
        (["kqv"], None, ["kqv-0", "kqv-1"]),
        (["l_out", "result_*"], [0], ["l_out-0", "result_norm", "result_output"]),
        (["nothing"], None, []),
    ],
)
def test_a_recorder_keeps_what_was_asked(gguf, patterns, layers, kept):
    engine, tap = ReferenceEngine(gguf), Recorder(patterns, layers)
    engine.forward(IDS, engine.new_cache(8), tap=tap)
    assert list(tap.arrays) == kept
