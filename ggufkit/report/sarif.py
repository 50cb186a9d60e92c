"""Reports as SARIF 2.1.0, which code hosts and editors show beside the file.

Source: Static Analysis Results Interchange Format (SARIF) Version 2.1.0, OASIS Standard. A binary file has no lines;
places are byte offsets (`byteOffset`), and the tensor or key is a logical location.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from ggufkit import __version__
from ggufkit.checks.rule import RULES, Rule
from ggufkit.findings import Finding, Report, Severity
from ggufkit.report.document import plain
from ggufkit.report.escape import shown

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}


def render(reports: Sequence[Report]) -> str:
    """One run over all files; only the rules that found something are described."""
    codes = sorted({finding.code for report in reports for finding in report.findings})
    run = {
        "tool": {
            "driver": {
                "name": "ggufkit",
                "semanticVersion": __version__,
                "rules": [_rule(RULES[code]) for code in codes if code in RULES],
            }
        },
        "artifacts": [{"location": {"uri": _uri(report.source)}} for report in reports],
        "results": [_result(report, finding) for report in reports for finding in report.findings],
        "invocations": [{"executionSuccessful": not any(report.incomplete for report in reports)}],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, allow_nan=False)


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.code,
        "name": rule.name,
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.doc},
        "properties": {"family": rule.family},
    }


def _result(report: Report, finding: Finding) -> dict[str, Any]:
    place = finding.tensor or finding.key
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": _uri(report.source)}}}
    if finding.offset is not None:
        location["physicalLocation"]["region"] = {"byteOffset": finding.offset}
    if place is not None:
        kind = "variable" if finding.tensor else "property"
        location["logicalLocations"] = [{"name": shown(place), "fullyQualifiedName": shown(place), "kind": kind}]
    evidence = [shown(item.text) for item in finding.evidence]
    return {
        "ruleId": finding.code,
        "level": _LEVELS[finding.severity],
        "message": {"text": " ".join([shown(finding.message), *(f"({text})" for text in evidence)])},
        "locations": [location],
        "partialFingerprints": {"place/v1": f"{finding.code}:{shown(place or '')}:{finding.index or ''}"},
        "properties": plain(
            {
                "confidence": finding.confidence,
                "judgement": finding.judgement,
                "index": finding.index,
                "value": finding.value,
                "help": finding.help,
            }
        ),
    }


def _uri(source: str) -> str:
    """A path as a URI reference; relative ones stay relative."""
    path = PurePath(source)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())
