"""The report of `validate` as the JSON document `ggufkit.validate/1`.

The shape is a promise to whoever parses it: fields may be added, none is renamed or removed without a new version.
Every field is always there; what does not apply is null or empty.
"""

from __future__ import annotations

from typing import Any

from ggufkit.findings import Evidence, Finding, Report
from ggufkit.report.document import document


def validate(report: Report, *, indent: int | None = 2) -> str:
    """The document of one report; `indent=None` puts it on one line, for a stream of several."""
    return document("validate", as_dict(report), indent=indent)


def as_dict(report: Report) -> dict[str, Any]:
    """The document's fields, in its order."""
    return {
        "source": report.source,
        "verdict": report.verdict,
        "checked": {
            "tensors": report.tensors_checked,
            "of": report.tensors,
            "rules": report.rules_run,
            "of_rules": report.rules,
            "skipped": [{"what": skip.what, "why": skip.why} for skip in report.skipped],
        },
        "known": report.known,
        "facts": report.facts,
        "probes": report.probes,
        "findings": [_finding(finding) for finding in report.findings],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "name": finding.name,
        "severity": finding.severity,
        "confidence": finding.confidence,
        "judgement": finding.judgement,
        "tensor": finding.tensor,
        "key": finding.key,
        "index": finding.index,
        "offset": finding.offset,
        "value": finding.value,
        "message": finding.message,
        "evidence": [_evidence(evidence) for evidence in finding.evidence],
        "help": finding.help,
    }


def _evidence(evidence: Evidence) -> dict[str, Any]:
    return {"kind": evidence.kind, "text": evidence.text, **evidence.numbers}
