"""`diagnose` as text: a colleague's answer. What is wrong, since which step, the evidence, what usually causes it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.text import Text

from ggufkit.misread import Mistake
from ggufkit.report.escape import shown
from ggufkit.report.text.style import commands, heading, listing, plural, show
from ggufkit.runtime.diagnose import Diagnosis, Explanation
from ggufkit.steps import BY_NAME, full_name

#: a drawing for the fault that people draw on paper most
_DRAWINGS = {
    "transposed": """\
in the file (dims [in, out]):   w00 w01 w02 … │ w10 w11 w12 … │ …
                                └── row 0 ──┘   └── row 1 ──┘
right:        y[o] = Σ x[i] · w[o·in + i]     along a row
this engine:  y[o] = Σ x[i] · w[i·out + o]    across the rows""",
}


def diagnosis(
    console: Console, found: Diagnosis, mistake: Mistake | None, notes: Sequence[str], again: Sequence[str] = ()
) -> None:
    """Print the whole answer."""
    lines: list[RenderableType] = [_verdict(found, mistake), Text()]
    if mistake is not None:
        lines += _mistake(mistake)
    for number, fault in enumerate(found.faults, 1):
        lines += _fault(fault, number, len(found.faults))
    if found.unexplained:
        lines += _unexplained(found)
    lines += _evidence(found)
    if notes:
        lines += [heading("About the trace"), *(Text("  " + shown(said), "note") for said in notes), Text()]
    if found.ruled_out:
        other = "other known bug" if found.faults else "known bug"
        tried = f"  {plural(len(found.ruled_out), other)} tried at these steps and ruled out"
        lines += [Text(tried, "note"), Padding(Text(", ".join(found.ruled_out), "note"), (0, 0, 1, 4))]
    show(console, *lines, *commands(again), Text(f"compared {plural(found.checked, 'step')}"))


def _verdict(found: Diagnosis, mistake: Mistake | None) -> Text:
    faults = len(found.faults) + (mistake is not None)
    if faults:
        name = "ONE BUG" if faults == 1 else f"{faults} BUGS"
        first = f"  first seen at {_place(found)}" if mistake is None else "  first seen in the words"
        return Text.assemble((f"✗ {name} FOUND", "error"), first)
    if found.first_divergence is not None:
        return Text.assemble(("✗ NONE OF THE KNOWN BUGS", "error"), f"  but {_place(found)} does not follow")
    if not found.checked:
        return Text("? NOTHING TO COMPARE  the trace has no step of this model", "warning")
    return Text.assemble(("✓ THIS ENGINE COMPUTES RIGHTLY", "good"), "  every step follows from the ones before it")


def _place(found: Diagnosis) -> str:
    first = found.first_divergence
    return full_name(first.step, first.layer) if first else "no step"


def _mistake(mistake: Mistake) -> list[RenderableType]:
    rows = listing(
        "", f"tokens from position {mistake.position} on", wide=f"tokens from position {mistake.position} on"
    )
    for name, tokens in (("expected", mistake.expected), ("found", mistake.found)):
        rows.add_row(name, Text(" ".join(repr(shown(token)) for token in tokens) or "(the end)", overflow="ellipsis"))
    return [
        Text.assemble(("  " + mistake.title[:1].upper() + shown(mistake.title[1:]), "title")),
        Padding(Text(mistake.explanation), (0, 0, 1, 2)),
        Padding(rows, (0, 0, 1, 2), expand=False),
    ]


def _fault(fault: Explanation, number: int, of: int) -> list[RenderableType]:
    title = fault.title[:1].upper() + fault.title[1:]
    lines: list[RenderableType] = [
        Text.assemble((f"  {number}. " if of > 1 else "  ", "title"), (title, "title")),
        Padding(Text(fault.explanation), (0, 0, 1, 2)),
    ]
    if fault.name in _DRAWINGS:
        lines.append(Padding(Text(_DRAWINGS[fault.name], "note", no_wrap=True), (0, 0, 1, 4)))
    table = listing("since", "error", "with the bug", "explains", right=("error", "with the bug"), wide="explains")
    table.add_row(fault.places[0], f"{fault.error:.3g}", f"{fault.residual:.1e}", _places(fault.places))
    lines.append(Padding(table, (0, 0, 1, 2), expand=False))
    for (_, title), how in zip(fault.same_numbers_as, fault.tell_apart, strict=True):
        lines.append(Padding(Text.assemble(("Gives the same numbers here: ", "warning"), title), (0, 0, 0, 2)))
        lines.append(Padding(Text(f"To tell them apart, {how}.", "note"), (0, 0, 1, 4)))
    return lines


def _places(places: Sequence[str]) -> str:
    """`q_proj in 24 layers, k_proj in 24 layers`."""
    layers: dict[str, int] = {}
    for name in places:
        step = name.rsplit("-", 1)[0]
        layers[step] = layers.get(step, 0) + 1
    said = [step if count == 1 else f"{step} in {count} layers" for step, count in layers.items()]
    return ", ".join(said[:3]) + (f" and {len(said) - 3} more steps" if len(said) > 3 else "")


def _unexplained(found: Diagnosis) -> list[RenderableType]:
    few = ", ".join(found.unexplained[:6]) + (" …" if len(found.unexplained) > 6 else "")
    said = f"  {plural(len(found.unexplained), 'step')} that no known bug explains: {few}"
    return [Text(said, "warning"), Text()]


def _evidence(found: Diagnosis) -> list[RenderableType]:
    first = found.first_divergence
    lines: list[RenderableType] = []
    if first is not None:
        what = BY_NAME[first.step].what
        lines += [
            heading("First step that does not follow from its inputs"),
            Text(f"  {full_name(first.step, first.layer)}: {what}"),
            Text(f"  position {first.position} first; relative error {first.error:.3g}; {first.pattern}"),
            Text(),
        ]
    for title, count in found.noise.items():
        lines.append(Text(f"  harmless: {title} (seen in {plural(count, 'product')})", "note"))
    return [*lines, Text()] if found.noise else lines
