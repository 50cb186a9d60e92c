"""Tensors as pictures: what is drawn, as data (`Histogram`), and the drawing of it with matplotlib.

A histogram must show two things at once that differ by a factor of a million: where nearly all values lie, and
the few that lie far away. Counts are therefore logarithmic; values are linear while the extremes stay within
`LINEAR_LIMIT` robust deviations and bend to a logarithm (asinh) beyond, and what would still be off the paper
(a 1e30) is an arrow at its edge. A tensor is dequantized piece by piece, twice: once for its quantiles, once for
its bars. The memory needed does not depend on its size.

Colours: the blue, orange and red of Okabe and Ito's palette, which colour-blind people can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ggufkit import quants
from ggufkit.container import GGUF, Tensor
from ggufkit.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float32]

BINS = 160
MOST_PANELS = 64
#: bounds are the median ± this many robust deviations (the quartiles' distance / 1.349, a normal's deviation)
BOUNDS = 6.0
#: robust deviations up to which the axis stays linear, and beyond which a value is an arrow at the edge
LINEAR_LIMIT, PAPER_LIMIT = 60.0, 1e5
#: outliers that are kept with their index, and that are labelled in a picture
KEPT, LABELLED = 32, 2
SUFFIXES = (".png", ".svg", ".pdf")

_CHUNK = 1 << 22  # elements dequantized at once
_CELLS = 1 << 16  # the upper half of a float32 is its cell: 128 cells an octave

_FLOOR = 0.6  # where the logarithmic axis begins: below one element
_BLUE, _ORANGE, _RED, _GREY = "#0072B2", "#D55E00", "#B00020", "#8A8A8A"


@dataclass(frozen=True, slots=True)
class Histogram:
    """The values of one tensor, counted.

    Attributes:
        n: elements; n_nan, n_inf of them are neither counted in the bars nor in the bounds.
        minimum, maximum, median: of the finite values; NaN when there are none.
        low, high: the robust bounds.
        edges, counts: the bars, finite values only; edges has one entry more.
        bent: the axis is asinh((x - median) / deviation) rather than linear.
        deviation: the robust one.
        n_outliers: finite values outside the bounds.
        outliers: (index, value) of the furthest of them, furthest first.
        n_below, n_above: finite values beyond the first and last edge.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    n: int
    n_nan: int
    n_inf: int
    minimum: float
    maximum: float
    median: float
    deviation: float
    low: float
    high: float
    edges: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    bent: bool
    n_outliers: int
    outliers: tuple[tuple[tuple[int, ...], float], ...]
    n_below: int
    n_above: int


@dataclass(frozen=True, slots=True)
class _Spread:
    """What the first pass finds out."""

    n_nan: int
    n_inf: int
    minimum: float
    maximum: float
    median: float
    deviation: float


@dataclass(frozen=True, slots=True)
class _Axis:
    """The bins: uniform in x, or in asinh((x - median) / deviation)."""

    median: float
    deviation: float
    bent: bool
    first: float
    last: float

    def place(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Values → positions on the paper."""
        away = (values.astype(np.float64) - self.median) / self.deviation
        return np.arcsinh(away) if self.bent else away

    def value(self, positions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Positions → values."""
        return (np.sinh(positions) if self.bent else positions) * self.deviation + self.median


def matching(gguf: GGUF, globs: Sequence[str]) -> list[Tensor]:
    """The tensors that the shell patterns name; without any, the first layer and what is outside the layers.

    Raises:
        UsageError: a pattern matches nothing, or all together more than fit into one picture.
    """
    if not globs:
        found = [tensor for name, tensor in gguf.tensors.items() if name.startswith("blk.0.") or name[:4] != "blk."]
        return found[:MOST_PANELS]
    chosen: dict[str, Tensor] = {}
    for glob in globs:
        hits = {name: tensor for name, tensor in gguf.tensors.items() if fnmatchcase(name, glob)}
        if not hits:
            message = f"no tensor matches {glob!r}"
            raise UsageError(message, path=str(gguf.path), help="`inspect --tensors` lists them; quote the pattern")
        chosen |= hits
    if len(chosen) > MOST_PANELS:
        message = f"{len(chosen)} tensors match; {MOST_PANELS} fit into one picture"
        raise UsageError(message, help="narrow the pattern, for instance 'blk.[0-9].attn_*.bias'")
    return list(chosen.values())


def histogram(gguf: GGUF, tensor: Tensor, advance: Callable[[int], None] = lambda elements: None) -> Histogram:
    """Count the values of one tensor.

    Args:
        advance: called with the number of elements just read; every element is read twice.

    Raises:
        FormatError: the tensor's data is not in the file.
        NewerThanTool, Unsupported: its type cannot be decoded.
    """
    spread = _spread(_pieces(gguf, tensor, advance))
    axis = _axis(spread)
    counts = np.zeros(BINS + 2, np.int64)
    far = _Furthest(spread.median, BOUNDS * spread.deviation)
    for start, values in _pieces(gguf, tensor, advance):
        finite = np.isfinite(values)
        positions = axis.place(values[finite])
        bins = np.clip((positions - axis.first) / (axis.last - axis.first) * BINS + 1, 0, BINS + 1)
        counts += np.bincount(bins.astype(np.int64), minlength=BINS + 2)
        far.see(start, values, finite)
    return Histogram(
        name=tensor.name,
        type=tensor.type_name,
        shape=tensor.shape,
        n=tensor.n_elements,
        n_nan=spread.n_nan,
        n_inf=spread.n_inf,
        minimum=spread.minimum,
        maximum=spread.maximum,
        median=spread.median,
        deviation=spread.deviation,
        low=spread.median - BOUNDS * spread.deviation,
        high=spread.median + BOUNDS * spread.deviation,
        edges=axis.value(np.linspace(axis.first, axis.last, BINS + 1)),
        counts=counts[1:-1],
        bent=axis.bent,
        n_outliers=far.count,
        outliers=tuple((_index(at, tensor.shape), value) for at, value in far.furthest()),
        n_below=int(counts[0]),
        n_above=int(counts[-1]),
    )


def check_format(output: Path) -> None:
    """Refuse a file ending that cannot be drawn, before anything is read for it.

    Raises:
        UsageError: it is none of `SUFFIXES`.
    """
    if output.suffix.lower() not in SUFFIXES:
        ending = f"ends in {output.suffix!r}" if output.suffix else "has no ending"
        raise UsageError(f"the picture's name {ending}", path=str(output), expected=", ".join(SUFFIXES))


def save(histograms: Sequence[Histogram], output: Path, title: str) -> None:
    """Draw the histograms as small multiples into a PNG, SVG or PDF.

    Raises:
        UsageError: the file's ending names no such format.
        OSError: the file cannot be written.
    """
    check_format(output)
    dateless = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(output.suffix.lower())
    draw(histograms, title).savefig(output, metadata=dateless)


def draw(histograms: Sequence[Histogram], title: str) -> Figure:
    """The picture, as a matplotlib figure."""
    from matplotlib.figure import Figure

    columns = min(len(histograms), max(1, math.isqrt(len(histograms) * 4 // 3)))
    rows = -(-len(histograms) // columns)
    alone = len(histograms) == 1
    size = (9.0, 4.6) if alone else (max(4.4 * columns, 9.0), 2.6 * rows + 0.9)
    figure = Figure(figsize=size, dpi=130, facecolor="white")
    _margins(figure, *size, columns)
    figure.suptitle(_plain(title), fontsize=11, fontweight="bold", x=0.1 / size[0], y=1 - 0.1 / size[1], ha="left")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, one in zip(axes, histograms, strict=False):
        _panel(panel, one, large=alone)
    for panel in axes[len(histograms) :]:
        panel.axis("off")
    figure.supxlabel(_caption(histograms), fontsize=8.5, color="#555555", y=0.1 / size[1], va="bottom")
    figure.supylabel("elements (log)", fontsize=8.5, color="#555555", x=0.1 / size[0], ha="left")
    return figure


# -- counting ----------------------------------------------------------------------------------------------------


class _Furthest:
    """Collects the finite values outside the bounds: how many, and the furthest `KEPT`."""

    def __init__(self, median: float, distance: float) -> None:
        self.count = 0
        self._median, self._distance = median, distance
        self._at = np.empty(0, np.int64)
        self._values = np.empty(0, np.float32)

    def see(self, start: int, values: Floats, finite: npt.NDArray[np.bool_]) -> None:
        away = np.abs(values.astype(np.float64) - self._median)
        hits = np.flatnonzero(finite & (away > self._distance))
        self.count += hits.size
        self._at = np.concatenate([self._at, hits + start])
        self._values = np.concatenate([self._values, values[hits]])
        order = np.argsort(-np.abs(self._values.astype(np.float64) - self._median), kind="stable")[:KEPT]
        self._at, self._values = self._at[order], self._values[order]

    def furthest(self) -> Iterator[tuple[int, float]]:
        return zip(self._at.tolist(), self._values.tolist(), strict=True)


def _pieces(gguf: GGUF, tensor: Tensor, advance: Callable[[int], None]) -> Iterator[tuple[int, Floats]]:
    """The dequantized tensor in whole blocks: (flat index of the first, float32 values)."""
    gguf.read(tensor, 0, 0)  # says why, when the type or the shape cannot be read
    type_ = tensor.type
    assert type_ is not None
    step = _CHUNK // type_.block_size * type_.block_size
    for start in range(0, tensor.n_elements, step):
        count = min(step, tensor.n_elements - start)
        raw = gguf.read(tensor, type_.nbytes(start), type_.nbytes(count))
        yield start, quants.dequantize(type_, raw, byteorder=gguf.byteorder).reshape(-1)
        advance(count)


def _spread(pieces: Iterator[tuple[int, Floats]]) -> _Spread:
    cells = np.zeros(_CELLS, np.int64)
    n_nan, low, high = 0, math.inf, -math.inf
    for _, values in pieces:
        n_nan += int(np.isnan(values).sum())
        cells += np.bincount(values.view(np.uint32) >> 16, minlength=_CELLS)
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    n_inf = int(cells[[0x7F80, 0xFF80]].sum())
    if low > high:
        return _Spread(n_nan, n_inf, math.nan, math.nan, math.nan, math.nan)
    quarter, median, three_quarters = _quantiles(cells, (0.25, 0.5, 0.75))
    return _Spread(n_nan, n_inf, low, high, median, _deviation(three_quarters - quarter, low, high))


def _quantiles(cells: npt.NDArray[np.int64], shares: Sequence[float]) -> list[float]:
    """Quantiles of the finite values from their cells, to within a cell (0.4 %)."""
    with np.errstate(invalid="ignore"):  # some cells are NaN's
        middles = ((np.arange(_CELLS, dtype=np.uint32) << 16) | 0x8000).view(np.float32).astype(np.float64)
    middles[[0, 0x8000]] = 0.0
    order = np.argsort(middles, kind="stable")
    order = order[np.isfinite(middles[order])]
    totals = np.cumsum(cells[order])
    return [float(middles[order[np.searchsorted(totals, share * totals[-1])]]) for share in shares]


def _deviation(between_quartiles: float, low: float, high: float) -> float:
    """The robust deviation; for a tensor that is nearly constant something that still spans a picture."""
    return between_quartiles / 1.349 or (high - low) / 20 or abs(high) / 20 or 1.0


def _axis(spread: _Spread) -> _Axis:
    if math.isnan(spread.median):
        return _Axis(0.0, 1.0, False, -1.0, 1.0)
    ends = np.array([spread.minimum, spread.maximum])
    away = np.clip((ends - spread.median) / spread.deviation, -PAPER_LIMIT, PAPER_LIMIT)
    bent = bool(np.abs(away).max() > LINEAR_LIMIT)
    first, last = (np.arcsinh(away) if bent else away).tolist()
    margin = max(0.02 * (last - first), 0.5)
    return _Axis(spread.median, spread.deviation, bent, first - margin, last + margin)


def _index(at: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(part) for part in np.unravel_index(at, shape)) if shape else ()


# -- drawing -----------------------------------------------------------------------------------------------------


def _margins(figure: Figure, width: float, height: float, columns: int) -> None:
    """Room for the words, in inches; matplotlib's own layout takes longer than all the rest."""
    figure.subplots_adjust(
        left=0.75 / width,
        right=1 - 0.2 / width,
        bottom=0.65 / height,
        top=1 - 0.85 / height,
        wspace=0.55 / (width / columns - 0.55),
        hspace=0.45,
    )


def _panel(axes: Axes, one: Histogram, *, large: bool) -> None:
    _bars(axes, one)
    _frame(axes, one, large=large)
    _scale(axes, one)
    _label_outliers(axes, one, large=large)
    if one.n_nan or one.n_inf:
        said = ", ".join(f"{count:,} {name}" for name, count in (("NaN", one.n_nan), ("Inf", one.n_inf)) if count)
        axes.text(0.98, 0.94, said, transform=axes.transAxes, ha="right", va="top", color=_RED, fontweight="bold")


def _caption(histograms: Sequence[Histogram]) -> str:
    bent = "; linear near the median, logarithmic far from it" if any(one.bent for one in histograms) else ""
    return f"value{bent}    ·    shaded: median ± {BOUNDS:g} robust deviations, orange: beyond"


def _bars(axes: Axes, one: Histogram) -> None:
    axes.axvspan(one.low, one.high, color="#EEF3F7", zorder=0, lw=0)
    for bound in (one.low, one.high):
        axes.axvline(bound, color=_GREY, lw=0.7, ls=(0, (4, 3)), zorder=1)
    inside = (one.edges[1:] > one.low) & (one.edges[:-1] < one.high)
    for part, colour in ((inside, _BLUE), (~inside, _ORANGE)):
        counts = np.where(part, np.maximum(one.counts, _FLOOR), _FLOOR)
        axes.stairs(counts, one.edges, baseline=_FLOOR, fill=True, color=colour, lw=0, zorder=2)


def _frame(axes: Axes, one: Histogram, *, large: bool) -> None:
    """Title, subtitle and what is drawn around the bars."""
    small = 9 if large else 7
    shape = " × ".join(map(str, one.shape)) or "scalar"
    axes.set_title(_plain(one.name), fontsize=small + 1.5, loc="left", pad=small + 8)
    found = f"{one.type}  {shape}   {one.minimum:.4g} … {one.maximum:.4g}"
    axes.annotate(found, (0, 1), (0, 4), "axes fraction", "offset points", fontsize=small, color="#555555")
    if one.n_outliers:
        said = f"{one.n_outliers:,} outside"
        place = {"xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate(said, (1, 1), (0, 4), fontsize=small, color=_ORANGE, ha="right", **place)  # type: ignore[arg-type]
    axes.tick_params(labelsize=small, length=3, color="#999999")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")


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


def _label_outliers(axes: Axes, one: Histogram, *, large: bool) -> None:
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
            _point(axes, at, label, side, rank, size, hidden=off)


def _point(axes: Axes, at: float, label: str, side: int, rank: int, size: float, *, hidden: bool) -> None:
    axes.annotate(
        label,
        xy=(at, 1.0),
        xytext=(at, 0.42 + 0.1 * rank),
        textcoords=("data", "axes fraction"),
        ha="left" if side < 0 else "right",
        fontsize=size,
        color=_ORANGE,
        arrowprops=None if hidden else {"arrowstyle": "-", "color": _ORANGE, "lw": 0.6},
        bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        annotation_clip=False,
        zorder=4,
    )


def _plain(text: str) -> str:
    """Text of a file without anything that matplotlib would typeset or a font lacks."""
    from ggufkit.report.escape import shown

    return shown(text, limit=80).replace("$", r"\$")
