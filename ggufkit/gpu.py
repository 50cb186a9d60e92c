"""Is there a GPU that can be used, and compiling kernels for it: the one place that imports CuPy for others.

Whatever stands in the way (no CuPy, no GPU, an old driver, a full memory) is a `DeviceError` that says what to do.
Kernels are CUDA C++ in files beside the code that launches them; several files make one module, and macros fit it
to a model. CuPy compiles a module with NVRTC when it is first used and keeps the machine code on disk.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from ggufkit.errors import DeviceError

#: the oldest compute capability that the kernels are written for (integer tensor cores), as 10 · major + minor
OLDEST = 75

#: bytes of arrays that are read back into page-locked memory, and what their sizes are rounded up to, to be kept
_PINNED_LEAST, _PINNED_MOST, _PINNED_STEP = 64 << 10, 256 << 20, 16 << 20

_HERE = Path(__file__).parent
_FOLDERS = (_HERE / "runtime" / "cuda" / "kernels", _HERE / "quants" / "cuda")
_DRIVERS = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
_INSTALL = "pip install 'ggufkit[cuda13]' (for a driver that runs CUDA 13; `nvidia-smi` tells), else 'ggufkit[cuda12]'"


@dataclass(frozen=True, slots=True)
class Device:
    """The GPU in use.

    Attributes:
        capability: compute capability as 10 · major + minor.
        multiprocessors: how many there are.
        shared_bytes: shared memory that one block may have.
        memory_bytes: of the device in all.
    """

    name: str
    capability: int
    multiprocessors: int
    shared_bytes: int
    memory_bytes: int


def usable() -> bool:
    """Whether there is a GPU that the kernels run on. Does not import CuPy where there is no driver."""
    try:
        device()
    except DeviceError:
        return False
    return True


@cache
def device() -> Device:
    """The GPU in use.

    Raises:
        DeviceError: there is none, or it cannot be used.
    """
    cupy = library()
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    found = Device(
        name=properties["name"].decode("utf-8", "replace"),
        capability=10 * properties["major"] + properties["minor"],
        multiprocessors=properties["multiProcessorCount"],
        shared_bytes=properties["sharedMemPerBlockOptin"],
        memory_bytes=properties["totalGlobalMem"],
    )
    if found.capability < OLDEST:
        raise DeviceError(
            f"{found.name} has compute capability {found.capability / 10}",
            expected=f"{OLDEST / 10} or newer (Turing, 2018)",
            help="use --device cpu",
        )
    return found


@cache
def library() -> Any:
    """The module `cupy`, with a device behind it.

    Raises:
        DeviceError: no driver, no CuPy, one for another CUDA version, no GPU, or a driver that is too old.
    """
    if not _driver_there():
        raise DeviceError(
            "no NVIDIA driver was found on this machine",
            help="install the NVIDIA driver if there is a GPU, or use --device cpu",
        )
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(f"CuPy cannot be imported ({error})", help=_INSTALL) from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy and the driver fail in their own ways
        raise _no_device(error) from error
    if not count:
        raise DeviceError("the NVIDIA driver shows no GPU", help="check CUDA_VISIBLE_DEVICES, or use --device cpu")
    return cupy


@cache
def blas() -> tuple[Any, int]:
    """cuBLAS, and a handle of it. Both take a moment to load, which may be another thread's."""
    library()
    cublas = import_module("cupy_backends.cuda.libs").cublas
    return cublas, cublas.create()


def wake() -> None:
    """Let the driver make its context, which takes a while, in a thread; CuPy finds it when it is there.

    Nothing happens where there is no driver, and nothing is said where something is wrong with it: whoever uses the
    GPU will hear of it.
    """
    driver = _driver()
    if driver is not None:
        Thread(target=_make_context, args=(driver,)).start()


def _make_context(driver: ctypes.CDLL) -> None:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def _driver_there() -> bool:
    return _driver() is not None


def _driver() -> ctypes.CDLL | None:
    for name in _DRIVERS:
        with suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _no_device(error: Exception) -> DeviceError:
    text = str(error)
    if "InsufficientDriver" in text:
        return DeviceError(
            "the NVIDIA driver is too old for the CUDA version that CuPy was built for",
            help=f"update the driver, or install the CuPy that fits it: {_INSTALL}",
        )
    if "NoDevice" in text:
        return DeviceError("the NVIDIA driver shows no GPU", help="check CUDA_VISIBLE_DEVICES, or use --device cpu")
    return DeviceError(f"the GPU does not answer: {text}", help="`nvidia-smi` tells more; or use --device cpu")


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Say what did not fit when the device's memory runs out inside.

    Raises:
        DeviceError: it did.
    """
    cupy = library()
    try:
        yield
    except (cupy.cuda.memory.OutOfMemoryError, cupy.cuda.runtime.CUDARuntimeError) as error:
        if "OutOfMemory" not in type(error).__name__ and "MemoryAllocation" not in str(error):
            raise
        free, total = cupy.cuda.runtime.memGetInfo()
        raise DeviceError(
            f"{what} does not fit into the GPU's memory: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free",
            help="give a smaller context (--ctx), close other programs on the GPU, or use --device cpu",
        ) from error


def to_host(array: Any) -> Any:
    """A NumPy copy of a device array. A large one lies in page-locked memory, which copies at several times the rate
    and is kept for the next one of about that size."""
    cupy = library()
    if not _PINNED_LEAST <= array.nbytes <= _PINNED_MOST:
        return array.get()
    unit = min(1 << (array.nbytes - 1).bit_length(), _PINNED_STEP)
    memory = cupy.cuda.alloc_pinned_memory(-(-array.nbytes // unit) * unit)
    host = np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)
    return array.get(out=host)


def source(*names: str) -> str:
    """The text of several kernel files as one, each line still known by its file and number."""
    parts = []
    for name in names:
        path = next(folder / name for folder in _FOLDERS if (folder / name).exists())
        parts.append(f'#line 1 "{name}"\n{path.read_text(encoding="utf-8")}')
    return "\n".join(parts)


def macro_options(macros: Mapping[str, int | str]) -> tuple[str, ...]:
    """Compiler options that define `macros`."""
    return ("-std=c++17", *(f"-D{name}={value}" for name, value in macros.items()))


def compile_module(names: tuple[str, ...], macros: Mapping[str, int | str], *, cooperative: bool = False) -> Any:
    """A CuPy module of these files, compiled now or loaded from CuPy's cache on disk.

    Args:
        cooperative: launch its kernels cooperatively: all blocks are resident at once, or the launch fails.

    Raises:
        DeviceError: the compiler refuses.
    """
    cupy = library()
    module = cupy.RawModule(
        code=source(*names), options=macro_options(macros), backend="nvrtc", enable_cooperative_groups=cooperative
    )
    try:
        module.compile()
    except cupy.cuda.compiler.CompileException as error:
        first = next((line for line in str(error).splitlines() if "error" in line), str(error))
        raise DeviceError(
            f"the kernels {names[-1]} do not compile here: {first}",
            help="please report this with the output of `ggufkit doctor`; --device cpu works meanwhile",
        ) from error
    return module
