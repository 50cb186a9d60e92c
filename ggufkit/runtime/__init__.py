"""The forward pass: a specification in NumPy, a fast CPU engine, a GPU engine, and what uses them."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ggufkit.errors import UsageError

if TYPE_CHECKING:
    from ggufkit.container import GGUF
    from ggufkit.runtime.engine import Engine

#: models of fewer bytes, as float32, run in plain NumPy: nobody waits for a compiler on them
SMALL = 64 << 20
DEVICES = ("auto", "cpu", "cuda", "reference")


def load(
    model: GGUF | str | os.PathLike[str],
    device: str = "auto",
    *,
    dtype: Any = None,
    note: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Engine:
    """An engine that runs a model.

    Args:
        model: an opened one, which must stay open as long as the engine is used, or the path of one.
        device: `cuda`, `cpu`, `reference` (plain NumPy, slow, the specification), or `auto`: the GPU when a usable
            one is there, else the CPU.
        dtype: of the computation; `float64` means the reference. By default what the device does best.
        note: told, in a sentence, what takes its time or why a device was chosen.
        progress: told how far loading is: bytes done, bytes in all.

    Raises:
        UsageError: there is no such device, or it does not compute in this dtype.
        DeviceError: the GPU was asked for and cannot be used.
        Unsupported, FormatError, NewerThanTool: as `runtime.engine.runnable`.
        SourceError, NotGGUF: the path cannot be opened.
    """
    if device not in DEVICES:
        raise UsageError(f"there is no device {device!r}", expected=", ".join(DEVICES))
    if isinstance(model, str | os.PathLike):
        from ggufkit import reader

        model = reader.open(model)
    wanted = _dtype_name(dtype)
    if device == "auto":
        device = "reference" if wanted == "float64" else "cuda" if _gpu_usable() else "cpu"
    if device == "reference" or (device == "cpu" and wanted == "float64"):
        return _reference(model, wanted or "float32")
    if device == "cuda":
        cuda = import_module("ggufkit.runtime.cuda")
        engine: Engine = cuda.CudaEngine(model, wanted or "float16", note=note, progress=progress)
        return engine
    if wanted not in (None, "float32"):
        raise UsageError(f"the CPU does not compute in {wanted}", expected="float32 or float64")
    if 4 * sum(tensor.n_elements for tensor in model.tensors.values()) < SMALL:
        return _reference(model, "float32")
    from ggufkit.runtime.cpu import CpuEngine

    return CpuEngine(model, note=note, progress=progress)


def _dtype_name(dtype: Any) -> str | None:
    """The dtype's NumPy name; None for the default.

    Raises:
        UsageError: it is none.
    """
    import numpy as np

    try:
        return None if dtype is None else np.dtype(dtype).name
    except TypeError as error:
        raise UsageError(f"{dtype!r} is no dtype", expected="float16, float32 or float64") from error


def _gpu_usable() -> bool:
    try:
        gpu = import_module("ggufkit.gpu")
    except ImportError:
        return False
    return bool(gpu.usable())


def _reference(model: GGUF, dtype: str) -> Engine:
    from ggufkit.runtime.reference import ReferenceEngine

    return ReferenceEngine(model, dtype)
