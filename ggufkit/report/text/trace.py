"""The summary of a trace as text: a step a line."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from ggufkit.report.text.style import listing, shape_text, show
from ggufkit.runtime.record import Summary


def summaries(console: Console, rows: Sequence[Summary]) -> None:
    """Print them."""
    table = listing(
        "step", "shape", "mean", "std", "absmax", "first … last", "sha256",
        right=("mean", "std", "absmax"), wide="first … last",
    )  # fmt: skip
    for row in rows:
        figures = (f"{value:.4g}" for value in (row.mean, row.std, row.absmax))
        ends = f"{_few(row.first)} … {_few(row.last)}"
        shown_ends = Text(ends, "note", no_wrap=True, overflow="ellipsis")
        if row.not_finite:
            shown_ends = Text(f"{row.not_finite:,} not finite", "error", no_wrap=True, overflow="ellipsis")
        table.add_row(row.name, shape_text(row.shape), *figures, shown_ends, Text(row.checksum[:8], "note"))
    show(console, table)


def _few(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
