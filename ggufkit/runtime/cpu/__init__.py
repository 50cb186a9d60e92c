"""The fast CPU engine: Numba kernels on packed weights. Importing it imports Numba."""

from ggufkit.runtime.cpu.engine import CpuCache, CpuEngine

__all__ = ["CpuCache", "CpuEngine"]
