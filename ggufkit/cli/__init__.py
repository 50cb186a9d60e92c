"""The command line: parse, call, render. One file for each group of commands.

Everything heavy is imported inside the commands, so that `--help` and `inspect` answer at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ggufkit import __version__

#: command → its file here; the order is that of `--help`
COMMANDS = {
    "inspect": "look",
    "tokenize": "look",
    "plot": "draw",
    "validate": "verdict",
    "rules": "verdict",
    "explain": "verdict",
    "run": "speak",
    "trace": "prove",
    "compare": "prove",
    "diagnose": "prove",
    "bench": "machine",
    "doctor": "machine",
    "demo": "machine",
}


class _Commands(TyperGroup):
    """Reads only the command that is typed: building the options of all of them takes longer than to inspect a file."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands: Any = dict.fromkeys(COMMANDS)  # what a mistyped name is compared with

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        alone = typer.Typer(add_completion=False)
        alone.command(cmd_name)(getattr(import_module(f"ggufkit.cli.{COMMANDS[cmd_name]}"), cmd_name))
        return typer.main.get_command(alone)


app = typer.Typer(
    name="ggufkit",
    cls=_Commands,
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


def main() -> None:
    """Run the command line. Characters that the terminal cannot show become escapes instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="ggufkit")
