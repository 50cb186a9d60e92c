"""The report of `validate` as text: the verdict first, then what stands behind it, the worst first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.text import Text

from ggufkit.findings import Finding, Report, Severity, Verdict
from ggufkit.report.escape import shown
from ggufkit.report.text.style import heading, listing, number_text, plural, show

#: verdict → sign, style, what it means
VERDICTS: dict[Verdict, tuple[str, str, str]] = {
    Verdict.OK: ("✓", "good", "nothing wrong was found"),
    Verdict.WARNINGS: ("!", "warning", "usable, but something is not as it should be"),
    Verdict.BROKEN: ("✗", "error", "this file is damaged or wrong"),
    Verdict.INCOMPLETE: ("?", "warning", "not everything that was asked for could be checked"),
    Verdict.NEWER_THAN_TOOL: ("?", "warning", "it holds something that this version of ggufkit does not know"),
    Verdict.NOT_GGUF: ("✗", "error", "this is no GGUF file"),
}
SIGNS: dict[Severity, tuple[str, str]] = {
    Severity.ERROR: ("✗", "error"),
    Severity.WARNING: ("!", "warning"),
    Severity.INFO: ("·", "info"),
}
_TITLES = {Severity.ERROR: "Errors", Severity.WARNING: "Warnings", Severity.INFO: "Worth knowing"}

_LONGEST = 600  # characters of a message or a sentence of evidence


def report(console: Console, result: Report) -> None:
    """Print the whole report; its last line says what was checked."""
    lines: list[RenderableType] = [_verdict(result), Text()]
    for severity in sorted(Severity, key=lambda severity: -severity.rank):
        lines += _group(severity, [finding for finding in result.findings if finding.severity is severity])
    if result.known:
        lines += [Text(f"{plural(result.known, 'known finding')} of the baseline not shown", "note"), Text()]
    lines += _probes(result)
    lines += _skipped(result)
    show(console, *lines, Text(checked_line(result)))


def summary(console: Console, results: Sequence[Report]) -> None:
    """Print a line for each of several reports."""
    table = listing("verdict", "errors", "warnings", "file", right=("errors", "warnings"), wide="file")
    for result in results:
        sign, style, _ = VERDICTS[result.verdict]
        errors, warnings = (_count(result, severity) for severity in (Severity.ERROR, Severity.WARNING))
        verdict = Text(f"{sign} {result.verdict}", style)
        table.add_row(verdict, f"{errors or '–'}", f"{warnings or '–'}", Text(shown(result.source)))
    show(console, heading(plural(len(results), "file")), Padding(table, (0, 0, 1, 2), expand=False))


def checked_line(result: Report) -> str:
    """`checked 291 of 291 tensors, 47 of 49 rules ran, 2 skipped`."""
    skipped = result.rules - result.rules_run
    return (
        f"checked {result.tensors_checked} of {result.tensors} tensors, "
        f"{result.rules_run} of {result.rules} rules ran, {skipped} skipped"
    )


def _verdict(result: Report) -> Text:
    sign, style, meaning = VERDICTS[result.verdict]
    name = result.verdict.value.upper().replace("-", " ")
    return Text.assemble((f"{sign} {name}", style), f"  {shown(result.source)}", (f"  {meaning}", "note"))


def _group(severity: Severity, found: list[Finding]) -> list[RenderableType]:
    if not found:
        return []
    sign, style = SIGNS[severity]
    lines: list[RenderableType] = [Text(f"{_TITLES[severity]} ({len(found)})", style)]
    for (code, name), findings in groupby(found, key=lambda finding: (finding.code, finding.name)):
        lines.append(Text.assemble((f"  {sign} {code}", style), (f" {name}", "note")))
        for finding in findings:
            lines += _finding(finding)
    return [*lines, Text()]


def _finding(finding: Finding) -> list[RenderableType]:
    lines: list[RenderableType] = [_indented(Text(shown(finding.message, limit=_LONGEST)), 4)]
    if remarks := _remarks(finding):
        lines.append(_indented(Text("  ".join(remarks), "note"), 4))
    lines += [_indented(Text(f"– {shown(one.text, limit=_LONGEST)}"), 6) for one in finding.evidence]
    if finding.help:
        lines.append(_indented(Text(f"→ {shown(finding.help, limit=_LONGEST)}", "info"), 6))
    return lines


def _remarks(finding: Finding) -> list[str]:
    """Place, value and judgement, as far as there are any and the message does not say them already."""
    name = finding.tensor or finding.key or ""
    index = "" if finding.index is None else str(list(finding.index))
    value = number_text(finding.value) if isinstance(finding.value, float) else str(finding.value)
    parts = (
        name + index if name not in finding.message or index not in finding.message else None,
        f"= {value[:80]}" if finding.value is not None and value not in finding.message else None,
        f"byte {finding.offset:,}" if finding.offset is not None else None,
        f"judged {finding.judgement}" if finding.judgement else None,
        f"{finding.confidence} confidence" if finding.confidence != "high" else None,
    )
    return [shown(part) for part in parts if part]


def _probes(result: Report) -> list[RenderableType]:
    """What running the model showed, a line a number."""
    if not result.probes:
        return []
    lines: list[RenderableType] = [Text("The model running", "label")]
    lines += [_indented(Text(shown(probe["text"], limit=_LONGEST)), 2) for probe in result.probes.values()]
    return [*lines, Text()]


def _skipped(result: Report) -> list[RenderableType]:
    if not result.skipped:
        return []
    lines: list[RenderableType] = [Text("Not checked", "label")]
    for skip in result.skipped:
        style = "warning" if skip.asked or skip.newer else "note"
        lines.append(_indented(Text(f"{shown(skip.what)}: {shown(skip.why)}", style), 2))
    return [*lines, Text()]


def _indented(text: Text, columns: int) -> Padding:
    return Padding(text, (0, 0, 0, columns))


def _count(result: Report, severity: Severity) -> int:
    return sum(finding.severity is severity for finding in result.findings)


def rules(console: Console, found: Iterable[tuple[str, str, str, str]]) -> None:
    """Print the list of rules: code, name, severity, title."""
    table = listing("code", "name", "severity", "what it finds", wide="what it finds")
    for code, name, severity, title in found:
        table.add_row(code, name, Text(severity, SIGNS[Severity(severity)][1]), Text(title, no_wrap=True))
    show(console, table)
