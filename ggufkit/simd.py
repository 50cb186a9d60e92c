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

#: the largest finite float32, and the pattern of 2^-100, below which a scale may give values that are tiny
LARGEST, TINY_SCALE_BITS = 3.4028234663852886e38, (127 - 100) << 23


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


def _widen_half(b: ir.IRBuilder, h: Any) -> Any:
    """The patterns of float32 from those of f16, a vector of int32: no help from the processor or a library.

    A subnormal is an integer times 2^-24; float arithmetic on subnormal numbers would be slow.
    """
    lanes = h.type
    floats = ir.VectorType(F32, lanes.count)
    exponent, mantissa = b.and_(h, _all(lanes, 0x7C00)), b.and_(h, _all(lanes, 0x03FF))
    shifted = b.shl(b.and_(h, _all(lanes, 0x7FFF)), _all(lanes, 13))
    normal = b.add(shifted, _all(lanes, 112 << 23))  # the exponent's bias differs by 112
    subnormal = b.bitcast(b.fmul(b.sitofp(mantissa, floats), _all(floats, 2.0**-24)), lanes)
    finite = b.select(b.icmp_unsigned("==", exponent, _all(lanes, 0)), subnormal, normal)
    special = b.icmp_unsigned("==", exponent, _all(lanes, 0x7C00))
    magnitude = b.select(special, b.or_(shifted, _all(lanes, 0x7F800000)), finite)
    return b.or_(magnitude, b.shl(b.and_(h, _all(lanes, 0x8000)), _all(lanes, 16)))


@intrinsic
def half(typingctx: Any, raw: Any, at: Any) -> Any:
    """half(raw, at) -> float32: the f16 at byte `at`."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        word = b.zext(_load(b, args[0], args[1], I16), I32)
        bits = _widen_half(b, b.insert_element(ir.Constant(ir.VectorType(I32, 1), ir.Undefined), word, I32(0)))
        return b.bitcast(b.extract_element(bits, I32(0)), F32)

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
def fives32(typingctx: Any, raw: Any, nibbles: Any, fifth: Any, less: Any, codes: Any, to: Any) -> Any:
    """fives32(raw, nibbles, fifth, less, codes, to): thirty-two codes of five bits.

    The low nibbles of the sixteen bytes at `nibbles`, then the high ones, each with its bit of the word at byte
    `fifth` (lowest first) on top; less `less`.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, nibbles_, fifth_, less_, target, to_ = args
        half_, lanes = ir.VectorType(I8, 16), ir.VectorType(I8, 32)
        packed = _load(b, source, nibbles_, half_)
        low, high = b.and_(packed, _all(half_, 15)), b.lshr(packed, _all(half_, 4))
        both = b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, 32), list(range(32))))
        bits = _load(b, source, fifth_, ir.VectorType(I1, 32))
        on_top = b.select(bits, _all(lanes, 16), _all(lanes, 0))
        _store(b, b.sub(b.or_(both, on_top), _splat(b, b.trunc(less_, I8), 32)), target, to_)
        return context.get_dummy_value()

    number = types.intp
    return types.void(raw, number, number, number, codes, number), codegen


@intrinsic
def signs32(typingctx: Any, raw: Any, at: Any, codes: Any, to: Any) -> Any:
    """signs32(raw, at, codes, to): thirty-two codes of one bit, 1 where it is set and -1 where not."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        lanes = ir.VectorType(I8, 32)
        bits = _load(b, args[0], args[1], ir.VectorType(I1, 32))
        _store(b, b.select(bits, _all(lanes, 1), _all(lanes, -1)), args[2], args[3])
        return context.get_dummy_value()

    return types.void(raw, types.intp, codes, types.intp), codegen


@intrinsic
def affine16(typingctx: Any, codes: Any, at: Any, scale: Any, minimum: Any, values: Any) -> Any:
    """affine16(codes, at, scale, min, values): values[at + i] = scale · codes[at + i] + min, sixteen of them."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        codes_, at_, scale_, minimum_, values_ = args
        floats = ir.VectorType(F32, 16)
        q = b.sitofp(_load(b, codes_, at_, ir.VectorType(I8, 16)), floats)
        _store(b, b.fadd(b.fmul(q, _splat(b, scale_, 16)), _splat(b, minimum_, 16)), values_, at_)
        return context.get_dummy_value()

    return types.void(codes, types.intp, types.float32, types.float32, values), codegen


def _widener(lanes: int, widen: Any) -> Any:
    @intrinsic
    def widener(typingctx: Any, raw: Any, at: Any, values: Any, to: Any) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
            words = b.zext(_load(b, args[0], args[1], ir.VectorType(I16, lanes)), ir.VectorType(I32, lanes))
            _store(b, widen(b, words), args[2], args[3])
            return context.get_dummy_value()

        return types.void(raw, types.intp, values, types.intp), codegen

    return widener


#: widen_..._16(raw, at, values, to): sixteen numbers at byte `at`, as float32 from values[to] on
widen_f16_16 = _widener(16, lambda b, words: _widen_half(b, words))
widen_bf16_16 = _widener(16, lambda b, words: b.shl(words, _all(words.type, 16)))


def _add_lanes(b: ir.IRBuilder, into: Any, terms: list[Any]) -> None:
    """Add vectors of eight float64 to those at `into`, one after the other."""
    lanes = ir.VectorType(F64, 8)
    for place, term in enumerate(terms):
        at = I64(8 * place)
        _store(b, b.fadd(_load(b, into, at, lanes), term), into, at)


def _polynomial(b: ir.IRBuilder, terms: list[tuple[Any, Any]], constant: Any) -> Any:
    """The sum of scalar · vector, plus a scalar."""
    total = _splat(b, constant, 8)
    for scalar, vector in terms:
        total = b.fadd(total, b.fmul(_splat(b, scalar, 8), vector))
    return total


def _shifted_powers(b: ir.IRBuilder, powers: list[Any], shift: Any, n: float) -> list[Any]:
    """From sums of the powers of x over n elements a lane to those of x + shift: the binomial formula."""

    def times(factor: float, value: Any) -> Any:
        return b.fmul(ir.Constant(F64, factor), value)

    one = ir.Constant(F64, 1.0)
    c, (p1, p2, p3, p4) = shift, powers
    c2 = b.fmul(c, c)
    c3, c4 = b.fmul(c2, c), b.fmul(c2, c2)
    return [
        _polynomial(b, [(one, p1)], times(n, c)),
        _polynomial(b, [(one, p2), (times(2, c), p1)], times(n, c2)),
        _polynomial(b, [(one, p3), (times(3, c), p2), (times(3, c2), p1)], times(n, c3)),
        _polynomial(b, [(one, p4), (times(4, c), p3), (times(6, c2), p2), (times(4, c3), p1)], times(n, c4)),
    ]


def _pairs(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    """Products of two vectors of int16, added up by neighbouring pairs to int32: one instruction on x86."""
    count = x.type.count
    products = b.mul(_wide(b, x, I32), _wide(b, y, I32))
    lanes = ir.VectorType(I32, count // 2)
    even, odd = (ir.Constant(lanes, list(range(first, count, 2))) for first in (0, 1))
    return b.add(b.shuffle_vector(products, products, even), b.shuffle_vector(products, products, odd))


def _coded(width: int, shifted: bool) -> Any:
    @intrinsic
    def coded(
        typingctx: Any, codes: Any, at: Any, scale: Any, minimum: Any, shift: Any, bins: Any, to: Any, sums: Any
    ) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
            codes_, at_, scale_, minimum_, shift_, bins_, to_, sums_ = args
            q8 = _load(b, codes_, at_, ir.VectorType(I8, width))
            q16 = _wide(b, q8, I16)
            q, squares = _wide(b, q16, I32), b.mul(q16, q16)
            floats = ir.VectorType(F32, width)
            scaled = b.fmul(b.sitofp(q, floats), _splat(b, scale_, width))
            _store_bins(b, b.fadd(scaled, _splat(b, minimum_, width)), bins_, to_)
            # a lane adds up four codes at most: 4 · 128^4 fits
            products = (q, _pairs(b, q16, q16), _pairs(b, squares, q16), _pairs(b, squares, squares))
            lanes = [_fold(b, x, 8, b.add) for x in products]
            wide = b.fpext(scale_, F64)
            square = b.fmul(wide, wide)
            factors = (wide, square, b.fmul(square, wide), b.fmul(square, square))
            doubles = ir.VectorType(F64, 8)
            powers = [b.fmul(b.sitofp(x, doubles), _splat(b, f, 8)) for x, f in zip(lanes, factors, strict=True)]
            ends = [b.sext(_reduce(b, name, q8), I32) for name in ("smin", "smax")]
            x, y = (b.fadd(b.fmul(b.sitofp(end, F32), scale_), minimum_) for end in ends)
            swap = b.fcmp_ordered("<", y, x)
            x, y = b.select(swap, y, x), b.select(swap, x, y)
            ok = _is_plain(b, scale_, x, y)
            with b.if_then(ok, likely=True):
                _add_lanes(b, sums_, _shifted_powers(b, powers, shift_, width / 8) if shifted else powers)
            s1 = _reduce(b, "add", lanes[0]) if shifted else I32(0)
            results = [b.zext(ok, I32), s1, _reduce(b, "add", lanes[1]), *ends, x, y]
            return context.make_tuple(b, signature.return_type, results)

        number, float32 = types.intp, types.float32
        result = _tuple([types.int32] * 5 + [float32] * 2)
        return result(codes, number, float32, float32, types.float64, bins, number, sums), codegen

    return coded


def _is_plain(b: ir.IRBuilder, scale: Any, low: Any, high: Any) -> Any:
    """Whether all values between two are finite, and the scale so large (or zero) that none is tiny."""
    largest, tiny = ir.Constant(F32, LARGEST), I32(TINY_SCALE_BITS)
    finite = b.and_(b.fcmp_ordered(">=", low, ir.Constant(F32, -LARGEST)), b.fcmp_ordered("<=", high, largest))
    magnitude = b.and_(b.bitcast(scale, I32), I32(0x7FFFFFFF))
    usual = b.or_(b.icmp_unsigned(">", magnitude, tiny), b.icmp_unsigned("==", magnitude, I32(0)))
    return b.and_(finite, usual)


def _store_bins(b: ir.IRBuilder, values: Any, bins: Any, to: Any) -> None:
    """Store the histogram bins of a vector of float32 as uint16."""
    lanes = ir.VectorType(I32, values.type.count)
    top = b.lshr(b.bitcast(values, lanes), _all(lanes, 21))
    _store(b, b.trunc(top, ir.VectorType(I16, lanes.count)), bins, to)


#: coded(codes, at, scale, min, shift, bins, to, sums) -> (ok, sum q, sum q², min q, max q, min value, max value) of
#: the codes at `at`. bins[to + i] becomes the histogram bin of scale · q + min. If all of these are finite and the
#: scale is not tiny, it is ok, and to the four times eight float64 at `sums` are added the powers 1 to 4 of
#: scale · q + shift; the plain ones ignore the shift and do not tell the sum of q.
coded16, coded32 = _coded(16, False), _coded(32, False)
shifted16, shifted32 = _coded(16, True), _coded(32, True)


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
def valued32(typingctx: Any, values: Any, at: Any, pivot: Any, bins: Any, to: Any, sums: Any) -> Any:
    """valued32(values, at, pivot, bins, to, sums): thirty-two float32 at once.

    Returns (how many are odd: not finite, or below 2^-128 but not zero; the sum of the squares; min; max; how many
    are off the bf16 grid, off the f16 grid). If none is odd, bins[to + i] becomes the histogram bin of value i, and
    the powers 1 to 4 of value - pivot are added to the four times eight float64 at `sums`; otherwise nothing is
    added and the rest means nothing.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        values_, at_, pivot_, bins_, to_, sums_ = args
        x = _load(b, values_, at_, ir.VectorType(F32, 32))
        lanes = ir.VectorType(I32, 32)
        magnitude = b.and_(b.bitcast(x, lanes), _all(lanes, 0x7FFFFFFF))
        special = b.icmp_unsigned(">=", magnitude, _all(lanes, 0x7F800000))
        below = b.icmp_unsigned("<", b.sub(magnitude, _all(lanes, 1)), _all(lanes, (1 << 21) - 1))
        odd = _count(b, b.or_(special, below))
        _store_bins(b, x, bins_, to_)
        wide = b.fpext(x, ir.VectorType(F64, 32))
        y = b.fsub(wide, _splat(b, pivot_, 32))
        y2 = b.fmul(y, y)
        with b.if_then(b.icmp_unsigned("==", odd, I32(0))):
            _add_lanes(b, sums_, [_fold(b, power, 8, b.fadd) for power in (y, y2, b.fmul(y2, y), b.fmul(y2, y2))])
        results = [odd, _tree(b, b.fmul(wide, wide)), _extreme(b, x, "<"), _extreme(b, x, ">"), *_off_grids(b, x)]
        return context.make_tuple(b, signature.return_type, results)

    i, f, d, number = types.int32, types.float32, types.float64, types.intp
    return _tuple([i, d, f, f, i, i])(values, number, d, bins, number, sums), codegen
