"""Scores, mask, softmax, and the projection after them."""

from __future__ import annotations

import numpy as np

from ggufkit.runtime import reference as ref
from ggufkit.runtime.faults.products import product
from ggufkit.runtime.faults.registry import fault
from ggufkit.runtime.reference import REFERENCE, State
from ggufkit.steps import Array


def _future(s: State) -> Array:
    """Which keys lie after which query, [T, 1, S]."""
    future: Array = np.arange(s["kq"].shape[-1]) > s.positions[:, None, None]
    return future


@fault("the causal mask is missing", "attention", ("kq_soft_max",), seen_in=("prefill",))
def no_mask(s: State, step: str) -> Array:
    """Every position sees the whole prompt, the future included. One token at a time is not affected."""
    return ref.softmax(s["kq"])


@fault("future scores are set to 0 instead of minus infinity", "attention", ("kq_soft_max",), seen_in=("prefill",))
def mask_with_zero(s: State, step: str) -> Array:
    """A masked score must be minus infinity before the softmax. This engine writes 0 there, and the future keeps a
    share of the attention."""
    return ref.softmax(np.where(_future(s), s.number(0), s["kq"]))


@fault("the mask hides the token itself", "attention", ("kq_soft_max",))
def mask_off_by_one(s: State, step: str) -> Array:
    """A position attends to itself and to everything before it; this engine lets it see only what comes before."""
    hidden = _future(s) | (np.arange(s["kq"].shape[-1]) == s.positions[:, None, None])
    return np.nan_to_num(ref.softmax(np.where(hidden, -np.inf, s["kq"])))


@fault("scores are not divided by sqrt(head_dim)", "attention", ("kq",))
def no_scale(s: State, step: str) -> Array:
    """Scores are the products of queries and keys over sqrt(D); this engine leaves the division out."""
    return REFERENCE["kq"](s) * s.number(s.config.head_dim**0.5)


@fault("scores are divided by head_dim instead of its square root", "attention", ("kq",))
def scale_by_head_dim(s: State, step: str) -> Array:
    """Scores are the products of queries and keys over sqrt(D); this engine divides by D."""
    return REFERENCE["kq"](s) / s.number(s.config.head_dim**0.5)


@fault("scores are scaled by the model's width instead of a head's", "attention", ("kq",))
def scale_by_width(s: State, step: str) -> Array:
    """Scores are divided by sqrt(n_embd) where sqrt(head_dim) belongs."""
    return REFERENCE["kq"](s) * s.number((s.config.head_dim / s.config.n_embd) ** 0.5)


@fault("scores overflow in fp16", "attention", ("kq",))
def fp16_scores(s: State, step: str) -> Array:
    """Queries and keys of Qwen2 reach hundreds; their products leave the range of fp16 (65,504) and become infinite.
    Accumulate the scores in float32, or scale the query before the product."""
    queries = s["q_rope"].astype(np.float16).astype(np.float32).transpose(1, 0, 2)
    keys = ref.share(s["keys"], s.config.n_head).astype(np.float16).astype(np.float32).transpose(1, 2, 0)
    products: Array = (queries @ keys).astype(np.float16).astype(s.dtype).transpose(1, 0, 2)
    return products / s.number(s.config.head_dim**0.5)


@fault("softmax runs over the heads", "attention", ("kq_soft_max",))
def softmax_over_heads(s: State, step: str) -> Array:
    """Probabilities must sum to 1 over the keys of a row; here they sum to 1 over the heads."""
    powers = np.exp(s["kq"] - s["kq"].max(axis=1, keepdims=True))
    return np.where(_future(s), s.number(0), powers / powers.sum(axis=1, keepdims=True))


@fault("softmax runs over the queries", "attention", ("kq_soft_max",))
def softmax_over_queries(s: State, step: str) -> Array:
    """Probabilities must sum to 1 over the keys of a row; here they sum to 1 over the queries of a key (a column)."""
    masked = np.where(_future(s), -np.inf, s["kq"])
    powers = np.exp(masked - masked.max(axis=0, keepdims=True))
    columns: Array = powers / powers.sum(axis=0, keepdims=True)
    return columns


@fault("the output projection of the attention is left out", "attention", ("attn_out",))
def no_output_projection(s: State, step: str) -> Array:
    """The heads' values are added to the residual without being multiplied with attn_output.weight."""
    return s["kqv"] if s.config.q_width == s.config.n_embd else product(s, step)
