"""All rules over one file: `run` gives the report. The rules live in one file a family, and never print.

Nothing is opened that the selected rules do not need: without a numeric rule no tensor is read. What could not be
checked is said in the report, with the reason, and a rule that fails makes an incomplete report, never a clean one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import islice

from ggufkit import manifest as manifests
from ggufkit import reader
from ggufkit.checks import (  # noqa: F401 - the families register their rules
    keys,
    layout,
    magnitudes,
    metadata,
    numeric,
    outliers,
    splits,
    structure,
    template,
    tensors,
    tokens,
)
from ggufkit.checks import reference as _reference  # noqa: F401 - likewise; `run` has a parameter of that name
from ggufkit.checks import rule as registry
from ggufkit.checks.context import Announce, Context, Progress, Scan
from ggufkit.checks.facts import describe
from ggufkit.checks.rule import FAMILIES, PROFILES, RULES, Found, Need, Profile, Rule
from ggufkit.errors import FormatError, GgufkitError, NewerThanTool, NotGGUF
from ggufkit.findings import Finding, Report, Skipped

# isort: split
from ggufkit.checks import behaviour  # noqa: F401 - the last family: its rules run when all others have spoken

# isort: split
from ggufkit.checks import ablate as _ablate
from ggufkit.checks.running import RunRequest, abilities, begin, start

__all__ = ["FAMILIES", "PROFILES", "RULES", "Context", "Found", "Need", "Profile", "Rule", "examine", "explain", "run"]

#: more findings of one rule than this are counted, not listed
MAX_PER_RULE = 50

#: what opening can end with → the rule that documents it
_UNOPENED: dict[type[GgufkitError], str] = {NotGGUF: "S001", FormatError: "S002", NewerThanTool: "S003"}


def run(
    source: str | os.PathLike[str],
    *,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    profile: Profile = "llama.cpp",
    jobs: int | None = None,
    progress: Progress | None = None,
    announce: Announce | None = None,
    scan: Scan | None = None,
    reference: str | os.PathLike[str] | None = None,
    manifest: str | os.PathLike[str] | None = None,
    run: bool | None = False,
    device: str = "auto",
    ablate: Sequence[str] = (),
    running: Callable[[float], None] | None = None,
) -> Report:
    """Check one file, or the split set that it is a part of.

    Args:
        source: the path.
        select, ignore: rules by code (`S201`), beginning of a code (`N`) or name; all when `select` is empty.
        profile: whose reading of the format decides severities where parsers disagree.
        jobs: threads that measure tensors; by default one a core.
        progress: called as `progress(bytes_done, bytes_in_all)` while tensors are measured.
        announce: called with the name of a kernel that has to be compiled first, which takes a second or two, once.
        scan: measures the tensors; by default `stats.scan`, on the CPU.
        reference: another file of the same model, known to be good, to compare with.
        manifest: checksums of this file, written when it was known to be good.
        run: also run the model; None does where that fits the machine and takes a minute at most.
        device: where to run it, as `runtime.load` has it.
        ablate: globs of tensors; the model is also run without those of each, which means `run`.
        running: called with the share of the running that is done.

    Returns:
        The report. A file that is no GGUF, too damaged to open or of a newer version is a report as well.

    Raises:
        SourceError: the path does not exist or cannot be read.
        UsageError: `select` or `ignore` names no rule, `ablate` no tensor, or the manifest is none.
        NotGGUF, FormatError, NewerThanTool: the reference cannot be opened.
    """
    rules = registry.select(select, ignore)
    try:
        gguf = reader.open(source)
    except tuple(_UNOPENED) as error:
        return _unopened(os.fspath(source), error, profile)
    with gguf, ExitStack() as stack:
        context = Context(
            gguf,
            profile,
            jobs=jobs,
            progress=progress,
            announce=announce,
            scan=scan,
            reference=stack.enter_context(reader.open(reference)) if reference else None,
            manifest=manifests.load(manifest) if manifest else None,
        )
        request = None
        if run or ablate or (run is None and any(Need.ENGINE in rule.needs for rule in rules)):
            _ablate.check_globs(gguf, ablate)
            request = RunRequest(bool(run or ablate), device, tuple(ablate), *([running] if running else []))
        return examine(context, rules, source=os.fspath(source), request=request)


def examine(
    context: Context, rules: Iterable[Rule], *, source: str | None = None, request: RunRequest | None = None
) -> Report:
    """Apply `rules` to a file that is open already.

    Args:
        source: what the report calls it.
        request: run the model, after the rules that do not need that; None does not.
    """
    rules = list(rules)
    applied = _Applied(context)
    loading = None if request is None else begin(context, request)
    applied.apply(rule for rule in rules if Need.ENGINE not in rule.needs)
    if request is not None:
        context.running = start(context, request, applied.findings, loading)
    applied.apply(rule for rule in rules if Need.ENGINE in rule.needs)
    applied.try_out()
    if context.running is not None:
        context.running.finish()
    if not_selected := len(RULES) - applied.ran - applied.without:
        applied.lacking["not selected"] = [f"{not_selected} rules"]
    skipped = [Skipped(", ".join(codes), reason) for reason, codes in applied.lacking.items()]
    return Report(
        source=source or str(context.gguf.path),
        findings=tuple(sorted(applied.findings, key=lambda finding: -finding.severity.rank)),
        tensors_checked=len(context.stats) if context.was_measured else 0,
        tensors=len(context.gguf.tensors),
        rules_run=applied.ran,
        rules=len(RULES),
        skipped=(*applied.failed, *context.skipped, *_unread(context), *skipped),
        facts=describe(context.gguf),
        probes=context.running.probes if context.running else {},
    )


def explain(code: str) -> Rule:
    """The rule with this code or name.

    Raises:
        UsageError: there is none.
    """
    for rule in RULES.values():
        if code.upper() == rule.code or code.lower() == rule.name:
            return rule
    raise registry.no_rule(code)


class _Applied:
    """What came of applying rules.

    Attributes:
        findings: of all rules so far.
        lacking: reason → codes of the rules that had nothing to look at.
        failed: rules with a bug, as things not checked.
        ran: how many rules ran.
    """

    def __init__(self, context: Context) -> None:
        self.findings: list[Finding] = []
        self.lacking: dict[str, list[str]] = {}
        self.failed: list[Skipped] = []
        self.ran = 0
        self._context = context

    @property
    def without(self) -> int:
        """Rules that were chosen and did not run."""
        return len(self.failed) + sum(map(len, self.lacking.values()))

    def apply(self, rules: Iterable[Rule]) -> None:
        """Run the rules that have something to look at."""
        for rule in rules:
            reason = next(filter(None, map(self._context.lacks, rule.needs)), None)
            if reason is not None:
                self.lacking.setdefault(reason, []).append(rule.code)
                continue
            try:
                self.findings += _findings(rule, self._context)
                self.ran += 1
            except Exception as error:  # a bug in a rule must not cost the user the rest of the report
                self.failed.append(Skipped(rule.code, f"the rule itself failed: {_named(error)}", asked=True))

    def try_out(self) -> None:
        """With the model running: what it can do, and what the findings do to it."""
        if self._context.running is None:
            return
        try:
            abilities(self._context.running)
            self.findings = _ablate.with_function(self._context.running, self.findings)
            _ablate.ablate(self._context.running)
        except Exception as error:  # as above
            self._context.skip("trying out what was found", _named(error), asked=True)


def _findings(rule: Rule, context: Context) -> list[Finding]:
    """What one rule finds; beyond MAX_PER_RULE the rest is counted in one more finding."""
    found = iter(rule.check(context))
    findings = [rule.finding(one, context.profile) for one in islice(found, MAX_PER_RULE)]
    if more := sum(1 for _ in found):
        rest = Found(f"and {more:,} more of the same kind", severity=findings[-1].severity)
        findings.append(rule.finding(rest, context.profile))
    return findings


def _named(error: Exception) -> str:
    return str(error) if isinstance(error, GgufkitError) else f"{type(error).__name__}: {error}"


def _unread(context: Context) -> Iterable[Skipped]:
    """The tensors whose data was not looked at, each with its reason, the unknown types first."""
    newer = [tensor for tensor in context.gguf.tensors.values() if tensor.is_newer]
    for tensor in newer[:MAX_PER_RULE]:
        yield Skipped(f"tensor {tensor.name}", f"its type {tensor.type_id} is newer than this tool", newer=True)
    if not context.was_measured:
        if context.gguf.tensors:
            yield Skipped(f"the data of {len(context.gguf.tensors)} tensors", "no rule that reads it was run")
        return
    others = ((name, error) for name, error in context.unmeasured.items() if not isinstance(error, NewerThanTool))
    for name, error in islice(others, MAX_PER_RULE):
        asked = not isinstance(error, FormatError)  # a tensor outside the file is a finding of its own
        yield Skipped(f"tensor {name}", error.message, asked=asked)


def _unopened(source: str, error: GgufkitError, profile: Profile) -> Report:
    """The report on a file that could not be opened."""
    code = next(code for kind, code in _UNOPENED.items() if isinstance(error, kind))
    found = Found(
        error.message + (f"; expected {error.expected}" if error.expected else ""), offset=error.offset, help=error.help
    )
    newer = isinstance(error, NewerThanTool)
    return Report(
        source=source,
        findings=(RULES[code].finding(found, profile),),
        rules_run=1,
        rules=len(RULES),
        skipped=(Skipped(f"{len(RULES) - 1} rules", "the file could not be opened", newer=newer),),
        not_gguf=isinstance(error, NotGGUF),
    )
