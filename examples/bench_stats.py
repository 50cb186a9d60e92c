"""How fast are the statistics of `validate`? Beside gguf-py's dequantizing and NumPy, on the same tensors, in one run.

    python examples/bench_stats.py MODEL.gguf

The other side computes less: minimum, maximum, mean, standard deviation, kurtosis and a histogram, of some megabytes
of each type. Both sides read the file, from memory if it was read before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType

import ggufkit
from ggufkit import stats
from ggufkit.container import GGUF, Tensor

#: of each type this many bytes are enough for the slow side
SAMPLE = 8 << 20


def seconds(work: Callable[[], object], repeat: int = 1) -> float:
    """The shortest of some runs."""
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def with_numpy(file: GGUF, tensors: list[Tensor]) -> None:
    """What one would write without ggufkit."""
    for tensor in tensors:
        raw = file.read(tensor).reshape(tensor.n_rows, -1)
        values = gguf.quants.dequantize(raw, GGMLQuantizationType(tensor.type_id)).astype(np.float64)
        values.min(), values.max()
        central = values - values.mean()
        variance = (central**2).mean()
        (central**4).mean() / variance**2
        np.histogram(np.log2(np.abs(values[values != 0])), bins=100)


def sample(tensors: list[Tensor]) -> list[Tensor]:
    """The first of them that make up `SAMPLE` bytes, or one."""
    chosen: list[Tensor] = []
    for tensor in sorted(tensors, key=lambda tensor: tensor.nbytes or 0):
        if chosen and sum(one.nbytes or 0 for one in chosen) + (tensor.nbytes or 0) > SAMPLE:
            break
        chosen.append(tensor)
    return chosen


def main(path: str) -> None:
    file = ggufkit.open(path)
    by_type: dict[str, list[Tensor]] = {}
    for tensor in file.tensors.values():
        by_type.setdefault(tensor.type_name, []).append(tensor)
    for result in stats.scan(file, announce=lambda name: print(f"compiling {name}")):
        del result  # the first pass loads kernels and brings the file into memory
    print(f"{'type':8}{'MB':>8}{'ggufkit GB/s':>14}{'NumPy GB/s':>12}{'ratio':>7}")
    slow_total = fast_total = 0.0
    for name, tensors in sorted(by_type.items()):
        size = sum(tensor.nbytes or 0 for tensor in tensors)
        fast = seconds(lambda: list(stats.scan(file, tensors, compiled=True)), 3) / size  # noqa: B023
        chosen = sample(tensors)
        slow = seconds(lambda: with_numpy(file, chosen)) / sum(tensor.nbytes or 0 for tensor in chosen)  # noqa: B023
        fast_total, slow_total = fast_total + fast * size, slow_total + slow * size
        print(f"{name:8}{size / 1e6:8.1f}{1e-9 / fast:14.3f}{1e-9 / slow:12.4f}{slow / fast:7.0f}")
    whole = seconds(lambda: list(stats.scan(file)), 3)
    size = sum(tensor.nbytes or 0 for tensor in file.tensors.values())
    print(f"whole file: {size / 1e6:.0f} MB in {whole:.2f} s, {size / 1e9 / whole:.2f} GB/s")
    print(f"dequantizing with gguf-py and NumPy would take {slow_total:.0f} s: {slow_total / whole:.0f} times as long")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
