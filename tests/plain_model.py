"""A second Qwen2/Qwen3, written from the formulas without a look at ggufkit: loops over positions and heads,
complex numbers for the rotation, float64 throughout, no cache. It is slow, and is only there to disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def logits(weights: Mapping[str, np.ndarray], ids: Sequence[int], shape, arch: str) -> np.ndarray:
    """The logits at every position, float64 [T, V], of weights named as in GGUF; `shape` is a `tiny_models.Shape`."""
    stream = [weights["token_embd.weight"][token].astype(np.float64) for token in ids]
    for layer in range(shape.n_layer):
        of_layer = {
            name.removeprefix(f"blk.{layer}."): values.astype(np.float64)
            for name, values in weights.items()
            if name.startswith(f"blk.{layer}.")
        }
        attended = _attention([_normed(x, of_layer["attn_norm.weight"], shape) for x in stream], of_layer, shape, arch)
        stream = [x + y for x, y in zip(stream, attended, strict=True)]
        stream = [x + _feed_forward(_normed(x, of_layer["ffn_norm.weight"], shape), of_layer) for x in stream]
    head = weights.get("output.weight", weights["token_embd.weight"]).astype(np.float64)
    return np.array([head.dot(_normed(x, weights["output_norm.weight"].astype(np.float64), shape)) for x in stream])


def _normed(x, weight, shape):
    return weight * x * (x.dot(x) / len(x) + shape.norm_eps) ** -0.5


def _attention(inputs, weights, shape, arch):
    """For each position the output projection of its heads."""
    projected = {}
    for kind in "qkv":
        rows = [weights[f"attn_{kind}.weight"].dot(x) for x in inputs]
        if arch == "qwen2":
            rows = [row + weights[f"attn_{kind}.bias"] for row in rows]
        projected[kind] = [np.split(row, len(row) // shape.head_dim) for row in rows]
    if arch == "qwen3":
        for kind in "qk":
            norm = weights[f"attn_{kind}_norm.weight"]
            projected[kind] = [[_normed(head, norm, shape) for head in row] for row in projected[kind]]
    for kind in "qk":
        projected[kind] = [[_turned(head, at, shape) for head in row] for at, row in enumerate(projected[kind])]
    outputs = []
    for at in range(len(inputs)):
        out_heads = []
        for head in range(shape.n_head):
            group = head * shape.n_head_kv // shape.n_head
            scores = [projected["q"][at][head].dot(projected["k"][past][group]) for past in range(at + 1)]
            shares = np.exp(np.array(scores) / shape.head_dim**0.5)
            shares /= shares.sum()
            out_heads.append(sum(share * projected["v"][past][group] for past, share in enumerate(shares)))
        outputs.append(weights["attn_output.weight"].dot(np.concatenate(out_heads)))
    return outputs


def _turned(head, position, shape):
    """Channels i and i + D/2 as one complex number, turned by position · base^(-2i/D)."""
    half = shape.head_dim // 2
    numbers = head[:half] + 1j * head[half:]
    turned = [z * np.exp(1j * position * shape.rope_base ** (-2 * i / shape.head_dim)) for i, z in enumerate(numbers)]
    return np.concatenate([np.real(turned), np.imag(turned)])


def _feed_forward(x, weights):
    gate, up = weights["ffn_gate.weight"].dot(x), weights["ffn_up.weight"].dot(x)
    return weights["ffn_down.weight"].dot(up * gate / (1 + np.exp(-gate)))
