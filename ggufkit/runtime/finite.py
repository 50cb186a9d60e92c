"""Is every step of a pass finite, and if not, which one was the first?

Finite logits prove little: rounding activations to int8 turns the NaN of a damaged scale into a finite, even
plausible answer. So the watch looks at every named step, and the first that is not finite names the guilty tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ggufkit.runtime.engine import Engine
from ggufkit.steps import Array, full_name, future_keys, sort_key

_CHUNK = 128  # positions looked at together: the scores take T · H · S numbers


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a pass first stopped being finite.

    Attributes:
        step, layer: of the step, as in `steps`.
        position: the first position of it that holds such a value.
        nan, infinite: how many of each the step holds.
    """

    step: str
    layer: int | None
    position: int
    nan: int
    infinite: int

    @property
    def name(self) -> str:
        return full_name(self.step, self.layer)

    def __str__(self) -> str:
        return f"{self.name} at position {self.position} ({self.nan:,} NaN, {self.infinite:,} infinite)"


class FiniteWatch:
    """A tap that looks at every step and keeps only where it found NaN or an infinity.

    Attributes:
        seen: how many steps it was shown.
        bad: in the order they were shown.
    """

    def __init__(self, first_position: int = 0) -> None:
        self.seen = 0
        self.bad: list[Spot] = []
        self._first_position = first_position

    def wants(self, step: str, layer: int | None) -> bool:
        return True

    def __call__(self, step: str, layer: int | None, array: Array) -> None:
        self.seen += 1
        if step == "kq":  # a score of a future key is nobody's input
            array = np.where(future_keys(array, self._first_position), 0, array)
        if not np.isfinite(array).all():
            self.bad.append(_spot(step, layer, array, self._first_position))

    @property
    def first(self) -> Spot | None:
        """The earliest step of the pass that is not finite."""
        return min(self.bad, key=lambda spot: sort_key(spot.name), default=None)


def first_not_finite(engine: Engine, ids: Sequence[int]) -> tuple[Spot | None, int]:
    """Run `ids` from an empty cache and watch every step at every position.

    Returns:
        The first that is not finite, and how many steps were seen until then.
    """
    cache, seen = engine.new_cache(len(ids)), 0
    for start in range(0, len(ids), _CHUNK):
        watch = FiniteWatch(start)
        engine.forward(ids[start : start + _CHUNK], cache, logits="all", tap=watch)
        seen += watch.seen
        if watch.bad:
            return watch.first, seen
    return None, seen


def _spot(step: str, layer: int | None, array: Array, first_position: int) -> Spot:
    bad = ~np.isfinite(array)
    row = int(np.argmax(bad.reshape(len(array), -1).any(axis=1)))
    return Spot(step, layer, first_position + row, int(np.isnan(array).sum()), int(np.isinf(array).sum()))
