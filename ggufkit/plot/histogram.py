"""The values of tensors, counted (`Histogram`); `bars` draws them.

A histogram must show two things at once that differ by a factor of a million: where nearly all values lie, and
the few that lie far away. Counts are therefore logarithmic; values are linear while the extremes stay within
`LINEAR_LIMIT` robust deviations and bend to a logarithm (asinh) beyond, and what would still be off the paper
(a 1e30) is an arrow at its edge. A tensor is dequantized piece by piece, twice: once for its quantiles, once for
its bars. The memory needed does not depend on its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

from ggufkit import quants
from ggufkit.container import GGUF, Tensor
from ggufkit.errors import UsageError

Floats = npt.NDArray[np.float32]

BINS = 160
MOST_PANELS = 64
#: bounds are the median ± this many robust deviations (the quartiles' distance / 1.349, a normal's deviation)
BOUNDS = 6.0
#: robust deviations up to which the axis stays linear, and beyond which a value is an arrow at the edge
LINEAR_LIMIT, PAPER_LIMIT = 60.0, 1e5
#: outliers that are kept with their index
KEPT = 32

_CHUNK = 1 << 22  # elements dequantized at once
_CELLS = 1 << 16  # the upper half of a float32 is its cell: 128 cells an octave


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


def matching(gguf: GGUF, globs: Sequence[str], *, most: int | None = MOST_PANELS) -> list[Tensor]:
    """The tensors that the shell patterns name; without any, the first layer and what is outside the layers.

    Args:
        most: as many as fit into one picture.

    Raises:
        UsageError: a pattern matches nothing, or all together more than `most`.
    """
    if not globs:
        found = [tensor for name, tensor in gguf.tensors.items() if name.startswith("blk.0.") or name[:4] != "blk."]
        return found[:most]
    chosen: dict[str, Tensor] = {}
    for glob in globs:
        hits = {name: tensor for name, tensor in gguf.tensors.items() if fnmatchcase(name, glob)}
        if not hits:
            message = f"no tensor matches {glob!r}"
            raise UsageError(message, path=str(gguf.path), help="`inspect --tensors` lists them; quote the pattern")
        chosen |= hits
    if most is not None and len(chosen) > most:
        message = f"{len(chosen)} tensors match; {most} fit into one picture"
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
