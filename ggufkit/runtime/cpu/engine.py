"""The fast CPU engine: the reference's forward pass, step for step, on packed weights.

Every named step is made as an array of its own and shown to the tap that asks for it, so what is traced is what
runs. The heavy steps are kernels on all processors; a prompt is computed in chunks, so that memory does not grow
with its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ggufkit.arch import Config, expected_tensors
from ggufkit.container import GGUF
from ggufkit.errors import UsageError
from ggufkit.runtime.cpu.packed import PackedWeights, Progress
from ggufkit.runtime.cpu.plan import Floats, Plan, head_name
from ggufkit.runtime.cpu.program import compiled, crew
from ggufkit.runtime.cpu.simd import TILE_COLUMNS
from ggufkit.runtime.engine import Edit, Logits, Which, check_ids, runnable
from ggufkit.steps import Tap

CHUNK = 512  # positions computed together
_PLANS = 2  # that are kept: one for prompts, one for single tokens


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
            self.addresses = np.array([[layer.ctypes.data for layer in part] for part in (self.k, self.v)])
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
        if note is not None and not compiled():
            note("compiling the CPU kernels for this machine; this is done once and takes some seconds")
        self.weights = PackedWeights(gguf, _matrices(self.config), progress)
        self._plans: dict[tuple[int, int], Plan] = {}

    def new_cache(self, n_ctx: int) -> CpuCache:
        return CpuCache(self.config, n_ctx)

    def forward(self, ids: Sequence[int], cache: CpuCache, *, logits: Which = "last", tap: Tap | None = None) -> Logits:
        check_ids(ids, cache, self.config)
        step = CHUNK if tap is None else len(ids)  # a tap sees all positions of a call at once
        chunks = []
        for first in range(0, len(ids), step):
            chunk = ids[first : first + step]
            n_logits = len(chunk) if logits == "all" else int(first + step >= len(ids))
            chunks.append(self._run(chunk, cache, n_logits, tap))
        return chunks[-1] if logits == "last" else np.concatenate(chunks)

    @contextmanager
    def patched(self, edits: Iterable[Edit]) -> Iterator[None]:
        """See `Engine.patched`. What was packed before is kept aside and put back."""
        before = self._plans
        with self.weights.patched(edits):
            self._plans = {}
            try:
                yield
            finally:
                self._plans = before

    def _run(self, ids: Sequence[int], cache: CpuCache, n_logits: int, tap: Tap | None) -> Logits:
        """One pass over some positions."""
        plan = self._plan(len(ids), n_logits, cache.length + len(ids) if self._wants_scores(tap) else 0)
        plan.x[:] = self.weights.rows("token_embd.weight", ids)
        plan.run(crew(), cache, tap)
        cache.length += len(ids)
        return plan.logits.copy()

    def _plan(self, n: int, n_logits: int, n_scores: int) -> Plan:
        """A plan of this size; the last few without scores are kept for the next call."""
        plan = self._plans.pop((n, n_logits), None)
        if plan is None or n_scores:
            plan = Plan(self.config, self.weights, n, n_logits, n_scores)
        if not n_scores:
            self._plans[n, n_logits] = plan
            if len(self._plans) > _PLANS:
                self._plans.pop(next(iter(self._plans)))
        return plan

    def _wants_scores(self, tap: Tap | None) -> bool:
        layers = range(self.config.n_layer)
        return tap is not None and any(tap.wants(step, layer) for step in ("kq", "kq_soft_max") for layer in layers)


def _matrices(config: Config) -> Iterator[str]:
    """The names of the matrices that are multiplied with."""
    for name, expected in expected_tensors(config).items():
        if len(expected.shape) == 2 and (expected.layer is not None or name == head_name(config)):
            yield name
