"""The command that draws: a kind of picture is a row of `_KINDS`, which gathers its data and says how it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ggufkit.cli.common import Source, command, print_line, progress, stdout, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from ggufkit.plot import Theme

Kind = Literal["histogram"]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the user wants to see."""

    source: str
    globs: list[str]


@dataclass(frozen=True, slots=True)
class _Picture:
    """One picture, ready to be drawn on paper or on the terminal."""

    on_paper: Callable[[str, Theme], Figure]
    on_terminal: Callable[[Console], None]


def register(app: typer.Typer) -> None:
    """Add this group's command."""
    app.command()(plot)


@command
def plot(
    source: Source,
    globs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TENSOR-GLOB]...", help="Which tensors, for instance 'blk.*.attn_k.bias'."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="A .png, .svg or .pdf file.")
    ] = None,
    kind: Annotated[Kind, typer.Option(help="What to draw.")] = "histogram",
    dark: Annotated[bool, typer.Option("--dark", help="Light on dark.")] = False,
    terminal: Annotated[bool, typer.Option("--terminal", help="Draw on the terminal.")] = False,
) -> None:
    """Draw a file's numbers: histograms of tensors."""
    from ggufkit import plot as pictures

    target = output or Path(f"{Path(source).stem}-{kind}.png")
    if not terminal:
        pictures.check_format(target)
    picture = _KINDS[kind](_Asked(source, globs or []))
    if terminal:
        picture.on_terminal(stdout())
        return
    figure = picture.on_paper(Path(source).name, pictures.DARK if dark else pictures.LIGHT)
    with writing(target):
        pictures.save(figure, target)
    print_line(str(target))


def _histogram(asked: _Asked) -> _Picture:
    from ggufkit import reader
    from ggufkit.plot import bars
    from ggufkit.plot import histogram as counting
    from ggufkit.report.text import plot as text

    with reader.open(asked.source) as gguf:
        tensors = counting.matching(gguf, asked.globs)
        with progress("reading tensors", 2 * sum(tensor.n_elements for tensor in tensors)) as advance:
            count = _adding(advance)
            drawn = [counting.histogram(gguf, tensor, count) for tensor in tensors]
    return _Picture(
        lambda title, theme: bars.draw(drawn, title, theme),
        lambda console: text.histograms(console, drawn),
    )


def _adding(advance: Callable[[float], None]) -> Callable[[int], None]:
    """Turns how much was just done into how much is done."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        advance(done)

    return count


_KINDS: dict[str, Callable[[_Asked], _Picture]] = {
    "histogram": _histogram,
}
