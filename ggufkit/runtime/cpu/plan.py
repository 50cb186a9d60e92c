"""The forward pass as a program: which operations one call of n positions takes, and where each step's array is.

Operations are listed once for a number of positions and walked for every call of that size; only the position and
the cache's addresses change. Each named step has its own operation, so a trace stops after the ones that it wants
to see: what is traced is what runs. Layers share their buffers.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ggufkit.arch import Config
from ggufkit.runtime.cpu import program
from ggufkit.runtime.cpu.kernels import PANEL, STRIP, scratch_floats
from ggufkit.runtime.cpu.packed import Matrix, PackedWeights
from ggufkit.runtime.cpu.program import Crew
from ggufkit.runtime.cpu.simd import LANES, TILE_COLUMNS
from ggufkit.steps import Tap

Floats = NDArray[np.float32]

FEW = 6  # positions up to which multiplying codes is faster than widening them first
_TASK = 1 << 17  # weights in a task of `matvec`


class Addressed(Protocol):
    """A cache as operations use it; `addresses` is int64 [2, layers], of the keys and of the values."""

    n_ctx: int
    length: int
    addresses: NDArray[np.int64]


def head_name(config: Config) -> str:
    """The matrix that makes the logits."""
    return "token_embd.weight" if config.tied else "output.weight"


class Plan:
    """All operations of a forward pass over `n` positions.

    Args:
        n_logits: of how many of them, counted from the last, logits are made.
        n_scores: keys whose scores a trace wants, position + n of its call; 0 for none.

    Attributes:
        x: float32 [n, E], to be filled with the embedding before a run.
        logits: float32 [n_logits, V].
    """

    def __init__(self, config: Config, weights: PackedWeights, n: int, n_logits: int, n_scores: int = 0) -> None:
        self.n = n
        self._config, self._weights = config, weights
        self._rows: list[dict[str, int]] = []
        self._steps: list[tuple[int, str, int | None, Floats]] = []
        self._buffers: dict[tuple[str, tuple[int, ...]], Floats] = {}
        self._kept: list[NDArray[Any]] = []  # whatever addresses point into
        self._layer: int | None = None
        self._eps = np.full(1, config.norm_eps, np.float32)
        self._angles = self._buffer("angles", 2, n, config.head_dim // 2)
        traced = ("kq", "kq_soft_max") if n_scores else ()
        self._scores = {step: self._buffer(step, n, config.n_head, n_scores) for step in traced}
        self.x = self._buffer("x", n, config.n_embd)
        self._show(embd=self.x)
        for self._layer in range(config.n_layer):
            self._attention()
            self._feed_forward()
        self._layer = None
        self.logits = self._head(n_logits) if n_logits else np.empty((0, config.n_vocab), np.float32)
        self._operations = program.table(self._rows)
        self._layers = np.array([row["layer"] for row in self._rows])

    def run(self, crew: Crew, cache: Addressed, tap: Tap | None) -> None:
        """Walk the operations, from `x` to `logits`, at the cache's current position."""
        made, config = self._operations, self._config
        made["position"], made["n_ctx"] = cache.length, cache.n_ctx
        made["keys"], made["values"] = cache.addresses[:, self._layers]
        self._angles[:] = _angles(config, cache.length, self.n)
        scratch = scratch_floats(config.head_dim, cache.length + self.n)
        at = 0
        for end, step, layer, array in self._steps if tap is not None else ():
            if tap is not None and tap.wants(step, layer):
                crew.run(made, at, end, scratch)
                tap(step, layer, array)
                at = end
        crew.run(made, at, len(made), scratch)

    # --- the operations, in order ------------------------------------------------------------------------------

    def _attention(self) -> None:
        config = self._config
        (normed,) = self._norms(attn_norm=self.x)
        q, k, v = self._projections(normed)
        for i, (x, heads) in enumerate(((q, config.n_head), (k, config.n_head_kv))):
            self._add(program.ROTATE, self.n, apart=i, width=config.head_dim, heads=heads, x=x, y=self._angles)
        self._show(q_rope=self._by_head(q), k_rope=self._by_head(k))
        cached = {"width": config.head_dim, "key_heads": config.n_head_kv}
        self._add(program.KEEP, config.n_head_kv, **cached, heads=config.n_head_kv, x=k, y=v)
        out = self._buffer("kqv", *q.shape)
        panels = -(-self.n * config.n_head // config.n_head_kv // PANEL)
        n_tasks = config.n_head_kv * panels
        self._add(program.ATTEND, n_tasks, **cached, heads=config.n_head, x=q, out=out, **self._scores)
        self._show(**self._scores, kqv=out)
        (attended,) = self._linear(out, "attn_output.weight")
        self._show(attn_out=attended)
        self._plus(self.x, attended)
        self._show(ffn_inp=self.x)

    def _projections(self, normed: Floats) -> list[Floats]:
        """Queries, keys and values before the rotation."""
        made = self._linear(normed, "attn_q.weight", "attn_k.weight", "attn_v.weight")
        self._show(**dict(zip(("q_proj", "k_proj", "v_proj"), made, strict=True)))
        if self._config.qkv_bias:
            for i, (x, array) in enumerate(zip("qkv", made, strict=True)):
                self._plus(array, self._weights.vector(self._name(f"attn_{x}.bias"))[None], apart=i > 0)
            self._show(**dict(zip(("q_bias", "k_bias", "v_bias"), made, strict=True)))
        if self._config.qk_norm:
            q, k = self._norms(attn_q_norm=self._by_head(made[0]), attn_k_norm=self._by_head(made[1]))
            made[:2] = q.reshape(made[0].shape), k.reshape(made[1].shape)
        return made

    def _feed_forward(self) -> None:
        (normed,) = self._norms(ffn_norm=self.x)
        gate, up = self._linear(normed, "ffn_gate.weight", "ffn_up.weight")
        self._show(ffn_gate=gate, ffn_up=up)
        self._add(program.ACT, self.n, width=gate.shape[1], x=gate, y=up)
        self._show(ffn_act=gate)
        (out,) = self._linear(gate, "ffn_down.weight")
        self._show(ffn_out=out)
        self._plus(self.x, out)
        self._show(l_out=self.x)

    def _head(self, n_logits: int) -> Floats:
        (normed,) = self._norms(output_norm=self.x[self.n - n_logits :])
        (logits,) = self._linear(normed, head_name(self._config))
        self._show(result_output=logits)
        return logits

    # --- what they are made of ---------------------------------------------------------------------------------

    def _norms(self, **inputs: Floats) -> list[Floats]:
        """RMS norms over the last axis, by the role of their weight; they must not depend on each other."""
        made = {role: self._buffer(role, *x.shape) for role, x in inputs.items()}
        for i, (role, x) in enumerate(inputs.items()):
            width, weight = x.shape[-1], self._weights.vector(self._name(f"{role}.weight"))
            n_rows = x.size // width
            self._add(program.NORM, n_rows, apart=i > 0, width=width, x=x, y=self._eps, data=weight, out=made[role])
        self._show(**{_NORM_STEPS[role]: out for role, out in made.items()})
        return list(made.values())

    def _linear(self, x: Floats, *roles: str) -> list[Floats]:
        """x [n, in] by each of these matrices → [n, out]."""
        matrices = {role: self._weights.matrix(self._name(role)) for role in roles}
        if len(x) <= FEW:
            sums = self._sums(x, {m.group for m in matrices.values() if m.mins is not None})
            outs = [
                self._matvec(role, x, sums.get(m.group), m, apart=i > 0) for i, (role, m) in enumerate(matrices.items())
            ]
        else:
            arranged = self._arrange(x)
            outs = [
                self._matmul(role, len(x), arranged, m, apart=i > 0) for i, (role, m) in enumerate(matrices.items())
            ]
        return [self._trim(role, out[: len(x)], matrices[role]) for role, out in zip(roles, outs, strict=True)]

    def _sums(self, x: Floats, groups: set[int]) -> dict[int, Floats]:
        """The sums of x over groups of these sizes."""
        n, width = x.shape
        sums = {group: self._buffer(f"sums of {group} in {width}", n, width // group) for group in groups}
        for i, (group, out) in enumerate(sums.items()):
            self._add(program.SUMS, n, apart=i > 0, width=width, group=group, x=x, out=out)
        return sums

    def _matvec(self, role: str, x: Floats, sums: Floats | None, matrix: Matrix, *, apart: bool) -> Floats:
        out = self._buffer(role, len(x), matrix.blocks * LANES)
        span = max(_TASK // (LANES * matrix.columns), 1)
        n_tasks = -(-matrix.blocks // span)
        self._add(
            program.MATVEC, n_tasks, apart=apart, n=len(x), span=span, **_fields(matrix), x=x, y=sums, out=out
        )  # fmt: skip
        return out

    def _matmul(self, role: str, n: int, arranged: Floats, matrix: Matrix, *, apart: bool) -> Floats:
        out = self._buffer(role, len(arranged) * TILE_COLUMNS, matrix.blocks * LANES)
        n_tasks = -(-matrix.blocks // (STRIP * PANEL // LANES))
        self._add(program.MATMUL, n_tasks, apart=apart, n=n, **_fields(matrix), x=arranged, out=out)
        return out

    def _arrange(self, x: Floats) -> Floats:
        """x as `matmul` reads it."""
        n_tiles, width = -(-len(x) // TILE_COLUMNS), x.shape[1]
        out = self._buffer(f"arranged {width}", n_tiles, width, TILE_COLUMNS)
        self._add(program.ARRANGE, n_tiles, n=len(x), width=width, x=x, out=out)
        return out

    def _trim(self, role: str, x: Floats, matrix: Matrix) -> Floats:
        """Without the rows that only fill up the last panel."""
        if x.shape[1] == matrix.rows:
            return x
        out = self._buffer(f"{role}, trimmed", len(x), matrix.rows)
        self._add(program.TRIM, len(x), width=matrix.rows, blocks=matrix.blocks, x=x, out=out)
        return out

    def _plus(self, x: Floats, y: Floats, *, apart: bool = False) -> None:
        self._add(program.PLUS, len(x), apart=apart, width=x.shape[1], heads=len(y), x=x, y=y)

    def _add(self, kind: int, n_tasks: int, **fields: int | NDArray[Any] | None) -> None:
        """Append an operation; arrays are given as such."""
        row = {"n": self.n, "kind": kind, "n_tasks": n_tasks, "layer": self._layer or 0}
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                self._kept.append(value)
                row[name] = int(value.__array_interface__["data"][0])
            elif value is not None:
                row[name] = value
        self._rows.append(row)

    def _show(self, **steps: Floats) -> None:
        """These steps can be seen once the operations so far are finished."""
        self._steps += [(len(self._rows), step, self._layer, array) for step, array in steps.items()]

    def _buffer(self, name: str, *shape: int) -> Floats:
        """The buffer of that name and shape; layers share it."""
        if (name, shape) not in self._buffers:
            self._buffers[name, shape] = np.zeros(shape, np.float32)
        return self._buffers[name, shape]

    def _by_head(self, x: Floats) -> Floats:
        return x.reshape(self.n, -1, self._config.head_dim)

    def _name(self, role: str) -> str:
        return role if self._layer is None else f"blk.{self._layer}.{role}"


_NORM_STEPS = {
    "attn_norm": "attn_norm",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "ffn_norm": "ffn_norm",
    "output_norm": "result_norm",
}


def _fields(matrix: Matrix) -> dict[str, int | NDArray[Any] | None]:
    """A matrix as an operation's fields."""
    return {
        "data": matrix.data,
        "scales": matrix.scales,
        "mins": matrix.mins,
        "layout": matrix.layout,
        "group": matrix.group,
        "width": matrix.columns,
        "blocks": matrix.blocks,
    }


def _angles(config: Config, position: int, n: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Cosines and sines of the rotary embedding, [n, D/2] each, computed in double precision."""
    half = config.head_dim // 2
    positions = np.arange(position, position + n) / config.rope_scale
    angles = np.outer(positions, config.rope_base ** (-np.arange(half) / half))
    return np.cos(angles), np.sin(angles)
