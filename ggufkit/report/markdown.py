"""The rules as a page of documentation: docs/rules.md is this, and a test keeps it so."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from ggufkit.checks import FAMILIES, PROFILES, Rule

_INTRODUCTION = """# Rules

Every rule of `ggufkit validate`. A code is never used again, also when its rule is gone. `ggufkit explain CODE` prints
the same text; `--select` and `--ignore` take codes, beginnings of codes (`N`) and names.

This page is written by `ggufkit rules --markdown > docs/rules.md`.
"""


def rules(found: Iterable[Rule]) -> str:
    """The whole page."""
    order = list(FAMILIES)
    by_code = sorted(found, key=lambda rule: (order.index(rule.code[0]), rule.code))
    parts = [_INTRODUCTION]
    for family, members in groupby(by_code, key=lambda rule: rule.family):
        parts.append(f"## {family[0].upper()}{family[1:]}\n")
        parts += [_rule(rule) for rule in members]
    return "\n".join(parts).rstrip()


def _rule(rule: Rule) -> str:
    severities = {rule.severity[profile] for profile in PROFILES}
    severity = ", ".join(f"{rule.severity[profile]} ({profile})" for profile in PROFILES)
    said = severity if len(severities) > 1 else next(iter(severities))
    needs = "; needs " + ", and ".join(need.value for need in rule.needs) if rule.needs else ""
    body = rule.doc.partition("\n")[2].strip()
    for part in ("What", "Why", "Case", "Fix"):
        body = body.replace(f"{part}. ", f"**{part}.** ", 1)
    return f"### {rule.code} {rule.name}\n\n{rule.title}\n\n*{said}; {rule.confidence} confidence{needs}*\n\n{body}\n"
