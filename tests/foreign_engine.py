"""Somebody else's engine, with somebody else's bugs: what `diagnose` is tried on.

It shares no arithmetic with ggufkit. Weights are decoded by gguf-py, or, for a bug in the decoding, bit by bit
here; rotations go pair by pair, heads one at a time, and a cache is written slot by slot. Each bug is a word in
`bugs`; a few take a number after a colon (`rope_base:10000`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import gguf.quants
import numpy as np
from gguf import GGMLQuantizationType

from ggufkit.container import GGUF

F = np.float32


class ForeignEngine:
    """Runs token ids and keeps every intermediate, named as in the trace contract."""

    def __init__(self, model: GGUF) -> None:
        self.model = model
        self.arch = model.architecture
        meta = model.metadata
        get = lambda key: meta[f"{self.arch}.{key}"]  # noqa: E731
        self.n_layer, self.n_head, self.n_kv = (
            int(get(key)) for key in ("block_count", "attention.head_count", "attention.head_count_kv")
        )
        self.width = int(get("embedding_length"))
        self.dim = int(meta.get(f"{self.arch}.attention.key_length", self.width // self.n_head))
        self.eps, self.base = float(get("attention.layer_norm_rms_epsilon")), float(get("rope.freq_base"))
        self.cache_of_weights: dict[tuple[str, str], np.ndarray] = {}

    # -- weights ---------------------------------------------------------------------------------------------

    def weight(self, name: str, decoding: str = "") -> np.ndarray:
        key = (name, decoding)
        if key not in self.cache_of_weights:
            self.cache_of_weights[key] = self._decode(name, decoding)
        return self.cache_of_weights[key]

    def _decode(self, name: str, decoding: str) -> np.ndarray:
        tensor = self.model.tensors[name]
        raw = self.model.read(tensor)
        blocks = raw.reshape(-1, tensor.type.type_size)
        if decoding == "block_off_by_one" and tensor.type.is_block:
            blocks = np.concatenate([blocks[1:], blocks[:1]])
        elif decoding == "scale_byte_order" and tensor.type.is_block:
            blocks = blocks.copy()
            at = tensor.type.d
            blocks[:, [at, at + 1]] = blocks[:, [at + 1, at]]
            if tensor.type.dmin is not None:
                at = tensor.type.dmin
                blocks[:, [at, at + 1]] = blocks[:, [at + 1, at]]
        elif decoding and tensor.type.name == "Q5_0":
            return _q5_0(blocks, decoding).reshape(tensor.shape)
        elif decoding and tensor.type.name == "Q8_0" and decoding == "scale_of_next_block":
            scales = np.roll(blocks[:, :2].copy().view(np.float16).astype(F), -1, axis=0)
            return (scales * blocks[:, 2:].view(np.int8)).reshape(tensor.shape)
        elif decoding and tensor.type.name == "Q4_1":
            return _q4_1(blocks, decoding).reshape(tensor.shape)
        kind = GGMLQuantizationType(tensor.type.id)
        return gguf.quants.dequantize(blocks.reshape(-1), kind).astype(F).reshape(tensor.shape)

    # -- running ---------------------------------------------------------------------------------------------

    def trace(self, ids: Sequence[int], bugs: Sequence[str] = (), *, decode: bool = False) -> dict[str, np.ndarray]:
        """Every step over all the tokens, computed together or one by one."""
        run = _Run(self, len(ids), bugs)
        with np.errstate(all="ignore"):
            if decode:
                for at, token in enumerate(ids):
                    run.forward([token], at)
            else:
                run.forward(list(ids), 0)
        return run.collected()


class _Run:
    def __init__(self, engine: ForeignEngine, n: int, bugs: Sequence[str]) -> None:
        self.e, self.n = engine, n
        self.bugs = {bug.partition(":")[0]: float(bug.partition(":")[2] or 0) for bug in bugs}
        shape = (engine.n_layer, n + 1, engine.n_kv, engine.dim)
        self.keys, self.values = np.zeros(shape, F), np.zeros(shape, F)
        if "cache_stale" in self.bugs:  # what an earlier prompt left
            left = np.random.default_rng(7)
            self.keys, self.values = (left.normal(size=shape).astype(F) for _ in range(2))
        self.rows: dict[str, list[np.ndarray]] = {}

    def has(self, bug: str) -> bool:
        return bug in self.bugs

    def note(self, name: str, array: np.ndarray) -> np.ndarray:
        self.rows.setdefault(name, []).append(np.array(array, F))
        return array

    def collected(self) -> dict[str, np.ndarray]:
        out = {}
        for name, parts in self.rows.items():
            if name.startswith(("kq-", "kq_soft_max")):
                widest = max(part.shape[-1] for part in parts)
                parts = [np.pad(part, [(0, 0), (0, 0), (0, widest - part.shape[-1])]) for part in parts]
            out[name] = np.concatenate(parts)
        return out

    def times(self, x: np.ndarray, name: str, step: str) -> np.ndarray:
        """The product of every row of x with the tensor."""
        layer = int(name.split(".")[1]) if name.startswith("blk.") else None
        if self.has("other_layer") and layer is not None:
            other = min(layer + int(self.bugs["other_layer"]), self.e.n_layer - 1)
            name = name.replace(f"blk.{layer}.", f"blk.{other}.")
        decoding = next((bug for bug in DECODINGS if self.has(bug)), "")
        w = self.e.weight(name, decoding)
        n_out, n_in = w.shape
        flat = w.reshape(-1)
        if self.has("transposed") and (n_out == n_in or not self.has("square_only")):
            return np.einsum("ti,io->to", x, flat.reshape(n_in, n_out), optimize=True)
        if self.has("leading_dimension") and n_in > n_out:
            w = np.stack([flat[o * n_out : o * n_out + n_in] for o in range(n_out)])
        if self.has("fp16_activations"):
            x = x.astype(np.float16).astype(F)
        if self.has("bf16_activations"):
            x = (np.ascontiguousarray(x, F).view(np.uint32) + 0x8000 & 0xFFFF0000).astype(np.uint32).view(F)
        if self.has("int8_activations"):
            x = _int8(x)
        return np.einsum("ti,oi->to", x, w, optimize=True)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        w = self.e.weight(name)
        if self.has("norm_skipped") or (self.has("no_final_norm") and name == "output_norm.weight"):
            return x
        if self.has("layer_norm"):
            x = x - x.mean(axis=1)[:, None]
        if self.has("norm_weight_plus_one"):
            w = w + 1
        if self.has("norm_without_weight"):
            w = np.ones_like(w)
        eps = self.bugs.get("norm_epsilon", self.e.eps)
        total = (x.astype(np.float64) ** 2).sum(axis=1)
        mean = total if self.has("norm_by_sum") else total / x.shape[1]
        return (x * (1 / np.sqrt(mean + eps))[:, None] * w).astype(F)

    def bias(self, x: np.ndarray, layer: int, kind: str) -> np.ndarray:
        if self.has("bias_missing") or self.has(f"{kind}_bias_missing"):
            return x
        if self.has("bias_of_other_layer"):
            layer = min(layer + int(self.bugs["bias_of_other_layer"]), self.e.n_layer - 1)
        if self.has("bias_key_value_swapped") and kind in "kv":
            kind = "v" if kind == "k" else "k"
        b = self.e.weight(f"blk.{layer}.attn_{kind}.bias")
        return x + {True: 2 * b, False: b}[self.has("bias_doubled")] * (-1 if self.has("bias_negative") else 1)

    def turn(self, heads: np.ndarray, first: int) -> np.ndarray:
        """Rotate [T, heads, D], pair by pair."""
        if self.has("rope_off"):
            return heads
        out = heads.copy()
        dim = heads.shape[-1] // 2 if self.has("rope_half_channels") else heads.shape[-1]
        base = self.bugs.get("rope_base", self.e.base)
        for t in range(len(heads)):
            position = first + t + int(self.bugs.get("position_offset", 0))
            if self.has("position_stuck"):
                position = 0
            if self.has("rope_negative"):
                position = -position
            for i in range(dim // 2):
                a, b = (2 * i, 2 * i + 1) if self.has("rope_interleaved") else (i, i + dim // 2)
                angle = position * base ** (-(i if self.has("rope_exponent") else 2 * i) / dim)
                c, s = math.cos(angle), math.sin(angle)
                out[t, :, a] = heads[t, :, a] * c - heads[t, :, b] * s
                out[t, :, b] = heads[t, :, a] * s + heads[t, :, b] * c
        return out

    def forward(self, ids: list[int], first: int) -> None:
        e = self.e
        shown = [min(i + 1, e.weight("token_embd.weight").shape[0] - 1) for i in ids]
        table = e.weight("token_embd.weight")
        if self.has("embedding_transposed"):
            x = np.stack([table.reshape(-1)[i :: len(table)] for i in ids])
        else:
            x = table[shown if self.has("embedding_off_by_one") else ids]
        if self.has("embedding_scaled"):
            x = x * F(math.sqrt(e.width))
        self.note("embd", x)
        for layer in range(e.n_layer):
            x = self.layer(x, layer, first)
        x = self.note("result_norm", self.norm(x, "output_norm.weight"))
        tied = self.has("head_tied") or "output.weight" not in e.model.tensors
        self.note("result_output", self.times(x, "token_embd.weight" if tied else "output.weight", "result_output"))

    def layer(self, x: np.ndarray, n: int, first: int) -> np.ndarray:
        e, note, w, inp = self.e, self.note, f"blk.{n}.", x
        normed = note(f"attn_norm-{n}", self.norm(x, w + "attn_norm.weight"))
        names = {"q": "attn_q", "k": "attn_k", "v": "attn_v"}
        if self.has("key_value_swapped"):
            names |= {"k": "attn_v", "v": "attn_k"}
        if self.has("query_output_swapped"):
            names["q"] = "attn_output"
        made = {}
        for kind, name in names.items():
            made[kind] = note(f"{kind}_proj-{n}", self.times(normed, w + name + ".weight", f"{kind}_proj"))
            if e.arch == "qwen2":
                made[kind] = note(f"{kind}_bias-{n}", self.bias(made[kind], n, kind))
            made[kind] = made[kind].reshape(len(x), -1, e.dim)
        if e.arch == "qwen3":
            for kind in "qk":
                flat = made[kind].reshape(-1, e.dim)
                made[kind] = note(
                    f"{kind}_norm-{n}", self.norm(flat, w + f"attn_{kind}_norm.weight").reshape(made[kind].shape)
                )
        q = note(f"q_rope-{n}", self.turn(made["q"], first))
        k = note(f"k_rope-{n}", self.turn(made["k"], first))
        v = self.turn(made["v"], first) if self.has("rope_on_values") else made["v"]
        x = self.attend(x, q, k, v, n, first, normed)
        fnorm = note(f"ffn_norm-{n}", self.norm(x, w + "ffn_norm.weight"))
        gate_name, up_name = ("ffn_up", "ffn_gate") if self.has("gate_up_swapped") else ("ffn_gate", "ffn_up")
        gate = note(f"ffn_gate-{n}", self.times(fnorm, w + gate_name + ".weight", "ffn_gate"))
        up = note(f"ffn_up-{n}", self.times(fnorm, w + up_name + ".weight", "ffn_up"))
        act = note(f"ffn_act-{n}", self.activate(gate, up))
        down = note(f"ffn_out-{n}", self.times(act, w + "ffn_down.weight", "ffn_out"))
        if self.has("no_residual"):
            return note(f"l_out-{n}", down)
        if self.has("residual_from_input"):
            return note(f"l_out-{n}", down + inp)
        return note(f"l_out-{n}", down + (fnorm if self.has("residual_after_norm") else x))

    def attend(self, x, q, k, v, n, first, normed):
        e, note = self.e, self.note
        t = len(x)
        for i in range(t):
            slot = 0 if self.has("cache_slot_stuck") else first + i + self.has("cache_off_by_one")
            self.keys[n, slot], self.values[n, slot] = k[i], v[i]
        seen = self.n if self.has("cache_stale") else first + t
        keys, values = self.keys[n, :seen], self.values[n, :seen]
        if self.has("cache_current_only"):
            keys, values = k[-1:], v[-1:]
        if self.has("cache_stride_position"):
            keys, values = (
                np.lib.stride_tricks.as_strided(a.copy(), a.shape, a.strides[1:2] + a.strides[1:])
                for a in (keys, values)
            )
        if self.has("cache_stride"):
            keys, values = (a.reshape(e.n_kv, len(a), e.dim).transpose(1, 0, 2) for a in (keys, values))
        scores = np.zeros((t, e.n_head, len(keys)), F)
        for head in range(e.n_head):
            scores[:, head] = self.scores(q[:, head], keys[:, self.kv_head(head)])
        note(f"kq-{n}", scores)
        shares = note(f"kq_soft_max-{n}", self.shares(scores, first))
        mixed = np.zeros((t, e.n_head, e.dim), F)
        for head in range(e.n_head):
            mixed[:, head] = shares[:, head] @ values[:, self.kv_head(head)]
        flat = note(f"kqv-{n}", mixed.reshape(t, -1))
        name = "attn_q" if self.has("query_output_swapped") else "attn_output"
        out = flat if self.has("no_output_projection") else self.times(flat, f"blk.{n}.{name}.weight", "attn_out")
        note(f"attn_out-{n}", out)
        residual = normed if self.has("residual_after_norm") else x
        return note(f"ffn_inp-{n}", out if self.has("no_residual") else out + residual)

    def kv_head(self, head: int) -> int:
        if self.has("first_key_head"):
            return 0
        return head % self.e.n_kv if self.has("head_modulo") else head // (self.e.n_head // self.e.n_kv)

    def scores(self, q: np.ndarray, keys: np.ndarray) -> np.ndarray:
        dim = self.e.dim
        if self.has("fp16_scores"):
            raw = q.astype(np.float16).astype(F) @ keys.astype(np.float16).astype(F).T
            return raw.astype(np.float16).astype(F) / F(math.sqrt(dim))
        divisor = math.sqrt(dim)
        if self.has("no_scale"):
            divisor = 1.0
        if self.has("scale_by_head_dim"):
            divisor = dim
        if self.has("scale_by_width"):
            divisor = math.sqrt(self.e.width)
        return np.einsum("td,sd->ts", q, keys) / F(divisor)

    def shares(self, scores: np.ndarray, first: int) -> np.ndarray:
        t, _, s = scores.shape
        masked = scores.copy()
        for i in range(t):
            hidden = first + i + (0 if self.has("mask_off_by_one") else 1)
            if not self.has("no_mask") and not self.has("cache_stale") and s > 1:
                masked[i, :, hidden:] = 0 if self.has("mask_with_zero") else -np.inf
        axis = 1 if self.has("softmax_over_heads") else 0 if self.has("softmax_over_queries") else 2
        powers = np.exp(masked - masked.max(axis=axis, keepdims=True))
        shares = powers / powers.sum(axis=axis, keepdims=True)
        hidden_rows = self.has("mask_off_by_one") or self.has("softmax_over_heads")
        return np.nan_to_num(shares) if hidden_rows else shares

    def activate(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        sigmoid = 1 / (1 + np.exp(-gate))
        if self.has("gelu_tanh"):
            return 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
        if self.has("gelu"):
            return (
                np.array([0.5 * g * (1 + math.erf(g / math.sqrt(2))) for g in gate.ravel()], F).reshape(gate.shape) * up
            )
        if self.has("quick_gelu"):
            return gate / (1 + np.exp(-1.702 * gate)) * up
        if self.has("relu"):
            return gate.clip(0) * up
        if self.has("sigmoid"):
            return sigmoid * up
        if self.has("silu_on_up"):
            return gate * up / (1 + np.exp(-up))
        if self.has("no_up"):
            return gate * sigmoid
        return gate * up if self.has("no_activation") else gate * sigmoid * up


#: bugs in the decoding of blocks
DECODINGS = (
    "nibble_order",
    "nibbles_swapped",
    "high_bits_misplaced",
    "high_bits_missing",
    "zero_point_missing",
    "scale_of_next_block",
    "scale_byte_order",
    "block_off_by_one",
    "min_sign",
    "min_missing",
)


def _nibbles(packed: np.ndarray, decoding: str) -> np.ndarray:
    """32 four-bit codes of each block's 16 bytes."""
    low, high = packed & 0xF, packed >> 4
    if decoding == "nibble_order":
        out = np.empty((len(packed), 32), np.uint8)
        out[:, 0::2], out[:, 1::2] = low, high
        return out
    return np.hstack([high, low] if decoding == "nibbles_swapped" else [low, high])


def _q5_0(blocks: np.ndarray, decoding: str) -> np.ndarray:
    d = blocks[:, :2].copy().view(np.float16).astype(F)
    word = blocks[:, 2:6].copy().view(np.uint32)[:, 0]
    codes = _nibbles(blocks[:, 6:], decoding).astype(np.int32)
    for i in range(32):
        bit = (i * 2 if i < 16 else (i - 16) * 2 + 1) if decoding == "high_bits_misplaced" else i
        if decoding != "high_bits_missing":
            codes[:, i] += ((word >> np.uint32(bit)) & np.uint32(1)).astype(np.int32) << 4
    if decoding != "zero_point_missing":
        codes -= 16
    if decoding == "scale_of_next_block":
        d = np.concatenate([d[1:], d[:1]])
    return d * codes.astype(F)


def _q4_1(blocks: np.ndarray, decoding: str) -> np.ndarray:
    d, m = (blocks[:, at : at + 2].copy().view(np.float16).astype(F) for at in (0, 2))
    if decoding == "scale_of_next_block":
        d, m = (np.concatenate([a[1:], a[:1]]) for a in (d, m))
    m = {"min_sign": -m, "min_missing": 0 * m}.get(decoding, m)
    return d * _nibbles(blocks[:, 4:], decoding).astype(F) + m


def _int8(x: np.ndarray) -> np.ndarray:
    """Activations as llama.cpp's Q8_0: blocks of 32 with a scale in f16."""
    rows = x.reshape(len(x), -1, 32)
    d = np.abs(rows).max(axis=2, keepdims=True) / 127
    codes = np.round(rows / np.where(d == 0, 1, d))
    return (codes * d.astype(np.float16).astype(F)).reshape(x.shape).astype(F)
