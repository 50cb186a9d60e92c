"""Laying the rows of a matrix side by side, as the kernels read them."""

from __future__ import annotations

from typing import Any

from ggufkit.runtime.cpu.simd import kept


@kept
def interleave(rows: Any, out: Any, first_block: int) -> None:
    """Put rows [n, columns] into out [blocks, columns, lanes], from `first_block` on; lanes without a row are left."""
    n_rows, n_columns = rows.shape
    lanes = out.shape[2]
    for row in range(n_rows):
        block, lane = first_block + row // lanes, row % lanes
        for column in range(n_columns):
            out[block, column, lane] = rows[row, column]
