"""What this machine offers, and what is missing for a faster or a complete ggufkit: the data behind `doctor`.

Nothing is assumed to work. A GPU is asked for through the driver's own library (no CUDA toolkit and no CuPy are
needed for that), so that the advice names the one package that fits the driver.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from ggufkit import __version__
from ggufkit.errors import GgufkitError


class State(StrEnum):
    """How a check went. `absent` is fine: it only means that something optional is not there."""

    OK = "ok"
    ABSENT = "absent"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report.

    Attributes:
        found: what is there.
        help: what to do about what is not; a command where there is one.
    """

    group: str
    name: str
    found: str
    state: State = State.OK
    help: str | None = None


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver: the newest CUDA version it runs, and the GPUs it drives."""

    cuda: tuple[int, int]
    gpus: tuple[str, ...]


#: the packages that ggufkit stands on: distribution → what for
PACKAGES: dict[str, str] = {
    "numpy": "numbers",
    "numba": "fast CPU kernels",
    "tokenizers": "text to token ids",
    "jinja2": "chat templates",
    "safetensors": "trace files",
    "matplotlib": "pictures",
}

#: processor features that the CPU kernels profit from, as LLVM calls them
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512vnni", "avx512bf16", "amx-int8", "neon", "dotprod", "i8mm", "sve")

_CUDA_LIBRARIES = {"win32": ("nvcuda.dll",), "darwin": ()}
_UNIX_CUDA = ("libcuda.so.1", "libcuda.so")


def examine() -> tuple[Check, ...]:
    """Look at everything; takes about a second."""
    return (*_system(), *_packages(), *_gpu())


def healthy(checks: tuple[Check, ...]) -> bool:
    """Whether nothing that ggufkit needs is broken."""
    return all(check.state is not State.BROKEN for check in checks)


def cpu_count() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> tuple[int, int] | None:
    """Bytes of memory in all and free for use; None where the system does not tell."""
    if sys.platform == "win32":
        return _windows_memory()
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return sizes["MemTotal"], sizes["MemAvailable"]
    with suppress(OSError, ValueError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    return None


def nvidia_driver() -> Driver | None:
    """The driver, asked through its own library; None when there is none that works."""
    for name in _CUDA_LIBRARIES.get(sys.platform, _UNIX_CUDA):
        with suppress(OSError, AttributeError):
            return _ask_driver(ctypes.CDLL(name))
    return None


def extra_for(driver: Driver) -> str:
    """The extra whose CuPy fits the driver: `cuda13` from CUDA 13 on, else `cuda12`."""
    return "cuda13" if driver.cuda >= (13, 0) else "cuda12"


def _ask_driver(library: ctypes.CDLL) -> Driver | None:
    version, count = ctypes.c_int(), ctypes.c_int()
    if library.cuInit(0) or library.cuDriverGetVersion(ctypes.byref(version)):
        return None
    if library.cuDeviceGetCount(ctypes.byref(count)):
        return None
    cuda = (version.value // 1000, version.value % 1000 // 10)
    return Driver(cuda, tuple(_gpu_text(library, number) for number in range(count.value)))


def _gpu_text(library: ctypes.CDLL, number: int) -> str:
    """`NVIDIA H100 80GB HBM3 (9.0, 85.0 GB)`: name, compute capability, memory."""
    device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
    major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    library.cuDeviceGet(ctypes.byref(device), number)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    library.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # … MINOR
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    text = name.value.decode("utf-8", "replace")
    return f"{text} (compute {major.value}.{minor.value}, {memory.value / 1e9:.1f} GB)"


def _system() -> Iterator[Check]:
    python = f"{platform.python_version()} ({platform.python_implementation()}, {platform.machine()})"
    yield Check("system", "ggufkit", __version__)
    yield Check("system", "Python", python)
    yield Check("system", "system", platform.platform(terse=True))
    yield Check("system", "processor", f"{_processor()}, {cpu_count()} cores")
    yield _features()
    memory = memory_bytes()
    if memory is not None:
        yield Check("system", "memory", f"{memory[0] / 1e9:.1f} GB, {memory[1] / 1e9:.1f} GB available")


def _packages() -> Iterator[Check]:
    for name, purpose in PACKAGES.items():
        try:
            yield Check("packages", name, f"{metadata.version(name)} ({purpose})")
        except metadata.PackageNotFoundError:
            yield Check("packages", name, f"missing ({purpose})", State.BROKEN, f"pip install {name}")
    yield _attempt("packages", "compiled kernels", _kernel_cache, "set GGUFKIT_CACHE to a writable directory")


def _kernel_cache() -> str:
    """Where compiled kernels are kept, after trying that something can be written there."""
    import platformdirs

    place = Path(os.environ.get("GGUFKIT_CACHE") or platformdirs.user_cache_path("ggufkit"))
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=place):
        return f"kept in {place}"


def _gpu() -> Iterator[Check]:
    driver = nvidia_driver()
    if driver is None or not driver.gpus:
        yield Check("gpu", "GPU", "no NVIDIA GPU or driver found; the CPU does the work", State.ABSENT)
        return
    for gpu in driver.gpus:
        yield Check("gpu", "GPU", gpu)
    yield Check("gpu", "driver", f"runs CUDA up to {driver.cuda[0]}.{driver.cuda[1]}")
    if driver.cuda < (12, 0):
        yield Check("gpu", "CuPy", "this driver is too old for it", State.ABSENT, "update the NVIDIA driver")
        return
    install = f"pip install 'ggufkit[{extra_for(driver)}]'"
    if find_spec("cupy") is None:
        yield Check("gpu", "CuPy", "not installed; the CPU does the work", State.ABSENT, install)
        return
    yield _attempt("gpu", "CuPy", _cupy, install)


def _cupy() -> str:
    from ggufkit import gpu

    cupy = gpu.library()
    gpu.device()
    cupy.arange(2).sum().item()  # a launch, so that a CuPy for another CUDA version is found here
    runtime = cupy.cuda.runtime.runtimeGetVersion()
    return f"{cupy.__version__} works (CUDA {runtime // 1000}.{runtime % 1000 // 10})"


def _attempt(group: str, name: str, find: Callable[[], str], help: str) -> Check:  # noqa: A002
    """Whatever may fail in any way: what it says, or why it failed and what to do."""
    try:
        return Check(group, name, find())
    except GgufkitError as error:
        return Check(group, name, str(error), State.BROKEN, error.help or help)
    except Exception as error:  # a broken installation fails in its own ways
        return Check(group, name, f"does not work: {type(error).__name__}: {error}", State.BROKEN, help)


def _features() -> Check:
    def find() -> str:
        from llvmlite import binding

        there = binding.get_host_cpu_features()
        return ", ".join(name for name in FEATURES if there.get(name)) or "none of those that matter here"

    return _attempt("system", "features", find, "pip install --force-reinstall llvmlite")


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _windows_memory() -> tuple[int, int] | None:
    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", "tp", "fp", "tv", "fv", "fe")),
        )

    status = Status(length=ctypes.sizeof(Status))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined,unused-ignore]
        return None
    return status.total, status.free
