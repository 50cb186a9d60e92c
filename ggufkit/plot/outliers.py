"""Where the large values sit: a strip a layer over the channel pairs that the rotary embedding turns together.

Qwen2's key biases reach 211 where most are below 1, and a list of such values looks like damage. Side by side, with
both channels of each pair below each other, they are a pattern: the same slow pairs in layer after layer. A planted
value has no neighbour above, below, or in its partner. What is not rotated is shown by channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ggufkit import quants
from ggufkit.arch import role_of
from ggufkit.container import GGUF, Tensor
from ggufkit.errors import UsageError
from ggufkit.plot.grid import Grid, colour_bar, heat
from ggufkit.plot.style import LIGHT, Theme, frame, margins, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = npt.NDArray[np.float64]

#: without globs, the first of these that the file has
USUAL = ("attn_k.bias", "attn_q.bias", "attn_k_norm.weight", "attn_k.weight")
#: roles that fit into one picture
MOST_ROLES = 4

#: what is rotated, by the beginning of the role
_ROTATED = ("attn_q.", "attn_k.", "attn_q_norm.", "attn_k_norm.")
#: architectures whose files hold the two channels of a pair side by side; elsewhere they are half a head apart
_NEIGHBOURS = frozenset({"llama", "mistral", "deci", "baichuan", "internlm2", "granite"})
_MOST_COLUMNS = 64
_DEPTH = 3.0  # decades below the largest that the scale shows


@dataclass(frozen=True, slots=True, eq=False)
class Strips:
    """One role in all layers.

    Attributes:
        layers: of the strips; None for a tensor outside them.
        values: float64 [layers, 2, pairs] for what is rotated: of the heads' values at each of the two channels the one
            of the largest magnitude, with its sign. Otherwise [layers, 1, columns]. The rows of a matrix are as large
            as their largest magnitude.
        labels: of the pairs or channels.
    """

    role: str
    layers: tuple[int | None, ...]
    values: Numbers
    labels: tuple[str, ...]

    @property
    def rotated(self) -> bool:
        return self.values.shape[1] == 2

    def by_column(self) -> Numbers:
        """The largest magnitude over all layers, [2 or 1, columns]."""
        return np.asarray(np.nanmax(np.abs(self.values), axis=0, initial=0.0))

    def grid(self) -> Grid:
        """The strips as a map of magnitudes; the second channels are rows of their own below the first."""
        sizes = np.abs(self.values).reshape(-1, len(self.labels))
        names, notes = [], []
        for number, layer in enumerate(self.layers):
            names += ["–" if layer is None else str(layer), *([""] if self.rotated else [])]
            notes += [_note(self.values[number], self.labels), *([""] if self.rotated else [])]
        top = float(np.nanmax(np.where(np.isfinite(sizes), sizes, 0), initial=0.0)) or 1.0
        axis = "pair of channels (the last turn slowest)" if self.rotated else "channel"
        return Grid(
            f"{self.role}: magnitude", "layer", axis, tuple(names), self.labels, sizes, tuple(notes),
            bounds=(top / 10**_DEPTH, top),
        )  # fmt: skip


def strips(gguf: GGUF, tensors: Mapping[str, Tensor], row_sizes: Callable[[Tensor], Numbers]) -> list[Strips]:
    """The strips of each role among `tensors`.

    Args:
        row_sizes: the largest magnitude of each row of a matrix, float [rows].

    Raises:
        UsageError: more roles than fit into a picture.
        FormatError, NewerThanTool: a tensor cannot be read.
    """
    roles: dict[str, dict[int | None, Numbers]] = {}
    for name, tensor in tensors.items():
        role, layer = role_of(name)
        roles.setdefault(role, {})[layer] = _channels(gguf, tensor, row_sizes)
    if len(roles) > MOST_ROLES:
        message = f"these are {len(roles)} roles; {MOST_ROLES} fit into one picture"
        raise UsageError(message, help="narrow the pattern, for instance 'blk.*.attn_[qk].bias'")
    head, adjacent = head_size(gguf), gguf.architecture in _NEIGHBOURS
    return [
        fold(role, found, head if role.startswith(_ROTATED) else None, adjacent=adjacent)
        for role, found in roles.items()
    ]


def fold(role: str, found: Mapping[int | None, Numbers], head: int | None, *, adjacent: bool = False) -> Strips:
    """Channels by layer as strips; by pairs, when there is a head size that divides them all.

    Args:
        adjacent: the channels of a pair stand next to each other (2i, 2i + 1) rather than half a head apart.
    """
    layers = tuple(sorted(found, key=lambda layer: -1 if layer is None else layer))
    length = max(vector.size for vector in found.values())
    if head and head % 2 == 0 and all(vector.size == length and length % head == 0 for vector in found.values()):
        half = head // 2
        split = (-1, half, 2) if adjacent else (-1, 2, half)
        heads = [found[layer].reshape(split) for layer in layers]
        values = [_furthest(one.transpose(0, 2, 1) if adjacent else one) for one in heads]
        return Strips(role, layers, np.stack(values), tuple(map(str, range(half))))
    starts = np.linspace(0, length, min(length, _MOST_COLUMNS), endpoint=False).astype(np.int64)
    wide = [np.pad(found[layer], (0, length - found[layer].size), constant_values=np.nan) for layer in layers]
    columns = [np.stack([_furthest(part) for part in np.split(one, starts[1:])]) for one in wide]
    return Strips(role, layers, np.stack(columns)[:, None, :], tuple(map(str, starts)))


def head_size(gguf: GGUF) -> int | None:
    """Channels of a head, as the metadata has it; None when it does not say."""

    def integer(key: str) -> int | None:
        entry = gguf.fields.get(f"{gguf.architecture}.{key}")
        return entry.scalar if entry and type(entry.scalar) is int and entry.scalar > 0 else None

    n_embd, n_head = integer("embedding_length"), integer("attention.head_count")
    return integer("attention.key_length") or (n_embd // n_head if n_embd and n_head else None)


def draw(drawn: list[Strips], title: str, theme: Theme = LIGHT) -> Figure:
    """The roles beside each other: above, the largest of each pair over all layers; below, a strip a layer."""
    across, n_rows = 6.4 if len(drawn) == 1 else 4.9, max(one.values.shape[0] * one.values.shape[1] for one in drawn)
    below = min(max(0.15 * n_rows, 1.6), 9.0)
    each = across + 2.3
    width, height = each * len(drawn) + 0.1, below + 2.9
    rotated = any(one.rotated for one in drawn)
    caption = "upper half of a strip: the first channel of each pair, lower half: its partner" if rotated else ""
    figure = sheet(width, height, title, theme, caption)
    margins(figure, 0, 0, 0, 0)
    for number, one in enumerate(drawn):
        left = 0.7 + number * each
        strip = figure.add_axes((left / width, 0.85 / height, across / width, below / height))
        above = figure.add_axes((left / width, (below + 1.0) / height, across / width, 1.1 / height))
        scale = figure.add_axes(((left + across + 0.95) / width, 0.85 / height, 0.11 / width, below / height))
        _strip(strip, one, theme)
        colour_bar(figure, scale, strip.images[0], one.grid(), theme)
        _above(above, one, theme)
    return figure


def _strip(axes: Axes, one: Strips, theme: Theme) -> None:
    """The map; a line of paper parts the layers, and not the two channels of a layer."""
    grid = one.grid()
    heat(axes, grid, theme, parted=False)
    per_layer = one.values.shape[1]
    axes.hlines(np.arange(1, len(one.layers)) * per_layer - 0.5, -0.5, len(one.labels) - 0.5, color=theme.paper, lw=1.2)


def _above(axes: Axes, one: Strips, theme: Theme) -> None:
    frame(axes, theme, 7.5)
    places = np.arange(len(one.labels))
    sizes = np.nan_to_num(one.by_column(), nan=0.0, posinf=0.0)
    names = ("first channel", "its partner") if one.rotated else (None,)
    for row, (name, colour) in enumerate(zip(names, (theme.blue, theme.orange), strict=False)):
        axes.bar(
            places + (row - 0.5) * 0.42 * one.rotated,
            sizes[row],
            0.42 if one.rotated else 0.8,
            color=colour,
            label=name,
        )
    axes.set_xlim(-0.5, len(one.labels) - 0.5)
    axes.set_xticks([])
    axes.set_title(f"{one.role}: the largest of all layers", fontsize=9, loc="left", color=theme.faint, pad=6)
    if one.rotated:
        axes.legend(
            frameon=False,
            fontsize=8,
            labelcolor=theme.ink,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            borderpad=0.2,
            ncols=2,
        )


def _channels(gguf: GGUF, tensor: Tensor, row_sizes: Callable[[Tensor], Numbers]) -> Numbers:
    if len(tensor.shape) > 1:
        return np.asarray(row_sizes(tensor), np.float64)
    raw = gguf.read(tensor)
    assert tensor.type is not None  # or it could not have been read
    return quants.dequantize(tensor.type, raw, byteorder=gguf.byteorder).reshape(-1).astype(np.float64)


def _furthest(values: Numbers) -> Numbers:
    """Along the first axis the value of the largest magnitude, with its sign; NaN where there is one."""
    sizes = np.where(np.isnan(values), np.inf, np.abs(values))
    return np.asarray(np.take_along_axis(values, sizes.argmax(axis=0)[None], axis=0)[0])


def _note(strip: Numbers, labels: tuple[str, ...]) -> str:
    """The largest value of a layer, and its place."""
    if np.isnan(strip).all():
        return "NaN"
    row, column = np.unravel_index(int(np.nanargmax(np.abs(strip))), strip.shape)
    return f"{strip[row, column]:.4g} at {labels[column]}"
