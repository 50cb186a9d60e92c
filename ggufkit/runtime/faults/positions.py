"""Rotary embedding and positions."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ggufkit.arch import Config
from ggufkit.runtime import reference as ref
from ggufkit.runtime.faults.registry import fault
from ggufkit.runtime.reference import State
from ggufkit.steps import Array

_ROPE = ("q_rope", "k_rope")
_INPUTS = {"q_rope": ("q_norm", "q_bias", "q_proj"), "k_rope": ("k_norm", "k_bias", "k_proj")}
_COMMON_BASES = (1e4, 1e5, 5e5, 1e6, 5e6, 1e7)
_MAX_OFFSET = 128


def _unrotated(s: State, step: str) -> Array:
    return ref.heads(s.latest(*_INPUTS[step]), s.config.head_dim)


def _rotated(s: State, step: str, positions: NDArray[np.int64] | None = None, base: float | None = None) -> Array:
    positions = s.positions if positions is None else positions
    return ref.rotate(_unrotated(s, step), positions, base or s.config.rope_base, s.config.rope_scale)


def _bases(config: Config) -> Iterable[float]:
    return [base for base in _COMMON_BASES if base != config.rope_base]


def _offsets(_: Config) -> Iterable[int]:
    return (1, -1, *range(2, _MAX_OFFSET + 1))


@fault("rotary embedding is not applied", "positions", _ROPE)
def rope_off(s: State, step: str) -> Array:
    """Queries and keys go into the scores without having been rotated, so that the model cannot tell the order of
    the words."""
    return _unrotated(s, step)


@fault("the position is always 0", "positions", _ROPE, seen_in=("decode",))
def position_stuck(s: State, step: str) -> Array:
    """Every token is rotated by position 0, which leaves it as it was. Look for a position counter that is passed by
    value, is never advanced in the decoding loop, or restarts with every call."""
    return _rotated(s, step, positions=np.zeros_like(s.positions))


@fault("rotary pairs are interleaved (2i, 2i+1) instead of half-split (i, i + D/2)", "positions", _ROPE)
def rope_interleaved(s: State, step: str) -> Array:
    """Qwen's GGUF weights want channels i and i + D/2 rotated together (GPT-NeoX style). This engine rotates
    neighbours, which is right for Llama's GGUF weights alone: those are permuted for it."""
    x = _unrotated(s, step)
    half = x.shape[-1] // 2
    apart = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    turned = ref.rotate(apart, s.positions, s.config.rope_base, s.config.rope_scale)
    return np.stack([turned[..., :half], turned[..., half:]], axis=-1).reshape(x.shape)


@fault("the rotary base is {:g}", "positions", _ROPE, values=_bases)
def rope_base(s: State, step: str, value: float) -> Array:
    """The base (theta) is not the file's rope.freq_base. 10,000 is what loaders assume silently when they do not
    find, or do not read, that key."""
    return _rotated(s, step, base=value)


@fault("positions are off by {:+d}", "positions", _ROPE, values=_offsets)
def position_offset(s: State, step: str, value: int) -> Array:
    """The first token's position is 0. Counting from 1 alone does little harm, since only differences of positions
    matter; a counter that was not reset after the last prompt does."""
    return _rotated(s, step, positions=s.positions + value)


@fault("the rotation turns the other way", "positions", _ROPE)
def rope_negative(s: State, step: str) -> Array:
    """The sign of the sine is wrong: low * cos - high * sin and low * sin + high * cos are the right ones."""
    return _rotated(s, step, positions=-s.positions)


@fault("only half of the channels are rotated", "positions", _ROPE)
def rope_half_channels(s: State, step: str) -> Array:
    """The rotary dimension is taken as head_dim / 2; the rest of each head is passed on unrotated."""
    x = _unrotated(s, step)
    half = x.shape[-1] // 2
    turned = ref.rotate(x[..., :half], s.positions, s.config.rope_base, s.config.rope_scale)
    return np.concatenate([turned, x[..., half:]], axis=-1)


@fault("rotary frequencies fall half as fast as they should", "positions", _ROPE)
def rope_exponent(s: State, step: str) -> Array:
    """Pair i turns by position * base^(-2i/D); this engine uses base^(-i/D)."""
    return _rotated(s, step, base=s.config.rope_base**0.5)


@fault("values are rotated too", "positions", ("values",))
def rope_on_values(s: State, step: str) -> Array:
    """Only queries and keys carry the position. This engine rotates the values as well."""
    heads = ref.heads(s.latest("v_bias", "v_proj"), s.config.head_dim)
    turned = ref.rotate(heads, s.positions, s.config.rope_base, s.config.rope_scale)
    return ref.stored(s.cache.v[s.layer or 0], s.positions, turned)
