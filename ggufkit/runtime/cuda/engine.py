"""The GPU engine: see `runtime.engine.Engine`.

A prompt goes through cuBLAS in chunks (`prompt`), a single token through one kernel that stays on the device for
all of it (`decode`). Both write one cache. In the default mode the cache is f16, and so are the operands of a
prompt's products; everything else is float32 or exact integers. `dtype="float32"` keeps those two in float32 as
well and computes as the reference does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import numpy as np

from ggufkit import gpu
from ggufkit.arch import Config
from ggufkit.container import GGUF
from ggufkit.errors import Unsupported, UsageError
from ggufkit.runtime.cuda.decode import Decoder
from ggufkit.runtime.cuda.prompt import CHUNK, PromptRunner
from ggufkit.runtime.cuda.sample import Chooser
from ggufkit.runtime.cuda.weights import DeviceWeights, Progress
from ggufkit.runtime.engine import Edit, Logits, Which, check_ids, runnable
from ggufkit.runtime.sampling import Choice, Sampler
from ggufkit.steps import Tap

DTYPES = ("float16", "float32")
#: tokens that `follow` launches and reads together: long enough to hide the launch, short enough to stream smoothly
BURST = 8
#: a prompt for which the decoding kernel reads at most so many bytes of weights goes through it: that takes less time
#: than to widen all weights once and to load cuBLAS
FEW_BYTES = 20 * 10**9
#: bytes of a copy that measures the memory, and how many are made after the first
_COPIED, _COPIES = 1 << 30, 9
#: launches so many tokens from a number on, given ids and log-probabilities: (first, count, ids, chances)
Run = Callable[[int, int, Any, Any], None]


class CudaCache:
    """Keys and values of one sequence, [layer, n_head_kv, n_ctx, head_dim], on the device. See `runtime.engine.Cache`.

    Raises:
        UsageError: it would hold nothing.
        DeviceError: it does not fit.
    """

    def __init__(self, config: Config, n_ctx: int, dtype: str) -> None:
        if n_ctx < 1:
            raise UsageError(f"a context of {n_ctx} positions holds nothing")
        cupy = gpu.library()
        self.n_ctx = n_ctx
        self.length = 0
        shape = (config.n_layer, config.n_head_kv, n_ctx, config.head_dim)
        size = 2 * int(np.prod(shape)) * np.dtype(dtype).itemsize
        with gpu.memory_for(f"a context of {n_ctx:,} positions ({size / 1e9:.1f} GB of keys and values)"):
            self.k, self.v = (cupy.empty(shape, dtype) for _ in range(2))

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        if not 0 <= length <= self.length:
            raise UsageError(f"a cache of {self.length} positions cannot be cut to {length}")
        self.length = length


class CudaEngine:
    """See `runtime.engine.Engine`.

    Args:
        gguf: an opened file; it stays open as long as the engine is used.
        dtype: `float16`, the default: keys, values and a prompt's products in f16, sums in float32; or `float32`.
        note: told, in a sentence, what takes its time or is run otherwise than the file has it.
        progress: told how far loading is: bytes done, bytes in all.

    Raises:
        DeviceError: there is no usable GPU, or the model does not fit.
        Unsupported, FormatError, NewerThanTool: as `engine.runnable`; or a shape that the kernels do not fit.
        UsageError: another dtype.
    """

    name = "cuda"

    def __init__(
        self,
        gguf: GGUF,
        dtype: str = "float16",
        *,
        note: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise UsageError(f"the GPU does not compute in {dtype}", expected=" or ".join(DTYPES))
        self.dtype = np.dtype(dtype)
        self.device = gpu.device().name
        self.config = runnable(gguf)
        _check_shapes(self.config)
        self._cupy = gpu.library()
        self._weights = DeviceWeights(gguf, self.config)
        if note is not None and self._weights.converted:
            note(f"{', '.join(sorted(self._weights.converted))} run as signed bytes or F32, which loses nothing")
        half = dtype == "float16"
        self._decoder = Decoder(self.config, self._weights, kv_half=half)
        self._prompt = PromptRunner(self.config, self._weights, half=half)
        sizes = ((2, np.int32), (2, np.float32), (self.config.n_vocab, np.float32))
        self._one_token = tuple(self._cupy.empty(*size) for size in sizes)  # its id, log-probability and logits
        pool = ThreadPoolExecutor(3)
        compiling, tables = pool.submit(self._decoder.compile), pool.submit(self._decoder.lay_out)
        self._prompt.begin(pool)
        pool.shutdown(wait=False)
        self._weights.load(progress)
        self._decoder.prepare(tables.result())
        compiling.result()

    def new_cache(self, n_ctx: int) -> CudaCache:
        cache = CudaCache(self.config, n_ctx, self.dtype.name)
        if n_ctx > len(self._weights.rope):
            self._weights.reserve(n_ctx)
            self._decoder.use_rotations()
        return cache

    def forward(
        self, ids: Sequence[int], cache: CudaCache, *, logits: Which = "last", tap: Tap | None = None
    ) -> Logits:
        check_ids(ids, cache, self.config)
        if len(ids) == 1:
            return self._one(int(ids[0]), cache, tap)
        if logits == "last" and tap is None and len(ids) * self._weights.nbytes <= FEW_BYTES:
            return self._few(ids, cache)
        device_ids = self._cupy.asarray(np.asarray(ids, np.int32))
        step = CHUNK if tap is None else len(ids)  # a tap sees all positions of a call at once
        made = []
        for first in range(0, len(ids), step):
            normed = self._prompt.run(device_ids[first : first + step], cache, tap)
            if logits == "all":
                made.append(gpu.to_host(self._prompt.all_logits(normed)))
        if logits == "all":
            result = np.concatenate(made) if len(made) > 1 else made[0]
        else:
            normed = normed[-1:]
            result = gpu.to_host(self._prompt.last_logits(normed[0]))[None]
        if tap is not None:
            self._show_ends(tap, normed, result)
        return result

    def follow(
        self, token: int, cache: CudaCache, n: int, sampler: Sampler, burst: int = BURST
    ) -> Generator[Choice, None, None]:
        """See `runtime.engine.Follower`: tokens are chosen on the device and read back a burst behind it.

        Args:
            burst: tokens that are read together.
        """
        check_ids([token], cache, self.config)
        start, said = cache.length, 0
        n = min(n, cache.n_ctx - start)
        drawn: list[float] = []
        run = self._runner(cache, sampler, drawn)
        ids, chances = self._cupy.empty(n + 1, np.int32), self._cupy.empty(n + 1, np.float32)
        while said < n:
            ids[said : said + 1].set(np.array([token], np.int32))
            with closing(self._say(run, cache, start, ids, chances, burst)) as saying:
                for choice in saying:
                    token, said = choice.id, said + 1
                    yield choice
            if said < n:  # logits that are not finite, or too many candidates: the host chooses
                choice = sampler(self._one(token, cache, None)[0], drawn[said] if drawn else None)
                token, said = choice.id, said + 1
                yield choice

    def _runner(self, cache: CudaCache, sampler: Sampler, drawn: list[float]) -> Run:
        """What launches tokens and their choice; `drawn` is filled with the numbers that the choices take."""
        decoder, itemsize = self._decoder, 4
        if sampler.params.greedy:
            return lambda first, count, ids, chances: decoder.run(cache, count, ids[first:], chances[first:])
        choose = Chooser(sampler.params, self.config.n_vocab)
        logits = self._cupy.empty(self.config.n_vocab, np.float32)

        def run(first: int, count: int, ids: Any, chances: Any) -> None:
            drawn.extend(sampler.uniform() for _ in range(first + count - len(drawn)))
            for at in range(first, first + count):
                token, chance = (int(array.data.ptr) + itemsize * at for array in (ids, chances))
                decoder.run(cache, 1, token, chance, logits)
                choose(logits, drawn[at], token + itemsize, chance + itemsize)

        return run

    def _say(
        self, run: Run, cache: CudaCache, start: int, ids: Any, chances: Any, burst: int
    ) -> Generator[Choice, None, None]:
        """Tokens from the one after what the cache holds on, until one has no log-probability.

        Args:
            start: positions that the cache held before the first of `ids`.
        """
        said, n = cache.length - start, len(ids) - 1
        launched: deque[tuple[Any, int, int]] = deque()
        try:
            while said < n:
                while len(launched) < 2 and cache.length - start < n:
                    first = cache.length - start
                    count = min(burst, n - first)
                    run(first, count, ids, chances)
                    launched.append((self._mark(), first + 1, count))
                mark, first, count = launched.popleft()
                mark.synchronize()
                burst_ids, burst_chances = ids[first : first + count].get(), chances[first : first + count].get()
                for token, chance in zip(burst_ids.tolist(), burst_chances.tolist(), strict=True):
                    if math.isnan(chance):
                        return
                    said += 1
                    yield Choice(token, chance)
        finally:
            cache.length = start + said

    def _mark(self) -> Any:
        """An event after all that was launched so far."""
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record()
        return event

    def copy_rate(self) -> float:
        """Bytes read and written a second by copying in the device's memory: the median of some large copies."""
        cupy = self._cupy
        with gpu.memory_for("a copy to measure the memory with"):
            source, to = (cupy.empty(_COPIED, np.uint8) for _ in range(2))
        source.data.memset(1, _COPIED)
        seconds = []
        for _ in range(_COPIES + 1):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            to.data.copy_from_device_async(source.data, _COPIED)
            end.record()
            end.synchronize()
            seconds.append(cupy.cuda.get_elapsed_time(start, end) / 1000)
        return float(2 * _COPIED / np.median(seconds[1:]))

    @contextmanager
    def patched(self, edits: Iterable[Edit]) -> Iterator[None]:
        edits = list(edits)
        with self._weights.patched(edits):
            widened = any(self._weights.in_tiles(edit.tensor) for edit in edits)
            if widened:
                self._prompt.forget()
            try:
                yield
            finally:
                if widened:
                    self._prompt.forget()

    def _one(self, token: int, cache: CudaCache, tap: Tap | None) -> Logits:
        """One token through the decoding kernel; its logits, [1, V]."""
        ids, chances, logits = self._one_token
        ids.set(np.array([token, 0], np.int32))
        if tap is None:
            self._decoder.run(cache, 1, ids, chances, logits)
        else:
            self._decoder.traced(cache, ids, chances, logits, tap)
        return gpu.to_host(logits)[None]

    def _few(self, ids: Sequence[int], cache: CudaCache) -> Logits:
        """A few tokens through the decoding kernel; the logits of the last, [1, V]."""
        n, cupy = len(ids), self._cupy
        device_ids, chances = cupy.asarray(np.array([*ids, 0], np.int32)), cupy.empty(n + 1, np.float32)
        logits = self._one_token[2]
        self._decoder.run(cache, n, device_ids, chances, logits, n_given=n)
        return gpu.to_host(logits)[None]

    def _show_ends(self, tap: Tap, normed: Any, result: Any) -> None:
        if tap.wants("result_norm", None):
            tap("result_norm", None, normed.get())
        if tap.wants("result_output", None):
            tap("result_output", None, result)


def _check_shapes(config: Config) -> None:
    """What the kernels ask of a model beyond what every engine does.

    Raises:
        Unsupported: a width is not what they can load, or heads are too wide.
    """
    for name, value, multiple in (
        ("embedding length", config.n_embd, 4),
        ("feed-forward length", config.n_ff, 4),
        ("head size", config.head_dim, 8),
    ):
        if value % multiple:
            message = f"a model whose {name} is {value} does not fit the GPU kernels"
            raise Unsupported(message, expected=f"a multiple of {multiple}", help="use --device cpu")
    if config.head_dim > 256:
        raise Unsupported(f"heads of {config.head_dim} channels", expected="at most 256", help="use --device cpu")
