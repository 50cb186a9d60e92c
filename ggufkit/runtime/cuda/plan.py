"""Who multiplies what: the work of one token, laid out for every warp before the first launch.

The decoding kernel (kernels/decode.cu) is one block a multiprocessor that stays for the whole token. It takes no
number from a file: all it follows are the tables made here, from matrices whose types, sizes and addresses have
been checked while they were loaded. A table row says where some packed bytes lie, how many there are, which piece
of the vector they meet and where the result goes. The fields are packed as `Unit`, `Span` and `Tile` in decode.cu
unpack them.

How the work is cut:
- A matrix is tiles of 16 rows (quants/cuda/tiles.cuh). The tiles of a phase go to the blocks in order, equally
  many to each; where they do not divide, one more goes to those that have the fewest bytes of the layer so far.
- The down projection has few rows and many columns, so it is cut into slices of columns, too.
- Within a block the chunks of its tiles are dealt to the warps in order, by bytes. A warp's part of a tile is a
  piece; the pieces of a tile are added in order.
- A unit is what one copy fetches: a few chunks of one piece. Its place in the warp's ring, and how many earlier
  units may still be waiting there when its copy starts, are worked out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufkit.arch import Config

Ints = NDArray[np.int64]
Words = NDArray[np.uint32]

TILE_ROWS = 16
PHASES = ("qkv", "out", "gate", "down")
#: a copy aims at this many bytes: large enough to be cheap, small enough to spread over the warps
UNIT_BYTES = 4608
MAX_CHUNKS_A_UNIT = 7
GATES = 8
MAX_SLICES = 8
TAKES_PART, PAIRED, MINS = 1 << 16, 1 << 17, 1 << 18  # of a span
LAST, EMPTY = 1 << 30, 1 << 31  # of a unit
#: a unit says how many phases its warp skips before it, in 5 bits, so there is one at least every 32
CHECKPOINT = 32


@dataclass(frozen=True, slots=True)
class TileType:
    """How one type lies in tiles.

    Attributes:
        number: what the kernels call it: the file's number, 31 for W8.
        columns: of a chunk.
        nbytes: of a chunk of 16 rows.
    """

    name: str
    number: int
    columns: int
    nbytes: int


#: the types that run as they are packed; W8 (signed bytes, an f32 scale for 16) stands for all that is converted
TILE_TYPES: dict[str, TileType] = {
    row.name: row
    for row in (
        TileType("F32", 0, 128, 8192),
        TileType("F16", 1, 128, 4096),
        TileType("BF16", 30, 128, 4096),
        TileType("Q4_0", 2, 128, 1152),
        TileType("Q4_1", 3, 128, 1280),
        TileType("Q5_0", 6, 128, 1408),
        TileType("Q5_1", 7, 128, 1536),
        TileType("Q8_0", 8, 128, 2176),
        TileType("Q2_K", 10, 256, 1344),
        TileType("Q3_K", 11, 256, 1760),
        TileType("Q4_K", 12, 256, 2304),
        TileType("Q5_K", 13, 256, 2816),
        TileType("Q6_K", 14, 256, 3360),
        TileType("W8", 31, 128, 2560),
    )
}


_WITH_MINS = [TILE_TYPES[name].number for name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Tiles in device memory.

    Attributes:
        address: of the first tile.
        n_rows: of the matrix; of gate and up each, when they share tiles.
        paired: rows 0-7 of a tile are gate rows, rows 8-15 the up rows of the same numbers.
    """

    address: int
    type: TileType
    n_rows: int
    n_columns: int
    paired: bool = False

    @property
    def rows_a_tile(self) -> int:
        return TILE_ROWS // 2 if self.paired else TILE_ROWS

    @property
    def n_tiles(self) -> int:
        return -(-self.n_rows // self.rows_a_tile)

    @property
    def n_chunks(self) -> int:
        return -(-self.n_columns // self.type.columns)

    @property
    def nbytes(self) -> int:
        return self.n_tiles * self.n_chunks * self.type.nbytes


@dataclass(frozen=True, slots=True)
class LayerMatrices:
    """The matrices of one layer; `gate` holds `up` too when it is paired, and `up` is None then."""

    q: Matrix
    k: Matrix
    v: Matrix
    out: Matrix
    gate: Matrix
    up: Matrix | None
    down: Matrix

    @property
    def all(self) -> tuple[Matrix, ...]:
        """In the order that the tables number them."""
        found = (self.q, self.k, self.v, self.out, self.gate, self.up, self.down)
        return tuple(matrix for matrix in found if matrix is not None)


@dataclass(frozen=True, slots=True)
class Tables:
    """The kernel's tables.

    Attributes:
        units: uint32 [n, 4].
        lists: uint32 [n_blocks · warps, 2], first unit and number of units.
        spans: uint32 [4 · n_layer + 1, n_blocks, 4].
        tiles: uint32 [n, 2].
    """

    units: Words
    lists: Words
    spans: Words
    tiles: Words


@dataclass(frozen=True, slots=True)
class _Tiles:
    """The tiles of one phase, an entry each; `group` neighbours stay together in one block.

    Attributes:
        matrix, offset: where the packed bytes are, as a matrix of the layer and bytes from its address.
        width: columns of a chunk, in 128.
        first: which 128 columns of the vector the tile's first chunk meets.
        row, valid: the first of its rows, and how many there are.
    """

    matrix: Ints
    offset: Ints
    type: Ints
    chunk_bytes: Ints
    width: Ints
    n_chunks: Ints
    first: Ints
    row: Ints
    valid: Ints
    group: int = 1
    paired: bool = False

    @property
    def nbytes(self) -> Ints:
        return self.chunk_bytes * self.n_chunks


@dataclass(frozen=True, slots=True)
class _Phase:
    """One phase, dealt to the warps; `stream` numbers the warps of all blocks.

    Attributes:
        spans: [n_blocks, 4], the first column from 0.
        tiles: [n, 2].
        stream, matrix, offset, nbytes, work: of each unit; `work` is its fourth word.
    """

    spans: Ints
    tiles: Ints
    stream: Ints
    matrix: Ints
    offset: Ints
    nbytes: Ints
    work: Ints


class Work:
    """The work of one token, dealt to the blocks and warps.

    Args:
        config: of the model.
        layers, head: its matrices.
        n_blocks, warps: of the launch.

    Attributes:
        slices: parts that the columns of the down projection are cut into.
        vector_chunks: the longest vector that a block needs at once, in 128 columns.
        slots: the most pieces of tiles that a block has in a phase.
        largest_unit: bytes.
    """

    def __init__(
        self, config: Config, layers: Sequence[LayerMatrices], head: Matrix, n_blocks: int, warps: int
    ) -> None:
        self.n_blocks = n_blocks
        self.warps = warps
        self.slices = choose_slices(layers[0].down, n_blocks)
        self._config = config
        self._dealt: dict[tuple[Matrix, ...], list[_Phase]] = {}
        self._phases: list[tuple[_Phase, Ints]] = []  # with the addresses of the matrices
        for layer in layers:
            addresses = np.array([matrix.address for matrix in layer.all], np.int64)
            self._phases += [(phase, addresses) for phase in self._deal_layer(layer)]
        last = _deal(_rows_of([head]), np.zeros(n_blocks, np.int64), warps)
        last.spans[0, 1] |= TAKES_PART
        self._phases.append((last, np.array([head.address], np.int64)))
        widest = max(int(phase.spans[:, 3].max()) for phase, _ in self._phases)
        self.vector_chunks = max(_pieces(config.n_embd), _pieces(config.q_width), widest)
        self.slots = max(1 + int((phase.work >> 14 & 2047).max()) for phase, _ in self._phases)
        self.largest_unit = max(int(phase.nbytes.max()) for phase, _ in self._phases)

    def tables(self, ring_bytes: int) -> Tables:
        """The tables, with every unit's place in a ring of that many bytes (0: there are no rings)."""
        phases = self._phases
        spans, first = [], 0
        for phase, _ in phases:
            spans.append(phase.spans + np.array([first, 0, 0, 0]))
            first += len(phase.tiles)
        lengths = [len(phase.stream) for phase, _ in phases]
        number = np.repeat(np.arange(len(phases)), lengths)
        stream = np.concatenate([phase.stream for phase, _ in phases])
        address = np.concatenate([addresses[phase.matrix] + phase.offset for phase, addresses in phases])
        nbytes = np.concatenate([phase.nbytes for phase, _ in phases])
        work = np.concatenate([phase.work for phase, _ in phases])
        idle_number, idle_stream = self._idle()
        number, stream = np.append(number, idle_number), np.append(stream, idle_stream)
        address, nbytes = np.append(address, 0 * idle_stream), np.append(nbytes, 0 * idle_stream)
        work = np.append(work, 0 * idle_stream | EMPTY | LAST)
        order = np.lexsort((number, stream))
        number, address, nbytes, work = number[order], address[order], nbytes[order], work[order]
        counts = np.bincount(stream, minlength=self.n_blocks * self.warps)
        lists = np.stack([np.cumsum(counts) - counts, counts], axis=1)
        place, ahead = _rings(nbytes, lists, ring_bytes) if ring_bytes else (np.zeros_like(nbytes),) * 2
        third = nbytes // 16 | place // 16 << 12 | ahead << 24 | _skipped(number, lists) << 27
        return Tables(
            units=np.stack([address & 0xFFFFFFFF, address >> 32, third, work], axis=1).astype(np.uint32),
            lists=lists.astype(np.uint32),
            spans=np.stack(spans).astype(np.uint32),
            tiles=np.concatenate([phase.tiles for phase, _ in phases]).astype(np.uint32),
        )

    def _idle(self) -> tuple[Ints, Ints]:
        """Phases and warps without work there that get an empty unit: the last phase, and every 32nd."""
        found = []
        for number in {*range(CHECKPOINT - 1, len(self._phases), CHECKPOINT), len(self._phases) - 1}:
            busy = np.zeros(self.n_blocks * self.warps, np.bool_)
            busy[self._phases[number][0].stream] = True
            idle = np.flatnonzero(~busy)
            found.append((np.full_like(idle, number), idle))
        numbers, streams = zip(*found, strict=True)
        return np.concatenate(numbers), np.concatenate(streams)

    def _deal_layer(self, layer: LayerMatrices) -> list[_Phase]:
        """The phases of a layer; layers of the same types are dealt alike."""
        signature = tuple(replace(matrix, address=0) for matrix in layer.all)
        if signature not in self._dealt:
            load = np.zeros(self.n_blocks, np.int64)
            made = {name: _deal(tiles, load, self.warps) for name, tiles in self._tiles(layer)}
            _take_part(made, self._config.n_embd)
            self._dealt[signature] = [made[name] for name in PHASES]
        return self._dealt[signature]

    def _tiles(self, layer: LayerMatrices) -> list[tuple[str, _Tiles]]:
        """The largest phases first, so that the small ones even out what these leave."""
        return [
            ("gate", _side_by_side(layer)),
            ("down", _sliced(layer.down, layer.all.index(layer.down), self.slices)),
            ("qkv", _rows_of([layer.q, layer.k, layer.v])),
            ("out", _rows_of([layer.out], 3)),
        ]


def choose_slices(down: Matrix, n_blocks: int) -> int:
    """Into how many parts of its columns the down projection is cut.

    What counts is the block with the most chunks; everybody has to add the slices up, and a vector of more than
    64 · 128 columns is a burden.
    """

    def cost(slices: int) -> float:
        chunks = -(-down.n_chunks // slices)
        width = chunks * down.type.columns // 128
        return -(-down.n_tiles * slices // n_blocks) * chunks * (1 + slices / 20) + max(width - 64, 0)

    return min(range(1, min(MAX_SLICES, down.n_chunks) + 1), key=cost)


def _pieces(columns: int) -> int:
    return -(-columns // 128)


def _matrix_tiles(matrix: Matrix, index: int, first_row: int = 0) -> _Tiles:
    tiles = np.arange(matrix.n_tiles)
    same = np.ones_like(tiles)
    return _Tiles(
        matrix=same * index,
        offset=tiles * matrix.n_chunks * matrix.type.nbytes,
        type=same * matrix.type.number,
        chunk_bytes=same * matrix.type.nbytes,
        width=same * (matrix.type.columns // 128),
        n_chunks=same * matrix.n_chunks,
        first=same * 0,
        row=first_row + tiles * matrix.rows_a_tile,
        valid=np.minimum(matrix.n_rows - tiles * matrix.rows_a_tile, matrix.rows_a_tile),
        paired=matrix.paired,
    )


def _joined(parts: Sequence[_Tiles], order: Ints | None = None, **changes: Any) -> _Tiles:
    """Several runs of tiles as one, in another order when asked."""
    arrays: dict[str, Any] = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(_Tiles)
        if field.name not in ("group", "paired")
    }
    if order is not None:
        arrays = {name: array[order] for name, array in arrays.items()}
    return _Tiles(**arrays, **changes)


def _rows_of(matrices: Sequence[Matrix], index: int = 0) -> _Tiles:
    """The rows of matrices below each other."""
    first = np.cumsum([0, *(matrix.n_rows for matrix in matrices)])
    return _joined([_matrix_tiles(matrix, index + i, int(first[i])) for i, matrix in enumerate(matrices)])


def _side_by_side(layer: LayerMatrices) -> _Tiles:
    """Gate and up: in shared tiles, or a tile of one after a tile of the other."""
    if layer.up is None:
        return _matrix_tiles(layer.gate, 4)
    parts = [_matrix_tiles(layer.gate, 4), _matrix_tiles(layer.up, 5)]
    order = np.arange(2 * layer.gate.n_tiles).reshape(2, -1).T.ravel()
    return _joined(parts, order, group=2)


def _sliced(matrix: Matrix, index: int, slices: int) -> _Tiles:
    """Slice after slice of the columns; row r of slice i counts as row i · n_rows + r."""
    whole = _matrix_tiles(matrix, index)
    parts = []
    for i in range(slices):
        start, end = matrix.n_chunks * i // slices, matrix.n_chunks * (i + 1) // slices
        part = replace(
            whole,
            offset=whole.offset + start * matrix.type.nbytes,
            n_chunks=whole.n_chunks * 0 + (end - start),
            first=whole.first + start * (matrix.type.columns // 128),
            row=whole.row + i * matrix.n_rows,
        )
        parts.append(part)
    return _joined(parts)


def _deal(tiles: _Tiles, load: Ints, warps: int) -> _Phase:
    """Deal the tiles of a phase, and add their bytes to the blocks' load."""
    n_blocks = len(load)
    owner = _owners(tiles, load)
    count = np.bincount(owner, minlength=n_blocks)
    np.add.at(load, owner, tiles.nbytes)
    tile, inside = _ragged(tiles.n_chunks)  # of each chunk
    block = owner[tile]
    # the warp of a chunk, by the bytes of its block before it
    nbytes = tiles.chunk_bytes[tile]
    before = np.cumsum(nbytes) - nbytes
    total = np.bincount(block, nbytes, n_blocks).astype(np.int64)
    before -= (np.cumsum(total) - total)[block]
    stream = block * warps + before * warps // total[block]
    piece_begins = _changes(stream, tile)
    piece = np.cumsum(piece_begins) - 1
    slot = piece - piece[np.searchsorted(block, np.arange(n_blocks)).clip(max=len(block) - 1)][block]
    in_piece = np.arange(len(tile)) - np.flatnonzero(piece_begins)[piece]
    most = np.clip(UNIT_BYTES // tiles.chunk_bytes, 1, MAX_CHUNKS_A_UNIT)[tile]
    starts = np.flatnonzero(in_piece % most == 0)  # the units
    length = np.diff(np.append(starts, len(tile)))
    ends = np.append(starts[1:], len(tile)) - 1
    first_chunk, chunks = _vector_of(tiles, owner, n_blocks)
    at = (tiles.first[tile] + inside * tiles.width[tile] - first_chunk[block])[starts]
    last_of_stream = np.append(np.diff(stream[starts]) != 0, True)
    work = (
        tiles.type[tile[starts]]
        | at << 5
        | slot[starts] << 14
        | length << 25
        | piece_begins[starts].astype(np.int64) << 28
        | np.append(piece_begins[1:], True)[ends].astype(np.int64) << 29
        | last_of_stream.astype(np.int64) << 30
    )
    pieces = np.bincount(tile[piece_begins], minlength=len(tiles.row))
    first_slot = slot[np.cumsum(tiles.n_chunks) - tiles.n_chunks]
    with_mins = np.bincount(owner, np.isin(tiles.type, _WITH_MINS), n_blocks) > 0
    flags = np.where(count > 0, TAKES_PART, 0) | np.where(with_mins, MINS, 0) | (PAIRED if tiles.paired else 0)
    return _Phase(
        spans=np.stack([np.cumsum(count) - count, count | flags, first_chunk, chunks], axis=1),
        tiles=np.stack([tiles.row, first_slot | pieces << 11 | tiles.valid << 22], axis=1),
        stream=stream[starts],
        matrix=tiles.matrix[tile[starts]],
        offset=(tiles.offset[tile] + inside * nbytes)[starts],
        nbytes=nbytes[starts] * length,
        work=work,
    )


def _owners(tiles: _Tiles, load: Ints) -> Ints:
    """The block of each tile: runs of equal length, and one more for the least loaded where they do not divide.

    While nothing is dealt yet that is the first block: it keeps the books and must have a part in each layer.
    """
    n_blocks, n_groups = len(load), len(tiles.row) // tiles.group
    each, rest = divmod(n_groups, n_blocks)
    count = np.full(n_blocks, each)
    count[np.argsort(load, kind="stable")[:rest]] += 1
    return np.repeat(np.arange(n_blocks), count * tiles.group)


def _ragged(lengths: Ints) -> tuple[Ints, Ints]:
    """For runs of these lengths, of each element: its run, and its place in it."""
    run = np.repeat(np.arange(len(lengths)), lengths)
    return run, np.arange(len(run)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _changes(*keys: Ints) -> NDArray[np.bool_]:
    """Where any key differs from the element before; True at the first."""
    changed = np.zeros(len(keys[0]), np.bool_)
    changed[0] = True
    for key in keys:
        changed[1:] |= np.diff(key) != 0
    return changed


def _vector_of(tiles: _Tiles, owner: Ints, n_blocks: int) -> tuple[Ints, Ints]:
    """The part of the vector that each block's tiles meet: first 128 columns, and how many."""
    first = np.full(n_blocks, np.iinfo(np.int64).max)
    end = np.zeros(n_blocks, np.int64)
    np.minimum.at(first, owner, tiles.first)
    np.maximum.at(end, owner, tiles.first + tiles.n_chunks * tiles.width)
    first = np.where(end > 0, first, 0)
    return first, end - first


def _take_part(phases: dict[str, _Phase], n_embd: int) -> None:
    """Who needs a phase's vector without having tiles there: to add a residual, or to keep the trace (block 0)."""

    def has_tiles(name: str) -> NDArray[np.bool_]:
        return (phases[name].spans[:, 1] & 0xFFFF) > 0

    rows = np.append(phases["down"].tiles[:, 0], n_embd)
    first_slice = has_tiles("down") & (rows[phases["down"].spans[:, 0]] < n_embd)
    phases["qkv"].spans[has_tiles("out"), 1] |= TAKES_PART
    phases["gate"].spans[first_slice, 1] |= TAKES_PART
    for phase in phases.values():
        phase.spans[0, 1] |= TAKES_PART


def _rings(nbytes: Ints, lists: Ints, ring_bytes: int) -> tuple[Ints, Ints]:
    """Each unit's place in its warp's ring, and how many units before it may still lie there unused.

    A list is gone through once a token, so the units before the first ones are its last ones.
    """
    first, count = lists[:, 0], lists[:, 1]
    place = np.zeros_like(nbytes)
    end = np.zeros(len(lists), np.int64)
    for step in range(int(count.max())):
        there = np.flatnonzero(count > step)
        unit = first[there] + step
        start = np.where(end[there] + nbytes[unit] <= ring_bytes, end[there], 0)
        place[unit] = start
        end[there] = start + nbytes[unit]
    run, inside = _ragged(count)
    here, round_about = np.arange(len(nbytes)), count[run]
    ahead = np.zeros_like(nbytes)
    free = nbytes > 0
    for back in range(1, GATES):
        other = np.where(inside >= back, here - back, here - back + round_about)
        free &= back < round_about
        other[~free] = 0
        apart = (place + nbytes <= place[other]) | (place[other] + nbytes[other] <= place) | (nbytes[other] == 0)
        free &= apart
        ahead += free
    return place, ahead


def _skipped(number: Ints, lists: Ints) -> Ints:
    """How many phases a warp skips before each unit; `number` is the unit's phase."""
    before = np.empty_like(number)
    before[1:] = number[:-1]
    before[lists[:, 0]] = -1
    return np.maximum(number - before - 1, 0)
