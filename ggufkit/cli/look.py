"""Commands that look at a file without judging it: inspect and tokenize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ggufkit.cli.common import Json, Source, command, print_line, read_prompt, read_text, stdout
from ggufkit.errors import UsageError

if TYPE_CHECKING:
    from ggufkit.container import GGUF


@command
def inspect(
    source: Source,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    metadata: Annotated[bool, typer.Option("--metadata", help="List every metadata key.")] = False,
    key: Annotated[
        list[str] | None, typer.Option("--key", metavar="KEY", help="Print the whole value of a key (repeatable).")
    ] = None,
    tokenizer: Annotated[bool, typer.Option("--tokenizer", help="Show the tokenizer and the template only.")] = False,
    json: Json = False,
) -> int:
    """Show what is in a file: model, quantization mix, tokenizer, template, memory needed."""
    from ggufkit import reader

    with reader.open(source) as gguf:
        if key:
            _print_keys(gguf, key, json)
        elif json:
            _print_document(gguf)
        else:
            _print_overview(gguf, tensors, metadata, tokenizer)
        return 0 if gguf.complete and not gguf.problems else 1


@command
def tokenize(
    source: Source,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What to cut up; - reads stdin.")] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="Take the text from a file.")] = None,
    parse_special: Annotated[
        bool, typer.Option(help="Whether <|im_end|> and the like in the text become their tokens.")
    ] = True,
    json: Json = False,
) -> None:
    """Show how the file's tokenizer cuts a text up."""
    from ggufkit import overview, reader
    from ggufkit.tokenizer import Tokenizer

    if (text is None) == (file is None):
        raise UsageError("give a text or a --file, one of them", help="- reads the text from stdin")
    whole = read_text(file) if file else read_prompt(text or "")
    with reader.open(source) as gguf:
        tokenizer = Tokenizer.from_metadata(gguf.metadata)
        rows = overview.token_rows(tokenizer, tokenizer.encode(whole, parse_special=parse_special))
    if json:
        from ggufkit.report.document import document

        body = {"source": source, "text": whole, "parse_special": parse_special, "count": len(rows), "tokens": rows}
        print_line(document("tokenize", body))
    else:
        from ggufkit.report.text import tokenize as table

        table.tokens(stdout(), rows, kind=f"{tokenizer.vocabulary.model}, {tokenizer.vocabulary.pre}")


def _print_overview(gguf: GGUF, tensors: bool, metadata: bool, tokenizer: bool) -> None:
    from ggufkit import overview
    from ggufkit.report.text import inspect as text

    console = stdout()
    if tensors or metadata:
        if metadata:
            text.metadata(console, overview.metadata_rows(gguf))
        if tensors:
            text.tensors(console, overview.tensor_rows(gguf))
        text.problems(console, tuple(gguf.problems))
    else:
        text.overview(console, overview.overview(gguf), only_words=tokenizer)


def _print_document(gguf: GGUF) -> None:
    """Everything, whatever was asked for: a program picks what it needs."""
    from ggufkit import memory, overview
    from ggufkit.report.document import document, plain

    body: dict[str, Any] = {
        "source": str(gguf.path),
        **plain(overview.overview(gguf)),
        "memory_formula": memory.FORMULA,
        "metadata": overview.metadata_rows(gguf),
        "tensors": overview.tensor_rows(gguf),
    }
    print_line(document("inspect", body))


def _print_keys(gguf: GGUF, keys: list[str], json: bool) -> None:
    from ggufkit import overview
    from ggufkit.report.document import document
    from ggufkit.report.text import inspect as text

    rows = tuple(overview.metadata_value(gguf, key) for key in keys)
    if json:
        print_line(document("inspect", {"source": str(gguf.path), "metadata": rows}))
    else:
        text.values(rows, with_names=len(rows) > 1)
