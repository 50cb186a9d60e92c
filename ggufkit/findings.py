"""What a check has to say: findings with their evidence, and the report that gathers them.

A verdict is its findings; nothing else decides the exit status. All classes are frozen data, so that every
output format renders the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """How bad it is, if it is true."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    @property
    def rank(self) -> int:
        return list(Severity).index(self)


class Confidence(StrEnum):
    """How sure the rule is that what it saw is what it says."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


class Judgement(StrEnum):
    """Of an odd value: is it the model's own, or damage?"""

    GENUINE = "genuine"
    SUSPICIOUS = "suspicious"
    CORRUPT = "corrupt"


class Verdict(StrEnum):
    """A report in a word."""

    OK = "ok"
    WARNINGS = "warnings"
    BROKEN = "broken"
    INCOMPLETE = "incomplete"
    NEWER_THAN_TOOL = "newer-than-tool"
    NOT_GGUF = "not-gguf"


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing that speaks for a finding.

    Attributes:
        kind: `numbers`, `context`, `function`, `layout`, `text` …
        text: the evidence in a sentence.
        numbers: the figures in it, by name.
    """

    kind: str
    text: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong or odd.

    Attributes:
        code, name: of the rule (`O201`, `bias-outlier`).
        message: what was found, where, what was expected.
        tensor, key, index, offset, value: the place, as far as there is one; index in NumPy's order, offset in
            bytes of the file.
        help: what to do about it.
    """

    code: str
    name: str
    severity: Severity
    confidence: Confidence
    message: str
    judgement: Judgement | None = None
    tensor: str | None = None
    key: str | None = None
    index: tuple[int, ...] | None = None
    offset: int | None = None
    value: Any = None
    evidence: tuple[Evidence, ...] = ()
    help: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that was not checked, and why.

    Attributes:
        asked: the user asked for it, so that a report without it is incomplete.
        newer: it could not be checked because the file is newer than this tool.
    """

    what: str
    why: str
    asked: bool = False
    newer: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `validate` for one source.

    Attributes:
        source: the path as the user gave it.
        findings: most severe first.
        tensors_checked, tensors: how many tensors had their data read, of how many.
        rules_run, rules: how many rules had something to look at, of how many there are.
        facts: what the file is, for the reader of the report.
        probes: numbers from running the model, by name.
        known: findings that a baseline lists; they are counted and not in `findings`.
    """

    source: str
    findings: tuple[Finding, ...] = ()
    tensors_checked: int = 0
    tensors: int = 0
    rules_run: int = 0
    rules: int = 0
    skipped: tuple[Skipped, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    probes: Mapping[str, Any] = field(default_factory=dict)
    not_gguf: bool = False
    known: int = 0

    @property
    def verdict(self) -> Verdict:
        """The report in a word; the worst thing wins."""
        worst = self.worst
        if self.not_gguf:
            return Verdict.NOT_GGUF
        if worst is Severity.ERROR:
            return Verdict.BROKEN
        if any(skip.newer for skip in self.skipped):
            return Verdict.NEWER_THAN_TOOL
        if self.incomplete:
            return Verdict.INCOMPLETE
        return Verdict.WARNINGS if worst is Severity.WARNING else Verdict.OK

    @property
    def worst(self) -> Severity | None:
        """The highest severity among the findings."""
        return max((finding.severity for finding in self.findings), key=lambda s: s.rank, default=None)

    @property
    def incomplete(self) -> bool:
        """Whether something that was asked for was not checked, or nothing was checked at all."""
        return self.rules_run == 0 or any(skip.asked or skip.newer for skip in self.skipped)

    def exit_code(self, min_severity: Severity = Severity.ERROR) -> int:
        """0 clean, 1 findings at or above `min_severity`, 3 not everything that was asked for could be checked."""
        if self.not_gguf or any(finding.severity.rank >= min_severity.rank for finding in self.findings):
            return 1
        return 3 if self.incomplete else 0
