"""From the file to tiles in device memory.

Several threads read pieces of the file into page-locked buffers; each piece is copied to a staging area on the device
while the next are read; as soon as a run of rows is there, a kernel packs it into tiles (quants/cuda/tiles.cuh).
Nothing grows on the way: a type that has a decoder keeps its bits. The others, which no Qwen of today is shipped
in, become signed bytes with an f32 scale for 16 (W8), which loses nothing, or F32 for plain numbers.

All tiles lie in one allocation, so that a model that does not fit is refused before anything is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ggufkit import gpu, quants
from ggufkit.arch import Config
from ggufkit.container import GGUF, Tensor
from ggufkit.errors import Unsupported, UsageError
from ggufkit.runtime.cuda.plan import TILE_TYPES, LayerMatrices, Matrix, TileType
from ggufkit.runtime.engine import Edit, apply_edits
from ggufkit.runtime.weights import edits_within

Bytes = NDArray[np.uint8]
Progress = Callable[[int, int], None]

KERNELS = ("device.cuh", "tiles.cuh", "repack.cu")
_THREADS = 6
_BUFFERS = 16
_PIECES = (1 << 20, 4 << 20)  # bytes of one read and one copy; of large models
_LARGE = 2 << 30  # bytes of weights
_STAGE = 64 << 20  # bytes of rows that are packed together
_ALIGNMENT = 256
_VECTOR_ALIGNMENT = 32  # floats
#: bytes of 16 elements of W8 before they are packed: an f32 scale, signed bytes
_W8_RAW = 20


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor's rows as the packing kernel reads them.

    Attributes:
        type: of the tiles.
        row_bytes: of a row as it comes to the device.
        converted: the rows must be made from the file's by `_convert`.
    """

    tensor: Tensor
    type: TileType
    row_bytes: int
    converted: bool


@dataclass(frozen=True, slots=True)
class _Job:
    """Tiles of one matrix: `count` from `first` on, and where their rows come from (gate and up: two tensors)."""

    matrix: Matrix
    sources: tuple[_Source, ...]
    first: int
    count: int

    @property
    def rows(self) -> tuple[int, int]:
        """The first row of each source, and how many."""
        begin = self.first * self.matrix.rows_a_tile
        return begin, min(self.count * self.matrix.rows_a_tile, self.matrix.n_rows - begin)

    @property
    def raw_bytes(self) -> int:
        return sum(_aligned(self.rows[1] * source.row_bytes) for source in self.sources)


class DeviceWeights:
    """The model's tensors on the device: allocated when made, filled by `load`.

    Args:
        gguf: an opened file; it stays open as long as edits may come.
        config: its hyperparameters, from `engine.runnable`.

    Attributes:
        layers, head, embd: the matrices as tiles.
        types: a bit for each tile type that occurs.
        converted: the file's types that are not run as they are packed.

    Raises:
        DeviceError: the model does not fit.
        Unsupported: a tensor's type is not decoded.
    """

    def __init__(self, gguf: GGUF, config: Config) -> None:
        self._gguf = gguf
        self._config = config
        self._cupy = gpu.library()
        self._edits: dict[str, list[Edit]] = {}
        self._planned: list[_Job] = []
        self.converted: set[str] = set()
        layers = [self._plan_layer(f"blk.{layer}.") for layer in range(config.n_layer)]
        embd = self._plan_matrix("token_embd.weight")
        head = embd if config.tied else self._plan_matrix("output.weight")
        self._place()
        matrices = [job.matrix for job in self._planned]
        self.embd, self.head = matrices[embd], matrices[head]
        self.layers = [_layer_of([None if i is None else matrices[i] for i in layer]) for layer in layers]
        self.types = 0
        for matrix in matrices:
            self.types |= 1 << matrix.type.number
        self._lay_out_vectors()
        self._rope = self._cupy.empty((0, config.head_dim // 2, 2), np.float32)

    def load(self, progress: Progress | None = None) -> None:
        """Bring everything to the device; `progress` is told bytes done and bytes in all."""
        self._packer = gpu.compile_module(KERNELS, {"TYPES": f"{self.types}u"})
        self._load_vectors()
        self._upload(self._planned, progress)

    # --- planning ----------------------------------------------------------------------------------------------

    def _plan_matrix(self, *names: str) -> int:
        """Note that these tensors (one, or gate and up) make one matrix; its number."""
        sources = tuple(self._source(self._gguf.tensor(name)) for name in names)
        rows, columns = sources[0].tensor.shape
        matrix = Matrix(0, sources[0].type, rows, columns, paired=len(names) == 2)
        self._planned.append(_Job(matrix, sources, 0, matrix.n_tiles))
        return len(self._planned) - 1

    def _plan_layer(self, prefix: str) -> list[int | None]:
        gate, up = prefix + "ffn_gate.weight", prefix + "ffn_up.weight"
        numbers: list[int | None] = [
            self._plan_matrix(f"{prefix}attn_{name}.weight") for name in ("q", "k", "v", "output")
        ]
        if self._source(self._gguf.tensor(gate)).type == self._source(self._gguf.tensor(up)).type:
            numbers += [self._plan_matrix(gate, up), None]
        else:
            numbers += [self._plan_matrix(gate), self._plan_matrix(up)]
        return [*numbers, self._plan_matrix(prefix + "ffn_down.weight")]

    def _source(self, tensor: Tensor) -> _Source:
        assert tensor.type is not None  # `runnable` has refused the others
        columns = tensor.dims[0]
        if not tensor.type.decodable:
            raise Unsupported(f"{tensor.name} is {tensor.type_name}, which nobody stores in a model")
        if tensor.type_name in TILE_TYPES:
            row_bytes = tensor.type.nbytes(columns)
            return _Source(tensor, TILE_TYPES[tensor.type_name], row_bytes, self._gguf.byteorder != "little")
        self.converted.add(tensor.type_name)
        if tensor.type.is_block:
            return _Source(tensor, TILE_TYPES["W8"], columns // 16 * _W8_RAW, converted=True)
        return _Source(tensor, TILE_TYPES["F32"], 4 * columns, converted=True)

    def _place(self) -> None:
        """Allocate what all matrices take, and give each its address."""
        sizes = [_aligned(job.matrix.nbytes) for job in self._planned]
        self.nbytes = sum(sizes)
        with gpu.memory_for(f"the model ({self.nbytes / 1e9:.1f} GB of weights)"):
            self._memory = self._cupy.empty(self.nbytes, self._cupy.uint8)
        addresses = int(self._memory.data.ptr) + np.cumsum([0, *sizes])
        self._planned = [
            replace(job, matrix=replace(job.matrix, address=int(address)))
            for job, address in zip(self._planned, addresses, strict=False)
        ]

    # --- uploading ---------------------------------------------------------------------------------------------

    def _upload(self, jobs: Sequence[_Job], progress: Progress | None = None) -> None:
        """Bring matrices to the device and pack them; edits are applied on the way."""
        batches = list(_batches(jobs))
        stage_bytes = max(sum(job.raw_bytes for job in batch) for batch in batches)
        total, done = sum(job.raw_bytes for job in jobs), 0
        with gpu.memory_for("a staging area for the weights"):
            stages = [self._cupy.empty(stage_bytes, self._cupy.uint8) for _ in batches[:2]]
        with _Ferry(self._cupy, _PIECES[total > _LARGE]) as ferry:
            for number, batch in enumerate(batches):
                at = int(stages[number % 2].data.ptr)
                starts = []
                for job in batch:
                    starts.append(at)
                    for source in job.sources:
                        self._bring(ferry, source, *job.rows, at)
                        at += _aligned(job.rows[1] * source.row_bytes)
                ferry.flush()
                for job, start in zip(batch, starts, strict=True):
                    self._pack(job, start)
                done += sum(job.raw_bytes for job in batch)
                if progress is not None:
                    progress(done, total)
            self._cupy.cuda.get_current_stream().synchronize()

    def _bring(self, ferry: _Ferry, source: _Source, begin: int, rows: int, to: int) -> None:
        """Start bringing rows of a tensor to the device address `to`."""
        tensor, edits = source.tensor, self._edits.get(source.tensor.name, [])
        if not source.converted and not edits:
            ferry.carry_file(self._gguf, tensor, begin * source.row_bytes, rows * source.row_bytes, to)
            return
        file_row = (tensor.nbytes or 0) // tensor.n_rows
        raw = self._gguf.read(tensor, begin * file_row, rows * file_row)
        apply_edits(raw, edits_within(edits, begin * file_row, raw.size))
        made = self._convert(source, raw.reshape(rows, -1)) if source.converted else raw
        ferry.carry(np.ascontiguousarray(made).reshape(-1), to)

    def _convert(self, source: _Source, raw: Bytes) -> Bytes:
        """Rows of the file as rows that the packing kernel knows."""
        type_ = source.tensor.type
        assert type_ is not None
        if source.type.name == type_.name:
            return quants.to_little(type_, raw)
        if not type_.is_block:
            return quants.dequantize(type_, raw, byteorder=self._gguf.byteorder).astype("<f4").view(np.uint8)
        parts = quants.unpack(type_, raw, self._gguf.byteorder)
        made = np.empty((len(raw), parts.codes.shape[-1] // 16, _W8_RAW), np.uint8)
        repeats = made.shape[1] // parts.scales.shape[-1]
        made[..., :4] = np.repeat(parts.scales, repeats, axis=-1).astype("<f4")[..., None].view(np.uint8)
        made[..., 4:] = parts.codes.reshape(*made.shape[:2], 16).view(np.uint8)
        return made

    def _pack(self, job: _Job, upper: int) -> None:
        """Pack tiles from the rows at the device address `upper` (and, for gate and up, behind them)."""
        matrix, source, (_, rows) = job.matrix, job.sources[0], job.rows
        if matrix.paired:
            lower, n_lower = upper + _aligned(rows * source.row_bytes), rows
        else:
            lower, n_lower = upper + 8 * source.row_bytes, rows - 8
        to = matrix.address + job.first * matrix.n_chunks * matrix.type.nbytes
        ints = (matrix.rows_a_tile, rows, n_lower, source.row_bytes, matrix.n_columns, matrix.type.nbytes // 4)
        kernel = self._packer.get_function(f"repack_{matrix.type.name}")
        kernel((matrix.n_chunks, job.count), (128,), (to, upper, lower, *map(np.int32, ints)))

    # --- vectors -----------------------------------------------------------------------------------------------

    def _lay_out_vectors(self) -> None:
        """Norms and biases, float32, in one piece as model.cuh has it: q, k and v biases without a gap."""
        self._vector_at: dict[str, slice] = {}
        end = 0
        for name in self._vector_names():
            if not name.endswith(("attn_k.bias", "attn_v.bias")):
                end = -(-end // _VECTOR_ALIGNMENT) * _VECTOR_ALIGNMENT
            self._vector_at[name] = slice(end, end := end + self._gguf.tensor(name).n_elements)
        self._vectors = self._cupy.empty(end, self._cupy.float32)

    def _load_vectors(self) -> None:
        host = np.zeros(self._vectors.size, np.float32)
        for name, where in self._vector_at.items():
            host[where] = self._vector(name)
        self._vectors.set(host)

    def _vector_names(self) -> Iterator[str]:
        kinds = ["attn_norm.weight", "ffn_norm.weight"]
        kinds += [f"attn_{x}.bias" for x in "qkv"] if self._config.qkv_bias else []
        kinds += [f"attn_{x}_norm.weight" for x in "qk"] if self._config.qk_norm else []
        for layer in range(self._config.n_layer):
            yield from (f"blk.{layer}.{kind}" for kind in kinds)
        yield "output_norm.weight"

    def _vector(self, name: str) -> NDArray[np.float32]:
        tensor = self._gguf.tensor(name)
        raw = self._gguf.read(tensor)
        apply_edits(raw, self._edits.get(name, []))
        assert tensor.type is not None
        return quants.dequantize(tensor.type, raw, byteorder=self._gguf.byteorder).astype(np.float32)

    @property
    def vectors_address(self) -> int:
        """Where all norms and biases begin."""
        return int(self._vectors.data.ptr)

    def vector_address(self, name: str) -> int:
        """Where a norm's weights or a bias begin on the device; 0 for one that the model does not have."""
        where = self._vector_at.get(name)
        return 0 if where is None else self.vectors_address + 4 * where.start

    # --- rotations ---------------------------------------------------------------------------------------------

    @property
    def rope(self) -> Any:
        """The rotary embedding's cosines and sines, float32 [positions, D/2, 2]; see `reserve`."""
        return self._rope

    def reserve(self, n_positions: int) -> None:
        """Have rotations for at least that many positions."""
        if len(self._rope) >= n_positions:
            return
        config, cupy = self._config, self._cupy
        half = config.head_dim // 2
        frequencies = cupy.asarray(config.rope_base ** (-np.arange(half) / half))
        with gpu.memory_for(f"the rotations of {n_positions:,} positions"):
            self._rope = cupy.empty((n_positions, half, 2), np.float32)
        n = n_positions * half
        arguments = (self._rope, frequencies, np.int32(half), np.int32(n), np.float64(config.rope_scale))
        self._packer.get_function("rotations")((-(-n // 256),), (256,), arguments)

    # --- edits -------------------------------------------------------------------------------------------------

    @contextmanager
    def patched(self, edits: Iterable[Edit]) -> Iterator[None]:
        """With some bytes of the file replaced; what lies in device memory is put back exactly.

        Raises:
            UsageError: an edit names no tensor of the file or leaves it.
        """
        added = list(edits)
        for edit in added:
            tensor = self._gguf.tensor(edit.tensor)
            if edit.start < 0 or edit.start + len(edit.data) > (tensor.nbytes or 0):
                raise UsageError(f"an edit of {len(edit.data)} bytes at {edit.start} leaves {edit.tensor}")
        names = {edit.tensor for edit in added}
        jobs = [job for job in self._planned if names & {source.tensor.name for source in job.sources}]
        vectors = [name for name in names if name in self._vector_at]
        before = {name: list(known) for name, known in self._edits.items()}
        kept = [self._tiles_of(job.matrix).copy() for job in jobs]
        kept_vectors = [self._vectors[self._vector_at[name]].copy() for name in vectors]
        for edit in added:
            self._edits.setdefault(edit.tensor, []).append(edit)
        try:
            if jobs:
                self._upload(jobs)
            for name in vectors:
                self._vectors[self._vector_at[name]] = self._cupy.asarray(self._vector(name))
            yield
        finally:
            self._edits = before
            for job, tiles in zip(jobs, kept, strict=True):
                self._tiles_of(job.matrix)[...] = tiles
            for name, values in zip(vectors, kept_vectors, strict=True):
                self._vectors[self._vector_at[name]] = values

    def in_tiles(self, name: str) -> bool:
        """Whether a tensor lies in tiles; the others are norms and biases."""
        return any(source.tensor.name == name for job in self._planned for source in job.sources)

    def _tiles_of(self, matrix: Matrix) -> Any:
        """The packed bytes of a matrix, a view."""
        start = matrix.address - int(self._memory.data.ptr)
        return self._memory[start : start + matrix.nbytes]


class _Ferry:
    """Brings bytes to the device through page-locked buffers that several threads fill."""

    def __init__(self, cupy: Any, piece: int) -> None:
        self._piece = piece
        self._runtime = cupy.cuda.runtime
        self._stream = cupy.cuda.get_current_stream()
        with gpu.memory_for("a buffer of page-locked memory"):
            memory = cupy.cuda.alloc_pinned_memory(_BUFFERS * piece)
        whole = np.frombuffer(memory, np.uint8, _BUFFERS * piece)
        self._buffers = [whole[i * piece : (i + 1) * piece] for i in range(_BUFFERS)]
        self._copied = [cupy.cuda.Event(disable_timing=True) for _ in range(_BUFFERS)]
        self._waiting: deque[tuple[int, Future[None], int, int]] = deque()
        self._next = 0
        self._pool = ThreadPoolExecutor(_THREADS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def carry_file(self, gguf: GGUF, tensor: Tensor, start: int, count: int, to: int) -> None:
        """Start bringing packed bytes of a tensor to the device address `to`."""
        for at in range(0, count, self._piece):
            size = min(self._piece, count - at)

            def fill(buffer: Bytes, at: int = at) -> None:
                gguf.read_into(tensor, buffer.data, start + at)

            self._start(fill, size, to + at)

    def carry(self, data: Bytes, to: int) -> None:
        """Start bringing bytes of this machine's memory to the device address `to`."""
        for at in range(0, data.size, self._piece):
            size = min(self._piece, data.size - at)

            def fill(buffer: Bytes, at: int = at) -> None:
                buffer[:] = data[at : at + buffer.size]

            self._start(fill, size, to + at)

    def flush(self) -> None:
        """Put all that was started on the stream."""
        while self._waiting:
            self._send()

    def _start(self, fill: Callable[[Bytes], None], size: int, to: int) -> None:
        if len(self._waiting) == _BUFFERS:
            self._send()
        slot = self._next
        self._next = (slot + 1) % _BUFFERS
        self._copied[slot].synchronize()
        self._waiting.append((slot, self._pool.submit(fill, self._buffers[slot][:size]), size, to))

    def _send(self) -> None:
        """Copy the oldest buffer to the device, once it is filled."""
        slot, filled, size, to = self._waiting.popleft()
        filled.result()
        source = self._buffers[slot].ctypes.data
        self._runtime.memcpyAsync(to, source, size, self._runtime.memcpyHostToDevice, self._stream.ptr)
        self._copied[slot].record(self._stream)


def _batches(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """The jobs, cut and bundled so that the rows of a bundle fit into the staging area."""
    batch: list[_Job] = []
    filled = 0
    for job in jobs:
        most = max(_STAGE // (job.raw_bytes // job.count + 1), 1)  # tiles
        for first in range(job.first, job.first + job.count, most):
            part = replace(job, first=first, count=min(most, job.first + job.count - first))
            if batch and filled + part.raw_bytes > _STAGE:
                yield batch
                batch, filled = [], 0
            batch.append(part)
            filled += part.raw_bytes
    if batch:
        yield batch


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _layer_of(matrices: Sequence[Matrix | None]) -> LayerMatrices:
    q, k, v, out, gate, up, down = matrices
    if q is None or k is None or v is None or out is None or gate is None or down is None:
        raise AssertionError("only up may be missing: gate holds it then")
    return LayerMatrices(q, k, v, out, gate, up, down)
