"""`doctor` as text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ggufkit.doctor import Check, State
from ggufkit.report.escape import shown
from ggufkit.report.text.style import heading, show

SIGNS: dict[State, tuple[str, str]] = {
    State.OK: ("✓", "good"),
    State.ABSENT: ("–", "note"),
    State.BROKEN: ("✗", "error"),
}
_TITLES = {"system": "This machine", "packages": "Packages", "gpu": "GPU"}


def report(console: Console, checks: Sequence[Check]) -> None:
    """Print every check, and what to do about those that did not go well."""
    lines: list[RenderableType] = []
    for group, members in groupby(checks, key=lambda check: check.group):
        lines += [heading(_TITLES[group]), _table(list(members)), Text()]
    advice = [check for check in checks if check.help]
    if advice:
        lines.append(heading("To do"))
        lines += [Text.assemble(f"  {check.name}: ", (check.help or "", "info")) for check in advice]
    else:
        lines.append(Text("Everything that can be used is there.", "good"))
    show(console, *lines)


def _table(checks: list[Check]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(style="label", no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        sign, style = SIGNS[check.state]
        table.add_row(Text(f"  {sign}", style), check.name, shown(check.found))
    return table
