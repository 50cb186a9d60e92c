"""Reports as JUnit XML, which every CI system shows: a suite a file, a case a rule with a finding, and one for the
rest that passed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from xml.etree import ElementTree as ET

from ggufkit.findings import Finding, Report, Severity
from ggufkit.report.escape import shown


def render(reports: Sequence[Report]) -> str:
    """One document; errors are failures, warnings and notes are output of cases that pass."""
    root = ET.Element("testsuites", name="ggufkit validate")
    for report in reports:
        root.append(_suite(report))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True)


def _suite(report: Report) -> ET.Element:
    cases = list(_cases(report))
    failures = sum(case.find("failure") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = {"tests": str(len(cases)), "failures": str(failures), "skipped": str(skipped), "errors": "0"}
    suite = ET.Element("testsuite", {"name": shown(report.source), **counts})
    suite.extend(cases)
    return suite


def _cases(report: Report) -> Iterator[ET.Element]:
    by_rule = sorted(report.findings, key=lambda finding: finding.code)
    for code, group in groupby(by_rule, key=lambda finding: finding.code):
        findings = list(group)
        case = ET.Element("testcase", classname=shown(report.source), name=f"{code} {findings[0].name}")
        bad = [finding for finding in findings if finding.severity is Severity.ERROR]
        if bad:
            failure = ET.SubElement(case, "failure", message=shown(bad[0].message), type=code)
            failure.text = "\n".join(_text(finding) for finding in bad)
        rest = [finding for finding in findings if finding.severity is not Severity.ERROR]
        if rest:
            ET.SubElement(case, "system-out").text = "\n".join(_text(finding) for finding in rest)
        yield case
    for skip in report.skipped:
        case = ET.Element("testcase", classname=shown(report.source), name=f"skipped: {shown(skip.what)}")
        ET.SubElement(case, "skipped", message=shown(skip.why))
        yield case
    passed = report.rules_run - len({finding.code for finding in report.findings})
    yield ET.Element("testcase", classname=shown(report.source), name=f"{max(passed, 0)} rules found nothing")


def _text(finding: Finding) -> str:
    evidence = "".join(f"\n  - {shown(item.text)}" for item in finding.evidence)
    help_ = f"\n  {shown(finding.help)}" if finding.help else ""
    return f"{finding.severity}: {shown(finding.message)}{evidence}{help_}"
