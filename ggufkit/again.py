"""The smallest command that shows a divergence again: as few tokens as it needs, and one step.

Whoever mends a kernel runs it some hundred times. A run of four tokens and one step takes no time, and one number of
it says whether the mending helped.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ggufkit.trace import Mode, Trace

#: engines that `ggufkit trace` runs
_OWN = ("reference", "cpu", "cuda", "llama.cpp", "transformers")


def enough(token_ids: Sequence[int], position: int, mode: Mode) -> tuple[int, ...]:
    """The tokens that a divergence at a position needs. A prompt computed at once gets one more: what the future does
    to a position shows only if there is one."""
    return tuple(token_ids[: position + (1 if mode == "decode" else 2)])


def trace_command(model: str, ids: Sequence[int], mode: Mode, step: str, engine: str | None, output: str) -> str:
    """`ggufkit trace` of one step."""
    words = ["ggufkit", "trace", model, "--tokens", ",".join(map(str, ids)), "--steps", step]
    words += ["--engine", engine] if engine else []
    words += ["--decode"] if mode == "decode" else []
    return shlex.join([*words, "-o", output])


def of_two(a: Trace, b: Trace, step: str, position: int) -> tuple[str, ...]:
    """The commands that make and compare two small traces; an engine that is not run by `ggufkit trace` is left to
    its author."""
    ids = enough(a.token_ids, position, a.mode)
    lines = []
    for trace, output in ((a, "a.safetensors"), (b, "b.safetensors")):
        if trace.engine in _OWN:
            lines.append(trace_command("MODEL.gguf", ids, trace.mode, step, trace.engine, output))
        else:
            lines.append(f"# {output}: {step} of your engine, for the tokens {','.join(map(str, ids))}")
    return (*lines, "ggufkit compare a.safetensors b.safetensors")


def of_one(model: str, token_ids: Sequence[int], mode: Mode, step: str, position: int) -> tuple[str, ...]:
    """The command that makes what a foreign engine should give, and the one that holds its own against it."""
    ids = enough(token_ids, position, mode)
    return (
        f"# yours.safetensors: {step} of your engine, for the tokens {','.join(map(str, ids))}",
        trace_command(model, ids, mode, step, "reference", "right.safetensors"),
        "ggufkit compare yours.safetensors right.safetensors",
    )
