"""One token after the other: the launches of kernels/decode.cu, and its traces.

The kernel runs any number of tokens in one launch, feeding itself the likeliest token; ids and log-probabilities
stay on the device until somebody wants them. With a trace it runs one token and also writes what is inside its
fused phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ggufkit import gpu
from ggufkit.arch import Config
from ggufkit.errors import Unsupported
from ggufkit.runtime.cuda.plan import GATES, Tables, Work
from ggufkit.runtime.cuda.weights import DeviceWeights
from ggufkit.steps import Tap

if TYPE_CHECKING:
    from ggufkit.runtime.cuda.engine import CudaCache

Floats = NDArray[np.float32]

DECODERS = ("device.cuh", "tiles.cuh", "legacy.cuh", "k_quants.cuh", "floats.cuh", "product.cuh", "model.cuh")
KERNELS = (*DECODERS, "decode.cu")
WARPS = 15  # and the courier's
MAX_SPLITS = 9
_BULK_COPIES = 90  # the compute capability that has them
_RING_MOST = 16 << 10
_PLAN_POINTERS, _PLAN_ROPE = 14, 6  # of `Plan` in decode.cu, and the place of `rope`


def model_macros(config: Config, weights: DeviceWeights, kv_half: bool) -> dict[str, int | str]:
    """The macros of model.cuh."""
    return {
        "N_EMBD": config.n_embd,
        "N_FF": config.n_ff,
        "N_HEAD": config.n_head,
        "N_HEAD_KV": config.n_head_kv,
        "HEAD_DIM": config.head_dim,
        "N_LAYER": config.n_layer,
        "N_VOCAB": config.n_vocab,
        "NORM_EPS": f"{config.norm_eps!r}f" if config.norm_eps else "0.0f",
        "QKV_BIAS": int(config.qkv_bias),
        "QK_NORM": int(config.qk_norm),
        "TYPES": f"{weights.types}u",
        "EMBD_TYPE": weights.embd.type.number,
        "KV_HALF": int(kv_half),
    }


def vector_bytes(chunks: int, types: int) -> int:
    """Shared memory of a vector of 128 · `chunks` columns: see product.cuh."""
    floats = types & (1 << 0 | 1 << 1 | 1 << 30)
    return -(-chunks * (384 + 128 + 64 + 4 + (512 if floats else 0)) // 16) * 16 + 16


def fixed_bytes(config: Config, work: Work, types: int) -> int:
    """Shared memory of a block without the rings: `SHARED_TOTAL` of decode.cu for RING_BYTES = 0."""
    chunks = -(-config.n_embd // 128)
    floats = 2 * config.n_embd + chunks + work.warps + 3 * config.head_dim + work.warps * (config.head_dim + 2) + 8
    plan = 8 * _PLAN_POINTERS
    return vector_bytes(work.vector_chunks, types) + work.slots * 64 + work.warps * GATES * 8 + plan + 4 * floats


def ring_bytes(device: gpu.Device, fixed: int, warps: int, largest_unit: int) -> int:
    """What is left of a block's shared memory as one ring a warp; 0 where the device has no bulk copies.

    Raises:
        Unsupported: the block does not fit at all.
    """
    left = device.shared_bytes - fixed
    ring = max(left, 0) // warps // 16 * 16 if device.capability >= _BULK_COPIES else 0
    if left < 0 or 0 < ring < largest_unit:
        raise Unsupported(
            f"a block of this model's decoding kernel takes {fixed + warps * largest_unit:,} bytes of shared memory",
            expected=f"at most {device.shared_bytes:,} on {device.name}",
            help="use --device cpu",
        )
    return min(ring, _RING_MOST)


class Decoder:
    """The decoding kernel of one model, with its tables and the vectors between its blocks."""

    def __init__(self, config: Config, weights: DeviceWeights, *, kv_half: bool) -> None:
        self._config = config
        self._weights = weights
        self._cupy = gpu.library()
        device = gpu.device()
        most_tiles = max(matrix.n_tiles for layer in weights.layers for matrix in layer.all)
        self._n_blocks = min(device.multiprocessors, max(most_tiles, config.n_head))
        self.work = Work(config, weights.layers, weights.head, self._n_blocks, WARPS)
        fixed = fixed_bytes(config, self.work, weights.types)
        self._ring = ring_bytes(device, fixed, WARPS, self.work.largest_unit)
        self._shared = fixed + WARPS * self._ring
        self._threads = 32 * (WARPS + (self._ring > 0))  # the courier's warp comes on top
        self._macros = {
            **model_macros(config, weights, kv_half),
            "WARPS": WARPS,
            "SLICES": self.work.slices,
            "MAX_SPLITS": MAX_SPLITS,
            "VECTOR_CHUNKS": self.work.vector_chunks,
            "SLOTS": self.work.slots,
            "RING_BYTES": self._ring,
            "GATES": GATES,
        }
        self._epoch = 1
        self._trace = Trace(config, self.work.slices)

    def compile(self) -> None:
        """Compile the kernel, or load it from CuPy's cache; may run in a thread of its own."""
        module = gpu.compile_module(KERNELS, self._macros, cooperative=True)
        self._kernel = module.get_function("decode")
        self._kernel.max_dynamic_shared_size_bytes = self._shared

    def lay_out(self) -> Tables:
        """The plan's tables, which take the processor a moment; may run in a thread of its own."""
        return self.work.tables(self._ring)

    def prepare(self, tables: Tables) -> None:
        """Put the tables on the device."""
        cupy, config = self._cupy, self._config
        arrays = [cupy.asarray(table) for table in (tables.units, tables.lists, tables.spans, tables.tiles)]
        sizes = (
            config.q_width + 2 * config.kv_width,
            config.n_head * MAX_SPLITS * config.head_dim,
            config.n_head * MAX_SPLITS * 2,
            config.n_embd,
            config.n_ff,
            self.work.slices * config.n_embd,
            self._n_blocks * 4,
        )
        starts = np.cumsum([0, *(-(-size // 16) * 16 for size in sizes)])
        words = cupy.zeros((int(starts[-1]), 2), cupy.uint32)
        pointers = [int(array.data.ptr) for array in arrays]
        pointers += [self._weights.vectors_address, self._weights.embd.address]
        pointers += [0, *(int(words.data.ptr) + 8 * int(start) for start in starts[:-1])]
        self._plan = cupy.asarray(np.array(pointers, np.uint64))
        self._kept = (*arrays, words)
        self.use_rotations()

    def use_rotations(self) -> None:
        """Tell the plan where the rotations lie now."""
        at = _PLAN_ROPE
        self._plan[at : at + 1].set(np.array([self._weights.rope.data.ptr], np.uint64))

    def run(
        self,
        cache: CudaCache,
        n_tokens: int,
        ids: Any,
        chances: Any,
        logits: Any = None,
        trace: Any = None,
        scores: Any = None,
        n_given: int = 1,
    ) -> None:
        """Launch `n_tokens` tokens after what the cache holds; the cache's length grows.

        Args:
            ids: int32 [n_tokens + 1] on the device; the first `n_given` are given, the others are written.
            chances: float32 [n_tokens + 1], the log-probabilities of the ids written.
            logits: float32 [V] for the last token's, or None.
        """
        sizes = (np.int32(number) for number in (cache.n_ctx, cache.length, n_tokens, n_given))
        optional = (0 if array is None else array for array in (logits, trace, scores))
        arguments = (self._plan, cache.k, cache.v, *sizes, np.uint32(self._epoch), ids, chances, *optional)
        self._kernel((self._n_blocks,), (self._threads,), arguments, shared_mem=self._shared)
        self._epoch += n_tokens * (self._config.n_layer + 1)
        cache.length += n_tokens

    def traced(self, cache: CudaCache, ids: Any, chances: Any, logits: Any, tap: Tap) -> None:
        """Run one token and show its steps to the tap."""
        trace = self._cupy.empty(self._trace.size, self._cupy.float32)
        n_keys = cache.length + 1
        scores = self._cupy.empty((self._config.n_layer, self._config.n_head, n_keys), self._cupy.float32)
        self.run(cache, 1, ids, chances, logits, trace, scores)
        self._trace.show(trace.get(), scores.get(), logits.get(), tap)


class Trace:
    """Where the kernel writes the steps of one token: `TRACE_SIZE` of decode.cu, taken apart."""

    def __init__(self, config: Config, slices: int) -> None:
        self._config = config
        widths = {
            "attn_norm": config.n_embd,
            "proj": config.q_width + 2 * config.kv_width,
            "bias": config.q_width + 2 * config.kv_width,
            "norm": config.q_width + config.kv_width,
            "rope": config.q_width + config.kv_width,
            "kqv": config.q_width,
            "attn_out": config.n_embd,
            "ffn_inp": config.n_embd,
            "ffn_norm": config.n_embd,
            "ffn_gate": config.n_ff,
            "ffn_up": config.n_ff,
            "ffn_act": config.n_ff,
            "slices": slices * config.n_embd,
            "l_out": config.n_embd,
        }
        ends = np.cumsum(list(widths.values()))
        self._places = {
            name: slice(int(end) - width, int(end)) for (name, width), end in zip(widths.items(), ends, strict=True)
        }
        self.layer_size = int(ends[-1])
        self.size = config.n_layer * self.layer_size + 2 * config.n_embd

    def show(self, trace: Floats, scores: Floats, logits: Floats, tap: Tap) -> None:
        """Hand the steps to the tap in the order of the pass."""
        outer = trace[-2 * self._config.n_embd :].reshape(2, 1, -1)
        _offer(tap, "embd", None, outer[0])
        for layer in range(self._config.n_layer):
            flat = trace[layer * self.layer_size : (layer + 1) * self.layer_size]
            steps = {name: flat[where][None] for name, where in self._places.items()}
            for step, array in self._layer_steps(steps, scores[layer][None]):
                _offer(tap, step, layer, array)
        _offer(tap, "result_norm", None, outer[1])
        _offer(tap, "result_output", None, logits[None])

    def _layer_steps(self, steps: dict[str, Floats], scores: Floats) -> Sequence[tuple[str, Floats]]:
        config = self._config
        cuts = [config.q_width, config.q_width + config.kv_width]
        shown = [("attn_norm", steps["attn_norm"])]
        shown += zip(("q_proj", "k_proj", "v_proj"), np.split(steps["proj"], cuts, axis=1), strict=True)
        if config.qkv_bias:
            shown += zip(("q_bias", "k_bias", "v_bias"), np.split(steps["bias"], cuts, axis=1), strict=True)
        for name in ("norm", "rope") if config.qk_norm else ("rope",):
            q, k = np.split(steps[name].reshape(1, -1, config.head_dim), [config.n_head], axis=1)
            shown += [(f"q_{name}", q), (f"k_{name}", k)]
        shown += [("kq", scores), ("kq_soft_max", _soft_max(scores))]
        shown += [(name, steps[name]) for name in ("kqv", "attn_out", "ffn_inp", "ffn_norm", "ffn_gate", "ffn_up")]
        slices = steps["slices"].reshape(-1, config.n_embd)
        return [*shown, ("ffn_act", steps["ffn_act"]), ("ffn_out", slices.sum(0)[None]), ("l_out", steps["l_out"])]


def _soft_max(scores: Floats) -> Floats:
    with np.errstate(all="ignore"):
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)


def _offer(tap: Tap, step: str, layer: int | None, array: Floats) -> None:
    if tap.wants(step, layer):
        tap(step, layer, array)
