"""Reports as GitHub workflow commands: annotations on the run, a line each."""

from __future__ import annotations

from collections.abc import Sequence

from ggufkit.findings import Report, Severity
from ggufkit.report.escape import shown

_COMMANDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}


def render(reports: Sequence[Report]) -> str:
    """A line a finding, and one a file that says its verdict."""
    lines = []
    for report in reports:
        file = _property(report.source)
        for finding in report.findings:
            title = _property(f"{finding.code} {finding.name}")
            place = "" if finding.offset is None else f" (byte {finding.offset:,})"
            command = _COMMANDS[finding.severity]
            lines.append(f"::{command} file={file},title={title}::{_data(finding.message + place)}")
        lines.append(f"{shown(report.source)}: {report.verdict}")
    return "\n".join(lines)


def _data(text: str) -> str:
    """As the message of a workflow command: a percent sign and line ends are encoded."""
    return shown(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """As a property of a workflow command: commas and colons too."""
    return _data(text).replace(":", "%3A").replace(",", "%2C")
