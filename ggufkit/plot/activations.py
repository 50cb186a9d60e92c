"""The steps of a trace: their sizes as two maps of step × layer, and of two traces the error along the pass.

Position 0 of a real model is an attention sink, up to sixty times as large as the others. The RMS of a step is
therefore the median over its positions; its absmax is that of all, since overflow asks for the worst.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ggufkit.errors import UsageError
from ggufkit.plot.grid import Grid, Mark
from ggufkit.plot.style import LIGHT, Theme, frame, margins, sheet
from ggufkit.steps import STEPS, Array, full_name, future_keys, parse_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ggufkit.compare import Comparison, StepRow

_SCORES = ("kq-", "kq_soft_max-")
#: what an error of zero, or of something infinite, is drawn as
_LEAST, _MOST = 1e-9, 1e3


def sizes(arrays: Mapping[str, Array], first_position: int = 0) -> tuple[Grid, Grid]:
    """RMS (the median over the positions) and absmax of each step, over what is finite.

    Of scores and probabilities only those of the keys up to each position count; what kq says of later ones is
    undefined.

    Args:
        arrays: full step name → [T, …], read one after the other.
        first_position: of row 0.

    Raises:
        UsageError: there is no step.
    """
    rms, absmax, bad = {}, {}, []
    for name in arrays:
        values, counted = _counted(name, arrays[name], first_position)
        finite = counted & np.isfinite(values)
        bad += [] if (finite == counted).all() else [name]
        absmax[name] = float(np.abs(values[finite]).max(initial=0.0)) if finite.any() else math.nan
        squares = np.square(values, where=finite, out=np.zeros_like(values)).sum(axis=1)
        rms[name] = float(np.sqrt(np.median(squares / np.maximum(finite.sum(axis=1), 1))))
    marks = dict.fromkeys(bad, "NaN or Inf")
    return arrange(rms, "RMS (median over the positions)", marks), arrange(absmax, "absmax", marks)


def _counted(name: str, array: Array, first_position: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A step as [T, n], and which of its numbers mean something."""
    values = array.astype(np.float64)
    counted = np.ones(values.shape, np.bool_)
    if name.startswith(_SCORES) and values.ndim == 3:
        counted &= ~future_keys(array, first_position)
    return values.reshape(len(values), -1), counted.reshape(len(values), -1)


def errors(found: Comparison) -> Grid:
    """The relative error of each step of two traces; the first that differs is marked."""
    values = {row.name: min(row.error, _MOST) for row in found.rows if row.status not in ("shape", "apart")}
    marks = {full_name(found.first.step, found.first.layer): "error"} if found.first else {}
    return arrange(values, "relative error of the worst position", marks)


def arrange(values: Mapping[str, float], quantity: str, marks: Mapping[str, str]) -> Grid:
    """Numbers by full step name as a map of step × layer, in the order of the pass; steps outside are bars across.

    Raises:
        UsageError: there are none.
    """
    places = {name: place for name in values if (place := parse_name(name))}
    if not places:
        raise UsageError("there is no step to draw", help="`ggufkit trace` writes a trace with all of them")
    layers = sorted({layer for _, layer in places.values() if layer is not None}) or [0]
    present = {step for step, _ in places.values()}
    steps = [step.name for step in STEPS if step.name in present]
    cells = np.full((len(steps), len(layers)), np.nan)
    found = []
    for name, (step, layer) in places.items():
        row = steps.index(step)
        cells[row, slice(None) if layer is None else layers.index(layer)] = values[name]
        if name in marks:
            found.append(Mark(row, len(layers) // 2 if layer is None else layers.index(layer), marks[name]))
    labels = tuple(map(str, layers))
    notes = tuple(_note(row, labels) for row in cells)
    return Grid(quantity, "", "layer", tuple(steps), labels, cells, notes, marks=tuple(found))


def draw_errors(found: Comparison, title: str, theme: Theme = LIGHT) -> Figure:
    """The error along the pass, with what noise explains shaded and the first divergence named."""
    figure = sheet(9.6, 4.8, title, theme, _caption(found))
    margins(figure, 0.85, 0.25, 0.95, 0.75)
    axes = figure.subplots()
    frame(axes, theme, 8)
    rows = [row for row in found.rows if row.status not in ("shape", "apart")]
    if not rows:
        raise UsageError("the two traces have no step and position in common that could be compared")
    heights = [min(max(row.error, _LEAST), _MOST) for row in rows]
    axes.set_yscale("log")
    axes.plot(range(len(rows)), heights, color=theme.line, lw=0.8, zorder=1)
    for statuses, colour, marker, label in (
        (("same",), theme.line, ".", "bit for bit the same"),
        (("close",), theme.blue, "o", "within noise" if found.tolerance else "within the tolerance"),
        (("diverged",), theme.orange, "X", "diverged"),
    ):
        at = [place for place, row in enumerate(rows) if row.status in statuses]
        if at:
            axes.scatter(
                at, [heights[place] for place in at], s=22, c=colour, marker=marker, label=label, lw=0, zorder=2
            )
    if found.tolerance is not None:
        axes.axhspan(_LEAST / 10, found.tolerance, color=theme.quiet, zorder=0, lw=0)
        axes.axhline(found.tolerance, color=theme.line, lw=0.8, ls=(0, (4, 3)))
    _layer_ticks(axes, rows)
    axes.set_ylim(min(heights) / 3, max(*heights, found.tolerance or 0) * 300)
    axes.set_ylabel("relative error of the worst position", fontsize=8.5, color=theme.faint)
    axes.set_xlabel("layer: its steps in the order of the pass", fontsize=8.5, color=theme.faint)
    if found.first is not None:
        _name_first(axes, found, [row.name for row in rows], heights, theme)
    axes.legend(
        frameon=False,
        fontsize=8,
        labelcolor=theme.ink,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=3,
        borderpad=0.1,
    )
    return figure


def _name_first(axes: Axes, found: Comparison, names: list[str], heights: list[float], theme: Theme) -> None:
    """The first divergence: a line, its step, and where in it."""
    assert found.first is not None  # the caller asked
    name = full_name(found.first.step, found.first.layer)
    at = names.index(name)
    axes.axvline(at, color=theme.red, lw=1.0, zorder=0)
    left = at > len(names) / 2
    axes.annotate(
        f"first: {name}\nposition {found.first.position}, error {found.first.error:.2g}",
        (at, 0.985), (-6 if left else 6, 0), ("data", "axes fraction"), "offset points",
        ha="right" if left else "left", va="top", fontsize=9, color=theme.red, fontweight="bold",
        bbox={"boxstyle": "square,pad=0.2", "facecolor": theme.paper, "edgecolor": "none", "alpha": 0.85},
    )  # fmt: skip


def _layer_ticks(axes: Axes, rows: Iterable[StepRow]) -> None:
    """A tick where each layer begins; every few when there are many."""
    starts: dict[str, int] = {}
    for place, row in enumerate(rows):
        step, layer = parse_name(row.name) or ("", None)
        starts.setdefault(step if layer is None else str(layer), place)
    layers = [name for name in starts if name.isdigit()]
    shown = layers[:: max(1, -(-len(layers) // 24))]
    axes.set_xticks([starts[name] for name in shown], shown)


def _caption(found: Comparison) -> str:
    if found.tokens_differ_at is not None:
        return f"the token ids differ from position {found.tokens_differ_at} on: compared is what is before it"
    return "shaded: what the precisions of the two explain" if found.tolerance is not None else ""


def _note(row: NDArray[np.float64], layers: tuple[str, ...]) -> str:
    if np.isnan(row).all():
        return ""
    at = int(np.nanargmax(row))
    return f"{row[at]:.3g}" if len(layers) == 1 or np.ptp(row) == 0 else f"{row[at]:.3g} in {layers[at]}"
