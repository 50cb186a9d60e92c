"""The command line: parse, call, render. One file for each group of commands.

Everything heavy is imported inside the commands, so that `--help` and `inspect` answer at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ggufkit import __version__
from ggufkit.cli import draw, look, machine, prove, speak, verdict

app = typer.Typer(
    name="ggufkit",
    help="Is it the GGUF file, the tokenizer and template, or my engine? Answered with evidence.",
    epilog="Exit status: 0 clean, 1 findings, 2 usage, 3 something that was asked for could not be checked.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"ggufkit {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Is it the GGUF file, the tokenizer and template, or my engine? Answered with evidence."""


for group in (look, draw, verdict, speak, prove, machine):
    group.register(app)


def main() -> None:
    """Run the command line. Characters that the terminal cannot show become escapes instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="ggufkit")
