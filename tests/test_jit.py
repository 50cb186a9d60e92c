"""Compiled kernels: compiled once, loaded ever after, and no obstacle where they cannot be kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ggufkit import jit

MODULE, NAME, ARGUMENTS = "ggufkit.stats.kernels", "widen_bf16", "PLP"


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and nothing loaded yet."""
    monkeypatch.setenv("GGUFKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(jit, "_loaded", {})
    return tmp_path / "kernels"


def load(announced: list[str] | None = None) -> jit.Kernel:
    return jit.kernel(MODULE, NAME, ARGUMENTS, None if announced is None else announced.append)


def works(kernel: jit.Kernel) -> bool:
    """Widen 21 numbers: one vector of sixteen and a rest."""
    raw = np.arange(0x3F80, 0x3F80 + 21, dtype="<u2")
    values = np.zeros(21, np.float32)
    kernel(raw.ctypes.data, 21, values.ctypes.data)
    return bool((values == (raw.astype(np.uint32) << 16).view(np.float32)).all())


def test_compiles_the_first_time_and_says_so(fresh: Path):
    announced: list[str] = []
    assert works(load(announced))
    assert announced == [NAME]
    assert [path.name.startswith("ggufkit.stats.widen_bf16.") for path in fresh.iterdir()] == [True]


def test_another_process_loads_it_without_numba():
    load()
    script = (
        "import sys; from ggufkit import jit; "
        f"jit.kernel({MODULE!r}, {NAME!r}, {ARGUMENTS!r}, lambda name: print('compiling', name)); "
        "print('numba' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False"]


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\0" * 32 + b"not the code"])
def test_a_damaged_file_is_compiled_anew(fresh: Path, content: bytes, monkeypatch: pytest.MonkeyPatch):
    load()
    (path,) = fresh.iterdir()
    path.write_bytes(content)
    monkeypatch.setattr(jit, "_loaded", {})
    announced: list[str] = []
    assert works(load(announced))
    assert announced == [NAME]


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("GGUFKIT_CACHE", str(tmp_path / "file"))  # a file where a directory should be
    assert works(load())


def test_code_that_cannot_stand_alone_runs_from_numba(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jit, "_object_code", lambda function: None)
    assert works(load())
    assert not fresh.exists()


def test_code_that_needs_symbols_of_numba_is_not_kept():
    from numba import cfunc, types

    @cfunc(types.void(types.CPointer(types.float64), types.int64), nopython=True)
    def allocates(values, n):
        values[0] = np.ones(n)[n // 2]

    assert jit._object_code(allocates) is None


def test_a_kernel_is_loaded_once():
    assert load() is load()
