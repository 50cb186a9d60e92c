"""The forward pass on an NVIDIA GPU, through CuPy: see `engine.CudaEngine`."""

from ggufkit.runtime.cuda.engine import CudaEngine

__all__ = ["CudaEngine"]
