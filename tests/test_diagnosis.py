"""The whole answer of `diagnose`: the words first, then every step; as a document, as text, as an exit status."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_engine import ForeignEngine
from typer.testing import CliRunner

from ggufkit import again, demo, diagnosis, reader
from ggufkit.cli import app
from ggufkit.conversation import Words, message
from ggufkit.runtime import faults
from ggufkit.runtime.faults.apart import told_apart
from ggufkit.trace import Trace

PROMPT = "snow"
HEALTHY: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def gguf():
    with reader.open(demo.MODEL) as opened:
        yield opened


@pytest.fixture(scope="module")
def engine(gguf) -> ForeignEngine:
    return ForeignEngine(gguf)


@pytest.fixture(scope="module")
def ids(gguf) -> tuple[int, ...]:
    words = Words.of(gguf)
    return tuple(words.tokenizer.encode(words.render([message("user", PROMPT)])))


@pytest.fixture
def saved(engine, ids, tmp_path):
    """Writes the trace of an engine with bugs; `rest` are fields of the trace."""

    def save(bugs: Sequence[str], *, mode: str = "prefill", **rest: Any) -> Path:
        arrays = engine.trace(ids, bugs, decode=mode == "decode")
        path = tmp_path / "mine.safetensors"
        replace(Trace(arrays, ids, mode=mode), **rest).save(path)
        return path

    return save


def run(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["diagnose", str(demo.MODEL), *map(str, args)])
    return done.exit_code, done.stdout


def document(*args: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*args, "--json")[1])
    return found


class TestExitStatus:
    def test_a_healthy_engine_is_0(self, saved):
        status, text = run(saved(HEALTHY))
        assert status == 0
        assert "THIS ENGINE COMPUTES RIGHTLY" in text
        assert "compared 103 steps" in text

    def test_a_bug_is_1(self, saved):
        assert run(saved(["transposed"]))[0] == 1

    def test_wrong_words_are_1_even_if_every_step_is_right(self, saved, ids):
        assert run(saved(HEALTHY), "-p", PROMPT, "--raw")[0] == 1

    def test_nothing_to_compare_is_3(self, saved, engine, ids):
        empty = saved(HEALTHY, arrays={"nonsense": np.zeros((1, 1), np.float32)})
        status, text = run(empty)
        assert status == 3
        assert "NOTHING TO COMPARE" in text

    def test_a_file_that_is_no_trace_is_2(self, tmp_path):
        path = tmp_path / "trace.txt"
        path.write_text("nothing here\n")
        assert run(path)[0] == 2


class TestWords:
    def test_the_right_words_are_checked_and_silent(self, saved):
        found = document(saved(HEALTHY, prompt=PROMPT))
        assert found["checked"] == {"steps": 103, "words": True}
        assert found["faults"] == []

    def test_an_unknown_prompt_is_not_held_against_anybody(self, saved):
        assert document(saved(HEALTHY))["checked"]["words"] is False

    def test_a_missing_template_is_named_before_any_step(self, engine, gguf, tmp_path):
        bare = tuple(Words.of(gguf, raw=True).tokenizer.encode(PROMPT))
        path = tmp_path / "bare.safetensors"
        Trace(engine.trace(bare, ["bias_missing"]), bare, prompt=PROMPT).save(path)
        found = document(path)
        assert [fault["name"] for fault in found["faults"]] == ["template_missing", "bias_missing"]
        assert found["first_divergence"]["step"] == "token_ids"
        assert found["faults"][0]["family"] == "words"


class TestDocument:
    FIELDS = frozenset(
        [
            *("schema", "source", "trace", "first_divergence", "faults", "ruled_out"),
            *("unexplained", "noise", "checked", "notes", "again"),
        ]
    )
    DIVERGENCE = frozenset(["step", "layer", "position", "error", "pattern"])
    FAULT = frozenset(
        ["name", "title", "explanation", "family", "residual", "error", "places", "same_numbers_as", "tell_apart"],
    )

    def test_of_a_healthy_engine(self, saved):
        found = document(saved(HEALTHY))
        assert set(found) == self.FIELDS
        assert found["schema"] == "ggufkit.diagnose/1"
        assert (found["first_divergence"], found["faults"], found["unexplained"], found["again"]) == (None, [], [], [])

    def test_of_a_bug(self, saved):
        found = document(saved(["bias_missing"]))
        assert set(found) == self.FIELDS
        assert set(found["first_divergence"]) == self.DIVERGENCE
        assert (found["first_divergence"]["step"], found["first_divergence"]["layer"]) == ("q_bias", 0)
        (fault,) = found["faults"]
        assert set(fault) == self.FAULT
        assert fault["name"] == "bias_missing"
        assert fault["residual"] < 1e-5 < fault["error"]
        assert fault["places"][:3] == ["q_bias-0", "k_bias-0", "v_bias-0"]
        assert "bias_doubled" in found["ruled_out"]

    def test_of_wrong_words(self, saved):
        (fault,) = document(saved(HEALTHY), "-p", PROMPT, "--raw")["faults"]
        assert set(fault) == self.FAULT | {"position", "expected", "found"}

    def test_every_field_is_described(self, saved):
        described = (Path(__file__).parents[1] / "docs" / "json.md").read_text(encoding="utf-8")
        section = described.partition("## diagnose")[2].partition("\n## ")[0]
        wanted = (self.FIELDS | self.DIVERGENCE | self.FAULT) - {"schema"}
        assert [name for name in sorted(wanted) if f"`{name}`" not in section] == []


class TestText:
    def test_the_transposed_case_is_drawn(self, saved):
        text = run(saved(["transposed"]))[1]
        assert "ONE BUG FOUND" in text
        assert "first seen at q_proj-0" in text
        assert "across the rows" in text

    def test_several_bugs_are_numbered_in_the_order_of_the_pass(self, saved):
        text = run(saved(["gelu", "bias_missing"]))[1]
        assert "2 BUGS FOUND" in text
        assert text.index("1. The attention biases are not added") < text.index("2. GELU (exact form)")

    def test_what_no_known_bug_explains_is_said(self, saved, engine, ids):
        arrays = engine.trace(ids)
        text = run(saved(HEALTHY, arrays=arrays | {"ffn_act-1": arrays["ffn_act-1"] * np.float32(1.7)}))[1]
        assert "NONE OF THE KNOWN BUGS" in text
        assert "ffn_act-1" in text

    def test_the_smallest_command_that_shows_it_again(self, saved, ids):
        text = run(saved(["rope_interleaved"]))[1]
        few = ",".join(map(str, ids[:3]))  # position 1 is the first that RoPE turns; one more for the future
        assert f"--tokens {few} --steps q_rope-0 --engine reference" in text


class TestTellingApart:
    @pytest.mark.parametrize(
        ("bug", "mode", "first", "same", "how"),
        [
            ("rope_off", "prefill", "rope_off", ["position_stuck"], "no harm if the position is always 0"),
            ("rope_off", "decode", "rope_off", ["position_stuck"], "computed at once"),
            ("cache_stale", "decode", "cache_stale", ["no_mask"], "computed at once"),
            ("no_mask", "prefill", "no_mask", ["cache_stale"], "token by token"),
        ],
    )
    def test_the_mode_decides_which_comes_first_and_the_other_mode_tells(self, saved, bug, mode, first, same, how):
        fault = document(saved([bug], mode=mode))["faults"][0]
        assert (fault["name"], fault["same_numbers_as"]) == (first, same)
        assert how in fault["tell_apart"][0]

    def test_a_step_that_only_one_of_them_changes_tells_them_apart(self):
        stuck, alone = faults.FAULTS["cache_slot_stuck"], faults.FAULTS["cache_current_only"]
        assert "add the step kq_soft_max" in told_apart(stuck, alone, "decode", {"kq", "kqv"})
        assert "nothing in a trace" in told_apart(stuck, stuck, "decode", set())


class TestAgain:
    IDS = (11, 12, 13, 14, 15)

    def test_decoding_needs_the_tokens_up_to_the_position(self):
        assert again.enough(self.IDS, 2, "decode") == (11, 12, 13)

    def test_a_prompt_at_once_gets_one_token_of_future(self):
        assert again.enough(self.IDS, 2, "prefill") == (11, 12, 13, 14)
        assert again.enough(self.IDS, 4, "prefill") == self.IDS

    def test_two_engines_of_ours_are_run_and_a_foreign_one_is_left_to_its_author(self):
        ours, theirs = Trace({}, self.IDS, engine="cpu"), Trace({}, self.IDS, engine="mine", mode="decode")
        assert again.of_two(ours, theirs, "kq-3", 1) == (
            "ggufkit trace MODEL.gguf --tokens 11,12,13 --steps kq-3 --engine cpu -o a.safetensors",
            "# b.safetensors: kq-3 of your engine, for the tokens 11,12,13",
            "ggufkit compare a.safetensors b.safetensors",
        )


def test_another_file_s_trace_is_noted(saved, gguf):
    found = diagnosis.diagnose(gguf, saved(HEALTHY, model="0" * 64))
    assert any("another file" in said for said in found.notes)
