"""The JSON report, held against its promise: field for field, and safe for any parser."""

from __future__ import annotations

import json

import numpy as np

from ggufkit.findings import Confidence, Evidence, Finding, Judgement, Report, Severity, Skipped
from ggufkit.report import json_v1

REPORT = Report(
    source="models/tiny.gguf",
    findings=(
        Finding(
            code="O201",
            name="vector-outlier",
            severity=Severity.ERROR,
            confidence=Confidence.HIGH,
            message="blk.0.attn_k.bias[3] is inf",
            judgement=Judgement.CORRUPT,
            tensor="blk.0.attn_k.bias",
            index=(3,),
            offset=4096,
            value=float("inf"),
            evidence=(Evidence("numbers", "far from all others", {"ratio": np.float32(2.5), "others": (1.0, -2.0)}),),
            help="fetch the file again",
        ),
        Finding("S107", "string-not-utf8", Severity.WARNING, Confidence.HIGH, "bad text", key="k\udcff\x1b"),
    ),
    tensors_checked=1,
    tensors=2,
    rules_run=3,
    rules=4,
    skipped=(Skipped("tensor b", "its type 99 is newer than this tool", newer=True),),
    facts={"architecture": "qwen2", "types": {"F32": 2}},
    probes={"nats": float("nan")},
)

GOLDEN = {
    "schema": "ggufkit.validate/1",
    "source": "models/tiny.gguf",
    "verdict": "broken",
    "checked": {
        "tensors": 1,
        "of": 2,
        "rules": 3,
        "of_rules": 4,
        "skipped": [{"what": "tensor b", "why": "its type 99 is newer than this tool"}],
    },
    "known": 0,
    "facts": {"architecture": "qwen2", "types": {"F32": 2}},
    "probes": {"nats": "NaN"},
    "findings": [
        {
            "code": "O201",
            "name": "vector-outlier",
            "severity": "error",
            "confidence": "high",
            "judgement": "corrupt",
            "tensor": "blk.0.attn_k.bias",
            "key": None,
            "index": [3],
            "offset": 4096,
            "value": "Infinity",
            "message": "blk.0.attn_k.bias[3] is inf",
            "evidence": [{"kind": "numbers", "text": "far from all others", "ratio": 2.5, "others": [1.0, -2.0]}],
            "help": "fetch the file again",
        },
        {
            "code": "S107",
            "name": "string-not-utf8",
            "severity": "warning",
            "confidence": "high",
            "judgement": None,
            "tensor": None,
            "key": "k\\xff\x1b",
            "index": None,
            "offset": None,
            "value": None,
            "message": "bad text",
            "evidence": [],
            "help": None,
        },
    ],
}


def test_the_document_is_the_promised_one() -> None:
    written = json_v1.validate(REPORT)
    document = json.loads(written, parse_constant=lambda name: AssertionError(name))
    assert document == GOLDEN
    assert [*document] == [*GOLDEN]
    assert [*document["findings"][0]] == [*GOLDEN["findings"][0]]  # type: ignore[index]


def test_a_document_is_ascii_and_may_be_one_line() -> None:
    line = json_v1.validate(REPORT, indent=None)
    assert line.isascii()
    assert "\n" not in line
    assert "\\ud" not in line
    assert json.loads(line) == json.loads(json_v1.validate(REPORT))
