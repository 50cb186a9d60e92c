"""The bundled model and its story."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ggufkit import demo, reader
from ggufkit.cli import app
from ggufkit.demo import Scene
from ggufkit.findings import Judgement, Severity, Verdict
from ggufkit.runtime.engine import Edit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("copies")


@pytest.fixture(scope="module")
def scenes(folder: Path) -> Iterator[list[Scene]]:
    """The whole story, told once, with its copies in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        yield list(demo.scenes())


def test_the_model_is_small_enough_to_be_bundled() -> None:
    assert demo.MODEL.stat().st_size < 5_000_000


def test_healthy(scenes: list[Scene]) -> None:
    scene = scenes[0]
    assert scene.report.verdict is Verdict.OK
    assert scene.report.tensors_checked == scene.report.tensors == 63
    assert all(finding.severity is Severity.INFO for finding in scene.report.findings)
    assert scene.reply is not None
    assert scene.reply.problems == ()
    assert scene.reply.numbers.stop == "end of turn"


def test_the_haiku_is_one(scenes: list[Scene]) -> None:
    reply = scenes[0].reply
    assert reply is not None
    assert len(reply.text.strip().splitlines()) == 3
    assert "leaves" in reply.text
    assert reply.numbers.repetition < 0.1


def test_one_flipped_bit_is_named(scenes: list[Scene]) -> None:
    scene = scenes[1]
    assert scene.report.verdict is Verdict.BROKEN
    worst = scene.report.findings[0]
    assert (worst.tensor, worst.index) == (demo.FLIPPED_TENSOR, (demo.FLIPPED_INDEX,))
    assert worst.judgement is Judgement.CORRUPT
    assert scene.reply is None or scene.reply.problems or scene.reply.text != scenes_text(scenes)


def test_zeroed_biases_are_named_and_the_answer_is_lost(scenes: list[Scene]) -> None:
    scene = scenes[2]
    assert scene.report.verdict is Verdict.BROKEN
    assert {finding.code for finding in scene.report.findings if finding.severity is Severity.ERROR} == {"O206"}
    assert scene.reply is None or scene.reply.text != scenes_text(scenes)


def scenes_text(scenes: list[Scene]) -> str:
    assert scenes[0].reply is not None
    return scenes[0].reply.text


def test_the_flip_changes_one_bit() -> None:
    with reader.open(demo.MODEL) as gguf:
        edit, before, after = demo.flipped_bit(gguf)
        stored = gguf.read(gguf.tensor(edit.tensor), edit.start, 4).tobytes()
    changed = int.from_bytes(stored, "little") ^ int.from_bytes(edit.data, "little")
    assert changed.bit_count() == 1
    assert abs(before) < 2 < 1e30 < abs(after)


def test_a_damaged_copy_differs_where_it_should_and_nowhere_else(tmp_path: Path) -> None:
    with reader.open(demo.MODEL) as gguf:
        place = gguf.tensor("output_norm.weight").offset
        copy = demo.damaged(gguf, tmp_path / "copy.gguf", [Edit("output_norm.weight", 4, b"\xff\xff")])
    original, changed = demo.MODEL.read_bytes(), copy.read_bytes()
    assert [at for at, (x, y) in enumerate(zip(original, changed, strict=True)) if x != y] in (
        [place + 4, place + 5],
        [place + 4],
        [place + 5],
    )


def test_the_copies_are_gone_afterwards(scenes: list[Scene], folder: Path) -> None:
    assert len(scenes) == 3
    assert list(folder.iterdir()) == []


def test_the_command_tells_the_story(scenes: list[Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "scenes", lambda: iter(scenes))
    out = CliRunner().invoke(app, ["demo"]).stdout
    assert scenes[0].reply is not None
    for part in ("✓ OK", "One bit flipped", "✗ BROKEN", "O206", "ggufkit validate model.gguf"):
        assert part in out
    assert all(line.strip() in out for line in scenes[0].reply.text.strip().splitlines())


def test_the_story_as_a_document(scenes: list[Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "scenes", lambda: iter(scenes))
    found = json.loads(CliRunner().invoke(app, ["demo", "--json"]).stdout)
    assert found["schema"] == "ggufkit.demo/1"
    assert [scene["report"]["verdict"] for scene in found["scenes"]] == ["ok", "broken", "broken"]
