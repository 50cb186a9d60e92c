"""The demo as text: each scene with its verdict beside its answer."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ggufkit.demo import MODEL, Scene
from ggufkit.findings import Finding
from ggufkit.report.escape import RUNNING_TEXT, shown
from ggufkit.report.text.run import closing as closing_line
from ggufkit.report.text.style import count_text, nbytes_text, show
from ggufkit.report.text.validate import SIGNS, VERDICTS, checked_line

_SHOWN, _EVIDENCE = 2, 2  # findings of a scene, and sentences of evidence for each


def opening(console: Console) -> None:
    """Print what this is about."""
    question = "A model talks garbage. Is it the file, the words, or the engine?"
    show(console, Text(question, "title"), Text("Three files, each checked and run here and now.", "note"), Text())


def scene(console: Console, number: int, seen: Scene) -> None:
    """Print one scene."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="label", no_wrap=True)
    table.add_column(overflow="fold")
    if number == 1:
        table.add_row("   inspect", _what(seen))
    for row, line in enumerate(_verdict(seen)):
        table.add_row("" if row else "   validate", line)
    for row, line in enumerate(_answer(seen)):
        table.add_row("" if row else "   run", line)
    title = Text(f"{number}  {seen.title}", "title")
    show(console, title, Text(f"   {shown(seen.story)}", "note"), table, Text())


def closing(console: Console) -> None:
    """Print what to type next."""
    next_steps = (
        ("ggufkit inspect model.gguf", "what is in it"),
        ("ggufkit validate model.gguf", "what is wrong with it, with evidence"),
        ('ggufkit run model.gguf -p "Hello"', "it speaks, and proves its sanity"),
        ("ggufkit plot model.gguf 'blk.0.*' -o weights.png", "see its numbers"),
        ("ggufkit explain O206", "what a finding means"),
    )
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(style="label")
    for typed, what in next_steps:
        table.add_row(Text(f"   {typed}", "info"), what)
    show(console, Text("Now with your own file:", "title"), table, Text(f"   (this one is {MODEL})", "note"))


def _what(seen: Scene) -> Text:
    model, file = seen.overview.model, seen.overview.file
    types = ", ".join(share.type for share in seen.overview.quantization.types)
    size = f"{count_text(model.n_parameters)} parameters, {types}, {nbytes_text(file.size)}"
    return Text(f"{shown(str(model.architecture))}, {size}")


def _verdict(seen: Scene) -> list[RenderableType]:
    sign, style, _ = VERDICTS[seen.report.verdict]
    verdict = seen.report.verdict.value.upper().replace("-", " ")
    lines: list[RenderableType] = [
        Text.assemble((f"{sign} {verdict}", style), (f"  {checked_line(seen.report)}", "note"))
    ]
    worst = [finding for finding in seen.report.findings if finding.severity is seen.report.worst]
    for finding in worst[:_SHOWN]:
        lines += _finding(finding)
    if (more := len(worst) - _SHOWN) > 0:
        lines.append(Text(f"  and {more} more", "note"))
    return lines


def _finding(finding: Finding) -> list[RenderableType]:
    sign, style = SIGNS[finding.severity]
    lines: list[RenderableType] = [Text.assemble((f"{sign} {finding.code} ", style), shown(finding.message))]
    evidence = (Text(f"– {shown(one.text)}", "note") for one in finding.evidence[:_EVIDENCE])
    return lines + [Padding(text, (0, 0, 0, 2)) for text in evidence]


def _answer(seen: Scene) -> list[RenderableType]:
    asked = Text(f"“{seen.prompt}”", "note")
    if seen.reply is None:
        return [asked, Text(shown(seen.error or ""), "error")]
    return [asked, Text(shown(seen.reply.text.strip(), keep=RUNNING_TEXT)), closing_line(seen.reply)]
