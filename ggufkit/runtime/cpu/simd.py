"""Sixteen floats at a time: a vector type for Numba, and the few operations that the kernels are made of.

Numba leaves vectorizing to LLVM, which cannot keep an array of accumulators in registers. Here a kernel says
what it means: `acc = fma(load(codes, i), x[j], acc)` is three instructions for sixteen weights. The operations
are written in LLVM's portable vector language, without any processor's own instructions, so that the same kernel
runs everywhere and fast wherever LLVM knows the machine: sixteen lanes are one register of AVX-512, two of AVX2,
four of NEON.

Arrays are addressed by a flat index, whatever their shape: they must be C-contiguous, and nothing is checked.
Floats behave as IEEE says: a NaN or an infinity always gets through.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from typing import Any, TypeVar, cast

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import carray  # type: ignore[attr-defined]
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LANES = 16
_LINE = 64  # bytes of a cache line
_AHEAD = 4096  # how many bytes in advance `prefetch` asks for

Function = TypeVar("Function", bound=Callable[..., Any])

_emit: Any = cgutils  # Numba's helpers for writing LLVM's language; they are not typed
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}


def kernel(function: Function) -> Function:
    """Compile at the first call, once a type of its arguments; runs without the GIL and checks no index."""
    return cast(Function, numba.njit(**_OPTIONS)(function))


def inlined(function: Function) -> Function:
    """A kernel that becomes part of whoever calls it: what is handed over are registers then."""
    return cast(Function, numba.njit(**_OPTIONS, forceinline=True)(function))


def kept(function: Function) -> Function:
    """A kernel whose code is kept on disk. Numba notices changes of the function's own file only."""
    return cast(Function, numba.njit(**_OPTIONS, cache=True)(function))


def _operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of Numba's types that emits LLVM's instructions, as kernels call it: without the typing context."""
    return cast(Callable[..., Any], intrinsic(function))


class _Vector(types.Type):
    """Numba's type of a vector; it lives in registers and never leaves a kernel."""

    def __init__(self) -> None:
        super().__init__(name=f"f32x{LANES}")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: _Vector) -> None:
        super().__init__(manager, vector, _FLOATS)  # type: ignore[no-untyped-call]


VECTOR = _Vector()


def tile_shape() -> tuple[int, int]:
    """How many vectors by how many columns `tile` accumulates: as many as this processor's registers hold."""
    machine, features = platform.machine().lower(), llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 2, 12  # 24 of 32 registers
    if features.get("avx2") and features.get("fma"):
        return 1, 6  # 12 of 16
    return (1, 6) if machine in ("arm64", "aarch64") else (1, 3)  # 24 of 32; 12 of 16 narrow ones


TILE_VECTORS, TILE_COLUMNS = tile_shape()


# --- how operations are emitted --------------------------------------------------------------------------------


def _constant(value: float) -> Any:
    return ir.Constant(_FLOATS, [value] * LANES)


def _integers(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


def _spread(builder: Any, scalar: Any) -> Any:
    """One number in every lane."""
    single = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(single, ir.Constant(_FLOATS, ir.Undefined), _integers(0))


def _operand(context: Any, builder: Any, type_: Any, value: Any) -> Any:
    """A vector as it is, any number spread over the lanes."""
    if type_ == VECTOR:
        return value
    return _spread(builder, context.cast(builder, value, type_, types.float32))


def _call(builder: Any, name: str, *operands: Any) -> Any:
    """LLVM's elementwise function `name`."""
    type_ = ir.FunctionType(_FLOATS, [_FLOATS] * len(operands))
    function = _emit.get_or_insert_function(builder.module, type_, f"llvm.{name}.v{LANES}f32")
    return builder.call(function, operands)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "fmuladd", a, b, c)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _read(builder: Any, address: Any, vector: Any) -> Any:
    width = getattr(vector.element, "width", 32)
    return builder.load(builder.bitcast(address, vector.as_pointer()), align=width // 8)


def _write(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.bitcast(address, _FLOATS.as_pointer()), align=4)


def _elementwise(emit: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of two vectors, or of a vector and a number."""

    def operation(typing: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pairs = zip(signature.args, arguments, strict=True)
            return emit(builder, *(_operand(context, builder, *pair) for pair in pairs))

        return VECTOR(a, b), generate

    return _operation(operation)


# --- the operations --------------------------------------------------------------------------------------------

add = _elementwise(lambda builder, a, b: builder.fadd(a, b))
subtract = _elementwise(lambda builder, a, b: builder.fsub(a, b))
multiply = _elementwise(lambda builder, a, b: builder.fmul(a, b))
divide = _elementwise(lambda builder, a, b: builder.fdiv(a, b))
#: the larger one; where one is NaN, either
maximum = _elementwise(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


@_operation
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pairs = zip(signature.args, arguments, strict=True)
        return _fma(builder, *(_operand(context, builder, *pair) for pair in pairs))

    return VECTOR(a, b, c), generate


@_operation
def full(typing: Any, value: Any) -> Any:
    """A number in every lane."""
    return VECTOR(value), lambda context, builder, signature, arguments: _operand(
        context, builder, signature.args[0], arguments[0]
    )


@_operation
def spread(typing: Any, array: Any, index: Any) -> Any:
    """One element of a float32 array in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _spread(builder, builder.load(_address(context, builder, signature.args[0], *arguments)))

    return VECTOR(array, index), generate


@_operation
def element(typing: Any, array: Any, index: Any) -> Any:
    """array[index], without a thought of negative indices."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_address(context, builder, signature.args[0], *arguments))

    return types.float32(array, index), generate


@_operation
def where_reaches(typing: Any, limits: Any, index: Any, a: Any, b: Any) -> Any:
    """`a` in the lanes whose limit is at least `index`, `b` in the others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        limit, at, x, y = (_operand(context, builder, *pair) for pair in zip(signature.args, arguments, strict=True))
        return builder.select(builder.fcmp_ordered(">=", limit, at), x, y)

    return VECTOR(limits, index, a, b), generate


@_operation
def load(typing: Any, array: Any, index: Any) -> Any:
    """Sixteen elements from `index` on, as floats: float32, int8 codes, float16 (int16) or bfloat16 (uint16) bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments)
        return _WIDEN[signature.args[0].dtype](builder, address)

    return VECTOR(array, index), generate


@_operation
def store(typing: Any, array: Any, index: Any, vector: Any) -> Any:
    """Put sixteen floats into a float32 array, from `index` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _write(builder, arguments[2], _address(context, builder, signature.args[0], *arguments[:2]))
        return context.get_dummy_value()

    return types.void(array, index, vector), generate


def _from_codes(builder: Any, address: Any) -> Any:
    codes = _read(builder, address, ir.VectorType(ir.IntType(8), LANES))
    return builder.sitofp(builder.sext(codes, _INTS), _FLOATS)


def _from_bfloat16(builder: Any, address: Any) -> Any:
    halves = _read(builder, address, ir.VectorType(ir.IntType(16), LANES))
    return builder.bitcast(builder.shl(builder.zext(halves, _INTS), _integers(16)), _FLOATS)


def _from_float16(builder: Any, address: Any) -> Any:
    """Exponent and mantissa moved into place and scaled by 2^112, the difference of the two exponents' biases;
    infinities and NaN, whose exponent is 31, get the widest exponent instead."""
    halves = builder.zext(_read(builder, address, ir.VectorType(ir.IntType(16), LANES)), _INTS)
    sign = builder.shl(builder.and_(halves, _integers(0x8000)), _integers(16))
    magnitude = builder.shl(builder.and_(halves, _integers(0x7FFF)), _integers(13))
    scaled = builder.fmul(builder.bitcast(magnitude, _FLOATS), _constant(2.0**112))
    special = builder.or_(magnitude, _integers(0x7F800000))
    is_special = builder.icmp_unsigned(">=", magnitude, _integers(0x7C00 << 13))
    bits = builder.select(is_special, special, builder.bitcast(scaled, _INTS))
    return builder.bitcast(builder.or_(bits, sign), _FLOATS)


_WIDEN: dict[Any, Callable[[Any, Any], Any]] = {
    types.float32: lambda builder, address: _read(builder, address, _FLOATS),
    types.int8: _from_codes,
    types.int16: _from_float16,
    types.uint16: _from_bfloat16,
}


@_operation
def exp(typing: Any, x: Any) -> Any:
    """e^x to about one unit in the last place; below the smallest normal number it is 0.

    x = n ln 2 + r with |r| at most half of ln 2, and e^x = 2^n e^r: the Taylor series of e^r is exact to float32
    after eight terms, and n is added to the exponent. n is rounded by adding 1.5 · 2^23, which also leaves it in
    the lowest bits; ln 2 is taken off in two parts, of which the first has few enough bits to be exact.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (x,) = arguments
        rounder = _constant(1.5 * 2**23)
        shifted = _fma(builder, x, _constant(1 / math.log(2)), rounder)
        n = builder.fsub(shifted, rounder)
        high = 355 / 512
        r = _fma(builder, n, _constant(-high), x)
        r = _fma(builder, n, _constant(high - math.log(2)), r)
        series = _constant(1 / math.factorial(7))
        for power in reversed(range(7)):
            series = _fma(builder, series, r, _constant(1 / math.factorial(power)))
        exponent = builder.shl(builder.bitcast(shifted, _INTS), _integers(23))
        result = builder.bitcast(builder.add(builder.bitcast(series, _INTS), exponent), _FLOATS)
        result = builder.select(builder.fcmp_ordered("<", x, _constant(-87.33)), _constant(0.0), result)
        result = builder.select(builder.fcmp_ordered(">", x, _constant(88.72)), _constant(math.inf), result)
        return builder.select(builder.fcmp_unordered("uno", x, x), x, result)

    return VECTOR(x), generate


@_operation
def tile(
    typing: Any,
    panel: Any,
    panel_at: Any,
    x: Any,
    x_at: Any,
    row_step: Any,
    column_step: Any,
    depth: Any,
    out: Any,
    out_at: Any,
    out_step: Any,
    fresh: Any,
) -> Any:
    """The heart of every matrix product: out[c, v] (+)= Σ_k panel[k, v] · x[k, c], all sums kept in registers.

    v runs over TILE_VECTORS · LANES floats, c over TILE_COLUMNS, k over `depth`, in this order for every result.

    Args:
        panel, panel_at: float32 [depth, TILE_VECTORS · LANES] from that index on.
        x, x_at: x[k, c] is at x_at + k · row_step + c · column_step.
        out, out_at: out[c, v] is at out_at + c · out_step + v.
        fresh: whether the sums begin at 0 or at what `out` holds.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        panel, panel_at, x, x_at, row_step, column_step, depth, out, out_at, out_step, fresh = arguments
        panel = _address(context, builder, signature.args[0], panel, panel_at)
        x = _address(context, builder, signature.args[2], x, x_at)
        out = _address(context, builder, signature.args[7], out, out_at)
        places = [(vector, column) for column in range(TILE_COLUMNS) for vector in range(TILE_VECTORS)]
        sums = {place: _emit.alloca_once(builder, _FLOATS) for place in places}

        def number(value: int) -> Any:
            return ir.Constant(_I64, value)

        def target(vector: int, column: int) -> Any:
            return builder.gep(out, [builder.add(builder.mul(out_step, number(column)), number(vector * LANES))])

        with builder.if_else(fresh) as (anew, onward):
            with anew:
                for place in places:
                    builder.store(_constant(0.0), sums[place])
            with onward:
                for place in places:
                    builder.store(_read(builder, target(*place), _FLOATS), sums[place])
        columns = [builder.mul(column_step, number(column)) for column in range(TILE_COLUMNS)]
        with _emit.for_range(builder, depth) as loop:
            row = builder.gep(panel, [builder.mul(loop.index, number(TILE_VECTORS * LANES))])
            weights = [_read(builder, builder.gep(row, [number(v * LANES)]), _FLOATS) for v in range(TILE_VECTORS)]
            here = builder.gep(x, [builder.mul(loop.index, row_step)])
            for column, offset in enumerate(columns):  # in this order, so that few values are alive at once
                value = _spread(builder, builder.load(builder.gep(here, [offset])))
                for vector, weight in enumerate(weights):
                    place = sums[vector, column]
                    builder.store(_fma(builder, weight, value, builder.load(place)), place)
        for place in places:
            _write(builder, builder.load(sums[place]), target(*place))
        return context.get_dummy_value()

    return types.void(*_TILE_TYPES(panel, x, out)), generate


def _TILE_TYPES(panel: Any, x: Any, out: Any) -> tuple[Any, ...]:
    at = types.int64
    return panel, at, x, at, at, at, at, out, at, at, types.boolean


# --- memory, and other threads ---------------------------------------------------------------------------------


@_operation
def pointer(typing: Any, address: Any) -> Any:
    """An int64 as a pointer, for Numba's `carray`."""
    return types.voidptr(types.int64), lambda context, builder, signature, arguments: builder.inttoptr(
        arguments[0], ir.IntType(8).as_pointer()
    )


@inlined
def floats(address: int, count: int) -> Any:
    """The float32 array at an address."""
    return carray(pointer(address), count, np.float32)


@inlined
def codes(address: int, count: int) -> Any:
    """The int8 array at an address."""
    return carray(pointer(address), count, np.int8)


@inlined
def float16s(address: int, count: int) -> Any:
    """The bits of float16 at an address, which `load` knows by their type."""
    return carray(pointer(address), count, np.int16)


@inlined
def bfloat16s(address: int, count: int) -> Any:
    """The bits of bfloat16 at an address, which `load` knows by their type."""
    return carray(pointer(address), count, np.uint16)


@_operation
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Ask for the eight vectors _AHEAD bytes behind `index`, which will be loaded soon; they need not exist."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        n_bytes = 8 * LANES * signature.args[0].dtype.bitwidth // 8
        start = _address(context, builder, signature.args[0], *arguments)
        start = builder.bitcast(start, ir.IntType(8).as_pointer())
        type_ = ir.FunctionType(ir.VoidType(), [start.type, _I32, _I32, _I32])
        function = _emit.get_or_insert_function(builder.module, type_, "llvm.prefetch.p0")
        for offset in range(0, n_bytes, _LINE):
            line = builder.gep(start, [ir.Constant(_I64, _AHEAD + offset)])
            builder.call(function, [line, _I32(0), _I32(3), _I32(1)])  # to read, into every level, data
        return context.get_dummy_value()

    return types.void(array, index), generate


@_operation
def pause(typing: Any) -> Any:
    """Give way, while waiting, to whoever shares the core."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if (known := _PAUSE.get(platform.machine().lower())) is not None:
            name, operands = known
            type_ = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
            builder.call(_emit.get_or_insert_function(builder.module, type_, name), operands)
        return context.get_dummy_value()

    return types.void(), generate


_YIELD = ("llvm.aarch64.hint", [_I32(1)])
_X86_PAUSE: tuple[str, list[Any]] = ("llvm.x86.sse2.pause", [])
_PAUSE = {"x86_64": _X86_PAUSE, "amd64": _X86_PAUSE, "arm64": _YIELD, "aarch64": _YIELD}


@_operation
def fetch_add(typing: Any, array: Any, index: Any) -> Any:
    """Add one to an int64 that several threads share, and return what it was; orders memory around it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments)
        return builder.atomic_rmw("add", address, ir.Constant(_I64, 1), "acq_rel")

    return types.int64(array, index), generate


@_operation
def fetch(typing: Any, array: Any, index: Any) -> Any:
    """Read an int64 that several threads share; what they wrote before is visible afterwards."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_address(context, builder, signature.args[0], *arguments), "acquire", align=8)

    return types.int64(array, index), generate
