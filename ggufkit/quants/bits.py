"""What the block codecs share: reading an f16 field and spreading packed small integers over bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
F32 = npt.NDArray[np.float32]


def halves(blocks: U8, at: int) -> F32:
    """The little-endian f16 at byte `at` of every block: uint8 [n, type_size] -> float32 [n, 1]."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def words(field: U8, dtype: str) -> npt.NDArray[np.integer]:
    """Bytes as little-endian integers: uint8 [n, k] -> [n, k / size]."""
    return np.ascontiguousarray(field).view(np.dtype(dtype).newbyteorder("<"))


def planes(field: U8, bits: int, span: int) -> U8:
    """Spread packed integers of `bits` bits over bytes, in the order of the elements.

    ggml packs by planes: of `span` neighbouring bytes the lowest bits belong to the first `span` elements, the
    next bits to the following `span`, and so on. uint8 [n, k] -> uint8 [n, k · 8 / bits].
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = field.reshape(len(field), -1, 1, span)
    return ((runs >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(field), -1)


def signed(codes: U8, offset: int) -> I8:
    """Unsigned codes, shifted so that `offset` becomes zero."""
    return codes.view(np.int8) - np.int8(offset)
