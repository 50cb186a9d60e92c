"""Any result as a JSON document."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ggufkit import demo, reader
from ggufkit.cli import app
from ggufkit.findings import Severity, Skipped
from ggufkit.report.document import document, plain


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), "NaN"),
        (float("inf"), "Infinity"),
        (float("-inf"), "-Infinity"),
        (np.float32(0.5), 0.5),
        (np.float64("nan"), "NaN"),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array([np.inf], "f4"), ["Infinity"]),
        (Severity.ERROR, "error"),
        ({Severity.INFO: (1, None)}, {"info": [1, None]}),
        (frozenset({"b", "a"}), ["a", "b"]),
        (PurePosixPath("a/b"), "a/b"),
        (Skipped("x", "y"), {"what": "x", "why": "y", "asked": False, "newer": False}),
    ],
)
def test_values_become_json(value: object, expected: object) -> None:
    assert plain(value) == expected


def test_a_document_names_its_schema_first_and_is_plain_ascii() -> None:
    text = document("inspect", {"name": "秋\x1b[31m\udcff\u202e"})
    assert text.splitlines()[1] == '  "schema": "ggufkit.inspect/1",'
    assert text.isascii()
    assert "\x1b" not in text
    assert json.loads(text)["name"] == "秋\x1b[31m\\xff\u202e"  # a byte that is no UTF-8 has no place in JSON


def test_one_line_when_several_follow_each_other() -> None:
    assert document("validate", {"a": [1, 2]}, indent=None) == '{"schema": "ggufkit.validate/1", "a": [1, 2]}'


def test_what_has_no_form_is_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        plain({"a": object()})


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("documents")
    model, one, two = demo.MODEL, folder / "a.safetensors", folder / "b.safetensors"
    for target in (one, two):
        printed("trace", model, "--tokens", "1,2", "-o", target, *(["--dtype", "float64"] if target == two else []))
    flip = folder / "flipped.gguf"
    with reader.open(model) as gguf:
        demo.damaged(gguf, flip, [demo.flipped_bit(gguf)[0]])
    calls = {
        "inspect": ("inspect", model),
        "validate": ("validate", flip, "--no-run"),
        "rules": ("rules",),
        "run": ("run", model, "-p", "snow", "-n", 3),
        "trace": ("trace", model, "--tokens", "1,2", "--summary", "--layers", 0),
        "compare": ("compare", one, two),
        "tokenize": ("tokenize", model, "snow"),
        "doctor": ("doctor",),
        "error": ("inspect", folder / "missing.gguf"),
    }
    return {name: json.loads(printed(*args, "--json")) for name, args in calls.items()}


class TestShapes:
    """Every command's document keeps its shape: fields may be added, none renamed or removed.

    tests/golden/documents.json holds them; after adding a field, write it anew with
    `GGUFKIT_UPDATE_GOLDEN=1 pytest tests/test_document.py` and describe the field in docs/json.md.
    """

    GOLDEN = Path(__file__).with_name("golden") / "documents.json"

    def test_each_names_its_schema(self, documents: dict[str, Any]) -> None:
        assert {name: found["schema"] for name, found in documents.items()} == {
            name: f"ggufkit.{name}/1" for name in documents
        }

    def test_shapes_are_kept(self, documents: dict[str, Any]) -> None:
        shapes = {name: shape(found) for name, found in documents.items()}
        if os.environ.get("GGUFKIT_UPDATE_GOLDEN"):
            self.GOLDEN.write_text(json.dumps(shapes, indent=1) + "\n", encoding="utf-8")
        assert shapes == json.loads(self.GOLDEN.read_text(encoding="utf-8"))

    def test_every_field_is_described(self, documents: dict[str, Any]) -> None:
        described = (Path(__file__).parents[1] / "docs" / "json.md").read_text(encoding="utf-8")
        named = set(re.findall(r"`([A-Za-z0-9_]+)`", described))
        assert {name: sorted(fields(found) - named) for name, found in documents.items()} == {
            name: [] for name in documents
        }


#: objects whose keys are data: names of tensors, types, hyperparameters
OPEN = {"general", "hyperparameters", "types", "flags", "facts", "probes", "severity"}


def printed(*args: object) -> str:
    return CliRunner().invoke(app, [str(arg) for arg in args]).stdout


def shape(value: Any) -> Any:
    """A document with every value replaced by the name of its type, and every list by its first element's shape."""
    match value:
        case dict():
            return {
                key: "object" if key in OPEN and isinstance(item, dict) else shape(item) for key, item in value.items()
            }
        case list():
            return [shape(value[0])] if value else []
        case bool():
            return "bool"
        case int() | float():
            return "number"
        case None:
            return None
    return "string"


def fields(value: Any) -> set[str]:
    """The names of all fields in a document, but for the keys of open objects and of evidence."""
    if isinstance(value, list):
        return {name for item in value for name in fields(item)}
    if not isinstance(value, dict):
        return set()
    inner = (item for key, item in value.items() if key not in OPEN | {"evidence"})
    return set(value) | {name for item in inner for name in fields(item)}
