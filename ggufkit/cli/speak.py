"""The command that lets a file speak: run, once or as a chat."""

from __future__ import annotations

import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from ggufkit.cli.common import (
    INTERRUPTED,
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
    print_line,
    read_prompt,
    report_error,
    stderr,
    wake,
)
from ggufkit.errors import GgufkitError, UsageError

if TYPE_CHECKING:
    from ggufkit.container import GGUF
    from ggufkit.conversation import Conversation, Message, Reply, Words

_CHAT_HELP = "/exit or Ctrl-D ends, Ctrl-C stops an answer, /clear forgets what was said"


@command
def run(
    source: Source,
    prompt: Prompt = None,
    raw: Raw = False,
    system: System = None,
    n_predict: Annotated[int | None, typer.Option("-n", metavar="N", min=0, help="At most N tokens. [1024]")] = None,
    ctx: Annotated[int | None, typer.Option("--ctx", metavar="N", min=1, help="Positions of the context.")] = None,
    temp: Annotated[float, typer.Option("--temp", metavar="T", help="Temperature; 0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Only the K likeliest; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(metavar="P", help="Only the likeliest up to P together; 1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(metavar="P", help="Only those P times as likely as the likeliest.")] = 0.0,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the sampling; else another each time.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
) -> int:
    """Let the model answer, and prove that the answer is sane. Without a prompt, on a terminal: a chat."""
    wake(device)
    from ggufkit import reader
    from ggufkit.conversation import MOST_TOKENS, Conversation
    from ggufkit.runtime.sampling import SamplingParams

    chatting = prompt is None
    if chatting and (json or not sys.stdin.isatty()):
        raise UsageError("there is no prompt", help="give -p TEXT; -p - reads it from stdin")
    text = "" if prompt is None else read_prompt(prompt)
    params = SamplingParams(temp, top_k, top_p, min_p, seed)
    limit = MOST_TOKENS if n_predict is None else n_predict
    with reader.open(source) as gguf:
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(_words, gguf, raw, system, None if chatting else text)
            engine = load_engine(gguf, device, dtype)
            words, before = reading.result()
        talk = Conversation(engine, words, params, n_ctx=ctx, n_predict=limit, messages=before)
        if not words.templated and not raw:
            note("the file has no chat template: the prompt is taken as it is")
        if chatting:
            return _chat(talk)
        if json:
            return _document(talk, text, source)
        return _stream(talk, talk.say(text))


def _words(gguf: GGUF, raw: bool, system: str | None, prompt: str | None) -> tuple[Words, list[Message]]:
    """The file's words and the messages that come first, with what a first turn takes done ahead."""
    from ggufkit.conversation import Words, message

    words = Words.of(gguf, raw=raw)
    before = first_messages(words, system)
    words.tokenizer.encode("?" if prompt is None else words.render([*before, message("user", prompt)]))
    return words, before


def _document(talk: Conversation, text: str, source: str) -> int:
    from ggufkit.report.document import document

    reply = _silently(talk, text)
    engine = talk.engine
    body = {
        "source": source,
        "engine": engine.name,
        "device": engine.device,
        "dtype": str(engine.dtype),
        "sane": not reply.problems,
        "reply": reply,
    }
    print_line(document("run", body))
    return 1 if reply.problems else 0


def _silently(talk: Conversation, text: str) -> Reply:
    for _ in talk.say(text):
        pass
    assert talk.reply is not None
    return talk.reply


def _stream(talk: Conversation, pieces: Generator[str, None, None]) -> int:
    """Print an answer as it comes, then the line that closes it. Ctrl-C ends it early."""
    status = 0
    show = _visible if sys.stdout.isatty() else str
    try:
        for piece in pieces:
            sys.stdout.write(show(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        pieces.close()
        status = INTERRUPTED
    sys.stdout.write("\n")
    sys.stdout.flush()
    if talk.reply is not None:
        from ggufkit.report.text import run as text

        stderr().print(text.closing(talk.reply), soft_wrap=True)
        status = status or (1 if talk.reply.problems else 0)
    return status


def _visible(piece: str) -> str:
    """On a terminal, what a model says cannot move the cursor either."""
    from ggufkit.report.escape import RUNNING_TEXT, shown

    return shown(piece, keep=RUNNING_TEXT)


def _chat(talk: Conversation) -> int:
    """Turn after turn, until /exit or the end of the input."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing and history; Windows has its own
    note(_CHAT_HELP)
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt) as end:
            print_line("")
            return INTERRUPTED if isinstance(end, KeyboardInterrupt) else 0
        match text.strip():
            case "":
                continue
            case "/exit" | "/quit":
                return 0
            case "/help":
                note(_CHAT_HELP)
            case "/clear":
                talk.clear()
                note("forgotten")
            case command if command.startswith("/") and " " not in command:
                note(f"there is no {command}; {_CHAT_HELP}")
            case _:
                _turn(talk, text)


def _turn(talk: Conversation, text: str) -> None:
    """One answer; an error costs the turn, not the chat."""
    try:
        _stream(talk, talk.say(text))
    except GgufkitError as error:
        report_error(error)
