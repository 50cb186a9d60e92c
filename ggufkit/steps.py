"""The named steps of one forward pass: the one list that every engine, the trace file, compare and diagnose share.

A step of layer N is written `name-N` (`q_rope-3`); the few steps outside the layers stand alone. Shapes are given
in letters: T positions, S keys, E embedding, H query heads and K key heads of D channels, F feed-forward,
V vocabulary rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its name, what it is, its shape in letters, and whether each layer has one."""

    name: str
    what: str
    shape: str
    per_layer: bool = True


STEPS: tuple[Step, ...] = (
    Step("embd", "the embedding rows", "T,E", per_layer=False),
    Step("attn_norm", "RMS norm before the attention, weight applied", "T,E"),
    Step("q_proj", "query: the product alone", "T,HD"),
    Step("k_proj", "key: the product alone", "T,KD"),
    Step("v_proj", "value: the product alone", "T,KD"),
    Step("q_bias", "query: after the bias is added", "T,HD"),
    Step("k_bias", "key: after the bias is added", "T,KD"),
    Step("v_bias", "value: after the bias is added", "T,KD"),
    Step("q_norm", "query: per-head norm", "T,H,D"),
    Step("k_norm", "key: per-head norm", "T,K,D"),
    Step("q_rope", "query: rotated", "T,H,D"),
    Step("k_rope", "key: rotated", "T,K,D"),
    Step("kq", "scaled scores, before the mask", "T,H,S"),
    Step("kq_soft_max", "attention probabilities, 0 where masked", "T,H,S"),
    Step("kqv", "the heads' weighted values side by side", "T,HD"),
    Step("attn_out", "after the output projection", "T,E"),
    Step("ffn_inp", "plus the residual", "T,E"),
    Step("ffn_norm", "RMS norm before the feed-forward, weight applied", "T,E"),
    Step("ffn_gate", "gate: the product alone", "T,F"),
    Step("ffn_up", "up: the product alone", "T,F"),
    Step("ffn_act", "silu(gate) · up", "T,F"),
    Step("ffn_out", "down projection", "T,E"),
    Step("l_out", "plus the residual: the layer's output", "T,E"),
    Step("result_norm", "final norm", "T,E", per_layer=False),
    Step("result_output", "logits", "T,V", per_layer=False),
)
BY_NAME: dict[str, Step] = {step.name: step for step in STEPS}
LAYER_STEPS: tuple[str, ...] = tuple(step.name for step in STEPS if step.per_layer)

_ORDER = {step.name: position for position, step in enumerate(STEPS)}
_NAME = re.compile(r"(?P<step>[a-z_]+?)(?:-(?P<layer>0|[1-9]\d{0,3}))?")


class Tap(Protocol):
    """What an engine shows its steps to."""

    def wants(self, step: str, layer: int | None) -> bool:
        """Whether this step of this layer is wanted; engines ask before they make one."""

    def __call__(self, step: str, layer: int | None, array: Array) -> None:
        """Take the step: float32 or float64 of the step's shape, on the CPU; the engine may reuse the buffer."""


class Recorder:
    """A tap that keeps copies of the steps whose full names match one of `patterns` (shell globs).

    Attributes:
        arrays: full name → float array, in the order the engine made them.
    """

    def __init__(self, patterns: Iterable[str] = ("*",), layers: Iterable[int] | None = None) -> None:
        self.arrays: dict[str, Array] = {}
        self._patterns = tuple(patterns)
        self._layers = None if layers is None else frozenset(layers)

    def wants(self, step: str, layer: int | None) -> bool:
        if layer is not None and self._layers is not None and layer not in self._layers:
            return False
        name = full_name(step, layer)
        return any(fnmatchcase(name, pattern) or fnmatchcase(step, pattern) for pattern in self._patterns)

    def __call__(self, step: str, layer: int | None, array: Array) -> None:
        self.arrays[full_name(step, layer)] = np.array(array)


@dataclass(frozen=True, slots=True)
class Watch:
    """A tap that shows every wanted step to a function and keeps nothing."""

    see: Callable[[str, int | None, Array], None]
    steps: frozenset[str] | None = None

    def wants(self, step: str, layer: int | None) -> bool:
        return self.steps is None or step in self.steps

    def __call__(self, step: str, layer: int | None, array: Array) -> None:
        self.see(step, layer, array)


def full_name(step: str, layer: int | None) -> str:
    """`q_rope-3`, or the bare name of a step outside the layers."""
    return step if layer is None else f"{step}-{layer}"


def parse_name(name: str) -> tuple[str, int | None] | None:
    """The step and layer that a full name means; None when it is no step's name."""
    match = _NAME.fullmatch(name)
    if match is None or (step := BY_NAME.get(match["step"])) is None:
        return None
    if step.per_layer != (match["layer"] is not None):
        return None
    return step.name, int(match["layer"]) if match["layer"] else None


def sort_key(name: str) -> tuple[int, int]:
    """Orders full names as the forward pass makes them; names of no step come last."""
    parsed = parse_name(name)
    if parsed is None:
        return (1 << 30, 0)
    step, layer = parsed
    if layer is not None:
        return (layer + 1, _ORDER[step])
    return (0, 0) if step == "embd" else (1 << 29, _ORDER[step])


def future_keys(scores: Array, first_position: int) -> NDArray[np.bool_]:
    """Which keys lie after their position, bool [T, 1, S], for kq or kq_soft_max [T, H, S] whose first row belongs to
    `first_position`. What kq says of those keys is undefined."""
    positions = np.arange(first_position, first_position + len(scores))
    future: NDArray[np.bool_] = np.arange(scores.shape[-1]) > positions[:, None, None]
    return future
