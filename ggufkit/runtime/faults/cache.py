"""The key/value cache. What it does wrong shows in the scores and in the mixed values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ggufkit.runtime import reference as ref
from ggufkit.runtime.faults.registry import fault
from ggufkit.runtime.reference import State
from ggufkit.steps import Array

#: wrong strides of (a position, a head) in rows of D numbers, from the numbers of positions and heads
_STRIDES: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "read head by head, [K, S, D]": lambda n_keys, _: (1, n_keys),
    "a position is D numbers further, not K * D": lambda *_: (1, 1),
}


def scores(s: State, keys: Array) -> Array:
    """Scaled scores [T, H, S] of the queries against keys [S, H, D]."""
    products = s["q_rope"].transpose(1, 0, 2) @ keys.transpose(1, 2, 0)
    return products.transpose(1, 0, 2) / s.number(s.config.head_dim**0.5)


def mixed(s: State, values: Array) -> Array:
    """Probabilities [T, H, S] times values [S, H, D] → [T, H·D]."""
    weighted = s["kq_soft_max"].transpose(1, 0, 2) @ values.transpose(1, 0, 2)
    return weighted.transpose(1, 0, 2).reshape(len(s.positions), -1)


def cached(s: State, step: str) -> Array:
    """What a step reads from the cache: keys for the scores, values for the mix; [S, K, D]."""
    return s["keys" if step == "kq" else "values"]


def _attend(s: State, step: str, shared: Array) -> Array:
    return scores(s, shared) if step == "kq" else mixed(s, shared)


def _own(s: State, step: str) -> Array:
    """The cached entry at each query's own position, one for every query head: [T, H, D]."""
    return ref.share(cached(s, step)[s.positions], s.config.n_head)


def _own_score_in_slot_0(s: State) -> Array:
    own = np.sum(s["q_rope"] * _own(s, "kq"), axis=-1, keepdims=True) / s.number(s.config.head_dim**0.5)
    return np.where(np.arange(len(s["keys"])) == 0, own, own.dtype.type(0))


@fault("each token attends to itself alone", "cache", ("kq", "kq_soft_max", "kqv"), seen_in=("decode",))
def cache_current_only(s: State, step: str) -> Array:
    """Attention runs over one key, the current token's. Look for a cache whose length is not advanced, or for a
    decoding step that passes the new keys and values instead of the whole cache."""
    if step == "kq":
        return _own_score_in_slot_0(s)
    if step == "kq_soft_max":
        first = (np.arange(s["kq"].shape[-1]) == 0).astype(s["kq"].dtype)
        return np.broadcast_to(first, s["kq"].shape)
    return _own(s, step).reshape(len(s.positions), -1)


@fault("the cache position never moves: every token overwrites slot 0", "cache", ("kq", "kqv"), seen_in=("decode",))
def cache_slot_stuck(s: State, step: str) -> Array:
    """Every key and value is written to slot 0, while attention runs over the whole length, the rest of which was
    never written. Look at the offset that is passed to the copy into the cache."""
    if step == "kq":
        return _own_score_in_slot_0(s)
    return (s["kq_soft_max"][:, :, :1] * _own(s, step)).reshape(len(s.positions), -1)


@fault("slots that the last prompt left behind are attended to", "cache", ("kq_soft_max",), seen_in=("decode",))
def cache_stale(s: State, step: str) -> Array:
    """The softmax runs over more slots than this prompt has filled so far; they hold keys and values of an earlier run.
    Look for a length that is not reset with a new prompt, or for a preallocated cache that is attended to as a
    whole."""
    return ref.softmax(s["kq"])


@fault("keys and values are written one slot too far", "cache", ("kq", "kqv"))
def cache_off_by_one(s: State, step: str) -> Array:
    """The token at position p lies in slot p + 1, so that it does not see itself, and slot 0 is never written."""
    slots = cached(s, step)
    shifted = np.concatenate([np.zeros_like(slots[:1]), slots[:-1]])
    return _attend(s, step, ref.share(shifted, s.config.n_head))


@fault("the cache is read with the wrong strides ({})", "cache", ("kq", "kqv"), values=lambda _: tuple(_STRIDES))
def cache_stride(s: State, step: str, value: str) -> Array:
    """Keys and values are written position by position, [S, K, D], so that a position is K * D numbers further and a
    head D. This engine reads them with the strides of another layout."""
    n_keys, n_head_kv, _ = cached(s, step).shape
    position, head = _STRIDES[value](n_keys, n_head_kv)
    rows = cached(s, step).reshape(n_keys * n_head_kv, -1)
    places = np.arange(n_keys)[:, None] * position + np.arange(n_head_kv) * head
    return _attend(s, step, ref.share(rows[places % len(rows)], s.config.n_head))


@fault("query heads are given to key heads round robin", "attention", ("kq", "kqv"))
def head_modulo(s: State, step: str) -> Array:
    """With grouped-query attention, query head h uses key head h / (H/K): neighbours share one. This engine uses
    h modulo K."""
    return _attend(s, step, np.tile(cached(s, step), (1, s.config.n_head // s.config.n_head_kv, 1)))


@fault("all query heads use the first key head", "attention", ("kq", "kqv"))
def first_key_head(s: State, step: str) -> Array:
    """The index of the key head is not advanced with the query head's."""
    return _attend(s, step, np.repeat(cached(s, step)[:, :1], s.config.n_head, axis=1))
