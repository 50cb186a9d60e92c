"""Commands about this machine: bench, doctor, and the demo that shows everything at once."""

from __future__ import annotations

import typer

from ggufkit.cli.common import Json, command, print_line, stdout


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    for function in (doctor,):
        app.command()(function)


@command
def doctor(json: Json = False) -> int:
    """Say what this machine offers, what is missing, and how to get it."""
    from ggufkit import doctor as machine

    checks = machine.examine()
    if json:
        from ggufkit.report.document import document

        print_line(document("doctor", {"healthy": machine.healthy(checks), "checks": checks}))
    else:
        from ggufkit.report.text import doctor as text

        text.report(stdout(), checks)
    return 0 if machine.healthy(checks) else 1
