"""Numbers in rows and columns as a heat map: the form that layers, activations and attention share.

A colour must tell neighbours apart although one damaged tensor may be a factor of 1e30 away. The scale therefore
spans the bulk, and what is beyond it has a colour of its own; the number itself stands at the end of its row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ggufkit.plot.style import COLOURS, LIGHT, Theme, margins, plain, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Numbers = npt.NDArray[np.float64]

#: what a mark says → its sign on paper, worst first
MARKS = {"NaN or Inf": "P", "error": "X", "warning": "^", "info": "o"}

_REACH = 4.0  # quartile distances that the scale reaches beyond the quartiles
_LEAST = 0.25  # a quartile distance is taken for at least this (decades, or the unit of a linear scale)


@dataclass(frozen=True, slots=True)
class Mark:
    """Something to be seen at a place; `kind` is one of `MARKS`."""

    row: int
    column: int
    kind: str


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Numbers in rows and columns.

    Attributes:
        quantity: what the numbers are.
        row_axis, column_axis: what rows and columns are.
        rows, columns: their labels.
        values: float64 [rows, columns]; NaN where there is nothing.
        notes: a remark at the end of each row, or none.
        logarithmic: the scale of the colours.
        bounds: of the scale; by default those of the bulk.
        marks: at most one a place.
    """

    quantity: str
    row_axis: str
    column_axis: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Numbers
    notes: tuple[str, ...] = ()
    logarithmic: bool = True
    bounds: tuple[float, float] | None = None
    marks: tuple[Mark, ...] = ()

    def scaled(self) -> Numbers:
        """[rows, columns] as decades where the scale is logarithmic; -inf for zeros there."""
        if not self.logarithmic:
            return self.values
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log10(self.values)

    def limits(self) -> tuple[float, float]:
        """What the scale spans, in the unit of `scaled`."""
        if self.bounds is not None:
            low, high = (np.log10(self.bounds) if self.logarithmic else np.array(self.bounds)).tolist()
            return low, high
        scaled = self.scaled()
        finite = scaled[np.isfinite(scaled)]
        if not finite.size:
            return 0.0, 1.0
        first, third = np.quantile(finite, (0.25, 0.75))
        reach = _REACH * max(third - first, _LEAST)
        low, high = max(finite.min(), first - reach), min(finite.max(), third + reach)
        return float(low), float(high if high > low else low + _LEAST)


def draw(grids: Sequence[Grid], title: str, caption: str = "", theme: Theme = LIGHT, *, legend: bool = True) -> Figure:
    """Grids of the same rows beside each other."""
    first = grids[0]
    left = 0.25 + 0.068 * max(map(len, first.rows))
    widths = [_width(one) for one in grids]
    height = 1.55 + _cell(len(first.rows), 0.25, 6.5) * len(first.rows)
    beside = [0.8 + 0.055 * max(map(len, one.notes), default=0) for one in grids]
    width = left + sum(widths) + sum(beside) + 0.1
    figure = sheet(width, height, title, theme, caption)
    margins(figure, 0, 0, 0, 0)
    at = left
    for number, (one, across, after) in enumerate(zip(grids, widths, beside, strict=True)):
        axes = figure.add_axes((at / width, 0.78 / height, across / width, (height - 1.55) / height))
        image = heat(axes, one, theme, rows=number == 0)
        scale = figure.add_axes(((at + across + after - 0.62) / width, 0.78 / height, 0.11 / width, 1 - 1.55 / height))
        colour_bar(figure, scale, image, one, theme)
        axes.set_title(plain(one.quantity), fontsize=9, loc="left", color=theme.faint, pad=6)
        at += across + after
    if legend and any(one.marks for one in grids):
        _legend(figure, {mark.kind for one in grids for mark in one.marks}, theme)
    return figure


def heat(axes: Axes, grid: Grid, theme: Theme, *, rows: bool = True, parted: bool = True) -> AxesImage:
    """The map itself, with its labels, notes and marks, in a panel; `parted` puts paper between the cells."""
    from matplotlib import colormaps

    low, high = grid.limits()
    colours = colormaps[COLOURS].with_extremes(bad=theme.paper, over=theme.orange)
    placed = np.nan_to_num(grid.scaled(), nan=np.nan, neginf=low - 1, posinf=high + 1)  # matplotlib drops infinities
    image = axes.imshow(placed, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="none", origin="upper")
    axes.set_facecolor(theme.paper)
    axes.spines[:].set_visible(False)
    axes.tick_params(labelsize=8, length=0, labelcolor=theme.ink)
    _ticks(axes, grid, rows=rows)
    if parted:
        _gaps(axes, grid, theme)
    for number, note in enumerate(grid.notes):
        axes.annotate(
            note, (1, number), (4, 0), ("axes fraction", "data"), "offset points",
            fontsize=7.5, color=theme.faint, va="center",
        )  # fmt: skip
    _signs(axes, grid, theme)
    return image


def colour_bar(figure: Figure, place: Axes, image: AxesImage, grid: Grid, theme: Theme) -> None:
    """The scale of the colours, with the numbers themselves at its ticks."""
    low, high = grid.limits()
    scaled = grid.scaled()
    under, over = bool((scaled < low).any()), bool((scaled > high).any())
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[under, over]
    bar = figure.colorbar(image, cax=place, extend=extend)
    bar.outline.set_visible(False)
    ticks = _scale_ticks(low, high) if grid.logarithmic else np.linspace(low, high, 5).tolist()
    bar.set_ticks(ticks, labels=[f"{10**tick if grid.logarithmic else tick:.3g}" for tick in ticks])
    place.tick_params(labelsize=7.5, length=2, color=theme.line, labelcolor=theme.ink)


def _scale_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the scale; its ends as well when there are few."""
    step = max(1, int((high - low) // 6))
    powers = [float(power) for power in range(int(np.ceil(low)), int(np.floor(high)) + 1, step)]
    if len(powers) >= 3:
        return powers
    return sorted({low, high, *(power for power in powers if min(power - low, high - power) > 0.15 * (high - low))})


def _width(grid: Grid) -> float:
    return _cell(len(grid.columns), 0.26, 7.5) * max(len(grid.columns), 8)


def _cell(count: int, usual: float, most: float) -> float:
    """The size of a cell, so that all together stay within `most`."""
    return min(usual, most / max(count, 1))


def _ticks(axes: Axes, grid: Grid, *, rows: bool) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None
    across = axes.get_position().width * figure.get_size_inches()[0]
    longest = max(map(len, grid.columns), default=1)
    every = max(1, math.ceil(len(grid.columns) * (0.06 * longest + 0.09) / across))
    shown = range(0, len(grid.columns), every)
    axes.set_xticks(list(shown), [grid.columns[at] for at in shown])
    axes.set_xlabel(grid.column_axis, fontsize=8.5, color=axes.xaxis.label.get_color(), labelpad=3)
    axes.xaxis.label.set_color(axes.xaxis.get_tick_params()["labelcolor"])
    every = max(1, round(0.14 / _cell(len(grid.rows), 0.25, 6.5)))
    names = range(0, len(grid.rows), every) if rows else range(0)
    axes.set_yticks(list(names), [plain(grid.rows[at]) for at in names])
    if rows and grid.row_axis:
        axes.set_ylabel(grid.row_axis, fontsize=8.5, color=axes.yaxis.get_tick_params()["labelcolor"])


def _gaps(axes: Axes, grid: Grid, theme: Theme) -> None:
    """Thin lines of paper between the cells, while these are large enough."""
    n_rows, n_columns = grid.values.shape
    if n_columns <= 64 and n_rows <= 64:
        several = [row for row in range(n_rows) if np.ptp(grid.values[row]) != 0]  # a row of one number is one bar
        for row in several:
            axes.vlines(np.arange(1, n_columns) - 0.5, row - 0.5, row + 0.5, color=theme.paper, lw=0.6)
        axes.hlines(np.arange(1, n_rows) - 0.5, -0.5, n_columns - 0.5, color=theme.paper, lw=0.6)


def _signs(axes: Axes, grid: Grid, theme: Theme) -> None:
    for kind, sign in MARKS.items():
        places = [(mark.column, mark.row) for mark in grid.marks if mark.kind == kind]
        if places:
            axes.scatter(*zip(*places, strict=True), **_sign(kind, sign, theme), zorder=3)


def _sign(kind: str, sign: str, theme: Theme) -> dict[str, Any]:
    """A sign with a rim, so that it is seen on any colour."""
    colour = {"warning": theme.orange, "info": "#FFFFFF"}.get(kind, theme.red)
    return {"marker": sign, "s": 46, "c": colour, "edgecolors": "#101010" if kind == "info" else "white", "lw": 0.9}


def _legend(figure: Figure, kinds: set[str], theme: Theme) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for kind in [kind for kind in MARKS if kind in kinds]:
        sign = _sign(kind, MARKS[kind], theme)
        handles.append(
            Line2D([], [], ls="", marker=MARKS[kind], ms=7, mfc=sign["c"], mec=sign["edgecolors"], label=kind)
        )
    width, height = figure.get_size_inches()
    legend = figure.legend(
        handles=handles, loc="upper right", bbox_to_anchor=(1 - 0.1 / width, 1 - 0.05 / height), ncols=len(handles),
        frameon=False, fontsize=8.5, handletextpad=0.1, columnspacing=1.0,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_color(theme.ink)
