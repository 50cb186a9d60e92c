"""The verdict follows from the findings and from what was not checked, and from nothing else."""

from __future__ import annotations

import pytest

from ggufkit.findings import Confidence, Finding, Report, Severity, Skipped, Verdict

INFO, WARNING, ERROR = Severity.INFO, Severity.WARNING, Severity.ERROR
UNASKED, ASKED, NEWER = Skipped("a", "b"), Skipped("a", "b", asked=True), Skipped("a", "b", newer=True)


def report(
    *severities: Severity, skipped: tuple[Skipped, ...] = (), rules_run: int = 1, not_gguf: bool = False
) -> Report:
    findings = tuple(Finding("X100", "x", severity, Confidence.HIGH, "m") for severity in severities)
    return Report("f", findings, skipped=skipped, rules_run=rules_run, rules=1, not_gguf=not_gguf)


@pytest.mark.parametrize(
    ("made", "verdict", "status"),
    [
        (report(), Verdict.OK, 0),
        (report(INFO), Verdict.OK, 0),
        (report(INFO, WARNING), Verdict.WARNINGS, 0),
        (report(WARNING, ERROR), Verdict.BROKEN, 1),
        (report(skipped=(UNASKED,)), Verdict.OK, 0),
        (report(skipped=(ASKED,)), Verdict.INCOMPLETE, 3),
        (report(skipped=(NEWER,)), Verdict.NEWER_THAN_TOOL, 3),
        (report(skipped=(ASKED, NEWER)), Verdict.NEWER_THAN_TOOL, 3),
        (report(WARNING, skipped=(ASKED,)), Verdict.INCOMPLETE, 3),
        (report(ERROR, skipped=(ASKED, NEWER)), Verdict.BROKEN, 1),
        (report(rules_run=0), Verdict.INCOMPLETE, 3),
        (report(not_gguf=True), Verdict.NOT_GGUF, 1),
        (report(ERROR, not_gguf=True), Verdict.NOT_GGUF, 1),
    ],
)
def test_verdict_and_status(made: Report, verdict: Verdict, status: int) -> None:
    assert (made.verdict, made.exit_code()) == (verdict, status)


@pytest.mark.parametrize(
    ("severity", "threshold", "status"),
    [(INFO, INFO, 1), (INFO, WARNING, 0), (WARNING, WARNING, 1), (WARNING, ERROR, 0), (ERROR, INFO, 1)],
)
def test_the_threshold_decides_the_status(severity: Severity, threshold: Severity, status: int) -> None:
    assert report(severity).exit_code(threshold) == status


def test_findings_outrank_what_was_not_checked() -> None:
    assert report(WARNING, skipped=(ASKED,)).exit_code(WARNING) == 1
