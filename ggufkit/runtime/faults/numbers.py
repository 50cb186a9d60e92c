"""What healthy engines do to numbers. These faults explain noise and are never a diagnosis."""

from __future__ import annotations

import numpy as np

from ggufkit.runtime.faults.products import PRODUCTS, product
from ggufkit.runtime.faults.registry import fault
from ggufkit.runtime.reference import State
from ggufkit.steps import Array


@fault("activations are rounded to fp16", "numbers", PRODUCTS, harmless=True)
def fp16_activations(s: State, step: str) -> Array:
    """The inputs of products are fp16. Normal for GPU engines."""
    x = s[PRODUCTS[step][0]]
    return product(s, step, x=x.astype(np.float16).astype(x.dtype))


@fault("activations are rounded to bf16", "numbers", PRODUCTS, harmless=True)
def bf16_activations(s: State, step: str) -> Array:
    """The inputs of products are bf16. Normal for GPU engines."""
    return product(s, step, x=to_bf16(s[PRODUCTS[step][0]]))


@fault(
    "activations are rounded to int8 in blocks of {}", "numbers", PRODUCTS, values=lambda _: (32, 256), harmless=True
)
def int8_activations(s: State, step: str, value: int) -> Array:
    """The inputs of products are int8 with a scale for each block, as llama.cpp does it (Q8_0: 32, Q8_K: 256).
    Normal for CPU engines."""
    return product(s, step, x=to_int8(s[PRODUCTS[step][0]], value))


def to_bf16(x: Array) -> Array:
    """Round to the nearest bf16, ties to even; the dtype stays."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(x.dtype)


def to_int8(x: Array, block: int) -> Array:
    """Round to 127 steps of each block's largest magnitude along the last axis; the last block may be shorter."""
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)])
    blocks = padded.reshape(*x.shape[:-1], -1, block)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    codes = np.rint(blocks / np.where(scale == 0, 1, scale))
    return (codes * scale).reshape(padded.shape)[..., : x.shape[-1]].astype(x.dtype)
