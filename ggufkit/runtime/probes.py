"""What "sensible" means, as numbers. No probe judges; the rules of `checks` and the reader do.

Some probes are of soundness: every step finite, the cache changes nothing, the same input gives the same output,
attention rows sum to one and see no future, no probability on padding, agreement with another engine. They hold
for every healthy model, trained or not. The others are of ability (likelihood of text, copying, obeying a nonce)
and depend on the model's size and training.

Log-probabilities are natural; token ids go in, and where a text is needed somebody else's `encode` and `decode`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ggufkit.errors import UsageError
from ggufkit.runtime.engine import Edit, Engine, Logits
from ggufkit.runtime.finite import Spot, first_not_finite
from ggufkit.runtime.generate import Generation, generate
from ggufkit.runtime.sampling import log_sum_exp
from ggufkit.steps import Array, Watch, future_keys
from ggufkit.threads import pool

_CHUNK = 128  # positions whose logits are looked at together: 78 MB at 152k tokens
_ROWS = 8  # positions whose distributions are looked at together by one thread


def chunks(engine: Engine, ids: Sequence[int], size: int = _CHUNK) -> Iterator[tuple[int, Logits]]:
    """The logits at all positions of `ids`, [up to `size`, V] at a time, each with its first position."""
    cache = engine.new_cache(len(ids))
    for start in range(0, len(ids), size):
        yield start, engine.forward(ids[start : start + size], cache, logits="all")


def all_logits(engine: Engine, ids: Sequence[int]) -> Logits:
    """The logits at all positions, float32 [T, V]. Mind the size: 156 MB for 256 positions of 152k tokens."""
    made = [logits for _, logits in chunks(engine, ids)]
    return made[0] if len(made) == 1 else np.concatenate(made)


# --- soundness -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finite:
    """Steps seen, and the first that was not finite; None for none."""

    steps: int
    first: Spot | None


def finite(engine: Engine, ids: Sequence[int]) -> Finite:
    """Look at every step of one pass, at every position."""
    first, steps = first_not_finite(engine, ids)
    return Finite(steps, first)


@dataclass(frozen=True, slots=True)
class Shift:
    """How far one run's predictions are from another's.

    Attributes:
        positions: compared.
        mean_kl, max_kl: KL divergence of a position, in nats; infinite where only the second is not finite.
        top1: share of positions with the same likeliest token.
        max_abs, rms: of the difference of the logits.
        delta_nats: how much likelier the text is to the first, in nats a token; None without a text.
    """

    positions: int
    mean_kl: float
    max_kl: float
    top1: float
    max_abs: float
    rms: float
    delta_nats: float | None


def distribution_shift(a: Logits, b: Logits, targets: Sequence[int] | None = None) -> Shift:
    """Compare two runs' logits [T, V]; `targets` are the ids that came next, up to T of them."""
    kl, same, largest, squares = (np.concatenate(rows) for rows in zip(*_by_rows(_apart, a, b), strict=True))
    return Shift(
        positions=len(a),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1=float(same.mean()),
        max_abs=float(largest.max()),
        rms=float(np.sqrt(squares.mean())),
        delta_nats=None if targets is None else float(np.mean(nats(b, targets) - nats(a, targets))),
    )


def nats(logits: Logits, targets: Sequence[int]) -> NDArray[np.float64]:
    """Minus the log-probability of each target at its position; infinite where the logits are not finite."""
    return np.concatenate(_by_rows(_nats, logits[: len(targets)], np.asarray(targets, int)))


def cache_consistency(engine: Engine, ids: Sequence[int]) -> Shift:
    """All positions together against one by one through the cache."""
    return distribution_shift(all_logits(engine, ids), np.concatenate([x for _, x in chunks(engine, ids, 1)]))


def agreement(engine: Engine, other: Engine, ids: Sequence[int]) -> Shift:
    """One engine against another, which is the one that is trusted."""
    return distribution_shift(all_logits(other, ids), all_logits(engine, ids), ids[1:])


@dataclass(frozen=True, slots=True)
class Determinism:
    """Whether two runs gave the same bits, and how far apart they were."""

    identical: bool
    max_abs: float


def determinism(engine: Engine, ids: Sequence[int]) -> Determinism:
    """The same input twice, all positions together and the last alone."""
    first, second = ([all_logits(engine, ids), _last_alone(engine, ids)] for _ in range(2))
    pairs = list(zip(first, second, strict=True))
    return Determinism(
        all(a.tobytes() == b.tobytes() for a, b in pairs),
        max(float(np.abs(a - b).max()) for a, b in pairs),
    )


@dataclass(frozen=True, slots=True)
class Attention:
    """What all rows of all heads of all layers have in common.

    Attributes:
        rows: seen.
        sum_error: the largest distance of a row's sum from 1.
        future: the largest probability of a key after its position.
        least: the smallest probability.
    """

    rows: int
    sum_error: float
    future: float
    least: float


def attention(engine: Engine, ids: Sequence[int]) -> Attention:
    """Look at every row of attention probabilities of one pass."""
    seen: list[Attention] = []

    def look(step: str, layer: int | None, array: Array) -> None:
        future = np.where(future_keys(array, 0), np.abs(array), 0)
        sums = np.abs(array.sum(axis=-1, dtype=np.float64) - 1)
        seen.append(Attention(sums.size, float(sums.max()), float(future.max()), float(array.min())))

    engine.forward(ids, engine.new_cache(len(ids)), tap=Watch(look, frozenset({"kq_soft_max"})))
    return Attention(
        sum(layer.rows for layer in seen),
        float(np.max([layer.sum_error for layer in seen])),
        float(np.max([layer.future for layer in seen])),
        float(np.min([layer.least for layer in seen])),
    )


@dataclass(frozen=True, slots=True)
class Padding:
    """The vocabulary rows that no text stands behind.

    Attributes:
        ids: how many there are.
        most, mean: their probability together at a position.
        argmax: at how many positions one of them is the likeliest of all.
    """

    ids: int
    most: float
    mean: float
    argmax: int


def padding(engine: Engine, ids: Sequence[int], padding_ids: Collection[int]) -> Padding:
    """The probability that padding gets at the positions of `ids`."""
    rows, shares, argmax = sorted(padding_ids), [], 0
    for _, logits in chunks(engine, ids):
        shares.append(np.exp(logits[:, rows] - log_sum_exp(logits)[:, None]).sum(-1))
        argmax += int(np.isin(logits.argmax(-1), rows).sum())
    share = np.concatenate(shares)
    return Padding(len(rows), float(share.max()), float(share.mean()), argmax)


def effect_of(engine: Engine, edits: Iterable[Edit], ids: Sequence[int], baseline: Logits | None = None) -> Shift:
    """What some changed bytes do to the predictions of a text.

    Args:
        baseline: `all_logits` of the untouched engine, when it is there already.

    Returns:
        `delta_nats` > 0: the change costs; < 0: it gains.
    """
    before = all_logits(engine, ids) if baseline is None else baseline
    with engine.patched(edits):
        after = all_logits(engine, ids)
    return distribution_shift(before, after, ids[1:])


# --- ability ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How well a text is predicted.

    Attributes:
        tokens: predicted.
        nats: minus the mean log-probability of a token.
        bits_per_byte: of the text's UTF-8, comparable between tokenizers; None without a text. The first token,
            which nothing predicts, is charged like the average one.
        top1: share of tokens that were the likeliest.
    """

    tokens: int
    nats: float
    bits_per_byte: float | None
    top1: float


def likelihood(engine: Engine, ids: Sequence[int], n_bytes: int | None = None) -> Likelihood:
    """How well each id is predicted from those before it; `n_bytes` of text they stand for.

    Raises:
        UsageError: fewer than two ids.
    """
    if len(ids) < 2:
        raise UsageError("a likelihood needs at least two tokens: the first is predicted by nothing")
    costs, hits = [], 0
    for start, logits in chunks(engine, ids[:-1]):
        targets = ids[start + 1 : start + 1 + len(logits)]
        costs.append(nats(logits, targets))
        hits += int((logits.argmax(-1) == np.asarray(targets)).sum())
    cost = float(np.concatenate(costs).mean())
    bits = cost * len(ids) / math.log(2) / n_bytes if n_bytes else None
    return Likelihood(len(ids) - 1, cost, bits, hits / (len(ids) - 1))


def text_likelihood(engine: Engine, encode: Callable[[str], Sequence[int]], text: str) -> Likelihood:
    """How well a text is predicted; one of `texts`, for instance."""
    return likelihood(engine, encode(text), len(text.encode()))


@dataclass(frozen=True, slots=True)
class Copy:
    """Random tokens, and the same again: nats a token of either half, without the first token of each.

    A model whose attention, positions and cache work finds the second half far cheaper than the first.
    """

    tokens: int
    first: float
    second: float

    @property
    def gain(self) -> float:
        return self.first - self.second


def copy(engine: Engine, candidates: Sequence[int] | None = None, *, n: int = 48, seed: int = 0) -> Copy:
    """The copy probe, with `n` ids drawn from `candidates` (all rows of the vocabulary by default)."""
    pool = range(engine.config.n_vocab) if candidates is None else candidates
    drawn = np.random.default_rng(seed).choice(len(pool), n, replace=len(pool) < n)
    ids = [pool[int(index)] for index in drawn] * 2
    costs = nats(all_logits(engine, ids[:-1]), ids[1:])
    return Copy(n, float(costs[: n - 1].mean()), float(costs[n:].mean()))


NONCE_PROMPT = 'Write a haiku that contains the words "{words}".'

_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = {2: "twenty", 3: "thirty", 4: "forty", 5: "fifty"}


@dataclass(frozen=True, slots=True)
class Nonce:
    """The words that were asked for, the answer, whether it contains them, and how it was made."""

    words: str
    answer: str
    said: bool
    generation: Generation


def minute_in_words(hour: int, minute: int) -> str:
    """A time of the 12-hour clock as it is spoken: `seven o'clock`, `seven oh five`, `seven forty-two`.

    Raises:
        UsageError: no such time.
    """
    if not (0 <= hour < 24 and 0 <= minute < 60):
        raise UsageError(f"{hour}:{minute:02} is no time of day", expected="hours 0 to 23, minutes 0 to 59")
    spoken = _SMALL[hour % 12 or 12]
    if minute == 0:
        return f"{spoken} o'clock"
    if minute < 20:
        return f"{spoken} {'oh ' if minute < 10 else ''}{_SMALL[minute]}"
    tens, ones = divmod(minute, 10)
    return f"{spoken} {_TENS[tens]}{f'-{_SMALL[ones]}' if ones else ''}"


def nonce(
    engine: Engine,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    *,
    clock: tuple[int, int] | None = None,
    stop_ids: Container[int] = (),
    n_predict: int = 64,
) -> Nonce:
    """Ask for a haiku with this very minute in it, which no canned answer can have.

    Args:
        encode: a user's message to the ids of a whole prompt, the chat template included.
        clock: hour and minute, to repeat a run; now by default.
    """
    hour, minute = clock or time.localtime()[3:5]
    words = minute_in_words(hour, minute)
    ids = encode(NONCE_PROMPT.format(words=words))
    generation = generate(engine, ids, n_predict=n_predict, stop_ids=stop_ids).finish()
    answer = decode(generation.ids)
    return Nonce(words, answer, contains(answer, words), generation)


def contains(answer: str, words: str) -> bool:
    """Whether the words occur, whatever their case, line breaks, dashes and apostrophes look like."""
    return bool(re.search(rf"\b{re.escape(_plain(words))}\b", _plain(answer)))


def _plain(text: str) -> str:
    text = re.sub(r"[‐‑–—-]+", " ", re.sub(r"[’‘`]", "'", text.casefold()))
    return " ".join(text.split())


# --- arithmetic ------------------------------------------------------------------------------------------------

T = TypeVar("T")


def _by_rows(function: Callable[..., T], *arrays: NDArray[Any]) -> list[T]:
    """What a function makes of a few rows of the arrays at a time, in threads: NumPy computes without a lock."""
    starts = range(0, max(len(arrays[0]), 1), _ROWS)
    return list(pool().map(lambda at: function(*(array[at : at + _ROWS] for array in arrays)), starts))


def _nats(logits: Logits, targets: NDArray[np.int_]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        found = log_sum_exp(logits) - logits[np.arange(len(targets)), targets]
    return np.where(_finite_rows(logits), found, np.inf)


def _apart(a: Logits, b: Logits) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Of each row: KL divergence, whether the likeliest is the same, the largest difference, its mean square."""
    same = (a.argmax(-1) == b.argmax(-1)) & _finite_rows(b)
    with np.errstate(invalid="ignore", over="ignore"):
        differences = a - b
        squares = np.mean(np.square(differences, dtype=np.float64), axis=-1)
    return _kl(a, b), same, np.abs(differences).max(-1), squares


def _kl(a: Logits, b: Logits) -> NDArray[np.float64]:
    """KL divergence of softmax(b) from softmax(a), for each row, in nats; float64 throughout, for it may be 1e-12."""
    usable = _finite_rows(b)
    with np.errstate(invalid="ignore", over="ignore"):
        p, q = a.astype(np.float64), b.astype(np.float64)
        q[~usable] = 0
        for x in (p, q):
            x -= log_sum_exp(x)[:, None]
        np.subtract(p, q, out=q)
        kl = np.einsum("tv,tv->t", np.exp(p, out=p), q)
    return np.where(usable, np.maximum(kl, 0), np.inf)


def _finite_rows(logits: Logits) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(logits).all(axis=-1))


def _last_alone(engine: Engine, ids: Sequence[int]) -> Logits:
    """The logits after the last id, run by itself through the cache."""
    cache = engine.new_cache(len(ids))
    if len(ids) > 1:
        engine.forward(ids[:-1], cache)
    return engine.forward(ids[-1:], cache)
