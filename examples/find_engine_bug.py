"""My engine talks garbage. Which line of it is wrong?

A home-made engine with the three historic bugs at once: square matrices are multiplied transposed, the biases that
"look corrupt" are switched off, and the cache position never moves. Each round runs it on a prompt, writes what it
computed, and asks `ggufkit diagnose`. The bug that is named is mended, as its author would, until nothing is left.

    python examples/find_engine_bug.py                 # on the bundled model
    python examples/find_engine_bug.py MODEL.gguf      # on your own Qwen2 file
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import ggufkit
from ggufkit import diagnosis, quants
from ggufkit.container import GGUF
from ggufkit.conversation import Words, message
from ggufkit.demo import MODEL
from ggufkit.trace import Trace

PROMPT = "Write a haiku about autumn leaves."
ANSWER = 40  # tokens to generate before and after


class MyEngine:
    """What somebody writes in an afternoon: one token at a time, NumPy, a cache, and a dictionary of weights."""

    def __init__(self, gguf: GGUF) -> None:
        self.gguf = gguf
        meta = gguf.metadata
        self.n_layer, self.n_head, self.n_kv = (
            int(meta[f"qwen2.{key}"]) for key in ("block_count", "attention.head_count", "attention.head_count_kv")
        )
        self.eps = float(meta["qwen2.attention.layer_norm_rms_epsilon"])
        self.base = float(meta["qwen2.rope.freq_base"])
        self.dim = int(meta["qwen2.embedding_length"]) // self.n_head
        self.weights = {name: self._load(name) for name in gguf.tensors}
        self.bugs = {"transposed", "bias_missing", "cache_slot_stuck"}

    def _load(self, name: str) -> np.ndarray:
        tensor = self.gguf.tensors[name]
        return quants.dequantize(tensor.type, self.gguf.read(tensor)).reshape(tensor.shape)

    def run(self, ids: list[int]) -> tuple[np.ndarray, dict[str, list[np.ndarray]]]:
        """Feed the tokens one by one; the last logits, and every step of every position."""
        self.keys = np.zeros((self.n_layer, len(ids) + ANSWER, self.n_kv, self.dim), np.float32)
        self.values = np.zeros_like(self.keys)
        steps: dict[str, list[np.ndarray]] = {}
        for position, token in enumerate(ids):
            logits = self.token(token, position, steps)
        return logits, steps

    def token(self, token: int, position: int, steps: dict[str, list[np.ndarray]]) -> np.ndarray:
        def note(name: str, value: np.ndarray) -> np.ndarray:
            steps.setdefault(name, []).append(value)
            return value

        w = self.weights
        x = note("embd", w["token_embd.weight"][token])
        for n in range(self.n_layer):
            blk = {name.split(".", 2)[2]: value for name, value in w.items() if name.startswith(f"blk.{n}.")}
            normed = note(f"attn_norm-{n}", self.norm(x, blk["attn_norm.weight"]))
            q, k, v = (self.project(normed, blk, kind, n, note) for kind in "qkv")
            q = note(f"q_rope-{n}", self.rotate(q, position))
            k = note(f"k_rope-{n}", self.rotate(k, position))
            heads = self.attend(q, k, v, n, position, note)
            x = note(f"ffn_inp-{n}", x + note(f"attn_out-{n}", self.times(heads, blk["attn_output.weight"])))
            normed = note(f"ffn_norm-{n}", self.norm(x, blk["ffn_norm.weight"]))
            gate = note(f"ffn_gate-{n}", self.times(normed, blk["ffn_gate.weight"]))
            up = note(f"ffn_up-{n}", self.times(normed, blk["ffn_up.weight"]))
            act = note(f"ffn_act-{n}", gate / (1 + np.exp(-gate)) * up)
            x = note(f"l_out-{n}", x + note(f"ffn_out-{n}", self.times(act, blk["ffn_down.weight"])))
        x = note("result_norm", self.norm(x, w["output_norm.weight"]))
        return note("result_output", self.times(x, w.get("output.weight", w["token_embd.weight"])))

    def norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x) + np.float32(self.eps)) * weight

    def times(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        square = weight.shape[0] == weight.shape[1]
        return x @ weight if square and "transposed" in self.bugs else weight @ x

    def project(self, x: np.ndarray, blk: dict[str, np.ndarray], kind: str, n: int, note) -> np.ndarray:
        y = note(f"{kind}_proj-{n}", self.times(x, blk[f"attn_{kind}.weight"]))
        if "bias_missing" not in self.bugs:  # "values of 100 cannot be right"
            y = y + blk[f"attn_{kind}.bias"]
        return note(f"{kind}_bias-{n}", y).reshape(-1, self.dim)

    def rotate(self, x: np.ndarray, position: int) -> np.ndarray:
        half = self.dim // 2
        angle = (position * self.base ** (-np.arange(half) / half)).astype(np.float32)
        low, high = x[:, :half], x[:, half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.hstack([low * cos - high * sin, low * sin + high * cos])

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, n: int, position: int, note) -> np.ndarray:
        slot = 0 if "cache_slot_stuck" in self.bugs else position
        self.keys[n, slot], self.values[n, slot] = k, v
        group = self.n_head // self.n_kv
        keys, values = (np.repeat(c[n, : position + 1], group, axis=1) for c in (self.keys, self.values))
        scores = note(f"kq-{n}", np.einsum("hd,shd->hs", q, keys) / np.float32(np.sqrt(self.dim)))
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares = note(f"kq_soft_max-{n}", shares / shares.sum(axis=1, keepdims=True))
        return note(f"kqv-{n}", np.einsum("hs,shd->hd", shares, values).reshape(-1))

    def answer(self, words: Words, ids: list[int]) -> str:
        """Greedy text."""
        logits, _ = self.run(ids)
        said: list[int] = []
        while len(said) < ANSWER and int(logits.argmax()) not in words.tokenizer.stop_ids:
            said.append(int(logits.argmax()))
            logits = self.token(said[-1], len(ids) + len(said) - 1, {})
        return words.tokenizer.decode(said)


def stacked(steps: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """One array a step; rows of scores get as many columns as the longest."""
    arrays = {}
    for name, rows in steps.items():
        widest = max(row.shape[-1] for row in rows)
        arrays[name] = np.stack([np.pad(r, [(0, 0)] * (r.ndim - 1) + [(0, widest - r.shape[-1])]) for r in rows])
    return arrays


def main() -> None:
    """Repair the engine round by round."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL
    with ggufkit.open(path) as gguf:
        words = Words.of(gguf)
        ids = words.tokenizer.encode(words.render([message("user", PROMPT)]))
        engine = MyEngine(gguf)
        print(f"{path.name}, {len(ids)} tokens of prompt\n\nbefore: {engine.answer(words, ids)!r}\n")
        with tempfile.TemporaryDirectory() as folder:
            for round_number in range(1, 5):
                trace = Path(folder) / "mine.safetensors"
                steps = stacked(engine.run(ids)[1])
                Trace(steps, tuple(ids), mode="decode", engine="mine", prompt=PROMPT).save(trace)
                start = time.perf_counter()
                found = diagnosis.diagnose(gguf, trace).numbers
                seconds = time.perf_counter() - start
                if not found.faults:
                    break
                fault = found.faults[0]
                print(f"round {round_number} ({seconds:.1f} s): since {fault.places[0]}: {fault.title}")
                engine.bugs -= {fault.name, *(name for name, _ in fault.same_numbers_as)}
        print(f"round {round_number} ({seconds:.1f} s): every one of {found.checked} steps follows\n")
        print(f"after:  {engine.answer(words, ids)!r}")


if __name__ == "__main__":
    main()
