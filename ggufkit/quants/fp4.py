"""Four bits an element through a table of 16 values: MXFP4, NVFP4, IQ4_NL and IQ4_XS.

Layouts after the structs of ggml-common.h. The values of E2M1 are doubled to be integers, and the scales halved.

    MXFP4    17  e:1 qs:16              scale = 2^(e - 128), nibbles as in Q4_0
    NVFP4    36  d:4 qs:32              four groups of 16 with a UE4M3 scale each; nibbles by groups of 8 bytes
    IQ4_NL   18  d:2 qs:16              scale = d (f16)
    IQ4_XS  136  d:2 scales_h:2 scales_l:4 qs:128
                                        eight groups of 32, scale = d · (6 bits - 32): four low bits in the
                                        nibbles of scales_l, two high bits in scales_h, lowest first
"""

from __future__ import annotations

import numpy as np

from ggufkit.quants import Unpacked
from ggufkit.quants.bits import F32, U8, halves, planes, signed

#: E2M1, doubled: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0)
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)

#: kvalues_iq4nl of ggml-common.h, a table fitted to the distribution of weights
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


def e8m0_half(e: U8) -> F32:
    """2^(e - 128) for a byte e; the two smallest are subnormal. 255, a NaN in the standard, is 2^127 in ggml."""
    bits = np.where(e < 2, np.uint32(0x00200000) << (e & 1).astype(np.uint32), (e - 1).astype(np.uint32) << 23)
    return bits.astype(np.uint32).view(np.float32)


def ue4m3_half(x: U8) -> F32:
    """Half the value of an unsigned E4M3 byte (bias 7; the top bit is ignored; 0x7f, its NaN, is 0 in ggml)."""
    exponent, mantissa = (x >> 3 & 0x0F).astype(np.int32), (x & 7).astype(np.int32)
    significand = np.where(exponent == 0, mantissa, mantissa + 8)
    value = np.ldexp(significand.astype(np.float32), np.maximum(exponent, 1) - 11)
    return np.where(x == 0x7F, np.float32(0), value)


def mxfp4(blocks: U8) -> Unpacked:
    return Unpacked(E2M1[planes(blocks[:, 1:], 4, 16)], e8m0_half(blocks[:, :1]), None)


def nvfp4(blocks: U8) -> Unpacked:
    return Unpacked(E2M1[planes(blocks[:, 4:], 4, 8)], ue4m3_half(blocks[:, :4]), None)


def iq4_nl(blocks: U8) -> Unpacked:
    return Unpacked(IQ4[planes(blocks[:, 2:], 4, 16)], halves(blocks, 0), None)


def iq4_xs(blocks: U8) -> Unpacked:
    sc = signed(planes(blocks[:, 4:8], 4, 1) | planes(blocks[:, 2:4], 2, 1) << np.uint8(4), 32)
    return Unpacked(IQ4[planes(blocks[:, 8:], 4, 16)], halves(blocks, 0) * sc, None)
