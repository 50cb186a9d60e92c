"""Commands that judge a file: validate, and the two that explain its rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import typer

from ggufkit.cli.common import (
    Device,
    Json,
    Output,
    command,
    note,
    print_line,
    progress,
    stdout,
    wake,
    write_text,
    writing,
)
from ggufkit.errors import UsageError
from ggufkit.findings import Report, Severity

if TYPE_CHECKING:
    from ggufkit.checks import Profile, Rule

#: the exit statuses of several files, the last one wins: damage outranks what could not be checked
_OUTRANKS = (0, 3, 1)

Codes = Annotated[
    list[str] | None,
    typer.Option(metavar="CODES", help="Rules by code (S201), beginning (N) or name; several with commas."),
]


class Format(StrEnum):
    """The output formats of `validate`."""

    TEXT = "text"
    JSON = "json"
    JSONL = "jsonl"
    SARIF = "sarif"
    JUNIT = "junit"
    GITHUB = "github"


@command
def validate(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="GGUF files, or directories of them.")],
    select: Codes = None,
    ignore: Codes = None,
    run: Annotated[
        bool | None, typer.Option("--run/--no-run", help="Also run the model; by default where that is quick.")
    ] = None,
    device: Device = "auto",
    ablate: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Also run it without these tensors (blk.*.attn_*.bias).")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Another file of the same model, known to be good.")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Checksums of this file, written when it was good.")
    ] = None,
    write_manifest: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write such checksums, if nothing is wrong with the file.")
    ] = None,
    baseline: Annotated[Path | None, typer.Option(metavar="FILE", help="Known findings: counted, not shown.")] = None,
    write_baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the findings as known ones.")
    ] = None,
    profile: Annotated[
        Literal["llama.cpp", "spec"] | None, typer.Option(help="Whose reading decides; llama.cpp's by default.")
    ] = None,
    min_severity: Annotated[
        Severity | None, typer.Option(help="Exit with 1 from here on; by default for errors.")
    ] = None,
    format: Annotated[Format, typer.Option(help="How to write the report.")] = Format.TEXT,  # noqa: A002
    json: Json = False,
    output: Output = None,
    jobs: Annotated[int | None, typer.Option(metavar="N", min=1, help="Threads; by default one a core.")] = None,
) -> int:
    """Say what is wrong with a file, each finding with its evidence."""
    if run is not False:
        wake(device)
    from ggufkit import baseline as baselines
    from ggufkit import settings as settled

    shape = Format.JSON if json else format
    paths = list(_files(sources))
    if shape is Format.JSON and len(paths) > 1:
        raise UsageError(f"{len(paths)} files do not fit into one document", help="use --format jsonl")
    if write_manifest is not None and len(paths) > 1:
        raise UsageError(f"{len(paths)} files do not fit into one manifest")
    if ablate and run is False:
        raise UsageError("--ablate runs the model, which --no-run forbids")
    settings = settled.find(Path.cwd())
    asked = _Asked(
        _codes(select) or list(settings.select),
        [*_codes(ignore), *settings.ignore],
        profile or settings.profile or "llama.cpp",
        jobs,
        reference,
        manifest,
        run,
        device,
        ablate or [],
    )
    results = [_check(path, asked) for path in paths]
    _remember(results, write_manifest, write_baseline)
    if baseline is not None:
        known = baselines.load(baseline)
        results = [baselines.without_known(result, known) for result in results]
    _write(results, shape, output)
    least = min_severity or settings.min_severity or Severity.ERROR
    return max((result.exit_code(least) for result in results), key=_OUTRANKS.index)


@command
def rules(
    json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print all of their documentation as a page.")] = False,
) -> None:
    """List every rule of `validate`."""
    from ggufkit.checks import RULES

    if markdown:
        from ggufkit.report import markdown as page

        print_line(page.rules(RULES.values()))
        return
    if json:
        from ggufkit.report.document import document

        print_line(document("rules", {"rules": [_rule_fields(rule) for rule in RULES.values()]}))
        return
    from ggufkit.report.text import validate as text

    text.rules(stdout(), ((rule.code, rule.name, _severity(rule), rule.title) for rule in RULES.values()))


@command
def explain(code: Annotated[str, typer.Argument(metavar="CODE", help="A code (S201) or a name.")]) -> None:
    """Explain a rule: what it looks at, why, a real case, what to do."""
    from ggufkit import checks

    rule = checks.explain(code)
    print_line(f"{rule.code} {rule.name}  ({_severity(rule)}; {rule.family})\n\n{rule.doc}")


def _files(sources: Iterable[str]) -> Iterable[str]:
    """Every file that was named; of a directory the GGUF files in it, of a split set its first shard."""
    from ggufkit.source import shard_paths

    for source in sources:
        if not Path(source).is_dir():
            yield source
            continue
        found = sorted(Path(source).glob("*.gguf"))
        if not found:
            raise UsageError("holds no .gguf file", path=source)
        yield from (str(path) for path in found if path == shard_paths(path)[0])


@dataclass(frozen=True, slots=True)
class _Asked:
    """What every file is to be checked for."""

    select: list[str]
    ignore: list[str]
    profile: Profile
    jobs: int | None
    reference: str | None
    manifest: Path | None
    run: bool | None
    device: str
    ablate: list[str]


def _check(path: str, asked: _Asked) -> Report:
    from ggufkit import checks

    reading = 1.0 if asked.run is False else 0.5
    with progress(f"checking {Path(path).name}", 1.0) as advance:
        return checks.run(
            path,
            select=asked.select,
            ignore=asked.ignore,
            profile=asked.profile,
            jobs=asked.jobs,
            reference=asked.reference,
            manifest=asked.manifest,
            progress=lambda done, total: advance(reading * done / max(total, 1)),
            run=asked.run,
            device=asked.device,
            ablate=asked.ablate,
            running=lambda share: advance(reading + (1 - reading) * share),
        )


def _remember(results: list[Report], manifest: Path | None, baseline: Path | None) -> None:
    """Write a manifest of a good file, and a baseline of whatever was found."""
    from ggufkit import baseline as baselines
    from ggufkit import manifest as manifests
    from ggufkit.report.document import named_document

    if manifest is not None:
        if results[0].worst is Severity.ERROR:
            raise UsageError("no manifest is written of a file with errors", path=results[0].source)
        write_text(named_document(manifests.SCHEMA, _manifest(results[0].source)), manifest)
        note(f"{manifest}: checksums of {results[0].tensors} tensors")
    if baseline is not None:
        write_text(named_document(baselines.SCHEMA, baselines.entries(results)), baseline)
        note(f"{baseline}: {sum(len(result.findings) for result in results)} known findings")


def _manifest(path: str) -> dict[str, Any]:
    from ggufkit import manifest as manifests
    from ggufkit import reader

    with reader.open(path) as gguf, progress("checksums", gguf.size) as advance:
        done = 0

        def add(count: int) -> None:
            nonlocal done
            done += count
            advance(done)

        return manifests.make(gguf, add).as_document(path)


def _write(results: list[Report], shape: Format, output: Path | None) -> None:
    if shape in (Format.SARIF, Format.JUNIT, Format.GITHUB):
        renderer = import_module(f"ggufkit.report.{shape}")
        write_text(renderer.render(results), output)
        return
    if shape is not Format.TEXT:
        from ggufkit.report import json_v1

        indent = 2 if shape is Format.JSON else None
        write_text("\n".join(json_v1.validate(result, indent=indent) for result in results), output)
        return
    if output is None:
        _write_text(results, None)
        return
    with writing(output), output.open("w", encoding="utf-8") as file:
        _write_text(results, file)


def _write_text(results: list[Report], file: IO[str] | None) -> None:
    from ggufkit.report.text import validate as text
    from ggufkit.report.text.style import console

    target = console(file)
    for result in results:
        text.report(target, result)
    if len(results) > 1:
        text.summary(target, results)


def _codes(given: list[str] | None) -> list[str]:
    """Codes from repeated options and comma-separated lists."""
    return [code for part in given or () for code in part.replace(",", " ").split()]


def _rule_fields(rule: Rule) -> dict[str, object]:
    fields = ("code", "name", "family", "title", "confidence", "severity")
    return {**{name: getattr(rule, name) for name in fields}, "needs": [need.value for need in rule.needs]}


def _severity(rule: Rule) -> Severity:
    return rule.severity["llama.cpp"]
