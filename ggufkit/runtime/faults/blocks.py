"""Blocks decoded wrongly: a product with a weight whose bits were put together in the wrong way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ggufkit import quants
from ggufkit.quants import QuantType, Unpacked
from ggufkit.runtime.faults.products import PRODUCTS, product, weight_name
from ggufkit.runtime.faults.registry import fault
from ggufkit.runtime.reference import State
from ggufkit.steps import Array

#: types that keep the low four bits of two codes in a byte → the run r: a byte holds elements i and i + r
_NIBBLE_RUNS = {"Q4_0": 16, "Q4_1": 16, "Q5_0": 16, "Q5_1": 16, "Q4_K": 32, "Q5_K": 32}
#: what was added to a code to store it without a sign
_ZERO_POINTS = {"Q4_0": 8, "Q5_0": 16, "Q3_K": 4, "Q6_K": 32}
_FIVE_BITS = frozenset({"Q5_0", "Q5_1", "Q5_K"})

Change = Callable[[QuantType, Unpacked], Unpacked | None]


def _decoded(s: State, step: str, change: Change) -> Array:
    """The product with the weight's parts changed; as it should be for types where `change` gives None."""
    tensor, raw = s.weights.packed(weight_name(s, step))
    if tensor.type is None or not tensor.type.is_block:
        return product(s, step)
    parts = change(tensor.type, quants.unpack(tensor.type, raw, s.weights.gguf.byteorder))
    if parts is None:
        return product(s, step)
    values = parts.codes.reshape(-1, tensor.type.group) * parts.scales.reshape(-1, 1)
    if parts.mins is not None:
        values = values + parts.mins.reshape(-1, 1)
    return product(s, step, values.astype(np.float32).reshape(tensor.shape))


def _stored(type_: QuantType, parts: Unpacked) -> Array:
    """The codes as they stand in the file, without sign; int16."""
    return parts.codes.astype(np.int16) + np.int16(_ZERO_POINTS.get(type_.name, 0))


def _with_stored(type_: QuantType, parts: Unpacked, stored: Array) -> Unpacked:
    return parts._replace(codes=(stored - np.int16(_ZERO_POINTS.get(type_.name, 0))).astype(np.int8))


@fault("the two codes of a byte are put side by side", "weights", PRODUCTS)
def nibble_order(s: State, step: str) -> Array:
    """In the 4- and 5-bit types the low halves of 16 (K-quants: 32) bytes are consecutive elements, and the high
    halves are the elements after those. This engine makes elements 2i and 2i+1 out of byte i."""

    def change(type_: QuantType, parts: Unpacked) -> Unpacked | None:
        if (run := _NIBBLE_RUNS.get(type_.name)) is None:
            return None
        stored = _stored(type_, parts)
        low = (stored & 15).reshape(-1, 2, run).transpose(0, 2, 1).reshape(stored.shape)
        return _with_stored(type_, parts, low | (stored & ~15))

    return _decoded(s, step, change)


@fault("the low and the high half of each byte are exchanged", "weights", PRODUCTS)
def nibbles_swapped(s: State, step: str) -> Array:
    """The low half of a byte is the earlier element. This engine takes the high half first."""

    def change(type_: QuantType, parts: Unpacked) -> Unpacked | None:
        if (run := _NIBBLE_RUNS.get(type_.name)) is None:
            return None
        stored = _stored(type_, parts)
        low = (stored & 15).reshape(-1, 2, run)[:, ::-1].reshape(stored.shape)
        return _with_stored(type_, parts, low | (stored & ~15))

    return _decoded(s, step, change)


@fault("the fifth bits are given to the wrong elements", "weights", PRODUCTS)
def high_bits_misplaced(s: State, step: str) -> Array:
    """Q5_0 and Q5_1 keep the fifth bit of element i in bit i of a 32-bit word, so that byte i of the nibbles goes with
    bits i and i + 16. This engine takes bits 2i and 2i + 1."""

    def change(type_: QuantType, parts: Unpacked) -> Unpacked | None:
        if type_.name not in _FIVE_BITS:
            return None
        stored = _stored(type_, parts)
        high = (stored & 16).reshape(-1, _NIBBLE_RUNS[type_.name], 2).transpose(0, 2, 1).reshape(stored.shape)
        return _with_stored(type_, parts, high | (stored & 15))

    return _decoded(s, step, change)


@fault("the fifth bits are left out", "weights", PRODUCTS)
def high_bits_missing(s: State, step: str) -> Array:
    """The 5-bit types keep four bits of a code in nibbles and the fifth in a field of its own; this engine reads the
    nibbles alone."""

    def change(type_: QuantType, parts: Unpacked) -> Unpacked | None:
        return _with_stored(type_, parts, _stored(type_, parts) & 15) if type_.name in _FIVE_BITS else None

    return _decoded(s, step, change)


@fault("the zero point of the codes is not subtracted", "weights", PRODUCTS)
def zero_point_missing(s: State, step: str) -> Array:
    """Q4_0 stores code + 8, Q5_0 code + 16, Q3_K code + 4, Q6_K code + 32. This engine multiplies the stored number
    by the scale without subtracting that first."""

    def change(type_: QuantType, parts: Unpacked) -> Unpacked | None:
        return parts._replace(codes=_stored(type_, parts).astype(np.int8)) if type_.name in _ZERO_POINTS else None

    return _decoded(s, step, change)


@fault("the min of each block has the wrong sign", "weights", PRODUCTS)
def min_sign(s: State, step: str) -> Array:
    """Q4_1 and Q5_1 add their min (d * q + m), the K-quants subtract theirs (d * sc * q - dmin * m). This engine does
    it the other way round."""
    return _decoded(s, step, lambda _, parts: None if parts.mins is None else parts._replace(mins=-parts.mins))


@fault("the min of each block is left out", "weights", PRODUCTS)
def min_missing(s: State, step: str) -> Array:
    """Types with a min (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K) are decoded as if they had none."""
    return _decoded(s, step, lambda _, parts: None if parts.mins is None else parts._replace(mins=None))


@fault("each block is decoded with the next block's scale", "weights", PRODUCTS)
def scale_of_next_block(s: State, step: str) -> Array:
    """The codes are right and the scales are shifted by one block. Look at the pointer arithmetic between a block's
    scale and its codes."""

    def change(type_: QuantType, parts: Unpacked) -> Unpacked | None:
        groups = type_.block_size // type_.group
        mins = None if parts.mins is None else np.roll(parts.mins.reshape(-1), -groups)
        return parts._replace(scales=np.roll(parts.scales.reshape(-1), -groups), mins=mins)

    return _decoded(s, step, change)


@fault("each block is the one after the right one", "weights", PRODUCTS)
def block_off_by_one(s: State, step: str) -> Array:
    """Scale and codes belong together, but to the block after the right one. Look for an index that is advanced before
    the block is read, or for a tensor's data that is taken to begin too late."""
    tensor, _ = s.weights.packed(weight_name(s, step))
    if tensor.type is None or not tensor.type.is_block:
        return product(s, step)
    weight = s.weights[weight_name(s, step)]
    return product(s, step, np.roll(weight.reshape(-1), -tensor.type.block_size).reshape(weight.shape))


@fault("block scales are read in the wrong byte order", "weights", PRODUCTS)
def scale_byte_order(s: State, step: str) -> Array:
    """The two bytes of a block's f16 scale are exchanged. Look for big-endian reads, or for a struct that is read one
    byte off."""
    tensor, raw = s.weights.packed(weight_name(s, step))
    type_ = tensor.type
    if type_ is None or not type_.is_block or type_.d is None:
        return product(s, step)
    blocks = raw.reshape(-1, type_.type_size).copy()
    for at in (type_.d, type_.dmin):
        if at is not None:
            blocks[:, [at, at + 1]] = blocks[:, [at + 1, at]]
    values = quants.dequantize(type_, blocks.reshape(-1), byteorder=s.weights.gguf.byteorder)
    return product(s, step, values.reshape(tensor.shape))
