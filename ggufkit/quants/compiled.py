"""Taking blocks apart with the compiled kernels: what `codecs` does, some fifty times as fast.

Worth its loading (and, once, compiling) from a few megabytes on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ggufkit import jit
from ggufkit.quants import QuantType, Unpacked
from ggufkit.quants.bits import F32, I8, U8
from ggufkit.quants.fp4 import E2M1, IQ4
from ggufkit.quants.iq import grid

_MODULE, _ARGUMENTS = "ggufkit.quants.kernels", "PLPPPPPPPP"

#: elements that are taken apart at once, so that the codes stay in the cache
_TILE = 1 << 17


@dataclass(slots=True)
class Buffers:
    """What an unpacker writes, for some number of blocks; flat. See `kernels` for the meaning."""

    codes: I8
    scales: F32
    mins: F32
    d: F32
    dmin: F32
    flags: U8
    keys: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, qtype: QuantType, n_blocks: int) -> Buffers:
        groups = n_blocks * (qtype.block_size // qtype.group)
        own = n_blocks if qtype.d is not None else groups
        return cls(
            np.empty(n_blocks * qtype.block_size, np.int8),
            np.empty(groups, np.float32),
            np.empty(groups if qtype.has_min else 0, np.float32),
            np.empty(own, np.float32),
            np.empty(n_blocks if qtype.has_min else 0, np.float32),
            np.empty(n_blocks, np.uint8),
            np.empty(n_blocks, np.uint64),
        )


def table(qtype: QuantType) -> I8:
    """The values that a type's indices stand for: int8, flat; one element for types without."""
    if qtype.name in ("MXFP4", "NVFP4"):
        return E2M1
    if qtype.name in ("IQ4_NL", "IQ4_XS"):
        return IQ4
    if qtype.name.startswith("IQ"):
        return np.ascontiguousarray(grid("IQ1_S" if qtype.name == "IQ1_M" else qtype.name)).reshape(-1)
    return np.zeros(1, np.int8)


def is_kept(qtype: QuantType) -> bool:
    """Whether the kernels of this type can be had without compiling them."""
    return all(jit.is_kept(_MODULE, name) for name in (qtype.name.lower(), "affine"))


def get_ready(qtype: QuantType) -> None:
    """Compile or load the kernels of this type."""
    if not is_kept(qtype):
        Unpacker(qtype)
        _affine()


def _affine() -> jit.Kernel:
    return jit.kernel(_MODULE, "affine", "PPPLLLP")


class Unpacker:
    """The compiled unpacker of one type. Safe to share between threads."""

    def __init__(self, qtype: QuantType, announce: jit.Announce | None = None) -> None:
        self.type = qtype
        self._kernel = jit.kernel(_MODULE, qtype.name.lower(), _ARGUMENTS, announce)
        self._table = table(qtype)

    def __call__(self, raw: U8, into: Buffers) -> None:
        """Take blocks apart: raw uint8 [n · type_size], C-contiguous, little-endian; `into` has room for n."""
        n = len(raw) // self.type.type_size
        arrays = (into.codes, into.scales, into.mins, into.d, into.dmin, into.flags, into.keys, self._table)
        self._kernel(raw.ctypes.data, n, *(array.ctypes.data for array in arrays))


def unpack(qtype: QuantType, raw: U8) -> Unpacked:
    """Little-endian blocks, uint8 [..., bytes of a row] -> codes, scales and mins; see `ggufkit.quants.unpack`."""
    flat = np.ascontiguousarray(raw).reshape(-1)
    buffers = Buffers.of(qtype, len(flat) // qtype.type_size)
    Unpacker(qtype)(flat, buffers)
    lead = (*raw.shape[:-1], -1)
    mins = buffers.mins.reshape(lead) if qtype.has_min else None
    return Unpacked(buffers.codes.reshape(lead), buffers.scales.reshape(lead), mins)


def dequantize(qtype: QuantType, raw: U8, out: F32) -> None:
    """Little-endian blocks, uint8 [n · type_size] -> float32 [n · block_size], both C-contiguous."""
    unpacker, affine = Unpacker(qtype), _affine()
    step = max(1, _TILE // qtype.block_size)
    buffers = Buffers.of(qtype, min(step, len(raw) // qtype.type_size))
    inputs = [array.ctypes.data for array in (buffers.codes, buffers.scales, buffers.mins)]
    for start in range(0, len(raw) // qtype.type_size, step):
        tile = raw[start * qtype.type_size : (start + step) * qtype.type_size]
        values = out[start * qtype.block_size : (start + step) * qtype.block_size]
        unpacker(tile, buffers)
        affine(*inputs, int(qtype.has_min), qtype.group, len(values) // qtype.group, values.ctypes.data)
