"""What the rules on numbers share: which tensors were measured, and where in the file a block of theirs is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ggufkit.checks.context import Context
from ggufkit.container import Tensor

if TYPE_CHECKING:
    from ggufkit.stats import TensorStats

FETCH_AGAIN = "fetch the file again and compare its checksum with the publisher's"
#: one row a token: rows of tokens that were never trained may be zero, equal or tiny
EMBEDDINGS = frozenset({"token_embd.weight", "output.weight", "position_embd.weight", "token_types.weight"})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block is: its first element's index, its byte in the file, its length in bytes."""

    index: tuple[int, ...]
    offset: int
    nbytes: int
    start: int


def locate(tensor: Tensor, stats: TensorStats, block: int) -> Place:
    assert tensor.type is not None
    index = stats.block_coordinates(block)
    element = int(np.ravel_multi_index(index, stats.shape)) if index else 0
    start = tensor.type.nbytes(element)
    count = min(stats.blocks.elements, stats.rows.length - (index[-1] if index else 0))
    return Place(index, tensor.offset + start, tensor.type.nbytes(count), start)


def measured(context: Context) -> Iterator[tuple[Tensor, TensorStats]]:
    for name, stats in context.stats.items():
        if stats.count:
            yield context.gguf.tensors[name], stats


def matrices(context: Context) -> Iterator[tuple[Tensor, TensorStats]]:
    return ((tensor, stats) for tensor, stats in measured(context) if len(stats.shape) > 1)


def expert_of(stats: TensorStats, index: tuple[int, ...]) -> str:
    """` of expert 17` for a stacked tensor."""
    return f" of expert {index[0]}" if stats.experts and index else ""
