"""From logits to the next token.

The filters run in llama.cpp's order, so that settings mean what they mean there: top-k, top-p, min-p, then the
temperature, each on the softmax of what the one before left over. Chance comes from one seeded PCG64 generator:
the same logits, parameters and seed give the same tokens.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufkit.errors import NotFinite, UsageError

Logits = NDArray[np.float32]
Ids = NDArray[np.intp]

#: top-p first looks for its share among this many candidates; only a flat distribution needs all of them sorted
_FIRST_LOOK = 1024

#: field → (what it may be, in words; the test of it)
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a number from 0 (greedy) up", lambda value: 0 <= value < math.inf),
    "top_k": ("a whole number from 0 (off) up", lambda value: value >= 0 and value == int(value)),
    "top_p": ("above 0 and at most 1 (off)", lambda value: 0 < value <= 1),
    "min_p": ("from 0 (off) to 1", lambda value: 0 <= value <= 1),
    "seed": ("a whole number from 0 to 2^64 - 1", lambda value: value is None or 0 <= value < 1 << 64),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; the defaults are greedy.

    Attributes:
        temperature: the logits are divided by it; 0 takes the likeliest token, whatever the others say.
        top_k: keep the k likeliest; 0 keeps all.
        top_p: keep the likeliest until their probabilities sum to it; 1 keeps all.
        min_p: keep what is at least this share of the likeliest's probability; 0 keeps all.
        seed: None draws one, which `Sampler.seed` then tells.

    Raises:
        UsageError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for known in fields(self):
            value = getattr(self, known.name)
            expected, accepts = _RANGES[known.name]
            if not accepts(value):
                raise UsageError(f"{known.name} is {value}", expected=expected)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = SamplingParams()


@dataclass(frozen=True, slots=True)
class Choice:
    """A token and its natural log-probability under the model's own softmax, before any filter."""

    id: int
    logprob: float


class Sampler:
    """Chooses tokens one after the other.

    Attributes:
        seed: what its generator was seeded with, so that a run can be repeated; None if greedy without one.
    """

    def __init__(self, params: SamplingParams = GREEDY) -> None:
        self.params = params
        drawn = params.seed is None and not params.greedy
        self.seed = secrets.randbits(32) if drawn else params.seed
        self._rng = np.random.Generator(np.random.PCG64(self.seed))

    def uniform(self) -> float:
        """The next number from [0, 1); a token takes one, unless the choice is greedy."""
        return float(self._rng.random())

    def __call__(self, logits: Logits, uniform: float | None = None) -> Choice:
        """Choose from logits [V], with the chance that `uniform` is or the next one.

        Raises:
            NotFinite: some are NaN or infinite; nothing is ever chosen from those.
        """
        check_finite(logits)
        token = int(np.argmax(logits)) if self.params.greedy else self._pick(logits, uniform)
        return Choice(token, float(logits[token] - log_sum_exp(logits)))

    def _pick(self, logits: Logits, uniform: float | None) -> int:
        ids = candidates(logits, self.params)
        kept = logits[ids].astype(np.float64)
        weights = np.exp((kept - kept.max()) / self.params.temperature)
        sums = np.cumsum(weights)
        chance = self.uniform() if uniform is None else uniform
        return int(ids[np.searchsorted(sums, chance * sums[-1], side="right")])


def candidates(logits: Logits, params: SamplingParams) -> Ids:
    """The ids that the filters leave, never none; likeliest first, and of equal ones the smaller id, if any is on."""
    if params.top_k == 0 and params.top_p == 1:
        return _min_p(logits, np.arange(len(logits)), params.min_p)
    ids = _likeliest(logits, params.top_k) if params.top_k else _enough(logits, params.top_p)
    if params.top_p < 1:
        whole = logits[ids] if params.top_k else logits
        shares = np.exp(logits[ids].astype(np.float64) - log_sum_exp(whole))
        ids = ids[: int(np.searchsorted(np.cumsum(shares), params.top_p)) + 1]
    return _min_p(logits, ids, params.min_p)


def log_sum_exp(logits: NDArray[Any]) -> Any:
    """log(sum(exp(logits))) over the last axis, float64, from float32 exponentials of differences to the maximum."""
    most = np.max(logits, axis=-1, keepdims=True)
    with np.errstate(over="ignore"):  # a difference of -inf is an exponential of 0, which is right
        sums = np.sum(np.exp(logits - most), axis=-1, dtype=np.float64)
    return most[..., 0].astype(np.float64) + np.log(sums)


def check_finite(logits: Logits) -> None:
    """Look at logits [V] before a token is chosen from them.

    Raises:
        NotFinite: there is a NaN or an infinity among them.
    """
    if np.isfinite(logits).all():
        return
    nan, infinite = int(np.isnan(logits).sum()), int(np.isinf(logits).sum())
    raise NotFinite(
        f"of {logits.size:,} logits {nan:,} are NaN and {infinite:,} infinite: there is no token to choose",
        expected="finite numbers",
        help="`validate` names the tensor that is damaged, if one is",
    )


def _likeliest(logits: Logits, count: int) -> Ids:
    """The `count` ids of the largest logits in falling order; of equal ones the smaller id first."""
    ids = np.arange(len(logits))
    if count < len(logits):
        ids = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
    return ids[np.argsort(-logits[ids], kind="stable")][:count]


def _enough(logits: Logits, share: float) -> Ids:
    """So many of the likeliest, in falling order, that their probabilities reach `share`."""
    ids = _likeliest(logits, _FIRST_LOOK)
    reached = np.sum(np.exp(logits[ids].astype(np.float64) - log_sum_exp(logits)))
    return ids if reached >= share else _likeliest(logits, len(logits))


def _min_p(logits: Logits, ids: Ids, min_p: float) -> Ids:
    """Those of `ids` that have at least the share `min_p` of the likeliest's probability."""
    return ids[logits[ids] >= logits[ids].max() + math.log(min_p)] if min_p > 0 else ids
