"""The attention of one head: a row a position, a column a key, from the step kq_soft_max of a trace.

What is right in such a picture is known beforehand: nothing right of the diagonal, and every row adds up to 1. Rows
for which that is not so are marked; the rest is for the eye (a sink at key 0, a diagonal, stripes at separators).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ggufkit.errors import UsageError
from ggufkit.plot.grid import Grid, Mark
from ggufkit.steps import Array, future_keys, parse_name

STEP = "kq_soft_max"
#: how far a row's sum may be from 1, and what keys may have that come later: rounding to float16 explains it
SUM_TOLERANCE = 2e-3
#: probabilities below this are all drawn alike
FAINTEST = 1e-3


def head(arrays: Mapping[str, Array], first_position: int = 0, layer: int | None = None, head: int = 0) -> Grid:
    """The rows of one head.

    Args:
        arrays: full step name → float32; of kq_soft_max-N [T, H, S].
        first_position: of row 0.
        layer: by default the first in the trace that has this step.

    Raises:
        UsageError: the trace lacks the step, or the model the head.
    """
    layers = [place[1] for name in arrays if (place := parse_name(name)) and place[0] == STEP]
    if not layers or (layer is not None and layer not in layers):
        wanted = STEP if layer is None else f"{STEP}-{layer}"
        have = ", ".join(str(one) for one in layers[:8]) + (", …" if len(layers) > 8 else "")
        raise UsageError(f"the trace has no {wanted}", help=f"it has the layers {have}" if layers else "trace it again")
    layer = layers[0] if layer is None else layer
    scores = arrays[f"{STEP}-{layer}"]
    if scores.ndim != 3 or not 0 <= head < scores.shape[1]:
        raise UsageError(f"there is no head {head}", expected=f"[positions, heads, keys], not {list(scores.shape)}")
    rows = scores[:, head].astype(np.float64)
    future = future_keys(scores, first_position)[:, 0]
    return Grid(
        f"layer {layer}, head {head}: probability",
        "position",
        "key",
        tuple(str(first_position + row) for row in range(len(rows))),
        tuple(map(str, range(rows.shape[1]))),
        np.where(future & (rows == 0), np.nan, rows),
        bounds=(FAINTEST, 1.0),
        marks=tuple(_marks(rows, future)),
    )


def caption(drawn: Grid) -> str:
    """What is right or wrong with the rows, in words."""
    wrong = len({mark.row for mark in drawn.marks})
    if wrong:
        return f"{wrong} of {len(drawn.rows)} rows do not add up to 1, or look at later keys: marked"
    return "every row adds up to 1 and no key is later than its position"


def _marks(rows: NDArray[np.float64], future: Array) -> list[Mark]:
    """The first thing wrong with each row, at its place."""
    found = []
    for at, row in enumerate(rows):
        later = np.flatnonzero(future[at] & (np.abs(row) > SUM_TOLERANCE))
        if not np.isfinite(row).all():
            found.append(Mark(at, int(np.flatnonzero(~np.isfinite(row))[0]), "NaN or Inf"))
        elif later.size:
            found.append(Mark(at, int(later[0]), "error"))
        elif abs(row.sum() - 1) > SUM_TOLERANCE:
            found.append(Mark(at, int(np.flatnonzero(~future[at])[-1]), "error"))
    return found
