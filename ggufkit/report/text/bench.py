"""`bench` as text: a line a test, as llama-bench prints them."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from ggufkit.report.text.style import facts, listing, nbytes_text, show
from ggufkit.runtime.bench import Benchmark


def report(console: Console, source: str, found: Benchmark) -> None:
    """Print what was measured."""
    table = listing("test", "tokens/s", "±", "weights read", right=("tokens/s", "±", "weights read"))
    for test in found.tests:
        read = "" if test.weight_rate is None else f"{nbytes_text(test.weight_rate)}/s"
        if found.copy_rate and test.weight_rate is not None:
            read += f" ({test.weight_rate / found.copy_rate:.0%})"
        table.add_row(test.name, f"{test.mean:,.1f}", f"{test.std:,.1f}", read)
    load = None if found.load_seconds is None else f"{found.load_seconds:.2f} s"
    rows = (
        ("file", Text(source)),
        ("engine", f"{found.engine} on {found.device}"),
        ("loaded in", load),
        ("first token", f"{1000 * found.first_token_seconds:.1f} ms"),
        ("a token needs", f"{nbytes_text(found.token_bytes)} of weights"),
        ("copying", None if found.copy_rate is None else f"{nbytes_text(found.copy_rate)}/s, read and written (100%)"),
    )
    show(console, facts(rows), Text(), Padding(table, (0, 0, 0, 2), expand=False))
