"""The command that draws: a kind of picture is a row of `_KINDS`, which gathers its data and says how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ggufkit.cli.common import command, note, print_line, progress, stderr, stdout, writing
from ggufkit.report.escape import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from ggufkit.container import GGUF, Tensor
    from ggufkit.errors import GgufkitError
    from ggufkit.plot import Theme
    from ggufkit.plot.grid import Grid
    from ggufkit.stats import TensorStats

Kind = Literal["histogram", "layers", "outliers", "scales", "activations", "attention"]
_TRACE = ".safetensors"
_ACROSS = "a bar across: outside the layers    ·    at the right: the largest of the row, and its layer"
Measure = Literal["absmax", "std", "kurtosis", "zeros", "bits"]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the user wants to see."""

    source: str
    globs: list[str]
    measure: str
    findings: bool
    against: Path | None
    layer: int | None
    head: int


@dataclass(frozen=True, slots=True)
class _Picture:
    """One picture, ready to be drawn on paper or on the terminal."""

    on_paper: Callable[[str, Theme], Figure]
    on_terminal: Callable[[Console], None]


@command
def plot(
    source: Annotated[str, typer.Argument(metavar="SOURCE|TRACE", help="A GGUF file, or a trace (.safetensors).")],
    globs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TENSOR-GLOB]...", help="Which tensors, for instance 'blk.*.attn_k.bias'."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="A .png, .svg or .pdf file.")
    ] = None,
    kind: Annotated[
        Kind | None,
        typer.Option(help="What to draw: by default histogram, of a trace activations.", show_default=False),
    ] = None,
    measure: Annotated[Measure, typer.Option(help="For layers: which number of each tensor.")] = "absmax",
    findings: Annotated[
        bool, typer.Option("--findings", help="For layers: validate as well, and mark what is found.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(metavar="TRACE", help="For activations: another trace; draws the error by step.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="For attention: by default the first in the trace.")
    ] = None,
    head: Annotated[int, typer.Option(metavar="N", min=0, help="For attention.")] = 0,
    dark: Annotated[bool, typer.Option("--dark", help="Light on dark.")] = False,
    terminal: Annotated[bool, typer.Option("--terminal", help="Draw on the terminal.")] = False,
) -> None:
    """Draw a file's numbers, or the steps of a trace."""
    from ggufkit import plot as pictures

    kind = kind or ("activations" if Path(source).suffix == _TRACE else "histogram")
    target = output or Path(f"{Path(source).stem}-{kind}.png")
    if not terminal:
        pictures.check_format(target)
    picture = _KINDS[kind](_Asked(source, globs or [], measure, findings, against, layer, head))
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


def _layers(asked: _Asked) -> _Picture:
    from ggufkit.plot import grid as maps
    from ggufkit.plot import layers
    from ggufkit.report.text import grid as text

    if asked.measure == layers.BITS:
        drawn = _bits(asked)
    else:
        measured, marks = _judged(asked) if asked.findings else (_measured(asked), {})
        drawn = layers.of_stats(measured, asked.measure, marks)
    return _Picture(
        lambda title, theme: maps.draw([drawn], title, _ACROSS, theme),
        lambda console: text.grid(console, drawn, asked.source),
    )


def _outliers(asked: _Asked) -> _Picture:
    from ggufkit import reader, stats
    from ggufkit.plot import outliers
    from ggufkit.report.text import grid as text

    with reader.open(asked.source) as gguf:

        def row_sizes(tensor: Tensor) -> Any:
            return stats.measure(gguf, tensor, keep_rows=True).rows.absmax

        usual = next((role for role in outliers.USUAL if f"blk.0.{role}" in gguf.tensors), "attn_k.bias")
        chosen = {tensor.name: tensor for tensor in _chosen(gguf, asked.globs or [f"blk.*.{usual}"])}
        drawn = outliers.strips(gguf, chosen, row_sizes)

    def on_terminal(console: Console) -> None:
        for one in drawn:
            text.grid(console, one.grid(), asked.source)

    return _Picture(lambda title, theme: outliers.draw(drawn, title, theme), on_terminal)


def _scales(asked: _Asked) -> _Picture:
    from ggufkit.plot import scales
    from ggufkit.report.text import plot as text

    found = scales.rows(_measured(asked))
    return _Picture(
        lambda title, theme: scales.draw(found, title, theme),
        lambda console: text.scales(console, found),
    )


def _activations(asked: _Asked) -> _Picture:
    from ggufkit import compare, trace
    from ggufkit.plot import activations
    from ggufkit.plot import grid as maps
    from ggufkit.report.text import grid as text

    first = trace.load(asked.source)
    if asked.against is None:
        both = activations.sizes(first.arrays, first.first_position)

        def on_terminal(console: Console) -> None:
            for one in both:
                text.grid(console, one, asked.source)

        return _Picture(lambda title, theme: maps.draw(both, title, _ACROSS, theme), on_terminal)
    found = compare.compare(first, trace.load(asked.against))
    name = f" against {asked.against.name}"
    return _Picture(
        lambda title, theme: activations.draw_errors(found, title + name, theme),
        lambda console: text.grid(console, activations.errors(found), asked.source + name),
    )


def _attention(asked: _Asked) -> _Picture:
    from ggufkit import trace
    from ggufkit.plot import attention
    from ggufkit.plot import grid as maps
    from ggufkit.report.text import grid as text

    opened = trace.load(asked.source)
    drawn = attention.head(opened.arrays, opened.first_position, asked.layer, asked.head)
    caption = attention.caption(drawn)
    return _Picture(
        lambda title, theme: maps.draw([drawn], title, caption, theme),
        lambda console: text.grid(console, drawn, f"{asked.source}  {caption}"),
    )


def _bits(asked: _Asked) -> Grid:
    from ggufkit import reader
    from ggufkit.plot import layers

    with reader.open(asked.source) as gguf:
        return layers.bits(_chosen(gguf, asked.globs))


def _chosen(gguf: GGUF, globs: list[str]) -> list[Tensor]:
    """The tensors of the globs; all without any."""
    from ggufkit.plot.histogram import matching

    return matching(gguf, globs or ["*"], most=None)


def _measured(asked: _Asked) -> list[TensorStats]:
    """One pass over the tensors. What cannot be read is said, and left blank."""
    from ggufkit import reader, stats
    from ggufkit.errors import GgufkitError

    measured = []
    with reader.open(asked.source) as gguf:
        tensors = _chosen(gguf, asked.globs)
        with progress("measuring tensors", sum(tensor.nbytes or 0 for tensor in tensors)) as advance:
            for tensor, result in stats.scan(gguf, tensors, progress=_adding(advance), announce=_compiling):
                if isinstance(result, GgufkitError):
                    note(f"{shown(tensor.name)}: {shown(result.message)}", style="warning")
                else:
                    measured.append(result)
    return measured


def _judged(asked: _Asked) -> tuple[list[TensorStats], dict[str, str]]:
    """The statistics that `validate` makes on its way, and the worst that it finds about each tensor."""
    from ggufkit import checks, stats

    measured: list[TensorStats] = []

    def keeping(*args: Any, **options: Any) -> Iterator[tuple[Tensor, TensorStats | GgufkitError]]:
        for tensor, result in stats.scan(*args, **options):
            if isinstance(result, stats.TensorStats):
                measured.append(result)
            yield tensor, result

    with progress("validating", 1.0) as advance:
        report = checks.run(
            asked.source,
            scan=keeping,
            progress=lambda done, total: advance(done / max(total, 1)),
            announce=_compiling,
        )
    marks = {one.tensor: str(one.severity) for one in reversed(report.findings) if one.tensor}
    return [one for one in measured if _wanted(one.name, asked.globs)], marks


def _wanted(name: str, globs: list[str]) -> bool:
    return not globs or any(fnmatchcase(name, glob) for glob in globs)


def _compiling(kernel: str) -> None:
    if stderr().is_terminal:
        note(f"compiling {kernel}, once")


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
    "layers": _layers,
    "outliers": _outliers,
    "scales": _scales,
    "activations": _activations,
    "attention": _attention,
}
