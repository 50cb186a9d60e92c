"""The IQ family: super-blocks of 256 whose elements come in fours or eights out of a codebook (a "grid").

Layouts after block_iq1_s … block_iq3_s of ggml-common.h; sizes in bytes, d is f16, s the small scale of a group.

    IQ2_XXS   66  d:2 qs:64                        8 × (4 grid bytes, one word: 4 × 7 sign bits, 4 bits s)
    IQ2_XS    74  d:2 qs:64 scales:8               32 words: 9 bits grid, 7 sign bits; s in nibbles, groups of 16
    IQ2_S     82  d:2 qs:32 signs:32 qh:8 scales:8 grid index 8 + 2 bits, 8 sign bits; s as in IQ2_XS
    IQ3_XXS   98  d:2 qs:64 words:32               grid of fours; words as the second one of IQ2_XXS
    IQ3_S    110  d:2 qs:64 qh:8 signs:32 scales:4 grid index 8 + 1 bits; s in nibbles, groups of 32
    IQ1_S     50  d:2 qs:32 qh:16                  8 words: 4 × 3 high grid bits, 3 bits s, the sign of delta
    IQ1_M     56  qs:32 qh:16 scales:8             nibbles of qh: 3 high grid bits, the sign of delta; four words
                                                   of 4 × 3 bits s, whose top nibbles make up the f16 d

A 7-bit sign field stands for eight signs of which an even number is set. The scales are d · (s + ½) / 4 (IQ2),
d · (s + ½) / 2 (IQ3_XXS), d · (2s + 1) (IQ3_S, IQ1). IQ1 adds ±⅛ to a grid of -1, 0, 1: in codes eight times as
large and scales an eighth, that is an integer too.

The grids are constants of the format and come from gguf-py.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from ggufkit.errors import Unsupported
from ggufkit.quants import Unpacked
from ggufkit.quants.bits import F32, I8, U8, halves, planes, words


@cache
def grid(name: str) -> I8:
    """The codebook of a type: int8 [entries, 4 or 8], from gguf-py.

    Raises:
        Unsupported: the installed gguf package does not hold it where 0.10 to 0.19 do.
    """
    import gguf.quants

    try:
        codec = getattr(gguf.quants, name)
        codec.init_grid()
        return np.asarray(codec.grid, np.float32).reshape(codec.grid_shape).astype(np.int8)
    except (AttributeError, TypeError, ValueError) as problem:
        raise Unsupported(
            f"the installed gguf package has no codebook for {name}",
            expected="gguf.quants with init_grid()",
            help="install gguf 0.19",
        ) from problem


def _even_signs() -> U8:
    """The eight signs of each 7-bit field: the eighth makes their number even."""
    fields = np.arange(128, dtype=np.uint8)
    parity = np.unpackbits(fields[:, None], axis=1).sum(axis=1, dtype=np.uint8) & 1
    signs: U8 = fields | parity << np.uint8(7)
    return signs


_EVEN_SIGNS = _even_signs()


def _apply(signs: U8, magnitudes: I8) -> I8:
    """Negate where a bit of `signs` (lowest first) is set: uint8 [n, k / 8] and int8 [n, k]."""
    negated: I8 = np.where(planes(signs, 1, 1) == 1, -magnitudes, magnitudes)
    return negated


def _look_up(name: str, index: npt.NDArray[np.integer]) -> I8:
    codes: I8 = grid(name)[index]
    return codes.reshape(len(index), -1)


def _sign_words(word: npt.NDArray[np.integer]) -> tuple[U8, F32]:
    """The words of IQ2_XXS and IQ3_XXS: uint32 [n, 8] -> sign bytes [n, 32], s + ½ [n, 8]."""
    fields = word[:, :, None] >> np.array([0, 7, 14, 21], np.uint32) & 0x7F
    return _EVEN_SIGNS[fields].reshape(len(word), 32), (word >> 28).astype(np.float32) + np.float32(0.5)


def iq2_xxs(blocks: U8) -> Unpacked:
    pairs = words(blocks[:, 2:], "u4").reshape(len(blocks), 8, 2)
    index = blocks[:, 2:].reshape(len(blocks), 8, 8)[:, :, :4].reshape(len(blocks), 32)
    signs, s = _sign_words(pairs[:, :, 1])
    return Unpacked(_apply(signs, _look_up("IQ2_XXS", index)), halves(blocks, 0) * s * np.float32(0.25), None)


def iq2_xs(blocks: U8) -> Unpacked:
    word = words(blocks[:, 2:66], "u2")
    s = planes(blocks[:, 66:], 4, 1) + np.float32(0.5)
    codes = _apply(_EVEN_SIGNS[word >> 9], _look_up("IQ2_XS", word & 511))
    return Unpacked(codes, halves(blocks, 0) * s * np.float32(0.25), None)


def iq2_s(blocks: U8) -> Unpacked:
    high = planes(blocks[:, 66:74], 2, 1).astype(np.uint16) << 8
    s = planes(blocks[:, 74:], 4, 1) + np.float32(0.5)
    codes = _apply(blocks[:, 34:66], _look_up("IQ2_S", blocks[:, 2:34] | high))
    return Unpacked(codes, halves(blocks, 0) * s * np.float32(0.25), None)


def iq3_xxs(blocks: U8) -> Unpacked:
    signs, s = _sign_words(words(blocks[:, 66:], "u4"))
    codes = _apply(signs, _look_up("IQ3_XXS", blocks[:, 2:66]))
    return Unpacked(codes, halves(blocks, 0) * s * np.float32(0.5), None)


def iq3_s(blocks: U8) -> Unpacked:
    high = planes(blocks[:, 66:74], 1, 1).astype(np.uint16) << 8
    s = 2 * planes(blocks[:, 106:], 4, 1) + np.float32(1)
    codes = _apply(blocks[:, 74:106], _look_up("IQ3_S", blocks[:, 2:66] | high))
    return Unpacked(codes, halves(blocks, 0) * s, None)


def _one_bit(index: npt.NDArray[np.integer], minus: npt.NDArray[np.bool_], dl: F32) -> Unpacked:
    """IQ1: grid entries and the sign of delta by eights, eight times as large, and scales dl / 8."""
    delta = np.where(minus, np.int8(-1), np.int8(1))
    codes = 8 * grid("IQ1_S")[index] + delta[:, :, None]
    return Unpacked(codes.reshape(len(index), -1), dl * np.float32(0.125), None)


def iq1_s(blocks: U8) -> Unpacked:
    word = words(blocks[:, 34:], "u2")
    high = word[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & 7
    index = blocks[:, 2:34] | high.reshape(len(blocks), 32) << 8
    minus = np.repeat(word & 0x8000 != 0, 4, axis=1)
    s = (2 * (word >> 12 & 7) + 1).astype(np.float32)
    return _one_bit(index, minus, halves(blocks, 0) * s)


def iq1_m(blocks: U8) -> Unpacked:
    nibbles = planes(blocks[:, 32:48], 4, 1)
    index = blocks[:, :32] | (nibbles & 7).astype(np.uint16) << 8
    word = words(blocks[:, 48:], "u2")
    top = (word >> 12) << np.array([0, 4, 8, 12], np.uint16)
    d = np.bitwise_or.reduce(top, axis=1, keepdims=True).astype(np.uint16).view(np.float16).astype(np.float32)
    s = word[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & 7
    dl = d * (2 * s.reshape(len(blocks), 16) + 1).astype(np.float32)
    return _one_bit(index, nibbles & 8 != 0, dl)
