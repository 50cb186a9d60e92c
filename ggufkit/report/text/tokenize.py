"""`tokenize` as text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from ggufkit.overview import TokenRow
from ggufkit.report.escape import shown
from ggufkit.report.text.style import heading, listing, plural, show


def tokens(console: Console, rows: Sequence[TokenRow], kind: str) -> None:
    """Print a token a line; those that are no text stand out."""
    table = listing("id", "text", "bytes", right=("id",), wide="bytes")
    for row in rows:
        text = Text(shown(row.text), "info" if row.special else "")
        table.add_row(f"{row.id}", text, Text(row.bytes, "note", no_wrap=True, overflow="ellipsis"))
    show(console, heading(plural(len(rows), "token"), kind), table)
