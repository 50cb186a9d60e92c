"""What a fault is, and the registry that the families fill."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from ggufkit.arch import Config
from ggufkit.runtime.reference import StepFunction
from ggufkit.steps import Array
from ggufkit.trace import Mode

MODES: tuple[Mode, ...] = get_args(Mode)

FaultFunction = Callable[..., Array]
Values = Callable[[Config], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Fault:
    """One known bug.

    Attributes:
        name: its identifier.
        title: what is wrong, in half a sentence.
        explanation: what in an engine usually causes it, and what to look at.
        family: weights, positions, cache, attention, norms, activations, numbers.
        steps: the steps whose numbers it changes.
        values: the sizes it comes in, from the hyperparameters; None when there is only one.
        harmless: healthy engines do it.
        seen_in: the modes in which it does harm: a mask that is missing none to one token at a time, a counter that is
            stuck in the decoding loop none to a prompt computed at once.
    """

    name: str
    title: str
    explanation: str
    family: str
    steps: tuple[str, ...]
    function: FaultFunction
    values: Values | None = None
    harmless: bool = False
    seen_in: tuple[Mode, ...] = MODES

    def variants(self, config: Config) -> list[Variant]:
        """The fault in every size it comes in for this model."""
        return [Variant(self, value) for value in (self.values(config) if self.values else (None,))]


@dataclass(frozen=True, slots=True)
class Variant:
    """A fault in one size."""

    fault: Fault
    value: Any = None

    @property
    def label(self) -> str:
        return self.fault.title if self.value is None else self.fault.title.format(self.value)

    def step_functions(self, only: Iterable[str] | None = None) -> dict[str, StepFunction]:
        """Replacements for the reference's table, for all of its steps or `only` some."""
        return {step: self.function(step) for step in self.fault.steps if only is None or step in only}

    def touches(self, steps: Iterable[str]) -> bool:
        """Whether it changes one of these steps."""
        return any(step in self.fault.steps for step in steps)

    def function(self, step: str) -> StepFunction:
        if self.value is None:
            return partial(self.fault.function, step=step)
        return partial(self.fault.function, step=step, value=self.value)


FAULTS: dict[str, Fault] = {}


def fault(
    title: str,
    family: str,
    steps: Iterable[str],
    *,
    values: Values | None = None,
    harmless: bool = False,
    seen_in: tuple[Mode, ...] = MODES,
) -> Callable[[FaultFunction], FaultFunction]:
    """Register a function as a known bug; its name and docstring become the fault's."""

    def register(function: FaultFunction) -> FaultFunction:
        name = function.__name__
        explanation = " ".join((function.__doc__ or "").split())
        FAULTS[name] = Fault(name, title, explanation, family, tuple(steps), function, values, harmless, seen_in)
        return function

    return register
