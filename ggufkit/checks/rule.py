"""What a rule is, and the registry of all of them.

A rule is one function from the context (the opened file and everything derived from it, computed once) to what it
found. Its decorator gives it a code that is never used again, a name, its usual severity and what it needs in
order to have anything to look at; its docstring is its documentation, printed by `ggufkit explain CODE`, and
therefore has the four parts that a reader wants: what it looks at, why that matters, a real case, what to do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

from ggufkit.errors import UsageError
from ggufkit.findings import Confidence, Evidence, Finding, Judgement, Severity

if TYPE_CHECKING:
    from ggufkit.checks.context import Context

#: whose reading of the format decides where parsers disagree
Profile = Literal["llama.cpp", "spec"]
PROFILES: tuple[Profile, ...] = ("llama.cpp", "spec")

FAMILIES: dict[str, str] = {
    "S": "structure of the file",
    "M": "metadata and tensor list",
    "T": "tokenizer",
    "C": "chat template",
    "N": "numbers in the weights",
    "O": "outliers: damage or genius",
    "R": "against a reference",
    "B": "behaviour of the running model",
}

#: the parts that every rule's docstring has, each opening a paragraph
SECTIONS = ("What.", "Why.", "Case.", "Fix.")


class Need(Enum):
    """What a rule cannot do without; `Context.lacks` says why it is not there."""

    HEADER = "a header that could be read to its end"
    TENSORS = "tensors"
    MODEL = "a language model with weights"
    CONFIG = "an architecture that is modelled here, with consistent hyperparameters"
    VOCABULARY = "a vocabulary"
    TEMPLATE = "a chat template"
    DATA = "the tensors' data"
    REFERENCE = "a reference file (--reference)"
    MANIFEST = "a manifest (--manifest)"
    ENGINE = "the model running (--run)"


@dataclass(frozen=True, slots=True)
class Found:
    """What a rule saw: a finding without the parts that the rule's registration supplies.

    Attributes:
        severity, confidence: only where they differ from the rule's usual ones.
        The rest is as in `findings.Finding`.
    """

    message: str
    tensor: str | None = None
    key: str | None = None
    index: tuple[int, ...] | None = None
    offset: int | None = None
    value: Any = None
    help: str | None = None
    evidence: tuple[Evidence, ...] = ()
    severity: Severity | None = None
    confidence: Confidence | None = None
    judgement: Judgement | None = None


Check = Callable[["Context"], Iterable[Found]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule as registered.

    Attributes:
        code, name: `S201`, `data-outside`.
        severity: of its findings, per profile.
        confidence: that what it saw is what it says.
        needs: without one of these it is skipped, and the report says why.
        doc: its documentation.
        check: the function.
    """

    code: str
    name: str
    severity: Mapping[Profile, Severity]
    confidence: Confidence
    needs: tuple[Need, ...]
    doc: str
    check: Check

    @property
    def family(self) -> str:
        return FAMILIES[self.code[0]]

    @property
    def title(self) -> str:
        """The first line of its documentation."""
        return self.doc.splitlines()[0]

    def finding(self, found: Found, profile: Profile) -> Finding:
        """The complete finding for what was found."""
        return Finding(
            code=self.code,
            name=self.name,
            severity=found.severity or self.severity[profile],
            confidence=found.confidence or self.confidence,
            message=found.message,
            judgement=found.judgement,
            tensor=found.tensor,
            key=found.key,
            index=found.index,
            offset=found.offset,
            value=found.value,
            evidence=found.evidence,
            help=found.help,
        )


#: every rule by its code, in the order of the families' files
RULES: dict[str, Rule] = {}


def rule(
    code: str,
    name: str,
    severity: Severity,
    *,
    spec: Severity | None = None,
    confidence: Confidence = Confidence.HIGH,
    needs: Sequence[Need] = (),
) -> Callable[[Check], Check]:
    """Register a function as the rule `code`.

    Args:
        code: the family's letter and three digits.
        severity: of its findings in the llama.cpp profile.
        spec: the same in the spec profile, where it differs.
        needs: what it cannot do without.
    """

    def register(check: Check) -> Check:
        assert code not in RULES, f"{code} is taken"
        severities: dict[Profile, Severity] = {"llama.cpp": severity, "spec": spec or severity}
        RULES[code] = Rule(code, name, severities, confidence, tuple(needs), inspect.getdoc(check) or "", check)
        return check

    return register


def select(wanted: Sequence[str] = (), ignored: Sequence[str] = ()) -> list[Rule]:
    """The rules that `wanted` names (all when empty) less those that `ignored` names.

    A name is a rule's code, the beginning of one (`N`, `S2`), or a rule's name (`data-outside`).

    Raises:
        UsageError: a name fits no rule.
    """
    chosen = _matching(wanted) if wanted else set(RULES)
    return [RULES[code] for code in RULES if code in chosen - _matching(ignored)]


def _matching(names: Sequence[str]) -> set[str]:
    codes: set[str] = set()
    for name in names:
        hits = {code for code, entry in RULES.items() if code.startswith(name.upper()) or entry.name == name.lower()}
        if not name or not hits:
            raise no_rule(name)
        codes |= hits
    return codes


def no_rule(name: str) -> UsageError:
    """The error for a name that fits no rule."""
    return UsageError(f"no rule is called {name!r}", help="`ggufkit rules` lists them")
