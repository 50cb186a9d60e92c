"""What all commands share: the options that mean the same everywhere, where output goes, and how errors end.

stdout carries the result, stderr everything else. No exception of ours reaches the user as a traceback: an
error is one line that says what was found and what to do, and the exit status of its class. With `--json` the
same error is a document on stdout, so that a program always gets one.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from ggufkit.errors import DeviceError, GgufkitError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from ggufkit.container import GGUF
    from ggufkit.conversation import Words
    from ggufkit.runtime.engine import Engine

INTERRUPTED = 130
BROKEN_PIPE = 141

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="A GGUF file, or any file of a split set.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write to FILE, not to stdout.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to run.")]
Dtype = Annotated[
    Literal["float16", "float32", "float64"] | None,
    typer.Option(help="Precision of the computation; float64 means the reference."),
]
Prompt = Annotated[str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="The prompt; - reads stdin.")]
Raw = Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without the chat template.")]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")]

F = TypeVar("F", bound=Callable[..., Any])


def command(function: F) -> F:
    """Wrap a command: its return value is the exit status, and every expected error ends in a line."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            status = function(*args, **kwargs) or 0
            sys.stdout.flush()
        except GgufkitError as error:
            status = report_error(error, as_json=bool(kwargs.get("json")))
        except KeyboardInterrupt:
            status = INTERRUPTED
        except OSError as error:
            status = _os_error(error, as_json=bool(kwargs.get("json")))
        except MemoryError:
            message = "this machine has not enough memory for it"
            status = report_error(DeviceError(message, help="`ggufkit inspect` says how much is needed"))
        raise typer.Exit(status)

    return guarded  # type: ignore[return-value]


def report_error(error: GgufkitError, *, as_json: bool = False) -> int:
    """Say what went wrong, and return the exit status."""
    if as_json:
        from ggufkit.report.document import document

        print_line(document("error", {"error": _error_fields(error), "exit_code": error.exit_code}))
    else:
        from ggufkit.report.escape import shown

        note(f"error: {shown(str(error))}", style="error")
        if error.help:
            note(f"  {shown(error.help)}")
    return error.exit_code


def note(message: str, *, style: str = "note") -> None:
    """One line for people, on stderr."""
    stderr().print(message, style=style, soft_wrap=True)


def stdout() -> Console:
    """The console for results."""
    from ggufkit.report.text.style import console

    return console()


@functools.cache
def stderr() -> Console:
    """The console for progress and notes."""
    from ggufkit.report.text.style import console

    return console(stderr=True)


def print_line(line: str) -> None:
    """Write a line to stdout as it is."""
    sys.stdout.write(line + "\n")


def write_text(line: str, output: Path | None) -> None:
    """Write a line to `output`, or to stdout.

    Raises:
        UsageError: the file cannot be written.
    """
    if output is None:
        print_line(line)
        return
    with writing(output):
        output.write_text(line + "\n", encoding="utf-8")


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turn the system's refusal to write `output` into a UsageError."""
    try:
        yield
    except OSError as error:
        message = f"cannot be written: {error.strerror or error}"
        raise UsageError(message, path=str(output), help="choose another place with -o") from error


@contextmanager
def progress(what: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
    """A bar on stderr for whatever lasts longer than a second, on a terminal only.

    Yields:
        a function to call with how much of `total` is done.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from ggufkit.cli.bar import Bar

    with Bar(stderr, what, total) as bar:
        yield bar.update


def wake(device: str) -> None:
    """Let the GPU get ready while something else is done, where one may be used."""
    if device != "cpu":
        from ggufkit import gpu

        gpu.wake()


def load_engine(gguf: GGUF, device: str, dtype: str | None = None) -> Engine:
    """An engine for the file, with what takes its time said on stderr."""
    from ggufkit import runtime

    with progress("loading", 1.0) as advance:
        return runtime.load(
            gguf,
            device,
            dtype=dtype,
            note=note if sys.stderr.isatty() else None,
            progress=lambda done, total: advance(done / max(total, 1)),
        )


def first_messages(words: Words, system: str | None) -> list[dict[str, str]]:
    """What a conversation begins with.

    Raises:
        UsageError: a system message without a template that could hold it.
    """
    if system is None:
        return []
    if not words.templated:
        raise UsageError("--system needs a chat template", help="leave it out; write what it says into the prompt")
    return [{"role": "system", "content": system}]


def read_prompt(prompt: str) -> str:
    """The prompt itself, or what stdin holds when it is `-`.

    Raises:
        UsageError: stdin is no UTF-8 text.
    """
    return _utf8(sys.stdin.buffer.read(), "stdin") if prompt == "-" else prompt


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        UsageError: it is no UTF-8 text.
    """
    return _utf8(file.read_bytes(), str(file))


def numbers(text: str, what: str) -> list[int]:
    """`1,2,3` as integers.

    Raises:
        UsageError: it is something else.
    """
    try:
        return [int(part) for part in text.replace(" ", "").split(",") if part]
    except ValueError:
        raise UsageError(f"{what} are numbers separated by commas, not {text!r}") from None


def _utf8(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("is not UTF-8 text", path=name, offset=error.start, help="convert it first") from error


def _error_fields(error: GgufkitError) -> dict[str, Any]:
    fields = {name: getattr(error, name) for name in ("message", "path", "offset", "expected", "help")}
    return {"kind": type(error).__name__, **fields}


def _os_error(error: OSError, *, as_json: bool) -> int:
    """A reader that went away is no error; anything else of the system's is one line."""
    if isinstance(error, BrokenPipeError) or error.errno == errno.EPIPE:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit's flush would complain
        return BROKEN_PIPE
    path = str(error.filename) if error.filename else None
    return report_error(UsageError(error.strerror or str(error), path=path), as_json=as_json)
