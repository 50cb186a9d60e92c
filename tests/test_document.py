"""Any result as a JSON document."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

import numpy as np
import pytest

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
    assert json.loads(text)["name"] == "秋\x1b[31m\udcff\u202e"


def test_one_line_when_several_follow_each_other() -> None:
    assert document("validate", {"a": [1, 2]}, indent=None) == '{"schema": "ggufkit.validate/1", "a": [1, 2]}'


def test_what_has_no_form_is_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        plain({"a": object()})
