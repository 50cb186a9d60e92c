"""Tokens a second, measured the way llama-bench does.

`pp N` runs a prompt of N tokens at once, `tg N` generates N tokens one by one; each is warmed up once and repeated.
What is generated does not matter, so the tokens are given and no sampler is timed, except where an engine chooses
them itself. Times include whatever the engine does between calls, and end when logits, or tokens, are on the CPU.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ggufkit.arch import expected_tensors
from ggufkit.container import GGUF
from ggufkit.errors import UsageError
from ggufkit.runtime.engine import Engine, Follower
from ggufkit.runtime.sampling import Sampler

#: tokens are taken from the first rows of the vocabulary, which every model has
_ID_ROWS = 256

Progress = Callable[[str, int, int], None]


@runtime_checkable
class Copier(Protocol):
    """An engine whose memory's rate can be measured, which is what the rate of reading weights is held against."""

    def copy_rate(self) -> float:
        """Bytes read and written a second by copying."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the result.

    Attributes:
        name: `pp512`, `tg128`.
        n_tokens: processed or generated in a repeat.
        rates: tokens a second of each repeat.
        weight_rate: for generation, bytes of weights read a second (mean); None for prompts, which reuse them.
    """

    name: str
    n_tokens: int
    rates: tuple[float, ...]
    weight_rate: float | None = None

    @property
    def mean(self) -> float:
        return float(np.mean(self.rates))

    @property
    def std(self) -> float:
        """Of the repeats, with n - 1; 0 for a single one."""
        return float(np.std(self.rates, ddof=1)) if len(self.rates) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What was measured.

    Attributes:
        engine, device: what ran, and where.
        token_bytes: bytes of weights in the file that one token needs: all of the layers, the head, one embedding row.
        load_seconds: to build the engine; None when somebody else did.
        first_token_seconds: from a prompt of one token to its logits, engine loaded and warm.
        copy_rate: bytes read and written a second by copying in the device's memory; None where nobody measures it.
    """

    engine: str
    device: str
    token_bytes: int
    load_seconds: float | None
    first_token_seconds: float
    tests: tuple[Measured, ...]
    copy_rate: float | None = None


def benchmark(
    engine: Engine,
    gguf: GGUF,
    *,
    pp: Sequence[int] = (512,),
    tg: Sequence[int] = (128,),
    repeats: int = 5,
    load_seconds: float | None = None,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure an engine.

    Args:
        pp: lengths of prompts.
        tg: numbers of tokens to generate.
        repeats: of each test, after one that is not counted.
        progress: called with a test's name, the repeats done, and the repeats in all.

    Raises:
        UsageError: a length or number below 1, or beyond the context that the model was trained with.
    """
    _check(pp, tg, repeats, engine.config.n_ctx_train)
    token_bytes = weights_per_token(gguf, engine)
    first = _first_token(engine)
    tests = []
    for kind, lengths, run in (("pp", pp, _prompt), ("tg", tg, _generate)):
        for length in lengths:
            rates = tuple(_rates(engine, f"{kind}{length}", length, run, repeats, progress))
            weight_rate = token_bytes * float(np.mean(rates)) if kind == "tg" else None
            tests.append(Measured(f"{kind}{length}", length, rates, weight_rate))
    copy_rate = engine.copy_rate() if isinstance(engine, Copier) else None
    return Benchmark(engine.name, engine.device, token_bytes, load_seconds, first, tuple(tests), copy_rate)


def weights_per_token(gguf: GGUF, engine: Engine) -> int:
    """Bytes of weights that one token needs, as the file stores them."""
    total = 0
    for name in expected_tensors(engine.config):
        tensor = gguf.tensors.get(name)
        if tensor is None or tensor.nbytes is None:
            continue
        is_table = name == "token_embd.weight" and not engine.config.tied
        total += tensor.nbytes // max(tensor.n_rows, 1) if is_table else tensor.nbytes
    return total


def _check(pp: Sequence[int], tg: Sequence[int], repeats: int, most: int) -> None:
    for length in (*pp, *tg):
        if not 1 <= length <= most:
            raise UsageError(f"{length} tokens cannot be run", expected=f"from 1 to {most:,}, the model's context")
    if repeats < 1:
        raise UsageError(f"{repeats} repeats measure nothing")


def _rates(
    engine: Engine,
    name: str,
    length: int,
    run: Callable[[Engine, int], float],
    repeats: int,
    progress: Progress | None,
) -> Iterator[float]:
    for number in range(repeats + 1):
        if progress:
            progress(name, number, repeats + 1)
        seconds = run(engine, length)
        if number:  # the first one warms up
            yield length / seconds


def _ids(engine: Engine, count: int) -> list[int]:
    rows = min(_ID_ROWS, engine.config.n_vocab)
    return [int(token) for token in np.random.default_rng(0).integers(0, rows, count)]


def _prompt(engine: Engine, length: int) -> float:
    """Seconds to process a prompt."""
    ids, cache = _ids(engine, length), engine.new_cache(length)
    start = time.perf_counter()
    engine.forward(ids, cache)
    return time.perf_counter() - start


def _generate(engine: Engine, length: int) -> float:
    """Seconds to run tokens one by one from an empty cache; an engine that chooses them itself does that, too."""
    ids, cache = _ids(engine, length), engine.new_cache(length)
    start = time.perf_counter()
    if isinstance(engine, Follower):
        deque(engine.follow(ids[0], cache, length, Sampler()), maxlen=0)
        return time.perf_counter() - start
    for token in ids:
        engine.forward([token], cache)
    return time.perf_counter() - start


def _first_token(engine: Engine) -> float:
    _prompt(engine, 1)
    return _prompt(engine, 1)
