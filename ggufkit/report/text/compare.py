"""`compare` as text: whether two traces agree, where they first part, and the steps around that place."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.text import Text

from ggufkit.compare import Comparison, Divergence, StepRow
from ggufkit.report.escape import shown
from ggufkit.report.text.style import commands, listing, number_text, plural, shape_text, show
from ggufkit.steps import BY_NAME, full_name

_STYLES = {"same": "good", "close": "good", "diverged": "error", "shape": "warning"}
_BEFORE, _AFTER = 4, 12  # steps shown around the first that differs


def comparison(console: Console, found: Comparison, a: str, b: str) -> None:
    """Print the verdict, the first divergence, and a table."""
    lines: list[RenderableType] = [_verdict(found), *_differences(found, a, b), Text()]
    rows, left_out = _around(found)
    if rows:
        lines.append(_table(rows))
    if left_out:
        lines.append(Text(f"{left_out} more; --json has them all", "note"))
    lines += commands(found.again)
    show(console, *lines)


def _verdict(found: Comparison) -> Text:
    if found.agree:
        n_same = sum(row.status == "same" for row in found.rows)
        said = f"{plural(len(found.rows), 'step')} compared, {n_same} bit for bit the same, {_allowed(found)}"
        return Text.assemble(("✓ THEY AGREE", "good"), f"  {said}")
    if not found.rows:
        return Text("? NOTHING TO COMPARE  the traces have no step in common", "warning")
    if found.first is None:
        return Text("✗ THEY DIFFER", "error")
    name = full_name(found.first.step, found.first.layer)
    return Text.assemble((f"✗ THEY PART AT {name}", "error"), f"  {BY_NAME[found.first.step].what}")


def _differences(found: Comparison, a: str, b: str) -> list[Text]:
    lines = []
    if found.tokens_differ_at is not None:
        message = f"  the token ids differ from position {found.tokens_differ_at} on: other words, not another engine"
        lines.append(Text(message, "error"))
    if found.first is not None:
        lines += _first(found.first, found)
    for name, missing in ((a, found.only_b), (b, found.only_a)):
        if missing:
            few = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            lines.append(Text(f"  {shown(name)} lacks {plural(len(missing), 'step')}: {shown(few)}", "note"))
    return lines + [Text(f"  {shown(remark)}", "warning") for remark in found.notes]


def _first(first: Divergence, found: Comparison) -> list[Text]:
    return [
        Text(f"  from position {first.position} on, relative error {number_text(float(f'{first.error:.3g}'))}"),
        Text(f"  {first.pattern}"),
        Text(f"  {_allowed(found)}", "note"),
    ]


def _allowed(found: Comparison) -> str:
    if found.tolerance is not None:
        return f"a relative error of {found.tolerance:.2g} is the noise of these precisions"
    return f"allowed: {found.atol or 0:g} + {found.rtol or 0:g} · |b|"


def _around(found: Comparison) -> tuple[Sequence[StepRow], int]:
    """The rows worth showing: those around the first that is not as it should be, else the worst of them all."""
    bad = [number for number, row in enumerate(found.rows) if row.status in ("diverged", "shape")]
    worst = sorted(found.rows, key=lambda row: -row.error)[:_BEFORE]
    rows = list(found.rows[max(0, bad[0] - _BEFORE) : bad[0] + _AFTER]) if bad else worst
    return rows, len(found.rows) - len(rows)


def _table(rows: Sequence[StepRow]) -> RenderableType:
    table = listing(
        "step", "", "rel. error", "max diff", "where", "cosine", "beyond",
        right=("rel. error", "max diff", "cosine", "beyond"), wide="where",
    )  # fmt: skip
    for row in rows:
        if row.status == "shape":
            shapes = f"{shape_text(row.shapes[0])} against {shape_text(row.shapes[1])}"
            table.add_row(row.name, Text("shape", "warning"), "", "", Text(shapes, no_wrap=True), "", "")
            continue
        where = Text(str(list(row.worst)) if row.worst and row.max_abs else "", "note", no_wrap=True)
        figures = (f"{row.error:.2e}", f"{row.max_abs:.3g}", where, f"{row.cosine:.6f}", f"{100 * row.beyond:.1f} %")
        table.add_row(row.name, Text(row.status, _STYLES[row.status]), *figures)
    return table
