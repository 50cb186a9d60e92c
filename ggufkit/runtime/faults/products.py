"""The matrix products of a layer, as the faults replace them."""

from __future__ import annotations

from collections.abc import Iterable

from ggufkit.arch import Config
from ggufkit.runtime import reference as ref
from ggufkit.runtime.reference import State
from ggufkit.steps import Array

#: the products: step → (the step that is its input, the role of its weight)
PRODUCTS: dict[str, tuple[str, str]] = {
    "q_proj": ("attn_norm", "attn_q.weight"),
    "k_proj": ("attn_norm", "attn_k.weight"),
    "v_proj": ("attn_norm", "attn_v.weight"),
    "attn_out": ("kqv", "attn_output.weight"),
    "ffn_gate": ("ffn_norm", "ffn_gate.weight"),
    "ffn_up": ("ffn_norm", "ffn_up.weight"),
    "ffn_out": ("ffn_act", "ffn_down.weight"),
    "result_output": ("result_norm", "output.weight"),
}


def product(s: State, step: str, weight: Array | None = None, x: Array | None = None) -> Array:
    """The matmul of a step, with another weight or another input."""
    if weight is None:
        weight = s.weights[weight_name(s, step)]
    return ref.matmul(s[PRODUCTS[step][0]] if x is None else x, weight)


def weight_name(s: State, step: str) -> str:
    """The tensor that a product multiplies with."""
    role = PRODUCTS[step][1]
    if step == "result_output":
        return "token_embd.weight" if s.config.tied else role
    return f"blk.{s.layer}.{role}"


def other_layers(config: Config) -> Iterable[int]:
    """Distances to other layers, the neighbours first."""
    return (1, -1, *(sign * k for k in range(2, config.n_layer) for sign in (1, -1)))


def layer_at(s: State, distance: int) -> int:
    """The layer so far away; the own one where there is none, so that the variant changes nothing there."""
    layer = (s.layer or 0) + distance
    return layer if 0 <= layer < s.config.n_layer else s.layer or 0
