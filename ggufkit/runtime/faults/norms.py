"""Norms and residuals."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ggufkit.arch import Config
from ggufkit.runtime import reference as ref
from ggufkit.runtime.faults.registry import fault
from ggufkit.runtime.reference import State
from ggufkit.steps import Array

_NORMS = {"attn_norm": "attn_norm.weight", "ffn_norm": "ffn_norm.weight", "result_norm": "output_norm.weight"}
_INPUTS = {"attn_norm": "inp", "ffn_norm": "ffn_inp", "result_norm": "inp"}
_RESIDUALS = ("ffn_inp", "l_out")


def _epsilons(config: Config) -> Iterable[float]:
    return [eps for eps in (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3) if abs(eps - config.norm_eps) > 0.01 * eps]


@fault("the norm's weight is not applied", "norms", _NORMS)
def norm_without_weight(s: State, step: str) -> Array:
    """The values are normalized and not multiplied with the norm's weight. Look for a fused kernel that is given no
    weight, or for a weight that was meant to be folded in elsewhere."""
    weight = s.weight(_NORMS[step])
    return ref.rms_norm(s[_INPUTS[step]], np.ones_like(weight), s.config.norm_eps)


@fault("1 is added to the norm's weight", "norms", _NORMS)
def norm_weight_plus_one(s: State, step: str) -> Array:
    """Gemma's norms multiply with 1 + weight; Qwen's multiply with the weight as it stands."""
    return ref.rms_norm(s[_INPUTS[step]], s.weight(_NORMS[step]) + 1, s.config.norm_eps)


@fault("the norm's epsilon is {:g}", "norms", _NORMS, values=_epsilons)
def norm_epsilon(s: State, step: str, value: float) -> Array:
    """The epsilon is not the file's attention.layer_norm_rms_epsilon. It shows where activations are small: in the
    first layer."""
    return ref.rms_norm(s[_INPUTS[step]], s.weight(_NORMS[step]), value)


@fault("LayerNorm (mean subtracted) instead of RMSNorm", "norms", _NORMS)
def layer_norm(s: State, step: str) -> Array:
    """RMSNorm divides by the root of the mean square and does not subtract the mean."""
    x = s[_INPUTS[step]]
    return ref.rms_norm(x - x.mean(axis=-1, keepdims=True), s.weight(_NORMS[step]), s.config.norm_eps)


@fault("the norm divides by the sum of squares instead of their mean", "norms", _NORMS)
def norm_by_sum(s: State, step: str) -> Array:
    """RMS is the root of the mean of the squares; the division by n_embd is missing."""
    x = s[_INPUTS[step]]
    normed: Array = x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + s.number(s.config.norm_eps))
    return normed * s.weight(_NORMS[step])


@fault("the norm is skipped", "norms", _NORMS)
def norm_skipped(s: State, step: str) -> Array:
    """The values go on as they are. For result_norm: the final norm before the head was forgotten."""
    return s[_INPUTS[step]]


@fault("the residual is not added", "norms", _RESIDUALS)
def no_residual(s: State, step: str) -> Array:
    """After the attention and after the feed-forward the block's input is added to its output; here it is not."""
    return s["attn_out"] if step == "ffn_inp" else s["ffn_out"]


@fault("the residual is taken after the norm", "norms", _RESIDUALS)
def residual_after_norm(s: State, step: str) -> Array:
    """The residual is the block's input before its norm; here the normalized values are added. Look for a norm that
    works in place."""
    return s["attn_out"] + s["attn_norm"] if step == "ffn_inp" else s["ffn_out"] + s["ffn_norm"]


@fault("the feed-forward's residual skips the attention", "norms", ("l_out",))
def residual_from_input(s: State, step: str) -> Array:
    """The feed-forward's output is added to the layer's input instead of to the sum after the attention, whose work
    is lost."""
    return s["ffn_out"] + s["inp"]
