"""How far the level of each block lies from what its row and its column of blocks let expect.

A weight matrix has strong rows and strong columns, and a block in one of them is no outlier. So the levels (log2 of
the mean square, in sixteenths of an octave of rms) of a chunk's blocks are modelled as row + column. Beginning with
the mean of all, both are found by alternating means in which a residual counts for four octaves at most: a scale
that is a thousandfold too large, or a row of foreign bytes, then hardly moves them. All in integers, so that every
implementation finds the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ggufkit.stats.layout import LEVELS_PER_OCTAVE

#: an effect needs that many blocks to be told from its residuals
FEWEST = 4

#: a residual counts for this much at most
CLAMP = 4 * LEVELS_PER_OCTAVE

#: how often columns and rows are refined; each time they may move by `CLAMP`
ROUNDS = 3

#: the deviation of a block that has none: zeros, or something not finite
NONE = -32768

Levels = npt.NDArray[np.int16]
_Ints = npt.NDArray[np.int64]


def deviations(levels: Levels) -> Levels:
    """The deviation of each block, in sixteenths of an octave: int16 [rows, columns] -> the same, or NONE."""
    n_rows, n_columns = levels.shape
    valid = levels > 0
    x = np.where(valid, levels, 0).astype(np.int64)
    rows, columns = np.zeros((n_rows, 1), np.int64), np.zeros((1, n_columns), np.int64)
    columns += _mean(x.reshape(1, -1), valid.reshape(1, -1), 1)
    for _ in range(ROUNDS):
        if n_rows >= FEWEST:
            columns += _mean((x - rows - columns).clip(-CLAMP, CLAMP), valid, 0)
        if n_columns >= FEWEST:
            rows += _mean((x - rows - columns).clip(-CLAMP, CLAMP), valid, 1)
    return np.where(valid, x - rows - columns, NONE).astype(np.int16)


def _mean(residual: _Ints, valid: npt.NDArray[np.bool_], axis: int) -> _Ints:
    """Mean of the valid residuals along an axis (which is kept), rounded to the nearest integer, halves up."""
    count = np.maximum(valid.sum(axis=axis, keepdims=True), 1)
    total = np.where(valid, residual, 0).sum(axis=axis, keepdims=True)
    result: _Ints = (2 * total + count) // (2 * count)
    return result
