"""Commands on the steps of the forward pass: trace writes them, compare holds two traces against each other, and
diagnose names the bug of the engine that wrote one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ggufkit.cli.common import (
    Device,
    Dtype,
    Json,
    Prompt,
    Raw,
    Source,
    System,
    command,
    first_messages,
    load_engine,
    note,
    numbers,
    print_line,
    progress,
    read_prompt,
    stdout,
)
from ggufkit.errors import UsageError

if TYPE_CHECKING:
    from ggufkit.container import GGUF
    from ggufkit.runtime.engine import Engine
    from ggufkit.runtime.record import Plan

TraceFile = Annotated[Path, typer.Argument(metavar="TRACE.safetensors", help="A trace.")]


@command
def trace(
    source: Source,
    prompt: Prompt = None,
    raw: Raw = False,
    system: System = None,
    tokens: Annotated[str | None, typer.Option(metavar="1,2,3", help="Token ids instead of a prompt.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="A .safetensors file.")] = None,
    steps: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only these: 'q_*', 'l_out-3'.")] = None,
    layers: Annotated[str | None, typer.Option(metavar="0-3", help="Only these layers.")] = None,
    engine: Annotated[
        Literal["reference", "cpu", "cuda", "llama.cpp", "transformers"] | None,
        typer.Option(help="What computes, rather than --device; the last two are other people's, and optional."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    decode: Annotated[bool, typer.Option("--decode", help="Position by position through the cache.")] = False,
    summary: Annotated[bool, typer.Option("--summary", help="A few numbers of each step instead of a file.")] = False,
    json: Json = False,
) -> None:
    """Write every step of the forward pass to a file, to be compared with another engine's."""
    from ggufkit import reader
    from ggufkit.runtime import record

    if (prompt is None) == (tokens is None):
        raise UsageError("give a prompt (-p) or --tokens, one of them")
    if (output is None) != summary:
        raise UsageError("say where the trace goes (-o FILE.safetensors) or ask for a --summary, one of them")
    with reader.open(source) as gguf:
        plan = _plan(
            gguf,
            None if tokens is None else numbers(tokens, "--tokens"),
            None if prompt is None else read_prompt(prompt),
            raw,
            system,
            steps=steps or ("*",),
            layers=layer_numbers(layers) if layers else None,
            decode=decode,
        )
        computing = _engine(gguf, engine or device, dtype)
        if output is None:
            _summarize(computing, plan, source, json)
            return
        record.write(output, computing, plan)
        n_steps = len(plan.shapes(computing.config))
        note(f"{n_steps} steps at {len(plan.rows)} positions, computed by {computing.name}")
        print_line(str(output))


@command
def compare(
    a: TraceFile,
    b: TraceFile,
    rtol: Annotated[float | None, typer.Option(metavar="R", min=0, help="Of an element, relative to B.")] = None,
    atol: Annotated[float | None, typer.Option(metavar="A", min=0, help="Of an element, absolute.")] = None,
    json: Json = False,
) -> int:
    """Name the first step in which two traces differ. Exits with 1 when they do."""
    from ggufkit import compare as comparing
    from ggufkit import trace as traces

    found = comparing.compare(traces.load(a), traces.load(b), rtol=rtol, atol=atol)
    if json:
        from ggufkit.report.document import document

        print_line(document("compare", {"a": str(a), "b": str(b), "agree": found.agree, "comparison": found}))
    else:
        from ggufkit.report.text import compare as text

        text.comparison(stdout(), found, str(a), str(b))
    return 0 if found.agree else 1


@command
def diagnose(
    source: Source,
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="Your engine's trace: .safetensors, or a text log.")],
    prompt: Prompt = None,
    raw: Raw = False,
    system: System = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="The token ids, for a text that does not say them.")
    ] = None,
    json: Json = False,
) -> int:
    """Name the bug of an engine from its trace. Exits with 1 when something is wrong with it."""
    from ggufkit import diagnosis, reader

    ids = None if tokens is None else tuple(numbers(tokens, "--tokens"))
    with reader.open(source) as gguf, progress("comparing every step"):
        found = diagnosis.diagnose(
            gguf, trace, token_ids=ids, prompt=None if prompt is None else read_prompt(prompt), raw=raw, system=system
        )
    if json:
        from ggufkit.report.document import document

        print_line(document("diagnose", {"source": source, "trace": str(trace), **found.as_document()}))
    else:
        from ggufkit.report.text import diagnose as text

        text.diagnosis(stdout(), found.numbers, found.words, found.notes, found.again)
    return found.exit_code


def _plan(
    gguf: GGUF,
    ids: Sequence[int] | None,
    prompt: str | None,
    raw: bool,
    system: str | None,
    **rest: Any,
) -> Plan:
    """What to run: given ids, or those that the file's tokenizer and template make of a prompt."""
    from ggufkit.conversation import Words, message
    from ggufkit.runtime.record import Plan
    from ggufkit.trace import model_digest

    if ids is None:
        words = Words.of(gguf, raw=raw)
        messages = [*first_messages(words, system), message("user", prompt or "")]
        ids = words.tokenizer.encode(words.render(messages))
    return Plan(ids, prompt=prompt, system=system, model=model_digest(gguf), **rest)


def layer_numbers(text: str) -> list[int]:
    """`0-3,7` as layers.

    Raises:
        UsageError: it is something else.
    """
    layers: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"{text!r} names no layers", expected="for instance 0-3 or 0,5,7-9")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return layers


def _engine(gguf: GGUF, name: str, dtype: str | None) -> Engine:
    """One of our engines, or a witness."""
    from ggufkit import witness

    return witness.load(name, gguf, dtype) if name in witness.WITNESSES else load_engine(gguf, name, dtype)


def _summarize(engine: Engine, plan: Plan, source: str, json: bool) -> None:
    from ggufkit.runtime import record

    rows = record.summarize(engine, plan)
    if json:
        from ggufkit.report.document import document

        body = {"source": source, "engine": engine.name, "dtype": str(engine.dtype), "token_ids": list(plan.ids)}
        print_line(document("trace", {**body, "mode": "decode" if plan.decode else "prefill", "steps": rows}))
    else:
        from ggufkit.report.text import trace as text

        text.summaries(stdout(), rows)
