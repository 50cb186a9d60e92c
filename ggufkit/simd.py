"""A few vector operations for numba kernels, written as LLVM intrinsics.

numba's own loops over sixteen or thirty-two small integers are unrolled before they are vectorized, and come
out scalar. The functions here emit the vector instructions themselves; LLVM lowers them to AVX-512, AVX2 or
NEON, whatever the machine has. They are called from compiled code only, on raw pointers and element offsets.
This module imports numba; only the sources of kernels import it (see `jit`).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()

_tuple: Any = types.Tuple


def _at(b: ir.IRBuilder, pointer: Any, index: Any, type_: ir.Type) -> Any:
    """The address of element `index`, as a pointer to something else."""
    return b.bitcast(b.gep(pointer, [index]), type_.as_pointer())


def _load(b: ir.IRBuilder, pointer: Any, index: Any, type_: ir.Type) -> Any:
    value = b.load(_at(b, pointer, index, type_))
    value.align = 1  # blocks of 18, 22 or 210 bytes are aligned to nothing
    return value


def _store(b: ir.IRBuilder, value: Any, pointer: Any, index: Any) -> None:
    b.store(value, _at(b, pointer, index, value.type)).align = 1


def _all(type_: ir.VectorType, value: Any) -> Any:
    return ir.Constant(type_, [value] * type_.count)


def _splat(b: ir.IRBuilder, scalar: Any, count: int) -> Any:
    nothing = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
    first = b.insert_element(nothing, scalar, I32(0))
    return b.shuffle_vector(first, nothing, _all(ir.VectorType(I32, count), 0))


def _reduce(b: ir.IRBuilder, operation: str, vector: Any) -> Any:
    """llvm.vector.reduce: one integer from all the lanes."""
    name = f"llvm.vector.reduce.{operation}.v{vector.type.count}{vector.type.element}"
    known = b.module.globals.get(name)
    function = known or ir.Function(b.module, ir.FunctionType(vector.type.element, [vector.type]), name)
    return b.call(function, [vector])


def _fold(b: ir.IRBuilder, vector: Any, down_to: int, add: Any) -> Any:
    """Add the upper half of the lanes to the lower half until `down_to` lanes are left: a fixed order."""
    while vector.type.count > down_to:
        half = vector.type.count // 2
        lanes = ir.VectorType(I32, half)
        low = b.shuffle_vector(vector, vector, ir.Constant(lanes, list(range(half))))
        high = b.shuffle_vector(vector, vector, ir.Constant(lanes, list(range(half, 2 * half))))
        vector = add(low, high)
    return vector


def _count(b: ir.IRBuilder, flags: Any) -> Any:
    """How many of the lanes of a vector of bits are set, as int32."""
    return b.zext(_reduce(b, "add", b.zext(flags, ir.VectorType(I8, flags.type.count))), I32)


def _wide(b: ir.IRBuilder, vector: Any, element: ir.Type) -> Any:
    return b.sext(vector, ir.VectorType(element, vector.type.count))


@intrinsic
def half(typingctx: Any, raw: Any, at: Any) -> Any:
    """half(raw, at) -> float32: the f16 at byte `at`, without help from the processor or a library."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        h = b.zext(_load(b, args[0], args[1], I16), I32)
        exponent, mantissa = b.and_(h, I32(0x7C00)), b.and_(h, I32(0x03FF))
        shifted = b.shl(b.and_(h, I32(0x7FFF)), I32(13))
        normal = b.add(shifted, I32(112 << 23))  # the exponent's bias differs by 112
        # a subnormal is an integer times 2^-24; float arithmetic on subnormals would be slow
        subnormal = b.bitcast(b.fmul(b.sitofp(mantissa, F32), ir.Constant(F32, 2.0**-24)), I32)
        finite = b.select(b.icmp_unsigned("==", exponent, I32(0)), subnormal, normal)
        special = b.icmp_unsigned("==", exponent, I32(0x7C00))
        magnitude = b.select(special, b.or_(shifted, I32(0x7F800000)), finite)
        return b.bitcast(b.or_(magnitude, b.shl(b.and_(h, I32(0x8000)), I32(16))), F32)

    return types.float32(raw, types.intp), codegen


@intrinsic
def from_bits(typingctx: Any, bits: Any) -> Any:
    """from_bits(bits) -> float32: the float with this pattern (an int64)."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return b.bitcast(b.trunc(args[0], I32), F32)

    return types.float32(types.int64), codegen


def _reader(type_: ir.Type, result: Any) -> Any:
    @intrinsic
    def read(typingctx: Any, raw: Any, at: Any) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
            return _load(b, args[0], args[1], type_)

        return result(raw, types.intp), codegen

    return read


#: read_...(raw, at): what stands at byte `at`, in the machine's (little-endian) order
read_f32 = _reader(F32, types.float32)
read_u16 = _reader(I16, types.uint16)
read_u32 = _reader(I32, types.uint32)
read_u64 = _reader(I64, types.uint64)


def _spreader(width: int) -> Any:
    @intrinsic
    def spread(typingctx: Any, raw: Any, at: Any, shift: Any, mask: Any, less: Any, codes: Any, to: Any) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
            source, at_, *numbers, target, to_ = args
            shift_, mask_, less_ = (_splat(b, b.trunc(number, I8), width) for number in numbers)
            field = _load(b, source, at_, ir.VectorType(I8, width))
            _store(b, b.sub(b.and_(b.lshr(field, shift_), mask_), less_), target, to_)
            return context.get_dummy_value()

        number = types.intp
        return types.void(raw, number, number, number, number, codes, number), codegen

    return spread


#: spread(raw, at, shift, mask, less, codes, to): codes[to + i] = (raw[at + i] >> shift & mask) - less
spread16, spread32 = _spreader(16), _spreader(32)


@intrinsic
def merge32(typingctx: Any, raw: Any, at: Any, shift: Any, mask: Any, left: Any, less: Any, codes: Any, to: Any) -> Any:
    """merge32(raw, at, shift, mask, left, less, codes, to): thirty-two codes get their high bits.

    codes[to + i] = (codes[to + i] | (raw[at + i] >> shift & mask) << left) - less
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, at_, shift_, mask_, left_, less_, target, to_ = args
        lanes = ir.VectorType(I8, 32)
        splat = [_splat(b, b.trunc(number, I8), 32) for number in (shift_, mask_, left_, less_)]
        high = b.shl(b.and_(b.lshr(_load(b, source, at_, lanes), splat[0]), splat[1]), splat[2])
        low = _load(b, target, to_, lanes)
        _store(b, b.sub(b.or_(low, high), splat[3]), target, to_)
        return context.get_dummy_value()

    number = types.intp
    return types.void(raw, number, number, number, number, number, codes, number), codegen


@intrinsic
def add_where32(typingctx: Any, raw: Any, at: Any, if_set: Any, if_clear: Any, codes: Any, to: Any) -> Any:
    """add_where32(raw, at, if_set, if_clear, codes, to): add one of two numbers to thirty-two codes, by the bits
    of the word at byte `at`, lowest first."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, at_, if_set_, if_clear_, target, to_ = args
        bits = _load(b, source, at_, ir.VectorType(I1, 32))
        chosen = b.select(bits, *(_splat(b, b.trunc(number, I8), 32) for number in (if_set_, if_clear_)))
        _store(b, b.add(_load(b, target, to_, ir.VectorType(I8, 32)), chosen), target, to_)
        return context.get_dummy_value()

    return types.void(raw, types.intp, types.intp, types.intp, codes, types.intp), codegen


def _coded(width: int) -> Any:
    @intrinsic
    def coded(typingctx: Any, codes: Any, at: Any, scale: Any, minimum: Any, bins: Any) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
            q8 = _load(b, args[0], args[1], ir.VectorType(I8, width))
            q16 = _wide(b, q8, I16)
            square = b.mul(q16, q16)
            q, q2 = _wide(b, q16, I32), _wide(b, square, I32)
            values = b.fadd(
                b.fmul(b.sitofp(q, ir.VectorType(F32, width)), _splat(b, args[2], width)), _splat(b, args[3], width)
            )
            zeros = _bin_values(b, values, args[4])
            # 128^4 · 8 is the most that an unsigned 32-bit lane holds
            fourth = b.zext(_fold(b, b.mul(q2, q2), 4, b.add), ir.VectorType(I64, 4))
            return context.make_tuple(
                b,
                signature.return_type,
                [
                    _reduce(b, "add", q),
                    _reduce(b, "add", b.mul(q, q)),
                    _reduce(b, "add", b.mul(q2, q)),
                    _reduce(b, "add", fourth),
                    b.sext(_reduce(b, "smin", q8), I32),
                    b.sext(_reduce(b, "smax", q8), I32),
                    zeros,
                ],
            )

        result = _tuple([types.int32] * 3 + [types.int64] + [types.int32] * 3)
        return result(codes, types.intp, types.float32, types.float32, bins), codegen

    return coded


def _bin_values(b: ir.IRBuilder, values: Any, bins: Any) -> Any:
    """Store the histogram bins of a vector of float32 as uint16; returns how many are zero."""
    lanes = ir.VectorType(I32, values.type.count)
    bits = b.bitcast(values, lanes)
    _store(b, b.trunc(b.lshr(bits, _all(lanes, 21)), ir.VectorType(I16, lanes.count)), bins, I64(0))
    return _count(b, b.icmp_unsigned("==", b.shl(bits, _all(lanes, 1)), _all(lanes, 0)))


#: coded(codes, at, scale, min, bins) -> (sum q, sum q², sum q³, sum q⁴, min q, max q, zeros)
#: of the codes at `at`; bins[i] becomes the histogram bin of scale · q + min
coded16, coded32 = _coded(16), _coded(32)


@intrinsic
def level_of(typingctx: Any, square: Any) -> Any:
    """level_of(x) -> int64: the exponent and the three top bits of the mantissa of a float64 that is not negative."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return b.lshr(b.bitcast(args[0], I64), I64(49))

    return types.int64(types.float64), codegen


@intrinsic
def bits_of(typingctx: Any, value: Any) -> Any:
    """bits_of(x) -> uint32: the pattern of a float32."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], I32)

    return types.uint32(types.float32), codegen


def _extreme(b: ir.IRBuilder, values: Any, order: str) -> Any:
    """The smallest ("<") or largest (">") of a vector of finite float32."""
    first = _fold(b, values, 1, lambda x, y: b.select(b.fcmp_ordered(order, x, y), x, y))
    return b.extract_element(first, I32(0))


def _tree(b: ir.IRBuilder, terms: Any) -> Any:
    """The sum of a vector of floats, always in the same order: lane i and lane i + half, and again."""
    return b.extract_element(_fold(b, terms, 1, b.fadd), I32(0))


def _off_grids(b: ir.IRBuilder, values: Any) -> tuple[Any, Any]:
    """How many of a vector of finite float32 bfloat16 cannot hold, and how many f16 cannot."""
    lanes, floats = ir.VectorType(I32, values.type.count), values.type
    bits = b.bitcast(values, lanes)
    magnitude = b.and_(bits, _all(lanes, 0x7FFFFFFF))
    off_bf16 = b.icmp_unsigned("!=", b.and_(bits, _all(lanes, 0xFFFF)), _all(lanes, 0))
    # normal f16: ten bits of mantissa, up to 65504
    long = b.icmp_unsigned("!=", b.and_(bits, _all(lanes, 0x1FFF)), _all(lanes, 0))
    large = b.icmp_unsigned(">", magnitude, _all(lanes, 0x477FE000))
    # subnormal f16: whole multiples of 2^-24
    small = b.icmp_unsigned("<", magnitude, _all(lanes, 0x38800000))
    units = b.fmul(b.bitcast(magnitude, floats), _all(floats, 2.0**24))
    units = b.select(small, units, _all(floats, 0.0))
    broken = b.fcmp_ordered("!=", b.sitofp(b.fptosi(units, lanes), floats), units)
    off_f16 = b.select(small, broken, b.or_(long, large))
    return _count(b, off_bf16), _count(b, off_f16)


@intrinsic
def valued32(typingctx: Any, values: Any, at: Any, pivot: Any, bins: Any) -> Any:
    """valued32(values, at, pivot, bins): thirty-two float32 at once.

    Returns (how many are odd: not finite, or below 2^-128 but not zero; zeros; sums of the powers 1 to 4 of
    value - pivot; the sum of the squares; min; max; how many are off the bf16 grid, off the f16 grid). All but the
    first mean something only if none is odd. bins[i] becomes the histogram bin of value i.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        x = _load(b, args[0], args[1], ir.VectorType(F32, 32))
        lanes = ir.VectorType(I32, 32)
        magnitude = b.and_(b.bitcast(x, lanes), _all(lanes, 0x7FFFFFFF))
        special = b.icmp_unsigned(">=", magnitude, _all(lanes, 0x7F800000))
        below = b.icmp_unsigned("<", b.sub(magnitude, _all(lanes, 1)), _all(lanes, (1 << 21) - 1))
        odd = _count(b, b.or_(special, below))
        zeros = _bin_values(b, x, args[3])
        wide = b.fpext(x, ir.VectorType(F64, 32))
        y = b.fsub(wide, _splat(b, args[2], 32))
        y2 = b.fmul(y, y)
        powers = (y, y2, b.fmul(y2, y), b.fmul(y2, y2), b.fmul(wide, wide))
        results = [odd, zeros, *(_tree(b, power) for power in powers)]
        results += [_extreme(b, x, "<"), _extreme(b, x, ">"), *_off_grids(b, x)]
        return context.make_tuple(b, signature.return_type, results)

    i, f, d = types.int32, types.float32, types.float64
    return _tuple([i, i, d, d, d, d, d, f, f, i, i])(values, types.intp, types.float64, bins), codegen
