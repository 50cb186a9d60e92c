"""Wrong weights, or the right ones in the wrong layout."""

from __future__ import annotations

import numpy as np

from ggufkit.runtime import reference as ref
from ggufkit.runtime.faults.products import PRODUCTS, layer_at, other_layers, product, weight_name
from ggufkit.runtime.faults.registry import fault
from ggufkit.runtime.reference import REFERENCE, State
from ggufkit.steps import Array


@fault("a weight matrix is multiplied in the wrong layout (transposed)", "weights", PRODUCTS)
def transposed(s: State, step: str) -> Array:
    """GGUF lists a matrix's sizes fastest first: dims [in, out] are `out` rows of `in` values one after the other,
    and y[o] = sum over i of x[i] * w[o * in + i]. This engine walks the same memory as w[i * out + o]. Look at the
    leading dimension and the transpose flag of the product, and at code that exchanges ne[0] and ne[1]."""
    weight = s.weights[weight_name(s, step)]
    return ref.matmul(s[PRODUCTS[step][0]], weight.reshape(weight.shape[::-1]).T)


@fault("a weight matrix is read with the wrong row length (leading dimension)", "weights", PRODUCTS)
def leading_dimension(s: State, step: str) -> Array:
    """Row o of a matrix [out, in] begins at element o * in; this engine lets it begin at o * out, so that only row 0
    is right. Look at the leading dimension (lda, ldb) or the row stride that is passed to the product."""
    weight = s.weights[weight_name(s, step)]
    n_out, n_in = weight.shape
    starts = np.arange(n_out) * n_out % max(weight.size - n_in, 1)
    rows = np.lib.stride_tricks.sliding_window_view(weight.reshape(-1), n_in)[starts]
    return ref.matmul(s[PRODUCTS[step][0]], rows)


@fault("weights of another layer are used (layer {:+d})", "weights", PRODUCTS, values=other_layers)
def other_layer(s: State, step: str, value: int) -> Array:
    """The product is right, but with a tensor of another layer. Look at the index that picks the layer's tensors,
    at sorting by name (blk.10 comes before blk.2), and at a loop that advances the layer too early."""
    if s.layer is None:
        return product(s, step)
    return product(s, step, s.weights[f"blk.{layer_at(s, value)}.{PRODUCTS[step][1]}"])


@fault("gate and up projections are exchanged", "weights", ("ffn_gate", "ffn_up"))
def gate_up_swapped(s: State, step: str) -> Array:
    """The activation belongs to the gate: silu(gate) * up. This engine multiplies with ffn_up.weight where ffn_gate
    belongs, and the other way round. Look at the order in which the two tensors are loaded or fused."""
    return product(s, step, s.weight("ffn_up.weight" if step == "ffn_gate" else "ffn_gate.weight"))


@fault("key and value projections are exchanged", "weights", ("k_proj", "v_proj"))
def key_value_swapped(s: State, step: str) -> Array:
    """Keys are made with attn_v.weight and values with attn_k.weight, which have the same shape. Look at the order
    of the tensors in a fused QKV product."""
    return product(s, step, s.weight("attn_v.weight" if step == "k_proj" else "attn_k.weight"))


@fault("query and output projections are exchanged", "weights", ("q_proj", "attn_out"))
def query_output_swapped(s: State, step: str) -> Array:
    """attn_q and attn_output often have the same shape, so that a mix-up raises no error. Look at where the layer's
    tensors are bound by name."""
    other = s.weight("attn_output.weight" if step == "q_proj" else "attn_q.weight")
    return product(s, step, other if other.shape == s.weights[weight_name(s, step)].shape else None)


@fault("the head is taken from token_embd although the file has output.weight", "weights", ("result_output",))
def head_tied(s: State, step: str) -> Array:
    """When a file holds output.weight, the logits are made with it; only without it is the head tied to the
    embedding. This engine always uses token_embd.weight."""
    return product(s, step, s.weights["token_embd.weight"])


@fault("embedding rows are off by one", "weights", ("embd",))
def embedding_off_by_one(s: State, step: str) -> Array:
    """The row after the token's own is looked up. Look for ids that are counted from 1, or for a shifted table."""
    ids = [min(token + 1, s.config.n_vocab - 1) for token in s.ids]
    return s.weights.rows("token_embd.weight", ids).astype(s.dtype)


@fault("embeddings are scaled by the square root of their width", "weights", ("embd",))
def embedding_scaled(s: State, step: str) -> Array:
    """Gemma multiplies its embeddings by sqrt(n_embd); Qwen and Llama do not. Look for code shared between them."""
    return REFERENCE["embd"](s) * s.number(s.config.n_embd**0.5)


@fault("the embedding table is read transposed", "weights", ("embd",))
def embedding_transposed(s: State, step: str) -> Array:
    """token_embd is one row of n_embd values a token; this engine gathers every n_vocab-th value instead, as if the
    table were [n_embd, n_vocab]."""
    table = s.weights["token_embd.weight"]
    rows: Array = table.reshape(table.shape[::-1]).T[np.asarray(s.ids)].astype(s.dtype)
    return rows
