"""Finding a GPU, and what is said when there is none; the kernels compile for every GPU that is promised."""

from __future__ import annotations

import ctypes
import sys
import types
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from ggufkit import gpu
from ggufkit.errors import DeviceError

#: compute capabilities that the README names
CAPABILITIES = (75, 80, 89, 90)
ALL_TYPES = "0xc0007dcfu"


@pytest.fixture(autouse=True)
def _fresh():
    gpu.library.cache_clear()
    gpu.device.cache_clear()
    yield
    gpu.library.cache_clear()
    gpu.device.cache_clear()


def pretend_cupy(monkeypatch, *, count=lambda: 1, capability=(9, 0)):
    properties = {
        "name": b"NVIDIA Something",
        "major": capability[0],
        "minor": capability[1],
        "multiProcessorCount": 8,
        "sharedMemPerBlockOptin": 99 << 10,
        "totalGlobalMem": 8 << 30,
    }
    runtime = types.SimpleNamespace(
        getDeviceCount=count, getDevice=lambda: 0, getDeviceProperties=lambda number: properties
    )
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(gpu, "_driver_there", lambda: True)


def fails_with(text):
    def count():
        raise RuntimeError(text)

    return count


def test_without_a_driver_it_says_so_and_does_not_import_cupy(monkeypatch):
    monkeypatch.setattr(gpu, "_driver_there", lambda: False)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match="no NVIDIA driver") as caught:
        gpu.device()
    assert "--device cpu" in caught.value.help
    assert not gpu.usable()


def test_without_cupy_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gpu, "_driver_there", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match="CuPy cannot be imported") as caught:
        gpu.library()
    assert "cuda13" in caught.value.help
    assert "cuda12" in caught.value.help


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("cudaErrorInsufficientDriver: CUDA driver version is insufficient", "driver is too old"),
        ("cudaErrorNoDevice: no CUDA-capable device is detected", "shows no GPU"),
        ("cudaErrorUnknown: unknown error", "does not answer"),
    ],
)
def test_a_device_that_fails_is_explained(monkeypatch, failure, message):
    pretend_cupy(monkeypatch, count=fails_with(failure))
    with pytest.raises(DeviceError, match=message) as caught:
        gpu.device()
    assert caught.value.help


def test_no_visible_gpu(monkeypatch):
    pretend_cupy(monkeypatch, count=lambda: 0)
    with pytest.raises(DeviceError, match="shows no GPU"):
        gpu.device()


def test_a_gpu_older_than_the_kernels_is_refused(monkeypatch):
    pretend_cupy(monkeypatch, capability=(7, 0))
    with pytest.raises(DeviceError, match=r"compute capability 7\.0"):
        gpu.device()


def test_a_gpu_is_described(monkeypatch):
    pretend_cupy(monkeypatch, capability=(8, 9))
    assert gpu.usable()
    assert gpu.device() == gpu.Device("NVIDIA Something", 89, 8, 99 << 10, 8 << 30)


def test_sources_keep_their_names_and_lines():
    text = gpu.source("device.cuh", "tiles.cuh")
    assert text.startswith('#line 1 "device.cuh"\n')
    assert '\n#line 1 "tiles.cuh"\n' in text


def nvrtc() -> ctypes.CDLL | None:
    """NVRTC from a wheel (nvidia-cuda-nvrtc) or the system; it compiles without a GPU."""
    places = [Path(entry) for name in ("nvidia.cu13", "nvidia.cuda_nvrtc") for entry in _locations(name)]
    for folder in places:
        for builtins in sorted((folder / "lib").glob("libnvrtc-builtins.so*")):
            ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
        for library in sorted((folder / "lib").glob("libnvrtc.so*")):
            return ctypes.CDLL(str(library))
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _locations(name: str) -> list[str]:
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:
        return []
    return list(spec.submodule_search_locations or []) if spec else []


def compile_log(library: ctypes.CDLL, text: str, options: tuple[str, ...]) -> str:
    """What the compiler has to complain about; empty when it has nothing."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = library.nvrtcCompileProgram(program, len(options), given)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return "" if status == 0 else f"{status}: {log.value.decode()[:3000]}"


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("module", ["repack", "prompt", "decode", "sample"])
def test_the_kernels_compile(module, capability):
    """With all types at once and in either precision: what no other test on this machine can see is the PTX."""
    library = nvrtc()
    if library is None:
        pytest.skip("needs NVRTC: pip install nvidia-cuda-nvrtc")
    names = import_module(f"ggufkit.runtime.cuda.{'weights' if module == 'repack' else module}").KERNELS
    half = capability != 89
    macros = {
        "N_EMBD": 256,
        "N_FF": 512,
        "N_HEAD": 4,
        "N_HEAD_KV": 2,
        "HEAD_DIM": 64,
        "N_LAYER": 2,
        "N_VOCAB": 288,
        "NORM_EPS": "1e-6f",
        "QKV_BIAS": 1,
        "QK_NORM": 1,
        "TYPES": ALL_TYPES,
        "EMBD_TYPE": 12,
        "KV_HALF": int(half),
        "WIDE_HALF": int(half),
        "WARPS": 16,
        "SLICES": 2,
        "MAX_SPLITS": 9,
        "VECTOR_CHUNKS": 8,
        "SLOTS": 32,
        "GATES": 8,
        "RING_BYTES": 8192 if capability >= 90 else 0,
    }
    options = (*gpu.macro_options(macros), f"--gpu-architecture=sm_{capability}")
    assert compile_log(library, gpu.source(*names), options) == ""
