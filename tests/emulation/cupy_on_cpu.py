"""As much of CuPy as the GPU engine uses, with NumPy arrays for device memory and kernels compiled for the CPU.

A kernel's source is compiled by g++ over simt.h, which runs the threads of a GPU as coroutines; nothing of the
kernels changes but the inline PTX, which simt.h replaces. So the engine's Python, its tables and its kernels'
arithmetic and synchronization are tested on any machine with a C++ compiler. Time and memory traffic are not.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
_KERNEL = re.compile(r'extern "C"\s+void\s+(\w+)\(([^)]*)\)\s*\{')
_MARK = "struct begin_of_the_kernels;"

MULTIPROCESSORS = 3


class ndarray(np.ndarray):
    """A NumPy array whose `data.ptr` is an address, as CuPy's is."""

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)

    def get(self, out=None):
        if out is None:
            return np.array(self)
        out[...] = self
        return out

    def set(self, values):
        self[...] = values


def asarray(values, dtype=None):
    return np.array(values, dtype).view(ndarray)


def empty(shape, dtype=np.float32):
    """Filled with a pattern that is a NaN in every float, so that whoever reads what nobody wrote is seen."""
    made = _aligned(int(np.prod(shape)), np.dtype(dtype)).reshape(shape)
    made.view(np.uint8)[...] = 0xFF
    return made


def zeros(shape, dtype=np.float32):
    made = empty(shape, dtype)
    made[...] = 0
    return made


def _aligned(count: int, dtype) -> ndarray:
    raw = np.empty(count * dtype.itemsize + 256, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + count * dtype.itemsize].view(dtype).view(ndarray)


def empty_like(other):
    return empty(other.shape, other.dtype)


class RawModule:
    """Kernels, compiled when asked for and kept by the hash of their text."""

    def __init__(self, code, options, backend, enable_cooperative_groups=False):
        self._together = enable_cooperative_groups
        self._code = code
        self._options = options
        self._library = None

    def compile(self):
        text = f'#include "{HERE / "simt.h"}"\n{_MARK}\n{self._code}\n'
        options = ["-std=c++17", *(option for option in self._options if option.startswith("-D"))]
        key = hashlib.sha256((text + repr(options) + (HERE / "simt.h").read_text()).encode()).hexdigest()[:24]
        library, source = CACHE / f"{key}.so", CACHE / f"{key}.cc"
        if not library.exists():
            source.write_text(text)
            expanded = _run(["g++", *options, "-E", "-P", str(source)])  # macros make kernels, too
            kernels = _KERNEL.finditer(expanded[expanded.index(_MARK) :])
            source.write_text(text + "\n".join(_wrapper(kernel[1], kernel[2], self._together) for kernel in kernels))
            _run(["g++", *options, "-O1", "-w", "-shared", "-fPIC", str(source), "-o", str(library)])
        self._library = ctypes.CDLL(str(library))

    def get_function(self, name):
        return Kernel(getattr(self._library, f"launch_{name}"))


class Kernel:
    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self, launch):
        self._launch = launch

    def __call__(self, grid, block, arguments, shared_mem=0):
        boxes = [_box(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(box) for box in boxes))
        sizes = [*grid, *(1 for _ in range(3 - len(grid))), *block]
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        if self._launch(*(ctypes.c_uint(size) for size in sizes), ctypes.c_size_t(shared_mem), pointers):
            raise AssertionError("the kernel's threads wait for each other forever")


def _box(argument):
    """An argument as the bytes that a launch passes."""
    if isinstance(argument, np.ndarray):
        return ctypes.c_uint64(argument.ctypes.data)
    if isinstance(argument, np.generic):
        return ctypes.create_string_buffer(argument.tobytes(), argument.itemsize)
    return ctypes.c_uint64(argument)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return done.stdout


def _wrapper(name: str, parameters: str, together: bool) -> str:
    kinds = [re.sub(r"\w+$", "", parameter.strip()) for parameter in parameters.split(",")]
    arguments = ", ".join(f"*({kind}*)a[{i}]" for i, kind in enumerate(kinds))
    return (
        f'extern "C" int launch_{name}(unsigned x, unsigned y, unsigned z, unsigned threads, size_t shared, void** a)'
        f" {{ return !simt::launch({{x, y, z}}, threads, shared, {str(together).lower()},"
        f" [=] {{ {name}({arguments}); }}); }}"
    )


def gemm_ex(handle, op_a, op_b, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, algo):
    """Of cuBLAS: only what the engine asks for, c[n, m] = b[n, k] · a[m, k]ᵀ in f32."""
    assert (op_a, op_b, c_type) == (1, 0, 0)
    weight, x = _matrix(a, m, k, lda, a_type), _matrix(b, n, k, ldb, b_type)
    _matrix(c, n, m, ldc, 0)[...] = x.astype(np.float32) @ weight.astype(np.float32).T


def _matrix(address, rows, columns, pitch, kind):
    dtype = np.dtype(np.float16 if kind == 2 else np.float32)
    size = ((rows - 1) * pitch + columns) * dtype.itemsize
    flat = np.frombuffer((ctypes.c_char * size).from_address(address), dtype)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (pitch * dtype.itemsize, dtype.itemsize))


class Event:
    def __init__(self, disable_timing=True):
        pass

    def record(self, stream=None):
        pass

    def synchronize(self):
        pass


class CudaError(Exception):
    pass


def _memcpy(to, from_, size, kind, stream):
    ctypes.memmove(to, from_, size)


def modules(capability: int, multiprocessors: int) -> dict[str, types.ModuleType]:
    """The modules `cupy` and `cupy_backends.cuda.libs` of a pretended device."""
    stream = types.SimpleNamespace(ptr=0, synchronize=lambda: None)
    properties = {
        "name": b"emulated",
        "major": capability // 10,
        "minor": capability % 10,
        "multiProcessorCount": multiprocessors,
        "sharedMemPerBlockOptin": 227 << 10,
        "totalGlobalMem": 1 << 34,
    }
    runtime = types.SimpleNamespace(
        getDeviceCount=lambda: 1,
        getDevice=lambda: 0,
        getDeviceProperties=lambda number: properties,
        memGetInfo=lambda: (1 << 33, 1 << 34),
        memcpyAsync=_memcpy,
        memcpyHostToDevice=1,
        CUDARuntimeError=CudaError,
    )
    cuda = types.SimpleNamespace(
        runtime=runtime,
        memory=types.SimpleNamespace(OutOfMemoryError=MemoryError),
        compiler=types.SimpleNamespace(CompileException=CudaError),
        Event=Event,
        get_current_stream=lambda: stream,
        alloc_pinned_memory=bytearray,
    )
    cupy = types.ModuleType("cupy")
    for name in ("asarray", "empty", "zeros", "empty_like", "RawModule", "ndarray"):
        setattr(cupy, name, globals()[name])
    for name in ("float16", "float32", "float64", "int32", "uint8", "uint32", "arange", "cos", "sin", "stack"):
        setattr(cupy, name, getattr(np, name))
    cupy.stack = lambda arrays, axis: np.stack(arrays, axis=axis).view(ndarray)
    cupy.asnumpy = np.array
    cupy.cuda = cuda
    cupy.get_default_memory_pool = lambda: types.SimpleNamespace(free_bytes=lambda: 0)
    libs = types.ModuleType("cupy_backends.cuda.libs")
    libs.cublas = types.SimpleNamespace(
        create=lambda: 0, gemmEx=gemm_ex, CUBLAS_OP_T=1, CUBLAS_OP_N=0, CUBLAS_COMPUTE_32F=68, CUBLAS_GEMM_DEFAULT=-1
    )
    return {
        "cupy": cupy,
        "cupy_backends": types.ModuleType("cupy_backends"),
        "cupy_backends.cuda": types.ModuleType("cupy_backends.cuda"),
        "cupy_backends.cuda.libs": libs,
    }


CACHE = Path()


def available() -> bool:
    return shutil.which("g++") is not None and sys.platform == "linux"


@contextmanager
def emulated(monkeypatch, cache: Path, *, capability: int = 90, multiprocessors: int = MULTIPROCESSORS):
    """With `ggufkit.gpu` finding a device made of this."""
    from ggufkit import gpu

    global CACHE
    CACHE = cache
    for name, module in modules(capability, multiprocessors).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(gpu, "_driver_there", lambda: True)
    caches = (gpu.library, gpu.device, gpu.blas)
    for found in caches:
        found.cache_clear()
    try:
        yield
    finally:
        for found in caches:
            found.cache_clear()
