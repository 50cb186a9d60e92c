"""Histograms drawn as small multiples: bars, the robust bounds, and the furthest values by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ggufkit.plot.histogram import BOUNDS, Histogram
from ggufkit.plot.style import LIGHT, Theme, frame, margins, plain, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: outliers that are labelled on each side when there is one panel
LABELLED = 2

_FLOOR = 0.6  # where the logarithmic axis begins: below one element


def draw(histograms: Sequence[Histogram], title: str, theme: Theme = LIGHT) -> Figure:
    """The picture, as a matplotlib figure."""
    columns = min(len(histograms), max(1, math.isqrt(len(histograms) * 4 // 3)))
    rows = -(-len(histograms) // columns)
    alone = len(histograms) == 1
    width, height = (9.0, 4.6) if alone else (max(4.4 * columns, 9.0), 2.6 * rows + 0.9)
    figure = sheet(width, height, title, theme, _caption(histograms))
    margins(figure, 0.75, 0.2, 0.65, 0.85)
    figure.subplots_adjust(wspace=0.55 / (width / columns - 0.55), hspace=0.45)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, one in zip(axes, histograms, strict=False):
        _panel(panel, one, theme, large=alone)
    for panel in axes[len(histograms) :]:
        panel.axis("off")
    figure.supylabel("elements (log)", fontsize=8.5, color=theme.faint, x=0.1 / width, ha="left")
    return figure


def _panel(axes: Axes, one: Histogram, theme: Theme, *, large: bool) -> None:
    _bars(axes, one, theme)
    _titles(axes, one, theme, large=large)
    _scale(axes, one)
    _label_outliers(axes, one, theme, large=large)
    if one.n_nan or one.n_inf:
        said = ", ".join(f"{count:,} {name}" for name, count in (("NaN", one.n_nan), ("Inf", one.n_inf)) if count)
        axes.text(0.98, 0.94, said, transform=axes.transAxes, ha="right", va="top", color=theme.red, fontweight="bold")


def _caption(histograms: Sequence[Histogram]) -> str:
    bent = "; linear near the median, logarithmic far from it" if any(one.bent for one in histograms) else ""
    return f"value{bent}    ·    shaded: median ± {BOUNDS:g} robust deviations, orange: beyond"


def _bars(axes: Axes, one: Histogram, theme: Theme) -> None:
    axes.axvspan(one.low, one.high, color=theme.quiet, zorder=0, lw=0)
    for bound in (one.low, one.high):
        axes.axvline(bound, color=theme.line, lw=0.7, ls=(0, (4, 3)), zorder=1)
    inside = (one.edges[1:] > one.low) & (one.edges[:-1] < one.high)
    for part, colour in ((inside, theme.blue), (~inside, theme.orange)):
        counts = np.where(part, np.maximum(one.counts, _FLOOR), _FLOOR)
        axes.stairs(counts, one.edges, baseline=_FLOOR, fill=True, color=colour, lw=0, zorder=2)


def _titles(axes: Axes, one: Histogram, theme: Theme, *, large: bool) -> None:
    """Title, subtitle and what is drawn around the bars."""
    small = 9 if large else 7
    shape = " × ".join(map(str, one.shape)) or "scalar"
    axes.set_title(plain(one.name), fontsize=small + 1.5, loc="left", pad=small + 8, color=theme.ink)
    found = f"{one.type}  {shape}   {one.minimum:.4g} … {one.maximum:.4g}"
    axes.annotate(found, (0, 1), (0, 4), "axes fraction", "offset points", fontsize=small, color=theme.faint)
    if one.n_outliers:
        said = f"{one.n_outliers:,} outside"
        place = {"xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate(said, (1, 1), (0, 4), fontsize=small, color=theme.orange, ha="right", **place)  # type: ignore[arg-type]
    frame(axes, theme, small)


def _scale(axes: Axes, one: Histogram) -> None:
    axes.set_yscale("log")
    axes.yaxis.minorticks_off()
    axes.set_ylim(_FLOOR, max(float(one.counts.max()) * 3, 6.0))
    if one.bent:
        centre, width = one.median, one.deviation
        axes.set_xscale(
            "function",
            functions=(
                lambda x: np.arcsinh((np.asarray(x) - centre) / width),
                lambda x: np.sinh(np.clip(x, -700, 700)) * width + centre,
            ),
        )
        _bent_ticks(axes, one)
    axes.set_xlim(one.edges[0], one.edges[-1])


def _bent_ticks(axes: Axes, one: Histogram) -> None:
    """Powers of ten on both sides of zero, as many as have room; short ticks at their multiples."""
    furthest = max(abs(one.edges[0]), abs(one.edges[-1]))
    powers = range(math.floor(math.log10(one.deviation)) + 1, math.floor(math.log10(furthest)) + 1)
    labelled = powers[:: max(1, -(-len(powers) // 3))]
    major = _both_sides(one, (10.0**power for power in labelled))
    axes.set_xticks([0.0, *major], ["0", *(f"{tick:g}" for tick in major)])
    if len(powers) <= 4:
        axes.set_xticks(_both_sides(one, (n * 10.0**power for power in powers for n in range(2, 10))), minor=True)


def _both_sides(one: Histogram, ticks: Iterable[float]) -> list[float]:
    return [tick for size in ticks for tick in (-size, size) if one.edges[0] < tick < one.edges[-1]]


def _label_outliers(axes: Axes, one: Histogram, theme: Theme, *, large: bool) -> None:
    """Name the furthest values on each side; what is off the paper gets an arrow."""
    size = 8 if large else 6.5
    for side in (-1, 1):
        members = [(index, value) for index, value in one.outliers if (value > one.median) == (side > 0)]
        for rank, (index, value) in enumerate(members[: LABELLED if large else 1]):
            edge = one.edges[0] if side < 0 else one.edges[-1]
            at = max(value, edge) if side < 0 else min(value, edge)
            off = at != value
            arrow = {-1: "◀ ", 1: " ▶"}[side] if off else ""
            where = f"[{', '.join(map(str, index))}]"
            label = f"{arrow if side < 0 else ''}{value:.6g} {where}{arrow if side > 0 else ''}"
            _point(axes, theme, at, label, side, rank, size, hidden=off)


def _point(axes: Axes, theme: Theme, at: float, label: str, side: int, rank: int, size: float, *, hidden: bool) -> None:
    axes.annotate(
        label,
        xy=(at, 1.0),
        xytext=(at, 0.42 + 0.1 * rank),
        textcoords=("data", "axes fraction"),
        ha="left" if side < 0 else "right",
        fontsize=size,
        color=theme.orange,
        arrowprops=None if hidden else {"arrowstyle": "-", "color": theme.orange, "lw": 0.6},
        bbox={"boxstyle": "square,pad=0.15", "facecolor": theme.paper, "edgecolor": "none", "alpha": 0.8},
        annotation_clip=False,
        zorder=4,
    )
