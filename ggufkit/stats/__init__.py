"""One pass over a tensor's bytes, serving every rule and picture at once."""

from __future__ import annotations

from ggufkit.stats.results import (
    OUTLIER_OCTAVES,
    BlockDeviation,
    BlockStats,
    ByteRun,
    ExpertStats,
    Extreme,
    GridStats,
    Histogram,
    MarkStats,
    RepeatStats,
    RowExtreme,
    RowStats,
    ScaleStats,
    Span,
    Stretch,
    TensorStats,
)

__all__ = [
    "OUTLIER_OCTAVES",
    "BlockDeviation",
    "BlockStats",
    "ByteRun",
    "ExpertStats",
    "Extreme",
    "GridStats",
    "Histogram",
    "MarkStats",
    "RepeatStats",
    "RowExtreme",
    "RowStats",
    "ScaleStats",
    "Span",
    "Stretch",
    "TensorStats",
]
