"""What all text reports share: the console, the colours, units, and the two shapes that a section has.

Colour never carries meaning alone; a word or a sign always says the same. Nothing from a file is printed
without `shown`, and rich's own markup is off, so that square brackets in a name are just brackets.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import IO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from ggufkit.report.escape import shown

THEME = Theme(
    {
        "title": "bold",
        "label": "dim",
        "note": "dim",
        "good": "green",
        "info": "cyan",
        "warning": "yellow",
        "error": "bold red",
        "type": "magenta",
    }
)

#: the width of text that goes to a pipe or a file: nothing there needs to be cut or wrapped
UNBOUNDED = 1000

_BYTES = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_COUNTS = ("", " k", " M", " G", " T", " P", " E")


def console(file: IO[str] | None = None, *, stderr: bool = False) -> Console:
    """A console that honours NO_COLOR, FORCE_COLOR and COLUMNS; not cut to any width when it is no terminal."""
    made = Console(file=file, stderr=stderr, theme=THEME, markup=False, emoji=False, highlight=False)
    if not made.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        made.width = UNBOUNDED
    return made


def nbytes_text(count: float) -> str:
    """Bytes for people, in powers of 1000: 491.4 MB."""
    return _scaled(count, _BYTES, " ")


def count_text(count: float) -> str:
    """A number for people: 494.0 M."""
    return _scaled(count, _COUNTS, "")


def _scaled(count: float, units: tuple[str, ...], space: str) -> str:
    scale = 0
    while abs(count) >= 999.95 and scale < len(units) - 1:
        count /= 1000
        scale += 1
    return f"{count:.0f}{space}{units[0]}" if scale == 0 else f"{count:.1f}{space}{units[scale]}"


def share_text(part: float, whole: float) -> str:
    """A part as a percentage, with `<0.1 %` for what is small but there."""
    if whole <= 0:
        return "–"
    percent = 100 * part / whole
    return "<0.1 %" if 0 < percent < 0.05 else f"{percent:.1f} %"


def number_text(value: float) -> str:
    """A float in at most six digits: -211.375, 1e+30, nan."""
    return f"{value:.6g}"


def shape_text(shape: Iterable[int]) -> str:
    """`4864 × 896`."""
    return " × ".join(f"{size}" for size in shape) or "scalar"


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 tensor`, `291 tensors`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def heading(title: str, note: str = "") -> Text:
    """The first line of a section."""
    return Text.assemble((title, "title"), ("  " + note if note else "", "note"))


def facts(rows: Iterable[tuple[str, RenderableType | None]]) -> Table:
    """Names and values below each other; rows whose value is None or empty are left out."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="label", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value is not None and value != "":
            table.add_row("  " + name, value)
    return table


def listing(*columns: str, right: Iterable[str] = (), wide: str | None = None) -> Table:
    """A table with a header line.

    Args:
        columns: their titles.
        right: those that hold numbers.
        wide: the one whose cells give way when the terminal is narrow; all others stay whole.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="label", show_edge=False)
    numbers = set(right)
    for title in columns:
        gives_way = title == wide
        table.add_column(
            Text(title, no_wrap=True, overflow="ellipsis"),
            justify="right" if title in numbers else "left",
            no_wrap=not gives_way,
            overflow="ellipsis",
        )
    return table


def commands(lines: Iterable[str]) -> list[RenderableType]:
    """Commands to type, each on a line of its own that is never wrapped; nothing for none."""
    said = [
        Text("  " + shown(line), "note" if line.startswith("#") else "", no_wrap=True, overflow="ignore")
        for line in lines
    ]
    return [heading("To see it again"), *said, Text()] if said else []


def show(console: Console, *things: RenderableType) -> None:
    """Print things below each other; what goes to a pipe or a file has no spaces at the ends of its lines."""
    if console.is_terminal:
        console.print(Group(*things), crop=False)
        return
    with console.capture() as capture:
        console.print(Group(*things), crop=False)
    console.file.write("\n".join(line.rstrip() for line in capture.get().split("\n")))


def from_file(value: object, *, limit: int | None = 200) -> Text:
    """A string or value that came from a file, escaped; in a table it stays on one line."""
    return Text(shown(str(value), limit=limit), no_wrap=True, overflow="ellipsis")
