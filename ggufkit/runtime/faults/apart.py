"""What would tell two bugs apart that give the same numbers in the trace at hand: another mode, or another step."""

from __future__ import annotations

from collections.abc import Set

from ggufkit.runtime.faults.registry import MODES, Fault
from ggufkit.steps import BY_NAME
from ggufkit.trace import Mode

_RUN = {"prefill": "the prompt computed at once", "decode": "the prompt computed token by token through the cache"}


def told_apart(a: Fault, b: Fault, mode: Mode, shown: Set[str]) -> str:
    """How to tell two bugs apart, in a sentence.

    Args:
        mode: of the trace at hand.
        shown: the steps that it holds.
    """
    for other in MODES:
        if other != mode and (other in a.seen_in) != (other in b.seen_in):
            one, two = (a, b) if other in a.seen_in else (b, a)
            return f"trace {_RUN[other]}: it is wrong there if {one.title}, and right if {two.title}"
    if (mode in a.seen_in) != (mode in b.seen_in):
        harmless = b if mode in a.seen_in else a
        return f"make sure of how this trace was made: with {_RUN[mode]} there is no harm if {harmless.title}"
    for step in BY_NAME:
        if step not in shown and (step in a.steps) != (step in b.steps):
            one, two = (a, b) if step in a.steps else (b, a)
            return f"add the step {step} to the trace: it is wrong by itself if {one.title}, and right if {two.title}"
    return "nothing in a trace tells them apart; look at both places in the code"
