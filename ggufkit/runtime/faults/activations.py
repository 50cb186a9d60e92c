"""The feed-forward's activation."""

from __future__ import annotations

import math

import numpy as np

from ggufkit.runtime import reference as ref
from ggufkit.runtime.faults.registry import fault
from ggufkit.runtime.reference import State
from ggufkit.steps import Array


@fault("GELU (tanh form) instead of SiLU", "activations", ("ffn_act",))
def gelu_tanh(s: State, step: str) -> Array:
    """Qwen's feed-forward is silu(gate) * up; GELU is another model's."""
    x = s["ffn_gate"]
    return x * (1 + np.tanh(s.number(math.sqrt(2 / math.pi)) * (x + s.number(0.044715) * x**3))) / 2 * s["ffn_up"]


@fault("GELU (exact form) instead of SiLU", "activations", ("ffn_act",))
def gelu(s: State, step: str) -> Array:
    """Qwen's feed-forward is silu(gate) * up; GELU is another model's."""
    x = s["ffn_gate"]
    erf = np.vectorize(math.erf, otypes=[x.dtype])
    return x * (1 + erf(x / math.sqrt(2))) / 2 * s["ffn_up"]


@fault("quick GELU instead of SiLU", "activations", ("ffn_act",))
def quick_gelu(s: State, step: str) -> Array:
    """x * sigmoid(1.702 x) is CLIP's activation; SiLU is x * sigmoid(x)."""
    x = s["ffn_gate"]
    return x / (1 + np.exp(s.number(-1.702) * x)) * s["ffn_up"]


@fault("ReLU instead of SiLU", "activations", ("ffn_act",))
def relu(s: State, step: str) -> Array:
    """Qwen's feed-forward is silu(gate) * up."""
    return np.maximum(s["ffn_gate"], 0) * s["ffn_up"]


@fault("sigmoid instead of SiLU", "activations", ("ffn_act",))
def sigmoid(s: State, step: str) -> Array:
    """SiLU is x * sigmoid(x); the factor x is missing."""
    return s["ffn_up"] / (1 + np.exp(-s["ffn_gate"]))


@fault("the activation is applied to up instead of gate", "activations", ("ffn_act",))
def silu_on_up(s: State, step: str) -> Array:
    """The feed-forward is silu(gate) * up; here it is gate * silu(up). Look at the order of a fused gate and up."""
    return s["ffn_gate"] * ref.silu(s["ffn_up"])


@fault("the gate is not multiplied with up", "activations", ("ffn_act",))
def no_up(s: State, step: str) -> Array:
    """The feed-forward is silu(gate) * up; here it is silu(gate) alone."""
    return ref.silu(s["ffn_gate"])


@fault("the activation is left out", "activations", ("ffn_act",))
def no_activation(s: State, step: str) -> Array:
    """The feed-forward is silu(gate) * up; here it is gate * up."""
    return s["ffn_gate"] * s["ffn_up"]
