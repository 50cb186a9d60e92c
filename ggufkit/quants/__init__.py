"""The block types of ggml as one table, and the door to their codecs.

This module is data: it imports neither numba nor the codecs, so that `inspect` can name a type and compute a
size without paying for either. `unpack` and `dequantize` load the codecs when they are first called.

Every block type of ggml is affine: value = scale · code + min, where the code is a small signed integer and
one scale (and, for some types, one min) is shared by a fixed group of elements. One `unpack` a type is
therefore enough for dequantizing, for statistics and for repacking into whatever a processor multiplies fast.

Sizes and ids: `ggml.h` (enum ggml_type) and `ggml-common.h` (the block structs) of ggml, revision d99724f.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["BY_NAME", "REMOVED", "TYPES", "QuantType", "Unpacked", "Word", "dequantize", "to_little", "unpack"]


class Word(NamedTuple):
    """`times` words of `width` bytes, from byte `offset` of a block: what a big-endian file stores swapped."""

    offset: int
    width: int
    times: int = 1


@dataclass(frozen=True, slots=True)
class QuantType:
    """One row of the type table.

    Attributes:
        id: the number in the file (enum ggml_type).
        name: ggml's name in capitals, e.g. "Q5_0".
        block_size: elements in a block; 1 for the plain numbers.
        type_size: bytes in a block.
        kind: "float" and "int" are plain numbers, "block" is a quantized block.
        group: elements that share one scale (0 for plain numbers).
        has_min: whether a group also has a min.
        d: byte offset of the block's own float scale, None where there is no such field.
        dmin: byte offset of the block's own float min, likewise.
        words: the multi-byte fields of a block, for the other byte order.
        decodable: False for a type that is never stored in a model file and that ggufkit does not decode.
    """

    id: int
    name: str
    block_size: int
    type_size: int
    kind: Literal["float", "int", "block"] = "block"
    group: int = 0
    has_min: bool = False
    d: int | None = None
    dmin: int | None = None
    words: tuple[Word, ...] = ()
    decodable: bool = True

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.type_size / self.block_size

    @property
    def is_block(self) -> bool:
        return self.kind == "block"

    def nbytes(self, n_elements: int) -> int:
        """Bytes of a row of `n_elements`, which must be a multiple of the block size."""
        return n_elements // self.block_size * self.type_size

    def __str__(self) -> str:
        return self.name


def _number(type_id: int, name: str, kind: Literal["float", "int"], size: int) -> QuantType:
    return QuantType(type_id, name, 1, size, kind, words=(Word(0, size),) if size > 1 else ())


def _block(
    type_id: int,
    name: str,
    block_size: int,
    type_size: int,
    group: int,
    *,
    d: int | None = None,
    dmin: int | None = None,
    words: tuple[Word, ...] = (),
) -> QuantType:
    """A block type; its f16 fields `d` and `dmin` are words too."""
    halves = tuple(Word(at, 2) for at in (d, dmin) if at is not None)
    has_min = dmin is not None
    return QuantType(type_id, name, block_size, type_size, "block", group, has_min, d, dmin, halves + words)


_ROWS = (
    _number(0, "F32", "float", 4),
    _number(1, "F16", "float", 2),
    _number(30, "BF16", "float", 2),
    _number(28, "F64", "float", 8),
    _number(24, "I8", "int", 1),
    _number(25, "I16", "int", 2),
    _number(26, "I32", "int", 4),
    _number(27, "I64", "int", 8),
    _block(2, "Q4_0", 32, 18, 32, d=0),
    _block(3, "Q4_1", 32, 20, 32, d=0, dmin=2),
    _block(6, "Q5_0", 32, 22, 32, d=0, words=(Word(2, 4),)),
    _block(7, "Q5_1", 32, 24, 32, d=0, dmin=2, words=(Word(4, 4),)),
    _block(8, "Q8_0", 32, 34, 32, d=0),
    # An activation format of the dot products, never stored in a model. gguf-py gives it 40 bytes (two f32 and
    # 32 codes), ggml has had two f16 instead for long; since neither occurs in a file it is not decoded.
    QuantType(9, "Q8_1", 32, 40, group=32, decodable=False),
    _block(10, "Q2_K", 256, 84, 16, d=80, dmin=82),
    _block(11, "Q3_K", 256, 110, 16, d=108),
    _block(12, "Q4_K", 256, 144, 32, d=0, dmin=2),
    _block(13, "Q5_K", 256, 176, 32, d=0, dmin=2),
    _block(14, "Q6_K", 256, 210, 16, d=208),
    # The other activation format. Its scale is an f32, and ggml can read it from a file.
    QuantType(15, "Q8_K", 256, 292, group=256, d=0, words=(Word(0, 4), Word(260, 2, 16))),
    _block(16, "IQ2_XXS", 256, 66, 32, d=0, words=(Word(2, 4, 16),)),
    _block(17, "IQ2_XS", 256, 74, 16, d=0, words=(Word(2, 2, 32),)),
    _block(18, "IQ3_XXS", 256, 98, 32, d=0, words=(Word(66, 4, 8),)),
    _block(19, "IQ1_S", 256, 50, 32, d=0, words=(Word(34, 2, 8),)),
    _block(20, "IQ4_NL", 32, 18, 32, d=0),
    _block(21, "IQ3_S", 256, 110, 32, d=0),
    _block(22, "IQ2_S", 256, 82, 16, d=0),
    _block(23, "IQ4_XS", 256, 136, 32, d=0, words=(Word(2, 2),)),
    # IQ1_M has no field d: its f16 scale lies in the top four bits of four words.
    _block(29, "IQ1_M", 256, 56, 16, words=(Word(48, 2, 4),)),
    _block(34, "TQ1_0", 256, 54, 256, d=52),
    _block(35, "TQ2_0", 256, 66, 256, d=64),
    # The fp4 types have no float field either: one exponent byte, or four UE4M3 bytes.
    _block(39, "MXFP4", 32, 17, 32),
    _block(40, "NVFP4", 64, 36, 16),
    _block(41, "Q1_0", 128, 18, 128, d=0),
    _block(42, "Q2_0", 64, 18, 64, d=0),
)

#: id -> type, in the order of the ids
TYPES: dict[int, QuantType] = {row.id: row for row in sorted(_ROWS, key=lambda row: row.id)}

#: "Q5_0" -> type
BY_NAME: dict[str, QuantType] = {row.name: row for row in TYPES.values()}

#: ids that ggml once used -> what they were; such a file is old, not damaged
REMOVED: dict[int, str] = {
    4: "Q4_2, dropped from ggml in 2023, before GGUF",
    5: "Q4_3, dropped from ggml in 2023, before GGUF",
    31: "Q4_0_4_4, Q4_0 repacked for ARM by llama-quantize in 2024; llama.cpp now repacks Q4_0 while loading",
    32: "Q4_0_4_8, Q4_0 repacked for ARM by llama-quantize in 2024; llama.cpp now repacks Q4_0 while loading",
    33: "Q4_0_8_8, Q4_0 repacked for ARM by llama-quantize in 2024; llama.cpp now repacks Q4_0 while loading",
    36: "IQ4_NL_4_4, an interleaved IQ4_NL of 2024; the BitNet fork stores its I2_S under this id",
    37: "IQ4_NL_4_8, an interleaved IQ4_NL of 2024",
    38: "IQ4_NL_8_8, an interleaved IQ4_NL of 2024",
}


class Unpacked(NamedTuple):
    """Blocks taken apart: value[..., i] = scales[..., i // group] · codes[..., i] (+ mins[..., i // group]).

    Attributes:
        codes: int8 [..., n], the signed code of each element.
        scales: float32 [..., n / group].
        mins: float32 like `scales`, or None for the types that have none.
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    mins: npt.NDArray[np.float32] | None


def unpack(qtype: QuantType, raw: npt.NDArray[np.uint8], byteorder: str = "little") -> Unpacked:
    """Take blocks apart into codes, scales and mins.

    Args:
        qtype: a block type.
        raw: uint8 [..., bytes of a row], a whole number of blocks in the last axis.
        byteorder: that of the file, "little" or "big".

    Raises:
        Unsupported: the type has no codes (plain numbers) or is not decoded (Q8_1).
        FormatError: the last axis is no whole number of blocks.
    """
    from ggufkit.quants import codecs

    return codecs.unpack(qtype, raw, byteorder)


def get_ready(qtype: QuantType) -> None:
    """Compile what dequantizes a block type, unless that was done some time before; small arrays profit, too."""
    from ggufkit.quants import compiled

    compiled.get_ready(qtype)


def dequantize(
    qtype: QuantType,
    raw: npt.NDArray[np.uint8],
    *,
    byteorder: str = "little",
    out: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """The float32 values of raw blocks or plain numbers, equal to the last bit to ggml's and gguf-py's.

    Args:
        qtype: any decodable type.
        raw: uint8 [..., bytes of a row].
        byteorder: that of the file, "little" or "big".
        out: float32 [..., elements of a row], C-contiguous, to write into.

    Returns:
        float32 [..., elements of a row]; `out` where it was given.

    Raises:
        Unsupported: the type is not decoded (Q8_1).
        FormatError: the last axis is no whole number of blocks.
    """
    from ggufkit.quants import codecs

    return codecs.dequantize(qtype, raw, byteorder=byteorder, out=out)


def to_little(qtype: QuantType, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A copy of big-endian blocks with every multi-byte field in little-endian order; the shape is kept.

    Upstream's converter defines the order for the plain floats, Q4_0, Q8_0, Q4_K, Q6_K and the fp4 types: the
    fields of the struct are swapped, its bytes are not. The other types follow the same rule, with the words
    as ggml's code loads them (the fifth bits of Q5_0 are one 32-bit word, for instance).
    """
    from ggufkit.quants import codecs

    return codecs.to_little(qtype, raw)
