"""The formats that other programs read: SARIF, JUnit, GitHub annotations; baselines and settings."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import jsonschema
import pytest

from ggufkit import baseline, settings
from ggufkit.errors import GgufkitError, NewerThanTool, UsageError
from ggufkit.findings import Confidence, Evidence, Finding, Report, Severity, Skipped
from ggufkit.report import github, junit, sarif

HOSTILE = 'a\x1b[31m"<b>&%,:\n‮.weight'
FINDINGS = (
    Finding(
        "O201",
        "vector-outlier",
        Severity.ERROR,
        Confidence.HIGH,
        f"{HOSTILE} is nan",
        tensor=HOSTILE,
        offset=77,
        index=(3,),
        value=float("nan"),
        evidence=(Evidence("numbers", "8 times", {"ratio": 8.0}),),
        help="fetch it",
    ),
    Finding("T101", "x", Severity.WARNING, Confidence.LOW, "no pre", key="tokenizer.ggml.pre"),
    Finding("O207", "large-bias", Severity.INFO, Confidence.HIGH, "genuine", tensor="blk.0.attn_k.bias"),
)
REPORT = Report("some dir/my model.gguf", FINDINGS, 3, 3, 9, 10, (Skipped("R1", "no reference"),))
CLEAN = Report("clean.gguf", (), 3, 3, 10, 10)

#: what SARIF 2.1.0 demands of the objects that are used here
SARIF_SUBSET = {
    "type": "object",
    "required": ["version", "runs"],
    "properties": {
        "version": {"const": "2.1.0"},
        "runs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["tool"],
                "properties": {
                    "tool": {"type": "object", "required": ["driver"]},
                    "invocations": {"items": {"required": ["executionSuccessful"]}},
                    "results": {
                        "items": {
                            "type": "object",
                            "required": ["message", "ruleId", "level"],
                            "properties": {
                                "level": {"enum": ["none", "note", "warning", "error"]},
                                "message": {"type": "object", "required": ["text"]},
                                "locations": {
                                    "items": {
                                        "properties": {
                                            "physicalLocation": {
                                                "properties": {
                                                    "artifactLocation": {
                                                        "properties": {
                                                            "uri": {"type": "string", "pattern": r"^[^\s]+$"}
                                                        }
                                                    },
                                                    "region": {
                                                        "properties": {"byteOffset": {"type": "integer", "minimum": -1}}
                                                    },
                                                }
                                            }
                                        }
                                    }
                                },
                                "partialFingerprints": {"additionalProperties": {"type": "string"}},
                            },
                        }
                    },
                },
            },
        },
    },
}


def test_sarif_is_as_its_standard_demands():
    document = json.loads(sarif.render([REPORT, CLEAN]))
    jsonschema.validate(document, SARIF_SUBSET)
    (run,) = document["runs"]
    assert [result["level"] for result in run["results"]] == ["error", "warning", "note"]
    assert {rule["id"] for rule in run["tool"]["driver"]["rules"]} >= {"O201", "O207"}
    assert run["results"][0]["locations"][0]["physicalLocation"]["region"] == {"byteOffset": 77}
    assert "\x1b" not in json.dumps(document, ensure_ascii=False)


def test_junit_counts_errors_as_failures_and_keeps_the_rest():
    root = ET.fromstring(junit.render([REPORT, CLEAN]))
    first, second = root.findall("testsuite")
    assert (first.get("failures"), first.get("skipped")) == ("1", "1")
    assert second.get("failures") == "0"
    failure = first.find("testcase/failure")
    assert failure is not None
    assert "8 times" in (failure.text or "")


def test_github_annotations_stay_on_their_line():
    lines = github.render([REPORT]).split("\n")
    assert len(lines) == 4
    assert lines[0].startswith("::error file=some dir/my model.gguf,title=O201 vector-outlier::")
    assert [line.split(" ")[0] for line in lines[:3]] == ["::error", "::warning", "::notice"]
    assert "\x1b" not in lines[0]
    assert "%25" in lines[0]


# --- baselines -----------------------------------------------------------------------------------------------------


def written(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "baseline.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_known_findings_are_counted_and_not_shown(tmp_path):
    path = written(tmp_path, {"schema": baseline.SCHEMA, **baseline.entries([REPORT])})
    report = baseline.without_known(REPORT, baseline.load(path))
    assert (report.findings, report.known) == ((), 3)
    assert report.exit_code() == 0


def test_a_new_finding_is_shown_beside_known_ones(tmp_path):
    known = Report(REPORT.source, FINDINGS[1:])
    path = written(tmp_path, {"schema": baseline.SCHEMA, **baseline.entries([known])})
    report = baseline.without_known(REPORT, baseline.load(path))
    assert [finding.code for finding in report.findings] == ["O201"]
    assert report.exit_code() == 1


def test_a_baseline_of_another_file_knows_nothing(tmp_path):
    path = written(tmp_path, {"schema": baseline.SCHEMA, **baseline.entries([REPORT])})
    other = Report("other.gguf", FINDINGS)
    assert baseline.without_known(other, baseline.load(path)).findings == FINDINGS


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", UsageError),
        ("[1]", UsageError),
        ('{"schema": "ggufkit.baseline/1", "files": {"a": [{}]}}', UsageError),
        ('{"schema": "ggufkit.baseline/2"}', NewerThanTool),
    ],
)
def test_what_is_no_baseline_says_so(tmp_path, text, error):
    with pytest.raises(error):
        baseline.load(written(tmp_path, text))


def test_a_missing_baseline_is_an_error(tmp_path):
    with pytest.raises(GgufkitError, match="cannot be read"):
        baseline.load(tmp_path / "nowhere.json")


# --- settings ------------------------------------------------------------------------------------------------------


def test_the_nearest_settings_hold(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.ggufkit]\nignore = ["M108"]\nmin-severity = "warning"\n')
    inner = tmp_path / "models" / "qwen"
    inner.mkdir(parents=True)
    found = settings.find(inner)
    assert (found.ignore, found.min_severity, found.profile) == (("M108",), Severity.WARNING, None)
    (inner / "ggufkit.toml").write_text('profile = "spec"\n')
    assert settings.find(inner) == settings.Settings(profile="spec")


def test_a_pyproject_without_our_table_says_nothing(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.other]\nx = 1\n")
    assert settings.find(tmp_path).select == ()


@pytest.mark.parametrize(
    "text", ["ignored = []", 'ignore = "M108"', 'profile = "mine"', 'min-severity = "fatal"', "ignore = ["]
)
def test_a_wrong_setting_says_what_would_be_right(tmp_path, text):
    (tmp_path / "ggufkit.toml").write_text(text)
    with pytest.raises(UsageError):
        settings.find(tmp_path)
