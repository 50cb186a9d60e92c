"""Traces in other people's layouts are recognised, put right, and said."""

from __future__ import annotations

import numpy as np
import pytest
from foreign_engine import ForeignEngine
from tiny_models import tiny_model

from ggufkit import foreign, reader
from ggufkit.arch import read_config
from ggufkit.errors import TraceError
from ggufkit.runtime.diagnose import diagnose
from ggufkit.runtime.evaluate import Graph
from ggufkit.runtime.weights import Weights
from ggufkit.trace import Trace

IDS = (5, 99, 17, 200, 44, 45, 17)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return reader.open(tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf"))


@pytest.fixture(scope="module")
def arrays(gguf):
    return ForeignEngine(gguf).trace(IDS)


def arrange(gguf, **arrays):
    named = {name.replace("__", "-"): array for name, array in arrays.items()}
    return foreign.arrange(Trace(named, IDS), read_config(gguf))


LAYOUTS = [
    ("q_rope__0", lambda a: a.reshape(len(a), -1), ""),
    ("q_rope__0", lambda a: a.transpose(1, 0, 2), "heads first"),
    ("q_rope__0", lambda a: a.reshape(len(a), -1).T, "transposed"),
    ("q_rope__0", lambda a: a[None], ""),
    ("q_bias__1", lambda a: a.reshape(len(a), 4, 16), ""),
    ("q_bias__1", lambda a: a.reshape(len(a), 4, 16).transpose(1, 0, 2), "heads first"),
    ("q_bias__1", lambda a: a.astype(np.float32).T, "transposed"),
    ("kq__0", lambda a: np.pad(a, [(0, 0), (0, 0), (0, 25)]), "padded"),
    ("kq__0", lambda a: np.pad(a.transpose(1, 0, 2), [(0, 0), (0, 0), (0, 25)]), "heads first and padded"),
    ("l_out__1", lambda a: a[None, :, None, :], ""),
    ("result_output", lambda a: np.pad(a, [(0, 0), (0, 32)]), "padded"),
]


@pytest.mark.parametrize(("name", "layout", "said"), LAYOUTS)
def test_a_layout_is_recognised(gguf, arrays, name, layout, said):
    original = arrays[name.replace("__", "-")]
    arranged = arrange(gguf, **{name: layout(original)})
    (made,) = arranged.known.values()
    np.testing.assert_array_equal(made, original)
    assert all(said in note for note in arranged.notes)
    assert bool(said) == bool(arranged.notes)


@pytest.mark.parametrize("layout", [lambda a: a[-1], lambda a: a[-1:], lambda a: a[None, -1]])
def test_a_single_row_is_the_last_position(gguf, arrays, layout):
    arranged = arrange(gguf, result_output=layout(arrays["result_output"]))
    part = arranged.parts["result_output", None]
    assert part.at == (slice(6, 7),)
    np.testing.assert_array_equal(part.values[0], arrays["result_output"][-1])


def test_what_cannot_be_recognised_is_left_out_and_said(gguf, arrays):
    arranged = arrange(gguf, l_out__0=np.zeros((7, 13)), l_out__77=arrays["l_out-0"], embd=arrays["embd"])
    assert set(arranged.known) == {("embd", None)}
    assert any("(7, 13)" in note for note in arranged.notes)
    assert any("no such step" in note for note in arranged.notes)


def test_a_token_outside_the_vocabulary_is_an_error(gguf):
    with pytest.raises(TraceError, match="outside the vocabulary"):
        foreign.arrange(Trace({}, (1, 99999)), read_config(gguf))


# --- text --------------------------------------------------------------------------------------------------------


def text_of(arrays, places):
    lines = [f"# token_ids: {' '.join(map(str, IDS))}", "loading model...", ""]
    for name, at in places:
        values = arrays[name][eval(f"np.s_[{at}]")].ravel()
        lines.append(f"{name}[{at}]: " + " ".join(f"{value:.7g}" for value in values) + " ...")
    return "\n".join(lines)


PRINTED = [("attn_norm-0", "3,0:8"), ("q_proj-0", "3,0:8"), ("q_bias-0", "3,0:8"), ("q_rope-0", "3,1,0:8")]
PRINTED += [("l_out-0", "3,0:8"), ("q_bias-1", "3"), ("result_output", "6,10:20")]


@pytest.mark.parametrize("bug", ["", "bias_missing", "rope_interleaved", "transposed"])
def test_a_printf_is_enough_for_a_diagnosis(gguf, tmp_path, bug):
    path = tmp_path / "log.txt"
    path.write_text(text_of(ForeignEngine(gguf).trace(IDS, [bug]), PRINTED))
    arranged = foreign.arrange(foreign.load(path), read_config(gguf))
    assert len(arranged.parts) == len(PRINTED)
    assert arranged.notes == []
    graph = Graph(read_config(gguf))
    found = diagnose(graph, Weights(gguf), IDS, arranged.known, arranged.parts)
    assert [fault.name for fault in found.faults] == ([bug] if bug else [])
    assert found.unexplained == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hello", "no line of it"),
        ("q_bias-0[3,0:2]: 1 2", "which tokens"),
        ("# token_ids: 1 2\nq_bias-0[1,0:2]: 1 two", "'two' is no number"),
        ("# token_ids: 1 2\nq_bias-0[1,0:1:2]: 1", "is no place"),
        ("\xff\xfe".encode("latin-1"), "neither a safetensors file nor text"),
    ],
)
def test_a_damaged_text_says_what_is_wrong(tmp_path, text, said):
    path = tmp_path / "log.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TraceError, match=said):
        foreign.load(path)


def test_numbers_that_do_not_fit_their_place_are_left_out(gguf, tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("# token_ids: 1 2 3\nl_out-0[1,60:80]: 1 2 3 4 5 6 7 8\nl_out-1[9]: 1\nembd[0,0:2]: 1 2\n")
    arranged = foreign.arrange(foreign.load(path), read_config(gguf))
    assert set(arranged.parts) == {("embd", None)}
    assert len(arranged.notes) == 2
