"""Heat maps on the terminal: solid cells where there are colours, shades of grey where there are none."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from ggufkit.plot.grid import MARKS, Grid
from ggufkit.report.escape import shown
from ggufkit.report.text.style import show

#: cividis in nine steps, dark to light
_COLOURS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#fee838")
_SHADES = "░▒▓█"
_OVER, _UNDER = "dark_orange", "grey50"
_SIGNS = {"NaN or Inf": "N", "error": "✗", "warning": "!", "info": "i"}
_WIDEST_CELL = 3


def grid(console: Console, drawn: Grid, title: str = "") -> None:
    """Print a map; columns that have no room each are gathered, the largest value shown."""
    labels = max(len(label) for label in ("", *drawn.rows))
    notes = max((len(note) for note in drawn.notes), default=0)
    room = max(console.width - labels - notes - 4, 8)
    groups = _groups(len(drawn.columns), room)
    cell = max(1, min(room // len(groups), _WIDEST_CELL))
    levels, (low, high) = _gathered(drawn.scaled(), groups), drawn.limits()
    lines = [Text.assemble((drawn.quantity, "title"), (f"  {shown(title)}" if title else "", "note")), Text()]
    signs = {(mark.row, int(np.searchsorted(groups, mark.column, "right")) - 1): mark.kind for mark in drawn.marks}
    for row, label in enumerate(drawn.rows):
        line = Text(f"{shown(label):<{labels}}  ")
        for column, value in enumerate(levels[row]):
            line.append_text(_cell(console, value, low, high, cell, signs.get((row, column))))
        line.append(f"  {drawn.notes[row]}" if drawn.notes else "", "note")
        lines.append(line)
    axis = _axis(drawn, groups, cell)
    lines += [Text(" " * (labels + 2) + axis, "note"), Text(), _scale(console, drawn, low, high)]
    show(console, *lines)


def _groups(count: int, room: int) -> npt.NDArray[np.int64]:
    """The first column of each group that is shown as one."""
    shown_columns = min(count, room)
    return np.linspace(0, count, shown_columns, endpoint=False).astype(np.int64)


def _gathered(values: npt.NDArray[np.float64], groups: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return np.fmax.reduceat(values, groups, axis=1)


def _cell(console: Console, value: float, low: float, high: float, width: int, mark: str | None) -> Text:
    sign = _SIGNS[mark] if mark else ""
    if np.isnan(value):
        return Text(sign.ljust(width), "error" if sign else "")
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    if console.color_system not in ("256", "truecolor"):
        shade = _SHADES[min(int(share * len(_SHADES)), len(_SHADES) - 1)]
        return Text(sign + shade * (width - len(sign)))
    colour = _OVER if value > high else _UNDER if value < low else _COLOURS[min(int(share * 9), 8)]
    ink = "black" if share > 0.6 else "white"
    return Text(sign.ljust(width), f"bold {ink} on {colour}")


def _axis(drawn: Grid, groups: npt.NDArray[np.int64], cell: int) -> str:
    """The columns' labels where they have room."""
    line = ""
    for place, column in enumerate(groups):
        label = drawn.columns[column]
        if len(line) <= place * cell and place * cell + len(label) <= len(groups) * cell:
            line = line.ljust(place * cell) + label + " "
    return f"{line.rstrip()}  {drawn.column_axis}"


def _scale(console: Console, drawn: Grid, low: float, high: float) -> Text:
    """What the shades mean, and the signs that were used."""
    ends = [f"{10**end if drawn.logarithmic else end:.3g}" for end in (low, high)]
    line = Text(f"{ends[0]} ")
    for step in np.linspace(low, high, 9 if console.color_system in ("256", "truecolor") else len(_SHADES)):
        line.append_text(_cell(console, float(step), low, high, 2, None))
    line.append(f" {ends[1]}{'  logarithmic' if drawn.logarithmic else ''}", "")
    kinds = {mark.kind for mark in drawn.marks}
    for kind in (kind for kind in MARKS if kind in kinds):
        line.append(f"   {_SIGNS[kind]} {kind}", "note")
    return line
