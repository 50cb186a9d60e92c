"""From the arrays of a scanned chunk to the few numbers that are kept of it.

This is the part of the pass that no longer looks at elements: it works by block (`blocks`, `scales`) and by row
(`rows`). Both ways of scanning share it, except for three loops that the compiled pass replaces (`Tools`). It runs in
the worker's thread; what remains for the collector is to add up (see `total`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ggufkit.quants.bits import F32, U8
from ggufkit.stats import blocks, scales
from ggufkit.stats.blocks import BlockDigest, Deviations
from ggufkit.stats.chunk import Chunk, Scanned
from ggufkit.stats.deviation import Levels
from ggufkit.stats.rows import RowDigest, Rows, digest_rows
from ggufkit.stats.runs import ByteRuns
from ggufkit.stats.scales import ScaleDigest


@dataclass(frozen=True, slots=True)
class Digest:
    """All that is kept of a chunk."""

    chunk: Chunk
    scanned: Scanned
    bytes: ByteRuns
    blocks: BlockDigest
    scales: ScaleDigest | None
    mins: ScaleDigest | None
    rows: Rows
    row_digest: RowDigest | None


class Tools(Protocol):
    """The loops over blocks and bytes that `Plain` does in NumPy; the compiled pass does the same, faster."""

    def deviate(self, levels: Levels) -> Deviations:
        """How far blocks [rows, columns] lie from their rows and columns."""

    def scan_scales(self, d: F32) -> ScaleDigest:
        """Sum up a series of scales: float32 [n]."""

    def byte_runs(self, data: U8) -> ByteRuns:
        """Runs of equal bytes."""


class Plain:
    """The loops in NumPy."""

    def deviate(self, levels: Levels) -> Deviations:
        return blocks.deviate(levels)

    def scan_scales(self, d: F32) -> ScaleDigest:
        return scales.scan_scales(d)

    def byte_runs(self, data: U8) -> ByteRuns:
        return ByteRuns.of(data)


def digest(chunk: Chunk, raw: U8, scanned: Scanned, tools: Tools) -> Digest:
    """Sum up a scanned chunk."""
    s = scanned
    rows = Rows(chunk.row, chunk.row_length, s.row_min, s.row_max, s.row_square, s.row_bad)
    result = Digest(
        chunk,
        scanned,
        tools.byte_runs(raw),
        blocks.digest_blocks(chunk, raw, scanned, tools.deviate),
        None if scanned.d is None else tools.scan_scales(scanned.d),
        None if scanned.dmin is None else tools.scan_scales(scanned.dmin),
        rows,
        digest_rows(rows) if chunk.row_length == chunk.full_row else None,
    )
    scanned.forget_blocks()
    return result
