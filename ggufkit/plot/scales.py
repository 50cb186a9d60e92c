"""The scales of the blocks of quantized tensors: a panel a role, in it a strip a layer.

A block is multiplied by its scale, so that one scale off by a factor of a thousand shows here as a single point far
from its strip, however well it hides among the weights. Shades are shares of the blocks (logarithmic), the triangles
the smallest and the largest scale of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ggufkit.arch import role_of
from ggufkit.errors import UsageError
from ggufkit.plot.layers import order
from ggufkit.plot.style import COLOURS, LIGHT, Theme, frame, margins, plain, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ggufkit.stats import ScaleStats, TensorStats

Counts = npt.NDArray[np.int64]

#: bins to a decade of the picture
PER_DECADE = 12
_WIDEST = 24.0  # decades that one picture spans at most; what is below is an arrow at its edge


@dataclass(frozen=True, slots=True, eq=False)
class ScaleRow:
    """The scales of one tensor.

    Attributes:
        counts: int64 [bins], by log10 of the magnitude, from `first` (a number of `PER_DECADE`ths of a decade) on.
        smallest, largest: magnitudes of the finite ones other than zero, with their blocks; NaN and None without any.
        median: to within a bin.
        n_zero, n_nonfinite: counted apart.
    """

    name: str
    type: str
    role: str
    layer: int | None
    count: int
    first: int
    counts: Counts
    smallest: float
    largest: float
    smallest_block: int | None
    largest_block: int | None
    median: float
    n_zero: int
    n_nonfinite: int


def rows(measured: Iterable[TensorStats]) -> list[ScaleRow]:
    """The scales of every tensor that has some.

    Raises:
        UsageError: no tensor has.
    """
    found = [_row(stats, stats.scales) for stats in measured if stats.scales is not None]
    if not found:
        raise UsageError("none of these tensors has blocks with scales", help="plain floats have none; choose others")
    return found


def draw(found: list[ScaleRow], title: str, theme: Theme = LIGHT) -> Figure:
    """A panel a role on one axis, so that roles can be compared."""
    roles = sorted(dict.fromkeys(row.role for row in found), key=order)
    panels = {
        role: sorted((row for row in found if row.role == role), key=lambda row: row.layer or 0) for role in roles
    }
    columns = min(3, len(roles))
    lines = -(-len(roles) // columns)
    tallest = min(max(0.1 * max(map(len, panels.values())), 0.7), 3.6)
    width, height = max(4.4 * columns, 7.0), lines * (tallest + 0.75) + 0.95
    caption = (
        "scale of a block, logarithmic    ·    darker: more blocks    ·    triangles: the smallest and the largest"
    )
    figure = sheet(width, height, title, theme, caption)
    margins(figure, 0.6, 0.25, 0.75, 0.8)
    figure.subplots_adjust(wspace=0.16, hspace=0.75 / tallest)
    low, high = _span(found)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for number, panel in enumerate(axes):
        if number < len(roles):
            _panel(panel, panels[roles[number]], low, high, theme)
        else:
            panel.axis("off")
    return figure


def _row(stats: TensorStats, scales: ScaleStats) -> ScaleRow:
    edges, counts = scales.histogram.edges.astype(np.float64), scales.histogram.counts
    middles = np.floor(np.log10(np.maximum((edges[1:] + edges[:-1]) / 2, 1e-46)) * PER_DECADE).astype(np.int64)
    first = int(middles.min(initial=0)) if middles.size == 0 else int(middles.min())
    binned = np.bincount(middles - first, counts).astype(np.int64) if middles.size else np.zeros(1, np.int64)
    role, layer = role_of(stats.name)
    total = np.cumsum(counts)
    median = float(edges[np.searchsorted(total, total[-1] / 2)]) if total.size and total[-1] else math.nan
    smallest, largest = scales.smallest, scales.largest
    return ScaleRow(
        stats.name, stats.type, role, layer, scales.count, first, binned,
        abs(smallest.value) if smallest else math.nan, abs(largest.value) if largest else math.nan,
        smallest.index // scales.per_block if smallest else None,
        largest.index // scales.per_block if largest else None,
        median, scales.n_zero, scales.n_nonfinite,
    )  # fmt: skip


def _span(found: list[ScaleRow]) -> tuple[int, int]:
    """The first bin and one past the last, over all rows."""
    low = min(row.first for row in found)
    high = max(row.first + row.counts.size for row in found)
    return max(low, high - int(_WIDEST * PER_DECADE)) - 2, high + 2


def _panel(axes: Axes, panel: list[ScaleRow], low: int, high: int, theme: Theme) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    shares = np.full((len(panel), high - low), np.nan)
    for number, row in enumerate(panel):
        seen = np.flatnonzero(row.counts)
        at = seen + row.first - low
        shares[number, at[at >= 0]] = row.counts[seen[at >= 0]] / max(row.count, 1)
    dark = sum(int(theme.paper[i : i + 2], 16) for i in (1, 3, 5)) < 384
    colours = colormaps[COLOURS if dark else f"{COLOURS}_r"].with_extremes(bad=theme.quiet)
    span = (low / PER_DECADE, high / PER_DECADE)
    axes.imshow(
        shares, cmap=colours, norm=LogNorm(1e-5, 1), aspect="auto", interpolation="none",
        extent=(*span, len(panel) - 0.5, -0.5),
    )  # fmt: skip
    for number, row in enumerate(panel):
        _extremes(axes, number, row, span, theme)
    frame(axes, theme, 7.5)
    every = max(1, len(panel) // 6)
    if panel[0].layer is None:
        axes.set_yticks([])
    else:
        axes.set_yticks(range(0, len(panel), every), [str(row.layer) for row in panel[::every]])
    step = max(1, round((span[1] - span[0]) / 6))
    ticks = list(range(math.ceil(span[0]), math.floor(span[1]) + 1, step))
    axes.set_xticks(ticks, [f"{10.0**tick:g}" for tick in ticks])
    axes.set_xlim(*span)
    types = " ".join(dict.fromkeys(row.type for row in panel))
    axes.set_title(plain(panel[0].role), fontsize=9.5, loc="left", pad=5, color=theme.ink)
    axes.set_title(plain(f"{types}   {_ends(panel)}"), fontsize=7.5, loc="right", pad=5, color=theme.faint)


def _extremes(axes: Axes, number: int, row: ScaleRow, span: tuple[float, float], theme: Theme) -> None:
    for value, marker in ((row.smallest, ">"), (row.largest, "<")):
        if not math.isnan(value) and value > 0:
            at = max(math.log10(value), span[0])
            axes.plot([at], [number], ls="", marker=marker, ms=3.2, color=theme.orange, clip_on=False)
    if row.n_nonfinite:
        axes.text(
            0.99, number, f"{row.n_nonfinite:,} NaN/Inf", transform=axes.get_yaxis_transform(), ha="right",
            va="center", fontsize=7.5, color=theme.red, fontweight="bold",
        )  # fmt: skip


def _ends(panel: list[ScaleRow]) -> str:
    """The smallest and largest scale of a role, and how many are zero."""
    ends = [end for row in panel for end in (row.smallest, row.largest) if not math.isnan(end)]
    zeros = sum(row.n_zero for row in panel)
    return (f"{min(ends):.2g} … {max(ends):.2g}" if ends else "") + (f"   {zeros:,} zero" if zeros else "")
