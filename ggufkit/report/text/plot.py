"""Histograms on the terminal: one as a chart of block characters, several as a line each; block scales likewise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.text import Text

from ggufkit.plot.histogram import Histogram
from ggufkit.plot.scales import ScaleRow
from ggufkit.report.escape import shown
from ggufkit.report.text.style import count_text, listing, number_text, shape_text, show

_BLOCKS = " ▁▂▃▄▅▆▇█"
_HEIGHT = 10
_WIDEST = 120
_SPARK = (8, 40)  # the narrowest and the widest histogram of a line
_NAMED = 4  # outliers named below a chart

Numbers = npt.NDArray[np.int64]


def histograms(console: Console, drawn: Sequence[Histogram]) -> None:
    """Print them."""
    if len(drawn) == 1:
        show(console, *_chart(drawn[0], min(console.width - 10, _WIDEST)))
    else:
        show(console, _lines(drawn, console.width))


def scales(console: Console, found: Sequence[ScaleRow]) -> None:
    """Print a line a tensor: how its scales spread on one axis, and the ends."""
    low = min(row.first for row in found)
    high = max(row.first + row.counts.size for row in found)
    longest = max(len(row.name) for row in found)
    room = min(max(console.width - longest - 52, _SPARK[0]), _SPARK[1], high - low)
    table = listing(
        "tensor", "type", "log counts", "smallest", "median", "largest", "zero",
        right=("smallest", "median", "largest", "zero"), wide="tensor",
    )  # fmt: skip
    for row in found:
        places = (np.arange(row.counts.size) + row.first - low) * room // (high - low)
        counts = np.bincount(places, row.counts, room).astype(np.int64)
        spark = Text("".join(_BLOCKS[level] for level in _levels(counts, 8)), "info")
        figures = (f"{value:.2g}" for value in (row.smallest, row.median, row.largest))
        zero = Text(f"{row.n_nonfinite:,} NaN/Inf", "error") if row.n_nonfinite else Text(f"{row.n_zero:,}")
        name = Text(shown(row.name), no_wrap=True, overflow="ellipsis")
        table.add_row(name, Text(row.type, "type"), spark, *figures, zero)
    show(console, table)


def _chart(one: Histogram, width: int) -> list[RenderableType]:
    counts, outside = _columns(one, max(width, 16))
    top = max(int(counts.max()), 1)
    levels = _levels(counts, _HEIGHT * 8)
    lines: list[RenderableType] = [_title(one), Text()]
    for row in reversed(range(_HEIGHT)):
        label = count_text(top) if row == _HEIGHT - 1 else "1" if row == 0 else ""
        line = Text(f"{label:>7} │", "note")
        for level, beyond in zip(levels, outside, strict=True):
            line.append(_BLOCKS[min(max(level - 8 * row, 0), 8)], "warning" if beyond else "info")
        lines.append(line)
    return [*lines, *_axis(one, len(counts)), *_remarks(one)]


def _lines(drawn: Sequence[Histogram], width: int) -> RenderableType:
    longest = max(len(one.name) for one in drawn)
    spark = min(max(width - longest - 57, _SPARK[0]), _SPARK[1])  # 57: the other columns
    table = listing(
        "tensor", "type", "log counts", "min", "median", "max", "outside",
        right=("min", "median", "max", "outside"), wide="tensor",
    )  # fmt: skip
    for one in drawn:
        numbers = (number_text(float(f"{value:.4g}")) for value in (one.minimum, one.median, one.maximum))
        bad = one.n_nan + one.n_inf
        beyond = Text(f"{bad:,} NaN/Inf", "error") if bad else Text(f"{one.n_outliers:,}" if one.n_outliers else "–")
        name = Text(shown(one.name), no_wrap=True, overflow="ellipsis")
        table.add_row(name, Text(one.type, "type"), _spark(one, spark), *numbers, beyond)
    return Padding(table, (0, 0, 0, 0), expand=False)


def _spark(one: Histogram, width: int) -> Text:
    counts, outside = _columns(one, width)
    line = Text()
    for level, beyond in zip(_levels(counts, 8), outside, strict=True):
        line.append(_BLOCKS[level], "warning" if beyond else "info")
    return line


def _columns(one: Histogram, width: int) -> tuple[Numbers, npt.NDArray[np.bool_]]:
    """The bars gathered into `width` columns, and which of them lie outside the bounds."""
    width = min(width, one.counts.size)
    starts = np.linspace(0, one.counts.size, width, endpoint=False).astype(np.int64)
    ends = np.append(starts[1:], one.counts.size)
    outside = (one.edges[ends] <= one.low) | (one.edges[starts] >= one.high)
    return np.add.reduceat(one.counts, starts), outside


def _levels(counts: Numbers, steps: int) -> list[int]:
    """Logarithmic heights: 0 for none, at least 1 for one element, `steps` for the most."""
    top = np.log1p(max(int(counts.max()), 1))
    heights = np.ceil(np.log1p(counts) / top * steps).astype(int)
    return [int(height) for height in heights]


def _title(one: Histogram) -> Text:
    found = f"  {one.type}  {shape_text(one.shape)}  {number_text(one.minimum)} … {number_text(one.maximum)}"
    return Text.assemble((shown(one.name), "title"), (found, "note"))


def _axis(one: Histogram, width: int) -> list[Text]:
    """The line below the bars and the values at its ends and at the median."""
    left, right = (number_text(float(f"{edge:.3g}")) for edge in (one.edges[0], one.edges[-1]))
    at = int(np.searchsorted(one.edges, one.median) * width / one.counts.size)
    middle = number_text(float(f"{one.median:.3g}"))
    labels = left.ljust(width - len(right)) + right
    start = at - len(middle) // 2
    if len(left) + 1 <= start <= width - len(right) - len(middle) - 1:
        labels = labels[:start] + middle + labels[start + len(middle) :]
    lines = [Text(" " * 8 + "└" + "─" * width, "note"), Text(" " * 9 + labels, "note")]
    if one.bent:
        lines.append(Text("  linear near the median, logarithmic far from it", "note"))
    return lines


def _remarks(one: Histogram) -> list[Text]:
    lines = []
    if one.n_nan or one.n_inf:
        lines.append(Text(f"  ✗ {one.n_nan:,} NaN, {one.n_inf:,} Inf", "error"))
    if one.n_outliers:
        named = ", ".join(f"{number_text(value)} {list(index)}" for index, value in one.outliers[:_NAMED])
        bounds = f"{number_text(float(f'{one.low:.3g}'))} … {number_text(float(f'{one.high:.3g}'))}"
        many = "" if one.n_outliers <= _NAMED else ", …"
        lines.append(Text(f"  {one.n_outliers:,} outside {bounds}: {named}{many}", "warning"))
    return lines
