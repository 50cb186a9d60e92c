"""Compiled kernels without waiting for the compiler: numba writes them once, afterwards the machine code is loaded.

Importing numba and calling the first cached function takes the better part of a second, whatever the function.
That is more than the work of many commands. So a kernel's object code is kept by ggufkit itself and linked with
llvmlite alone (some 0.05 s). The first time, and after an update of ggufkit, numba, llvmlite or the processor,
it is compiled anew; a second or two each, which `announce` can tell the user.

Sources of kernels are modules that import numba (`quants.kernels`, `stats.kernels`): module-level functions over
raw pointers, integers and floats that return nothing, raise nothing and allocate nothing, with one `SIGNATURE` a
module or `SIGNATURES[name]`. Their machine code then needs no symbol of numba's, which is checked before it is
kept; should a future numba break that, the kernels still run, from numba's own memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Kernel = Callable[..., None]
Announce = Callable[[str], None]

_SYMBOL = "ggufkit_kernel"
_lock = threading.RLock()
_loaded: dict[tuple[str, str], Kernel] = {}
_alive: list[Any] = []  # engines and compiled functions own the code that the pointers lead to

#: how the arguments of a kernel are passed: P a pointer, L an int64, D a double
_CTYPES = {"P": ctypes.c_void_p, "L": ctypes.c_int64, "D": ctypes.c_double}


def kernel(module: str, name: str, arguments: str, announce: Announce | None = None) -> Kernel:
    """The compiled function `name` of the kernel source `module`, as a Python callable that releases the GIL.

    Args:
        module: full name of the module with the source.
        name: of the function in it.
        arguments: one letter each, P (address, an int), L (int64) or D (float64).
        announce: called with the kernel's name if it has to be compiled now.
    """
    with _lock:
        known = _loaded.get((module, name))
        if known is None:
            known = _loaded[module, name] = _load(module, name, arguments, announce)
        return known


def is_kept(module: str, name: str) -> bool:
    """Whether a kernel can be had without compiling it."""
    return (module, name) in _loaded or _cache_path(module, name).exists()


def _load(module: str, name: str, arguments: str, announce: Announce | None) -> Kernel:
    path = _cache_path(module, name)
    code = _read(path)
    if code is not None:
        try:
            return _link(code, arguments)
        except (RuntimeError, OSError):  # llvmlite's ways to say that this is no code for this machine
            pass
    if announce is not None:
        announce(name)
    function = _compile(module, name)
    code = _object_code(function)
    if code is None:
        _alive.append(function)
        return _callable(function.address, arguments)
    _write(path, code)
    return _link(code, arguments)


def _callable(address: int, arguments: str, hidden: int = 0) -> Kernel:
    """`hidden` arguments come before the kernel's own; they are passed as pointers to unused memory."""
    unused = (ctypes.c_void_p * 4)()
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * hidden, *(_CTYPES[letter] for letter in arguments))
    function = prototype(address)
    if not hidden:
        return function
    _alive.append(unused)
    first = (ctypes.addressof(unused),) * hidden

    def call(*args: Any) -> None:
        function(*first, *args)

    return call


# Compiling, with numba


def _compile(module: str, name: str) -> Any:
    """numba's C callback of a kernel."""
    from numba import cfunc

    source = importlib.import_module(module)
    signature = getattr(source, "SIGNATURES", {}).get(name) or source.SIGNATURE
    options: dict[str, Any] = {"nopython": True, "error_model": "numpy", "boundscheck": False}
    return cfunc(signature, **options)(getattr(source, name))


def _object_code(function: Any) -> bytes | None:
    """The machine code of a C callback's inner function alone, or None if it cannot stand alone.

    The inner function has numba's convention: it returns a status and takes two pointers (for its result and an
    exception, both unused here) before its own arguments. The outer one, which calls Python, is dropped.
    """
    import llvmlite.binding as llvm

    try:
        module = llvm.parse_assembly(function._library.get_llvm_str())
        bodies = [item for item in module.functions if not item.is_declaration and item.name.startswith("_ZN")]
        if len(bodies) != 1:
            return None
        for item in [*module.functions, *module.global_variables]:
            if not item.is_declaration:
                item.linkage = "internal"
        bodies[0].name = _SYMBOL
        bodies[0].linkage = "external"
        machine = _machine()
        passes = llvm.create_new_module_pass_manager()
        passes.add_global_dead_code_eliminate_pass()
        passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
        outside = [item.name for item in [*module.functions, *module.global_variables] if item.is_declaration]
        if any(not name.startswith("llvm.") for name in outside):
            return None
        return bytes(machine.emit_object(module))
    except (AttributeError, RuntimeError):  # another numba or llvmlite than those this was written for
        return None


# Linking, with llvmlite alone


@cache
def _machine() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="default",
        codemodel="jitdefault",
        jit=True,
    )


def _link(code: bytes, arguments: str) -> Kernel:
    import llvmlite.binding as llvm

    _machine()
    # an engine owns its target machine, so it gets one that nobody else uses
    machine = llvm.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(_SYMBOL)
    if not address:
        raise RuntimeError("the object code lacks its symbol")
    _alive.append(engine)
    return _callable(address, arguments, hidden=2)


# Keeping


@cache
def _fingerprint() -> bytes:
    """What the code depends on besides its source: the compiler and the processor."""
    import llvmlite
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features().flatten()
    return repr((version("numba"), llvmlite.__version__, sys.platform, llvm.get_host_cpu_name(), features)).encode()


def _source(module: str) -> bytes:
    spec = find_spec(module)
    return Path(spec.origin).read_bytes() if spec is not None and spec.origin is not None else b""


@cache
def _digest(module: str) -> str:
    parts = (_fingerprint(), _source(__name__), _source("ggufkit.simd"), _source(module))
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:24]


def _cache_path(module: str, name: str) -> Path:
    """In the user's cache directory, or where GGUFKIT_CACHE says: the package itself may be read-only."""
    import platformdirs

    root = os.environ.get("GGUFKIT_CACHE") or platformdirs.user_cache_path("ggufkit")
    return Path(root) / "kernels" / f"{module.rpartition('.')[0]}.{name}.{_digest(module)}.o"


def _read(path: Path) -> bytes | None:
    """The code kept at `path`, if it is whole: a file of 32 bytes of SHA-256 and the code."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    code = content[32:]
    return code if code and hashlib.sha256(code).digest() == content[:32] else None


def _write(path: Path, code: bytes) -> None:
    """Keep the code, if the directory can be written to; whoever else writes the same file loses nothing."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(hashlib.sha256(code).digest() + code)
        part.replace(path)
    except OSError:  # read-only, full, or no directory at all: it will be compiled again next time
        with suppress(OSError):
            part.unlink(missing_ok=True)
