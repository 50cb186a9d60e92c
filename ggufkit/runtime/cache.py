"""The key/value cache of the NumPy engines: one array of keys and one of values a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ggufkit.arch import Config
from ggufkit.errors import UsageError


class ArrayCache:
    """Keys and values of one sequence, [n_ctx, n_head_kv, head_dim] a layer, grown in place.

    The operating system gives an array its pages when they are first touched, so that a large context costs
    nothing until it is used.
    """

    def __init__(self, config: Config, n_ctx: int, dtype: DTypeLike = np.float32) -> None:
        if n_ctx < 1:
            raise UsageError(f"a context of {n_ctx} positions holds nothing")
        self.n_ctx = n_ctx
        self.length = 0
        shape = (n_ctx, config.n_head_kv, config.head_dim)
        try:
            self.k: list[NDArray[Any]] = [np.empty(shape, dtype) for _ in range(config.n_layer)]
            self.v: list[NDArray[Any]] = [np.empty(shape, dtype) for _ in range(config.n_layer)]
        except MemoryError as error:
            size = 2 * config.n_layer * n_ctx * config.kv_width * np.dtype(dtype).itemsize
            message = f"the keys and values of {n_ctx:,} positions take {size / 1e9:,.1f} GB, which this machine lacks"
            raise UsageError(message, help="give a smaller context (--ctx)") from error

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        if not 0 <= length <= self.length:
            raise UsageError(f"a cache of {self.length} positions cannot be cut to {length}")
        self.length = length
