"""How much memory a model needs to run, from its header alone.

    weights   the packed bytes of all tensors, as they lie in the file
    KV cache  n_ctx · Σ over layers of n_head_kv · (key_length + value_length) · bytes a value (f16 2, f32 4)
    working   4 bytes · 512 positions · (rows of the head + 2 n_ff + 4 n_embd): one batch's logits and activations

The working memory is what engines that keep the logits of a whole batch allocate; one that keeps only the last
position's needs less, one that stores all attention scores needs more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ggufkit.container import GGUF

#: the context that most people start with
USUAL_CONTEXT = 4096
BATCH = 512
FORMULA = (
    "weights as in the file + n_ctx · Σ layers n_head_kv · (key_length + value_length) · 2 or 4 bytes"
    f" + 4 bytes · {BATCH} positions · (n_vocab + 2 n_ff + 4 n_embd)"
)

_MOST = 1 << 40  # a larger hyperparameter is damage, not a model


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes needed at one context length; the totals with either cache."""

    n_ctx: int
    weights: int
    kv_f16: int
    kv_f32: int
    working: int
    total_f16: int
    total_f32: int


def memory_needed(gguf: GGUF, rows: int | None) -> tuple[tuple[Memory, ...], str | None]:
    """The memory needed at the usual and at the model's full context, and a remark about it.

    Args:
        gguf: an opened file.
        rows: of the head; None for a file without an embedding.

    Returns:
        nothing when the header does not say enough; the remark then says what is missing. Otherwise the remark
        names what the formula leaves out for this architecture.
    """
    if not gguf.tensors:
        return (), "none: the file has no tensors"
    hyper = _Hyperparameters(gguf)
    missing = [key for key in ("context_length", "block_count", "embedding_length") if not hyper.number(key)]
    per_position = hyper.kv_values()
    if missing or per_position is None:
        return (), f"cannot be told without {', '.join(missing) or 'the width of keys and values'}"
    full = hyper.number("context_length")
    weights = sum(tensor.nbytes or 0 for tensor in gguf.tensors.values())
    sizes = sorted({min(USUAL_CONTEXT, full), full})
    return tuple(_at(n_ctx, weights, per_position, hyper.activations(rows or 0)) for n_ctx in sizes), hyper.remark()


def _at(n_ctx: int, weights: int, kv_values: int, activations: int) -> Memory:
    kv, working = n_ctx * kv_values, 4 * min(BATCH, n_ctx) * activations
    return Memory(n_ctx, weights, 2 * kv, 4 * kv, working, weights + 2 * kv + working, weights + 4 * kv + working)


class _Hyperparameters:
    """The integers that the formula needs, 0 where the file has none or a senseless one."""

    def __init__(self, gguf: GGUF) -> None:
        self._gguf = gguf

    def number(self, key: str) -> int:
        """A hyperparameter; the largest, when the file has one a layer."""
        return max(self.by_layer(key, 1), default=0)

    def by_layer(self, key: str, n_layer: int) -> list[int]:
        value: Any = self._gguf.metadata.get(f"{self._gguf.architecture}.{key}")
        values = value.tolist() if hasattr(value, "tolist") else [value] * n_layer
        return [entry for entry in values if type(entry) is int and 0 <= entry <= _MOST]

    def kv_values(self) -> int | None:
        """Values that the cache keeps for one position, over all layers."""
        n_layer = min(self.number("block_count"), 1 << 16)
        n_head = self.number("attention.head_count")
        head = self.number("embedding_length") // n_head if n_head else 0
        key = self.number("attention.key_length") or head
        value = self.number("attention.value_length") or head
        heads = self.by_layer("attention.head_count_kv", n_layer) or self.by_layer("attention.head_count", n_layer)
        return sum(heads) * (key + value) if heads and key + value else None

    def activations(self, rows: int) -> int:
        """Values of one position that are alive at once."""
        return rows + 2 * self.number("feed_forward_length") + 4 * self.number("embedding_length")

    def remark(self) -> str | None:
        left_out = {
            "attention.sliding_window": "sliding-window layers need less than this",
            "attention.kv_lora_rank": "a compressed (MLA) cache needs less than this",
            "ssm.state_size": "the recurrent state is not counted, and its layers keep no keys",
        }
        said = [text for key, text in left_out.items() if self.number(key)]
        return "; ".join(said) or None
