"""The forward pass of Qwen2 and Qwen3 in plain NumPy: the specification that every other engine is held against.

Each step is one small function from the state to an array, named as in `steps`. The engine walks the list and
hands every result to the tap. Whoever wants to know what a bug would look like replaces one of the functions
(`ReferenceEngine(..., steps={**REFERENCE, "q_rope": mine})`); whoever wants one step alone calls it on a state
filled from a trace.

Letters: T positions of this call, S keys in the cache, E embedding, H query and K key heads of D channels,
F feed-forward, V vocabulary rows. Weights are (out_features, in_features). Computed in float32 or float64;
weights are float32, exactly as dequantized.

The model: Qwen2 Technical Report, arXiv:2407.10671; RMSNorm arXiv:1910.07467; rotary embedding arXiv:2104.09864
(half-split pairs); grouped-query attention arXiv:2305.13245; SwiGLU arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ggufkit.arch import Config
from ggufkit.container import GGUF
from ggufkit.runtime.cache import ArrayCache
from ggufkit.runtime.engine import Edit, Logits, Which, check_ids, runnable
from ggufkit.runtime.weights import Weights
from ggufkit.steps import LAYER_STEPS, Array, Tap


@dataclass
class State:
    """What a step sees: the hyperparameters, the weights of its layer, and every step made before it.

    Attributes:
        positions: int [T], of this call's tokens.
        layer: the current one; None outside the layers.
        made: step name → array, of the current layer (and `inp`, the layer's input).
    """

    config: Config
    weights: Weights
    cache: ArrayCache
    ids: Sequence[int]
    positions: NDArray[np.int64]
    dtype: DTypeLike
    layer: int | None = None
    made: dict[str, Array] = field(default_factory=dict)

    def __getitem__(self, step: str) -> Array:
        return self.made[step]

    def latest(self, *steps: str) -> Array:
        """The first of these steps that this architecture has."""
        return next(self.made[step] for step in steps if step in self.made)

    def number(self, value: float) -> Array:
        """A scalar in the precision of the pass."""
        scalar: Array = np.asarray(value, self.dtype)
        return scalar

    def weight(self, role: str) -> Array:
        """A tensor of the current layer (`attn_q.weight`), or one outside the layers."""
        return self.weights[role if self.layer is None else f"blk.{self.layer}.{role}"]


StepFunction = Callable[[State], Array]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)) * weight.astype(x.dtype)


def matmul(x: Array, weight: Array) -> Array:
    """x [T, in] by weight [out, in] → [T, out], accumulated in x's precision."""
    return x @ weight.T.astype(x.dtype, copy=False)


def rotate(x: Array, positions: NDArray[np.int64], base: float, scale: float) -> Array:
    """Rotary embedding of x [T, heads, D]: channels i and i + D/2 are one pair, turned by position · base^(-2i/D)."""
    half = x.shape[-1] // 2
    angles = np.outer(positions / scale, base ** (-np.arange(half) / half))[:, None, :]
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    low, high = x[..., :half], x[..., half:]
    return np.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)


def silu(x: Array) -> Array:
    """x · sigmoid(x)."""
    return x / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    """Over the last axis, from exponentials of differences to the maximum."""
    powers = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return powers / np.sum(powers, axis=-1, keepdims=True)


def heads(x: Array, head_dim: int) -> Array:
    """[T, heads·D] → [T, heads, D]."""
    return x.reshape(len(x), -1, head_dim)


def share(x: Array, n_head: int) -> Array:
    """Give every query head its key head: [S, K, D] → [S, H, D]; consecutive query heads share one."""
    return np.repeat(x, n_head // x.shape[1], axis=1)


# --- the steps -------------------------------------------------------------------------------------------------


def embd(s: State) -> Array:
    return s.weights.rows("token_embd.weight", s.ids).astype(s.dtype)


def attn_norm(s: State) -> Array:
    return rms_norm(s["inp"], s.weight("attn_norm.weight"), s.config.norm_eps)


def q_proj(s: State) -> Array:
    return matmul(s["attn_norm"], s.weight("attn_q.weight"))


def k_proj(s: State) -> Array:
    return matmul(s["attn_norm"], s.weight("attn_k.weight"))


def v_proj(s: State) -> Array:
    return matmul(s["attn_norm"], s.weight("attn_v.weight"))


def q_bias(s: State) -> Array:
    return s["q_proj"] + s.weight("attn_q.bias")


def k_bias(s: State) -> Array:
    return s["k_proj"] + s.weight("attn_k.bias")


def v_bias(s: State) -> Array:
    return s["v_proj"] + s.weight("attn_v.bias")


def q_norm(s: State) -> Array:
    x = heads(s.latest("q_bias", "q_proj"), s.config.head_dim)
    return rms_norm(x, s.weight("attn_q_norm.weight"), s.config.norm_eps)


def k_norm(s: State) -> Array:
    x = heads(s.latest("k_bias", "k_proj"), s.config.head_dim)
    return rms_norm(x, s.weight("attn_k_norm.weight"), s.config.norm_eps)


def q_rope(s: State) -> Array:
    x = heads(s.latest("q_norm", "q_bias", "q_proj"), s.config.head_dim)
    return rotate(x, s.positions, s.config.rope_base, s.config.rope_scale)


def k_rope(s: State) -> Array:
    x = heads(s.latest("k_norm", "k_bias", "k_proj"), s.config.head_dim)
    return rotate(x, s.positions, s.config.rope_base, s.config.rope_scale)


def keys(s: State) -> Array:
    """Store the rotated keys at their positions; all keys so far, [S, K, D]."""
    return stored(s.cache.k[s.layer or 0], s.positions, s["k_rope"])


def values(s: State) -> Array:
    """Store the values at their positions; all values so far, [S, K, D]."""
    return stored(s.cache.v[s.layer or 0], s.positions, heads(s.latest("v_bias", "v_proj"), s.config.head_dim))


def kq(s: State) -> Array:
    """Scores, [T, H, S]: every query by every key, over sqrt(D)."""
    queries, shared = s["q_rope"].transpose(1, 0, 2), share(s["keys"], s.config.n_head).transpose(1, 2, 0)
    return (queries @ shared).transpose(1, 0, 2) / np.sqrt(s["q_rope"].dtype.type(s.config.head_dim))


def kq_soft_max(s: State) -> Array:
    """Probabilities over the keys at or before each position."""
    future = np.arange(s["kq"].shape[-1]) > s.positions[:, None, None]
    return softmax(np.where(future, -np.inf, s["kq"]))


def kqv(s: State) -> Array:
    weighted = s["kq_soft_max"].transpose(1, 0, 2) @ share(s["values"], s.config.n_head).transpose(1, 0, 2)
    return weighted.transpose(1, 0, 2).reshape(len(s.positions), -1)


def attn_out(s: State) -> Array:
    return matmul(s["kqv"], s.weight("attn_output.weight"))


def ffn_inp(s: State) -> Array:
    return s["attn_out"] + s["inp"]


def ffn_norm(s: State) -> Array:
    return rms_norm(s["ffn_inp"], s.weight("ffn_norm.weight"), s.config.norm_eps)


def ffn_gate(s: State) -> Array:
    return matmul(s["ffn_norm"], s.weight("ffn_gate.weight"))


def ffn_up(s: State) -> Array:
    return matmul(s["ffn_norm"], s.weight("ffn_up.weight"))


def ffn_act(s: State) -> Array:
    return silu(s["ffn_gate"]) * s["ffn_up"]


def ffn_out(s: State) -> Array:
    return matmul(s["ffn_act"], s.weight("ffn_down.weight"))


def l_out(s: State) -> Array:
    return s["ffn_out"] + s["ffn_inp"]


def result_norm(s: State) -> Array:
    return rms_norm(s["inp"], s.weight("output_norm.weight"), s.config.norm_eps)


def result_output(s: State) -> Array:
    return matmul(s["result_norm"], s.weight("token_embd.weight" if s.config.tied else "output.weight"))


def stored(kept: Array, positions: NDArray[np.int64], new: Array) -> Array:
    """Write `new` [T, K, D] at its positions; everything up to the last of them, [S, K, D]."""
    kept[positions] = new
    return kept[: positions[-1] + 1]


#: every step by name; `keys` and `values` are the cache's, and are not traced
REFERENCE: dict[str, StepFunction] = {
    function.__name__: function
    for function in (
        *(embd, attn_norm, q_proj, k_proj, v_proj, q_bias, k_bias, v_bias, q_norm, k_norm, q_rope, k_rope),
        *(keys, values, kq, kq_soft_max, kqv, attn_out, ffn_inp, ffn_norm, ffn_gate, ffn_up, ffn_act, ffn_out),
        *(l_out, result_norm, result_output),
    )
}
_UNTRACED = frozenset({"keys", "values"})


def layer_plan(config: Config) -> tuple[str, ...]:
    """The steps of one layer of this model, in order, with the cache's two before the scores."""
    absent = set[str]()
    if not config.qkv_bias:
        absent |= {"q_bias", "k_bias", "v_bias"}
    if not config.qk_norm:
        absent |= {"q_norm", "k_norm"}
    steps = [step for step in LAYER_STEPS if step not in absent]
    at = steps.index("kq")
    return (*steps[:at], "keys", "values", *steps[at:])


class ReferenceEngine:
    """The specification as an engine: see `runtime.engine.Engine`.

    Args:
        gguf: an opened file; it stays open as long as the engine is used.
        dtype: float32 or float64.
        steps: the step functions, `REFERENCE` with any of them replaced.

    Raises:
        Unsupported, FormatError, NewerThanTool: as `engine.runnable`.
    """

    name = "reference"
    device = "cpu"

    def __init__(
        self,
        gguf: GGUF,
        dtype: DTypeLike = np.float32,
        steps: Mapping[str, StepFunction] = REFERENCE,
        weights: Weights | None = None,
    ) -> None:
        self.config = runnable(gguf)
        self.dtype = np.dtype(dtype)
        self.weights = weights or Weights(gguf)
        self.steps = steps
        self._plan = layer_plan(self.config)

    def new_cache(self, n_ctx: int) -> ArrayCache:
        return ArrayCache(self.config, n_ctx, self.dtype)

    def forward(
        self, ids: Sequence[int], cache: ArrayCache, *, logits: Which = "last", tap: Tap | None = None
    ) -> Logits:
        check_ids(ids, cache, self.config)
        positions = np.arange(cache.length, cache.length + len(ids))
        state = State(self.config, self.weights, cache, ids, positions, self.dtype)
        with np.errstate(all="ignore"):  # a damaged model may well overflow; the probes look at what comes out
            self._walk(state, logits, tap)
        cache.length += len(ids)
        return np.asarray(state["result_output"], np.float32)

    def patched(self, edits: Iterable[Edit]) -> AbstractContextManager[None]:
        return self.weights.patched(edits)

    def _walk(self, state: State, logits: Which, tap: Tap | None) -> None:
        """Make every step in order, showing each to the tap."""
        self._make("embd", state, tap)
        inp = state["embd"]
        for layer in range(self.config.n_layer):
            state.layer, state.made = layer, {"inp": inp}
            for step in self._plan:
                self._make(step, state, tap)
            inp = state["l_out"]
        state.layer, state.made = None, {"inp": inp if logits == "all" else inp[-1:]}
        self._make("result_norm", state, tap)
        self._make("result_output", state, tap)

    def _make(self, step: str, state: State, tap: Tap | None) -> None:
        made = self.steps[step](state)
        state.made[step] = made
        if tap is not None and step not in _UNTRACED and tap.wants(step, state.layer):
            tap(step, state.layer, made)
