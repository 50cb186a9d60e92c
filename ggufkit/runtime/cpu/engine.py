"""The fast CPU engine: the reference's forward pass, step for step, on packed weights.

Every named step is made as an array of its own and shown to the tap that asks for it, so what is traced is what
runs. The heavy steps are kernels on all processors; a prompt is computed in chunks, so that memory does not grow
with its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggufkit.arch import Config, expected_tensors
from ggufkit.container import GGUF
from ggufkit.errors import UsageError
from ggufkit.runtime.cpu import kernels
from ggufkit.runtime.cpu.crew import Job, crew
from ggufkit.runtime.cpu.packed import Matrix, PackedWeights, Progress
from ggufkit.runtime.cpu.simd import LANES, TILE_COLUMNS
from ggufkit.runtime.engine import Edit, Logits, Which, check_ids, runnable
from ggufkit.steps import Tap

Floats = NDArray[np.float32]

CHUNK = 512  # positions computed together
_FEW = 4  # positions up to which multiplying one by one is faster than widening the weights
_TASK = 1 << 17  # weights in a task of `matvec`


class CpuCache:
    """Keys and values of one sequence, [n_head_kv, n_ctx, head_dim] a layer. See `runtime.engine.Cache`."""

    def __init__(self, config: Config, n_ctx: int) -> None:
        if n_ctx < 1:
            raise UsageError(f"a context of {n_ctx} positions holds nothing")
        self.n_ctx = n_ctx
        self.length = 0
        shape = (config.n_head_kv, n_ctx, config.head_dim)
        size = int(np.prod(shape))
        room = size + (TILE_COLUMNS + 1) * config.head_dim  # a tile may read, but not use, what lies behind

        def layers() -> list[Floats]:
            return [np.empty(room, np.float32)[:size].reshape(shape) for _ in range(config.n_layer)]

        try:
            self.k, self.v = layers(), layers()
        except MemoryError as error:
            message = (
                f"the keys and values of {n_ctx:,} positions take {8 * size * config.n_layer / 1e9:,.1f} GB,"
                " which this machine lacks"
            )
            raise UsageError(message, help="give a smaller context (--ctx)") from error

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        if not 0 <= length <= self.length:
            raise UsageError(f"a cache of {self.length} positions cannot be cut to {length}")
        self.length = length


@dataclass(frozen=True, slots=True)
class Viewer:
    """Shows the steps of one layer to the tap, if there is one."""

    tap: Tap | None
    layer: int | None = None

    def wants(self, step: str) -> bool:
        return self.tap is not None and self.tap.wants(step, self.layer)

    def __call__(self, step: str, array: Floats) -> None:
        if self.tap is not None and self.tap.wants(step, self.layer):
            self.tap(step, self.layer, array)


class CpuEngine:
    """See `runtime.engine.Engine`.

    Args:
        gguf: an opened file; it stays open as long as the engine is used.
        note: told, in a sentence, when something takes its time for a reason (the first compilation).
        progress: told how far loading is: bytes done, bytes in all.

    Raises:
        Unsupported, FormatError, NewerThanTool: as `engine.runnable`.
    """

    name = "cpu"
    device = "cpu"
    dtype = np.dtype(np.float32)

    def __init__(
        self, gguf: GGUF, *, note: Callable[[str], None] | None = None, progress: Progress | None = None
    ) -> None:
        self.config = runnable(gguf)
        if note is not None and not _compiled():
            note("compiling the CPU kernels for this machine; this is done once and takes some seconds")
        self.weights = PackedWeights(gguf, _matrices(self.config), progress)
        self._crew = crew()

    def new_cache(self, n_ctx: int) -> CpuCache:
        return CpuCache(self.config, n_ctx)

    def forward(self, ids: Sequence[int], cache: CpuCache, *, logits: Which = "last", tap: Tap | None = None) -> Logits:
        check_ids(ids, cache, self.config)
        step = CHUNK if tap is None else len(ids)  # a tap sees all positions of a call at once
        with np.errstate(all="ignore"):  # a damaged model may well overflow; the probes look at what comes out
            chunks = [
                self._chunk(ids[first : first + step], cache, logits, tap, last=first + step >= len(ids))
                for first in range(0, len(ids), step)
            ]
        return chunks[-1] if logits == "last" else np.concatenate(chunks)

    def patched(self, edits: Iterable[Edit]) -> AbstractContextManager[None]:
        return self.weights.patched(edits)

    # --- the forward pass --------------------------------------------------------------------------------------

    def _chunk(self, ids: Sequence[int], cache: CpuCache, logits: Which, tap: Tap | None, *, last: bool) -> Logits:
        """All layers for some positions; their logits, of which only the last chunk's matter for `last`."""
        angles = self._angles(cache.length, len(ids))
        show = Viewer(tap)
        x = self.weights.rows("token_embd.weight", ids)
        show("embd", x)
        for layer in range(self.config.n_layer):
            x = self._layer(layer, x, cache, angles, Viewer(tap, layer))
        cache.length += len(ids)
        if logits == "last":
            if not last:
                return np.empty((0, self.config.n_vocab), np.float32)
            x = x[-1:]
        x = self._norm(x, "output_norm.weight")
        show("result_norm", x)
        (result,) = self._linear(x, _head(self.config))
        show("result_output", result)
        return result

    def _layer(self, layer: int, x: Floats, cache: CpuCache, angles: tuple[Floats, Floats], show: Viewer) -> Floats:
        attended = self._attention(layer, x, cache, angles, show)
        (out,) = self._linear(attended, f"blk.{layer}.attn_output.weight")
        show("attn_out", out)
        x = out + x
        show("ffn_inp", x)
        return self._feed_forward(layer, x, show)

    def _feed_forward(self, layer: int, x: Floats, show: Viewer) -> Floats:
        normed = self._norm(x, f"blk.{layer}.ffn_norm.weight")
        show("ffn_norm", normed)
        gate, up = self._linear(normed, f"blk.{layer}.ffn_gate.weight", f"blk.{layer}.ffn_up.weight")
        show("ffn_gate", gate)
        show("ffn_up", up)
        act = np.empty_like(gate)
        self._crew.run(Job(kernels.silu_times, len(x), (gate, up, act)))
        show("ffn_act", act)
        (out,) = self._linear(act, f"blk.{layer}.ffn_down.weight")
        show("ffn_out", out)
        x = out + x
        show("l_out", x)
        return x

    def _attention(self, layer: int, x: Floats, cache: CpuCache, angles: tuple[Floats, Floats], show: Viewer) -> Floats:
        """From the layer's input to the heads' weighted values, [T, H·D]; keys and values go into the cache."""
        n, position = len(x), cache.length
        q, k, v = self._projections(layer, x, angles, show)
        keys, values = cache.k[layer], cache.v[layer]
        keys[:, position : position + n] = k.transpose(1, 0, 2)
        values[:, position : position + n] = v.transpose(1, 0, 2)
        traced = show.wants("kq") or show.wants("kq_soft_max")
        shape = (n, self.config.n_head, position + n) if traced else (0, 0, 0)
        kq, probabilities, out = np.empty(shape, np.float32), np.zeros(shape, np.float32), np.empty_like(q)
        rows = n * self.config.n_head // self.config.n_head_kv
        n_tasks = self.config.n_head_kv * -(-rows // kernels.PANEL)
        self._crew.run(Job(kernels.attention, n_tasks, (q, keys, values, position, out, kq, probabilities)))
        show("kq", kq)
        show("kq_soft_max", probabilities)
        out = out.reshape(n, -1)
        show("kqv", out)
        return out

    def _projections(self, layer: int, x: Floats, angles: tuple[Floats, Floats], show: Viewer) -> list[Floats]:
        """Rotated queries [T, H, D], rotated keys and values [T, K, D]."""
        normed = self._norm(x, f"blk.{layer}.attn_norm.weight")
        show("attn_norm", normed)
        made = self._linear(normed, *(f"blk.{layer}.attn_{name}.weight" for name in "qkv"))
        for name, value in zip("qkv", made, strict=True):
            show(f"{name}_proj", value)
        if self.config.qkv_bias:
            for name, value in zip("qkv", made, strict=True):
                value += self.weights.vector(f"blk.{layer}.attn_{name}.bias")
                show(f"{name}_bias", value)
        q, k, v = (value.reshape(len(x), -1, self.config.head_dim) for value in made)
        if self.config.qk_norm:
            q, k = (self._norm(value, f"blk.{layer}.attn_{name}_norm.weight") for name, value in (("q", q), ("k", k)))
            show("q_norm", q)
            show("k_norm", k)
        for name, value in (("q_rope", q), ("k_rope", k)):
            kernels.rotate(value, *angles)
            show(name, value)
        return [q, k, v]

    # --- what steps are made of --------------------------------------------------------------------------------

    def _linear(self, x: Floats, *names: str) -> list[Floats]:
        """x [T, in] by each of these matrices → [T, out]."""
        matrices = [self.weights.matrix(name) for name in names]
        if len(x) <= _FEW:
            return self._by_vector(x, matrices)
        return self._by_tile(x, matrices)

    def _by_vector(self, x: Floats, matrices: list[Matrix]) -> list[Floats]:
        outs = [np.empty((len(x), len(m.data) * LANES), np.float32) for m in matrices]
        jobs = []
        for t, row in enumerate(x):
            for m, out in zip(matrices, outs, strict=True):
                sums = None if m.mins is None else row.reshape(-1, m.group).sum(axis=-1)
                span = max(_TASK // (LANES * m.columns), 1)
                arguments = (m.data, m.scales, m.mins, m.group, row, sums, out[t], span)
                jobs.append(Job(kernels.matvec, -(-len(m.data) // span), arguments))
        self._crew.run(*jobs)
        return [np.ascontiguousarray(out[:, : m.rows]) for m, out in zip(matrices, outs, strict=True)]

    def _by_tile(self, x: Floats, matrices: list[Matrix]) -> list[Floats]:
        n_tiles = -(-len(x) // TILE_COLUMNS)
        arranged = np.empty((n_tiles, x.shape[1], TILE_COLUMNS), np.float32)
        self._crew.run(Job(kernels.arrange, n_tiles, (x, arranged)))
        outs = [np.empty((n_tiles * TILE_COLUMNS, len(m.data) * LANES), np.float32) for m in matrices]
        strip = kernels.PANEL * kernels.STRIP_PANELS // LANES
        self._crew.run(
            *(
                Job(kernels.matmul, -(-len(m.data) // strip), (m.data, m.scales, m.mins, m.group, arranged, out))
                for m, out in zip(matrices, outs, strict=True)
            )
        )
        return [np.ascontiguousarray(out[: len(x), : m.rows]) for m, out in zip(matrices, outs, strict=True)]

    def _norm(self, x: Floats, name: str) -> Floats:
        """RMS norm over the last axis, weight applied."""
        out = np.empty_like(x)
        width = x.shape[-1]
        rows, made = x.reshape(-1, width), out.reshape(-1, width)
        self._crew.run(Job(kernels.rms_norm, len(rows), (rows, self.weights.vector(name), self.config.norm_eps, made)))
        return out

    def _angles(self, position: int, n: int) -> tuple[Floats, Floats]:
        """Cosines and sines of the rotary embedding, float32 [n, D/2] each, computed in double precision."""
        half = self.config.head_dim // 2
        positions = np.arange(position, position + n) / self.config.rope_scale
        angles = np.outer(positions, self.config.rope_base ** (-np.arange(half) / half))
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _head(config: Config) -> str:
    return "token_embd.weight" if config.tied else "output.weight"


def _matrices(config: Config) -> Iterator[str]:
    """The names of the matrices that are multiplied with."""
    for name, expected in expected_tensors(config).items():
        if len(expected.shape) == 2 and (expected.layer is not None or name == _head(config)):
            yield name


def _compiled() -> bool:
    """Whether kernels of an earlier run are on disk."""
    cached = Path(kernels.matvec.stats.cache_path)  # type: ignore[attr-defined]
    return any(cached.glob("kernels.matvec-*.nbi"))
