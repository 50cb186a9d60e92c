"""Many positions at once: kernels/prompt.cu around the matrix products of cuBLAS.

The packed weights of a layer are widened into a buffer in the products' precision (f16, or f32 in exact mode), or
all layers' once when the device's memory has plenty of room. Products are [positions, in] by [out, in] into
float32. Long prompts are run in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ggufkit import gpu
from ggufkit.arch import Config
from ggufkit.runtime.cuda.decode import DECODERS, model_macros, vector_bytes
from ggufkit.runtime.cuda.plan import LayerMatrices, Matrix
from ggufkit.runtime.cuda.weights import DeviceWeights
from ggufkit.steps import Tap

if TYPE_CHECKING:
    from ggufkit.runtime.cuda.engine import CudaCache

KERNELS = (*DECODERS, "prompt.cu")
#: positions run together
CHUNK = 2048
#: rows of the head that are widened together for the logits of all positions
_HEAD_ROWS = 16_384
#: all layers stay widened when that takes less than this share of the free memory
_KEPT_SHARE = 0.2
_SCRATCH = 128  # bytes of shared memory of the kernels that sum over a block
_TILE = 64  # positions of a block of `attend`, keys of a tile
_EXACT_ROWS = 16  # positions of a block of `attend_exact`


_CUDA_R_32F, _CUDA_R_16F = 0, 2  # cudaDataType
_ONE, _ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)


@dataclass(frozen=True, slots=True)
class _Wide:
    """A layer's matrices in the products' precision, [out, in] each; `gate` has the rows of gate and up."""

    qkv: Any
    out: Any
    gate: Any
    down: Any


@dataclass(frozen=True, slots=True)
class _Room:
    """What a chunk of n positions needs on its way through the layers; made once for chunks of one length.

    Attributes:
        x: the residual stream, f32 [n, E].
        power: of the rows of the product that comes next, f32 [n].
        normed, narrowed, activated: inputs of products, [n, E], [n, H·D], [n, F].
        qkv, gate, product: outputs of products, f32 [n, (H + 2K)·D], [n, rows of gate and up], [n, E].
        queries, attended: f32 [n, H·D].
        act: f32 [n, F].
    """

    x: Any
    power: Any
    normed: Any
    narrowed: Any
    activated: Any
    qkv: Any
    gate: Any
    product: Any
    queries: Any
    attended: Any
    act: Any


class PromptRunner:
    """Runs chunks of a prompt; see the module.

    Args:
        half: products in f16 rather than f32.
    """

    def __init__(self, config: Config, weights: DeviceWeights, *, half: bool) -> None:
        self._config = config
        self._weights = weights
        self._cupy = gpu.library()
        self._wide_type, self._kind = (self._cupy.float16, _CUDA_R_16F) if half else (self._cupy.float32, _CUDA_R_32F)
        self._macros = {**model_macros(config, weights, half), "WIDE_HALF": int(half)}
        self._kept: list[_Wide] | None = None
        self._last_room: _Room | None = None
        self._buffer: _Wide | None = None
        self._stale = True
        self._functions: dict[str, Any] = {}
        self._compiling: Future[None] | None = None
        self._tiled = half and config.head_dim % 16 == 0 and config.head_dim <= 128

    def begin(self, pool: Executor) -> None:
        """Start to compile in another thread; the first prompt waits for it."""
        self._compiling = pool.submit(self.compile)

    def compile(self) -> None:
        """Compile the kernels, or load them from CuPy's cache, and load cuBLAS."""
        self._cublas, self._handle = gpu.blas()
        self._module = gpu.compile_module(KERNELS, self._macros)

    def forget(self) -> None:
        """The packed weights have changed: what was widened from them is no longer true."""
        self._stale = True

    # --- the pass ----------------------------------------------------------------------------------------------

    def run(self, ids: Any, cache: CudaCache, tap: Tap | None) -> Any:
        """Run a chunk, int32 [n] on the device, after what the cache holds; the final norm's output, f32 [n, E]."""
        n = len(ids)
        show = _Viewer(self._cupy, tap)
        self._prepare_weights()
        room = self._room(n)
        self._launch("embed_rows", (n,), 256, self._weights.embd.address, ids, room.x)
        show("embd", None, room.x)
        for layer in range(self._config.n_layer):
            self._layer(layer, room, cache, show)
        cache.length += n
        normed = self._cupy.empty_like(room.x)
        self._between_layers(self._config.n_layer, room, "output_norm.weight", None, normed, show)
        return normed

    def _room(self, n: int) -> _Room:
        if self._last_room is None or len(self._last_room.x) != n:
            self._last_room = None  # free the memory first
            config, floats = self._config, self._cupy.float32
            width, gates = config.q_width, _wide_shape(self._weights.layers[0], "gate")[0]
            wide = (config.n_embd, width, config.n_ff)
            plain = (width + 2 * config.kv_width, gates, config.n_embd, width, width, config.n_ff)
            with gpu.memory_for(f"a prompt of {n:,} positions at once"):
                self._last_room = _Room(
                    self._cupy.empty((n, config.n_embd), floats),
                    self._cupy.empty(n, floats),
                    *(self._empty(n, columns) for columns in wide),
                    *(self._cupy.empty((n, columns), floats) for columns in plain),
                )
        return self._last_room

    def _layer(self, layer: int, room: _Room, cache: CudaCache, show: _Viewer) -> None:
        """One layer. The output of its down projection is left in `room.product`, to be added by whoever norms next."""
        config, wide, n = self._config, self._wide(layer), len(room.x)
        exact = show.array("attn_norm", layer, n, config.n_embd)
        self._between_layers(layer, room, f"blk.{layer}.attn_norm.weight", room.normed, exact, show)
        show("attn_norm", layer, exact)
        self._product(room.normed, wide.qkv, room.qkv)
        self._attention(layer, room, cache, show)
        width = np.int32(config.q_width)
        self._launch("narrow", (n,), 256, room.attended, width, room.narrowed, room.power, shared=_SCRATCH)
        self._product(room.narrowed, wide.out, room.product)
        added, exact = (show.array(step, layer, n, config.n_embd) for step in ("attn_out", "ffn_norm"))
        self._add_norm(room, room.product, f"blk.{layer}.ffn_norm.weight", room.normed, added, exact)
        show("attn_out", layer, added)
        show("ffn_inp", layer, room.x)
        show("ffn_norm", layer, exact)
        self._product(room.normed, wide.gate, room.gate)
        self._activate(layer, room, show)
        self._product(room.activated, wide.down, room.product)

    def _between_layers(self, layer: int, room: _Room, weight: str, wide: Any, exact: Any, show: _Viewer) -> None:
        """Add what the layer before left, and norm."""
        added = show.array("ffn_out", layer - 1, *room.x.shape) if layer else None
        self._add_norm(room, room.product if layer else None, weight, wide, added, exact)
        if layer:
            show("ffn_out", layer - 1, added)
            show("l_out", layer - 1, room.x)

    def _add_norm(self, room: _Room, product: Any, weight: str, wide: Any, added: Any, exact: Any) -> None:
        norm = self._weights.vector_address(weight)
        arguments = (room.x, product, room.power, norm, wide, room.power, added, exact)
        self._launch("add_norm", (len(room.x),), 256, *arguments, shared=_SCRATCH)

    def _attention(self, layer: int, room: _Room, cache: CudaCache, show: _Viewer) -> None:
        """From the product of q, k and v to the heads' weighted values, `room.attended`."""
        config = self._config
        n, width = room.qkv.shape
        turned_width = config.q_width + config.kv_width
        traced = {
            name: show.any(names, layer, n, size)
            for name, names, size in (
                ("proj", ("q_proj", "k_proj", "v_proj"), width),
                ("bias", ("q_bias", "k_bias", "v_bias"), width),
                ("norm", ("q_norm", "k_norm"), turned_width),
                ("rope", ("q_rope", "k_rope"), turned_width),
            )
        }
        names = (f"blk.{layer}.attn_{name}" for name in ("q.bias", "q_norm.weight", "k_norm.weight"))
        vectors = (self._weights.vector_address(name) for name in names)
        where = (np.int32(cache.n_ctx), np.int32(cache.length))
        heads = config.n_head + 2 * config.n_head_kv
        arguments = (
            room.qkv,
            room.power,
            *vectors,
            self._weights.rope,
            room.queries,
            cache.k,
            cache.v,
            *where,
            np.int32(layer),
        )
        self._launch("turn", (heads, n), 32, *arguments, *traced.values())
        self._show_heads(layer, traced, show)
        scores = show.any(("kq", "kq_soft_max"), layer, n * config.n_head, cache.length + n)
        arguments = (room.queries, cache.k, cache.v, *where, np.int32(n), np.int32(layer), room.attended, scores)
        if self._tiled:
            shared = 2 * _TILE * (config.head_dim + 8) * 2
            self._launch("attend", (-(-n // _TILE), config.n_head), 128, *arguments, shared=shared)
        else:
            self._launch("attend_exact", (config.n_head, -(-n // _EXACT_ROWS)), 256, *arguments)
        if scores is not None:
            shape = (n, config.n_head, cache.length + n)
            show("kq", layer, scores.reshape(shape))
            keys = np.int32(cache.length + n)
            self._launch("soften", (n * config.n_head,), 256, scores, keys, np.int32(cache.length), shared=_SCRATCH)
            show("kq_soft_max", layer, scores.reshape(shape))
        show("kqv", layer, room.attended)

    def _show_heads(self, layer: int, traced: dict[str, Any], show: _Viewer) -> None:
        config = self._config
        cuts = [0, config.q_width, config.q_width + config.kv_width, config.q_width + 2 * config.kv_width]
        for name, array in traced.items():
            if array is None or (name == "bias" and not config.qkv_bias) or (name == "norm" and not config.qk_norm):
                continue
            flat = name in ("proj", "bias")
            for i, letter in enumerate("qkv" if flat else "qk"):
                part = array[:, cuts[i] : cuts[i + 1]]
                show(f"{letter}_{name}", layer, part if flat else part.reshape(len(part), -1, config.head_dim))

    def _activate(self, layer: int, room: _Room, show: _Viewer) -> None:
        """silu(gate) · up as the next product's input."""
        n, width = room.gate.shape
        gates, ups = (show.any(("ffn_gate", "ffn_up"), layer, n, self._config.n_ff) for _ in range(2))
        apart = 8 if self._weights.layers[layer].up is None else self._config.n_ff
        made = (room.act, room.activated, room.power, gates, ups)
        arguments = (room.gate, room.power, np.int32(width), np.int32(apart), *made)
        self._launch("silu_times", (n,), 256, *arguments, shared=_SCRATCH)
        show("ffn_gate", layer, gates)
        show("ffn_up", layer, ups)
        show("ffn_act", layer, room.act)

    # --- logits ------------------------------------------------------------------------------------------------

    def last_logits(self, normed: Any) -> Any:
        """The head by one position, f32 [V]."""
        head = self._weights.head
        out = self._cupy.empty(head.n_rows, self._cupy.float32)
        shared = vector_bytes(-(-self._config.n_embd // 128), self._weights.types) + 4 * 16 * 4
        grid = (min(head.n_tiles, 16 * gpu.device().multiprocessors),)
        arguments = (head.address, np.int32(head.type.number), np.int32(head.n_rows), normed, out)
        self._launch("project", grid, 128, *arguments, shared=shared)
        return out

    def all_logits(self, normed: Any) -> Any:
        """The head by all positions, f32 [n, V]."""
        cupy, head = self._cupy, self._weights.head
        n, width = normed.shape
        narrowed, power = self._empty(n, width), cupy.empty(n, cupy.float32)
        self._launch("narrow", (n,), 256, normed, np.int32(width), narrowed, power, shared=_SCRATCH)
        with gpu.memory_for(f"the logits of {n:,} positions"):
            out = cupy.empty((n, head.n_rows), cupy.float32)
        slab = self._empty(min(_HEAD_ROWS, head.n_rows), width)
        for first in range(0, head.n_rows, _HEAD_ROWS):
            rows = min(_HEAD_ROWS, head.n_rows - first)
            self._widen([(head, slab, first, rows)])
            self._product(narrowed, slab[:rows], out[:, first:])
        out *= power[:, None]
        return out

    # --- weights -----------------------------------------------------------------------------------------------

    def _prepare_weights(self) -> None:
        """Widen all layers if there is room to keep them, else make the buffer for one."""
        if self._kept is None and self._buffer is None:
            with gpu.memory_for("a layer's weights at full width"):
                if self._fits():
                    self._kept = [self._wide_buffers(layer) for layer in self._weights.layers]
                else:
                    self._buffer = self._wide_buffers(self._weights.layers[0])
        if self._kept is not None and self._stale:
            for layer, wide in zip(self._weights.layers, self._kept, strict=True):
                self._widen_layer(layer, wide)
        self._stale = False

    def _fits(self) -> bool:
        elements = sum(int(np.prod(_wide_shape(layer, name))) for layer in self._weights.layers for name in _WIDE_NAMES)
        free, _ = self._cupy.cuda.runtime.memGetInfo()
        pooled = self._cupy.get_default_memory_pool().free_bytes()
        return elements * np.dtype(self._wide_type).itemsize < _KEPT_SHARE * (free + pooled)

    def _wide_buffers(self, layer: LayerMatrices) -> _Wide:
        return _Wide(*(self._empty(*_wide_shape(layer, name)) for name in _WIDE_NAMES))

    def _wide(self, layer: int) -> _Wide:
        if self._kept is not None:
            return self._kept[layer]
        assert self._buffer is not None
        self._widen_layer(self._weights.layers[layer], self._buffer)
        return self._buffer

    def _widen_layer(self, layer: LayerMatrices, wide: _Wide) -> None:
        q, k, v = layer.q.n_rows, layer.k.n_rows, layer.v.n_rows
        jobs = [(layer.q, wide.qkv, 0, q), (layer.k, wide.qkv[q:], 0, k), (layer.v, wide.qkv[q + k :], 0, v)]
        jobs += [(layer.out, wide.out, 0, layer.out.n_rows), (layer.down, wide.down, 0, layer.down.n_rows)]
        if layer.up is None:
            jobs.append((layer.gate, wide.gate, 0, len(wide.gate)))
        else:
            rows = layer.gate.n_rows
            jobs += [(layer.gate, wide.gate, 0, rows), (layer.up, wide.gate[rows:], 0, rows)]
        self._widen(jobs)

    def _widen(self, jobs: list[tuple[Matrix, Any, int, int]]) -> None:
        """Widen matrices: of each, `rows` rows from tile row `first` on (a multiple of 16) into an array."""
        table = np.zeros(len(jobs), _WIDENING)
        at = 0
        for job, (matrix, to, first, rows) in zip(table, jobs, strict=True):
            from_ = matrix.address + first // 16 * matrix.n_chunks * matrix.type.nbytes
            job["pointers"] = from_, int(to.data.ptr)
            job["ints"] = matrix.type.number, matrix.n_columns, rows, at
            at += -(-rows // 16) * matrix.n_chunks
        device_table = self._cupy.asarray(table.view(np.uint8))
        self._launch("widen", (-(-at // 8),), 256, device_table, np.int32(len(jobs)), np.int32(at))

    # --- what it is made of ------------------------------------------------------------------------------------

    def _empty(self, *shape: int) -> Any:
        return self._cupy.empty(shape, self._wide_type)

    def _product(self, x: Any, weight: Any, out: Any) -> None:
        """out = x [n, in] by weight [out, in], float32; `out` may be some columns of a wider array."""
        rows, width = weight.shape
        self._cublas.gemmEx(
            self._handle, self._cublas.CUBLAS_OP_T, self._cublas.CUBLAS_OP_N,
            rows, len(x), width, _ONE.ctypes.data, weight.data.ptr, self._kind, width, x.data.ptr, self._kind, width,
            _ZERO.ctypes.data, out.data.ptr, _CUDA_R_32F, out.strides[0] // 4,
            self._cublas.CUBLAS_COMPUTE_32F, self._cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip

    def _launch(self, name: str, grid: tuple[int, ...], threads: int, *arguments: Any, shared: int = 0) -> None:
        function = self._functions.get(name)
        if function is None:
            if self._compiling is not None:
                self._compiling.result()
            function = self._functions[name] = self._module.get_function(name)
        given = tuple(0 if argument is None else argument for argument in arguments)
        function(grid, (threads,), given, shared_mem=shared)


#: `Widening` of prompt.cu
_WIDENING = np.dtype([("pointers", np.uint64, 2), ("ints", np.int32, 4)])
_WIDE_NAMES = ("qkv", "out", "gate", "down")


def _wide_shape(layer: LayerMatrices, name: str) -> tuple[int, int]:
    rows: dict[str, Callable[[], tuple[int, int]]] = {
        "qkv": lambda: (layer.q.n_rows + layer.k.n_rows + layer.v.n_rows, layer.q.n_columns),
        "out": lambda: (layer.out.n_rows, layer.out.n_columns),
        "gate": lambda: (16 * layer.gate.n_tiles if layer.up is None else 2 * layer.gate.n_rows, layer.gate.n_columns),
        "down": lambda: (layer.down.n_rows, layer.down.n_columns),
    }
    return rows[name]()


class _Viewer:
    """Shows steps to the tap, and makes the arrays that kernels write them to."""

    def __init__(self, cupy: Any, tap: Tap | None) -> None:
        self._cupy = cupy
        self._tap = tap

    def array(self, step: str, layer: int | None, *shape: int) -> Any:
        """An array for a step that is wanted; None for one that is not."""
        return self.any((step,), layer, *shape)

    def any(self, steps: tuple[str, ...], layer: int | None, *shape: int) -> Any:
        """The same for steps that are written together."""
        if self._tap is None or not any(self._tap.wants(step, layer) for step in steps):
            return None
        with gpu.memory_for(f"the step {steps[0]} of {shape[0]:,} rows"):
            return self._cupy.empty(shape, self._cupy.float32)

    def __call__(self, step: str, layer: int | None, array: Any) -> None:
        if self._tap is not None and array is not None and self._tap.wants(step, layer):
            self._tap(step, layer, self._cupy.asnumpy(array))
