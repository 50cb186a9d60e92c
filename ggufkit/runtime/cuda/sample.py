"""The next token chosen on the device: the launches of kernels/sample.cu, which is `runtime.sampling` in CUDA."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ggufkit import gpu
from ggufkit.runtime.sampling import SamplingParams

KERNELS = ("device.cuh", "sample.cu")
_THREADS = 1024
_SHARED = 4096 * 8 + 512  # `Scratch` of sample.cu: the candidates, and a few sums


class Chooser:
    """Draws tokens as `params` say from logits that lie on the device.

    Args:
        n_vocab: how many logits there are.
    """

    def __init__(self, params: SamplingParams, n_vocab: int) -> None:
        self._kernel = gpu.compile_module(KERNELS, {}).get_function("choose")
        least = math.log(params.min_p) if params.min_p > 0 else -math.inf
        self._numbers = (
            np.int32(n_vocab),
            np.int32(min(params.top_k, n_vocab)),
            np.float64(params.top_p),
            np.float32(least),
            np.float32(1 / params.temperature),
        )

    def __call__(self, logits: Any, uniform: float, token: Any, chance: Any) -> None:
        """Launch.

        Args:
            logits: float32 [V].
            uniform: drawn from [0, 1).
            token, chance: int32 [1] and float32 [1] on the device: the likeliest token and its log-probability come
                in, the chosen token and its own go out. The latter is NaN where the host must choose.
        """
        arguments = (logits, *self._numbers, np.float64(uniform), token, chance)
        self._kernel((1,), (_THREADS,), arguments, shared_mem=_SHARED)
