"""Commands about this machine: bench, doctor, and the demo that shows everything at once."""

from __future__ import annotations

import typer

from ggufkit.cli.common import Json, command, print_line, stdout


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    for function in (doctor, demo):
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


@command
def demo(json: Json = False) -> None:
    """Inspect, validate and run a small model that comes with ggufkit, then damage it and watch."""
    from ggufkit import demo as story

    if json:
        from ggufkit.report import json_v1
        from ggufkit.report.document import document

        scenes = [
            {
                "title": scene.title,
                "story": scene.story,
                "report": json_v1.as_dict(scene.report),
                "prompt": scene.prompt,
            }
            | {"reply": scene.reply, "error": scene.error}
            for scene in story.scenes()
        ]
        print_line(document("demo", {"scenes": scenes}))
        return
    from ggufkit.report.text import demo as text

    console = stdout()
    text.opening(console)
    for number, scene in enumerate(story.scenes(), 1):
        text.scene(console, number, scene)
    text.closing(console)
