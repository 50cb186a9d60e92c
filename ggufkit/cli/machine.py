"""Commands about this machine: bench, doctor, and the demo that shows everything at once."""

from __future__ import annotations

from typing import Annotated

import typer

from ggufkit.cli.common import Device, Dtype, Json, Source, command, load_engine, print_line, progress, stdout


@command
def bench(
    source: Source,
    pp: Annotated[list[int] | None, typer.Option(metavar="N", help="Prompt lengths; 512 by default.")] = None,
    tg: Annotated[list[int] | None, typer.Option(metavar="N", help="Tokens to generate; 128 by default.")] = None,
    repeats: Annotated[int, typer.Option("-r", "--repeats", metavar="N", help="Of each test.")] = 5,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Measure tokens a second, as llama-bench does."""
    from time import perf_counter

    from ggufkit import reader
    from ggufkit.runtime.bench import benchmark

    with reader.open(source) as gguf:
        start = perf_counter()
        engine = load_engine(gguf, device, dtype)
        seconds = perf_counter() - start
        lengths = {"pp": pp or [] if tg and not pp else pp or [512], "tg": tg or [] if pp and not tg else tg or [128]}
        with progress("measuring") as advance:
            found = benchmark(
                engine,
                gguf,
                **lengths,
                repeats=repeats,
                load_seconds=seconds,
                progress=lambda _, done, total: advance(done / total),
            )
    if json:
        from ggufkit.report.document import document, plain

        tests = [{**plain(test), "mean": test.mean, "std": test.std} for test in found.tests]
        print_line(document("bench", {"source": source, **plain(found), "tests": tests}))
    else:
        from ggufkit.report.text import bench as text

        text.report(stdout(), source, found)


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
