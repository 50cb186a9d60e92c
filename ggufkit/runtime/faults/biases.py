"""Qwen2's attention biases: left out, added twice, or another's."""

from __future__ import annotations

from ggufkit.runtime.faults.products import layer_at, other_layers
from ggufkit.runtime.faults.registry import fault
from ggufkit.runtime.reference import REFERENCE, State
from ggufkit.steps import Array

_BIASES = {"q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias"}
_INPUTS = {"q_bias": "q_proj", "k_bias": "k_proj", "v_bias": "v_proj"}


@fault("the attention biases are not added", "weights", _BIASES)
def bias_missing(s: State, step: str) -> Array:
    """Qwen2 adds a bias to its query, key and value projections. They look corrupt (values of 100 and more are
    genuine) and are tempting to switch off; without them the model talks garbage."""
    return s[_INPUTS[step]]


@fault("the attention biases are added twice", "weights", _BIASES)
def bias_doubled(s: State, step: str) -> Array:
    """The product adds the bias already (a fused kernel, or an accumulator that starts with it), and it is added
    once more."""
    return REFERENCE[step](s) + s.weight(_BIASES[step])


@fault("the attention biases are subtracted", "weights", _BIASES)
def bias_negative(s: State, step: str) -> Array:
    """The bias is subtracted instead of added."""
    return s[_INPUTS[step]] - s.weight(_BIASES[step])


@fault("the bias of another layer is added (layer {:+d})", "weights", _BIASES, values=other_layers)
def bias_of_other_layer(s: State, step: str, value: int) -> Array:
    """The bias comes from another layer than the weight. Look at the index that picks the bias tensors, and at
    sorting by name (blk.10 comes before blk.2)."""
    return s[_INPUTS[step]] + s.weights[f"blk.{layer_at(s, value)}.{_BIASES[step]}"]


@fault("key and value biases are exchanged", "weights", ("k_bias", "v_bias"))
def bias_key_value_swapped(s: State, step: str) -> Array:
    """Keys get attn_v.bias and values get attn_k.bias; both have the same length."""
    return s[_INPUTS[step]] + s.weight("attn_v.bias" if step == "k_bias" else "attn_k.bias")
