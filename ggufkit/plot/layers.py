"""The whole model at a glance: a map of role × layer, one number of each tensor.

A tensor outside the layers is a bar across all of them. Neighbouring layers of one role are alike in a healthy
model, so that a single cell which differs from its row is what the eye should find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ggufkit.arch import ARCHITECTURES, role_of
from ggufkit.container import Tensor
from ggufkit.plot.grid import Grid, Mark

if TYPE_CHECKING:
    from ggufkit.stats import TensorStats


@dataclass(frozen=True, slots=True)
class Measure:
    """One number of a tensor: what it is called, whether its colours are logarithmic, and how it is had."""

    quantity: str
    logarithmic: bool
    of: Callable[[TensorStats], float]


def _absmax(stats: TensorStats) -> float:
    return abs(stats.absmax.value) if stats.absmax else float("nan")


MEASURES: dict[str, Measure] = {
    "absmax": Measure("largest magnitude", True, _absmax),
    "std": Measure("standard deviation", True, lambda stats: stats.std),
    "kurtosis": Measure("kurtosis (3: a normal distribution)", True, lambda stats: stats.kurtosis),
    "zeros": Measure("zeros, % of the elements", False, lambda stats: 100 * stats.n_zero / max(stats.count, 1)),
}
#: not of the numbers but of their type: needs no pass over the weights
BITS = "bits"

_ORDER = {
    spec.name.removeprefix("blk.{}."): place
    for row in reversed(ARCHITECTURES.values())
    for place, spec in enumerate(sorted(row.tensors, key=lambda spec: spec.name.startswith("output")))
}


def order(role: str) -> tuple[int, str]:
    """The place of a role in the forward pass, a bias after its weight; roles that are not known come last."""
    stem, _, kind = role.rpartition(".")
    return _ORDER.get(f"{stem}.weight", len(_ORDER)), {"weight": "", "bias": "bias"}.get(kind, role)


def of_stats(measured: Iterable[TensorStats], measure: str, marks: Mapping[str, str] | None = None) -> Grid:
    """The map of one of `MEASURES`.

    Args:
        marks: tensor → `error`, `warning` or `info`: what was found about it. NaN and infinities mark themselves.
    """
    row = MEASURES[measure]
    values, found = {}, dict(marks or {})
    for stats in measured:
        values[stats.name] = row.of(stats)
        if stats.n_nan or stats.n_inf:
            found[stats.name] = "NaN or Inf"
    return arrange(values, row.quantity, found, logarithmic=row.logarithmic)


def bits(tensors: Iterable[Tensor], marks: Mapping[str, str] | None = None) -> Grid:
    """The map of bits per weight."""
    values = {one.name: 8 * one.nbytes / one.n_elements for one in tensors if one.nbytes and one.n_elements}
    return arrange(values, "bits per weight", marks or {}, logarithmic=False)


def arrange(values: Mapping[str, float], quantity: str, marks: Mapping[str, str], *, logarithmic: bool) -> Grid:
    """Numbers by tensor as a map of role × layer, the roles in the order of the forward pass."""
    places = {name: role_of(name) for name in values}
    n_layers = max((layer for _, layer in places.values() if layer is not None), default=0) + 1
    roles = sorted(dict.fromkeys(role for role, _ in places.values()), key=order)
    row_of = {role: row for row, role in enumerate(roles)}
    cells = np.full((len(roles), n_layers), np.nan)
    for name, value in values.items():
        role, layer = places[name]
        cells[row_of[role], slice(None) if layer is None else layer] = value
    outer = {role for role, layer in places.values() if layer is None}
    found = [
        Mark(row_of[places[name][0]], n_layers // 2 if places[name][1] is None else places[name][1] or 0, kind)
        for name, kind in marks.items()
        if name in places
    ]
    return Grid(
        quantity,
        "",
        "layer",
        tuple(roles),
        tuple(map(str, range(n_layers))),
        cells,
        tuple(_note(cells[row], outer=role in outer) for role, row in row_of.items()),
        logarithmic,
        marks=tuple(found),
    )


def _note(row: np.ndarray[tuple[int], np.dtype[np.float64]], *, outer: bool) -> str:
    """The largest value of a row, and where it is."""
    if np.isnan(row).all():
        return ""
    at = int(np.nanargmax(row))
    return f"{row[at]:.3g}" if outer else f"{row[at]:.3g} in {at}"
