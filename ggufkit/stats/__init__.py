"""One pass over a tensor's bytes, serving every rule and picture at once.

`measure` does one tensor, `scan` many with all processors. `results` says what comes out, `plain` how it is
defined; `kernels` does the same fast for files of more than a few megabytes (see `jit`).
"""

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
from ggufkit.stats.stream import SMALL, measure, scan

__all__ = [
    "OUTLIER_OCTAVES",
    "SMALL",
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
    "measure",
    "scan",
]
