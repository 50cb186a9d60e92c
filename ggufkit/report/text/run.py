"""`run` as text: the line that closes an answer and says whether it can be trusted."""

from __future__ import annotations

from rich.text import Text

from ggufkit.conversation import Reply
from ggufkit.report.escape import shown
from ggufkit.runtime.generate import Generation

#: share of 4-grams said before from which an answer is called out; damage does it, but so do small healthy models
REPETITIVE = 0.5


def closing(reply: Reply) -> Text:
    """One line: every step finite, how sure the model was, repetition, speed, why it ended."""
    numbers = reply.numbers
    if reply.problems:
        sign, style = "✗", "error"
    elif numbers.repetition > REPETITIVE:
        sign, style = "!", "warning"
    else:
        sign, style = "✓", "good"
    parts = [*reply.problems, *_sanity(numbers), *_speed(numbers), f"ended: {numbers.stop}"]
    return Text.assemble((f"{sign} ", style), (shown(" · ".join(parts)), "note" if sign == "✓" else style))


def _sanity(numbers: Generation) -> list[str]:
    said = []
    if numbers.not_finite is None and numbers.steps_watched:
        said.append(f"all {numbers.steps_watched} steps finite")
    if numbers.mean_logprob is not None:
        said.append(f"mean log-probability {numbers.mean_logprob:.2f}")
        said.append(f"repetition {100 * numbers.repetition:.0f} %")
    return said


def _speed(numbers: Generation) -> list[str]:
    said = []
    if numbers.decode_rate:
        said.append(f"{len(numbers.ids)} tokens at {numbers.decode_rate:.1f}/s")
    if numbers.prompt_rate:
        said.append(f"prompt {numbers.n_prompt} at {numbers.prompt_rate:.0f}/s")
    return said
