"""Any step of the forward pass on demand, from whatever other steps are known.

The reference engine computes a pass from front to back. Here a pass is given in part, by somebody else's trace,
and one step of it is asked for: it is computed from the nearest known steps before it. Where a trace holds a
step's direct inputs, the answer says whether that one step was computed rightly, free of everything that went
wrong or was rounded before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import pairwise

import numpy as np

from ggufkit.arch import Config
from ggufkit.runtime.cache import ArrayCache
from ggufkit.runtime.reference import State, StepFunction, layer_plan
from ggufkit.runtime.weights import Weights
from ggufkit.steps import Array

#: a step of a layer; None for the steps outside the layers
Place = tuple[str, int | None]

_DIRECT: dict[str, tuple[str, ...]] = {
    "attn_norm": ("inp",),
    "q_proj": ("attn_norm",),
    "k_proj": ("attn_norm",),
    "v_proj": ("attn_norm",),
    "q_bias": ("q_proj",),
    "k_bias": ("k_proj",),
    "v_bias": ("v_proj",),
    "keys": ("k_rope",),
    "kq": ("q_rope", "keys"),
    "kq_soft_max": ("kq", "keys"),
    "kqv": ("kq_soft_max", "values"),
    "attn_out": ("kqv",),
    "ffn_inp": ("attn_out", "inp"),
    "ffn_norm": ("ffn_inp",),
    "ffn_gate": ("ffn_norm",),
    "ffn_up": ("ffn_norm",),
    "ffn_act": ("ffn_gate", "ffn_up"),
    "ffn_out": ("ffn_act",),
    "l_out": ("ffn_out", "ffn_inp"),
    "result_norm": ("inp",),
    "result_output": ("result_norm",),
}


class Graph:
    """Which steps a model has, in order, and which need which."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._plan = layer_plan(config)
        self._inputs = dict(_DIRECT)
        for name in "qk":
            chain = [step for step in (f"{name}_proj", f"{name}_bias", f"{name}_norm") if step in self._plan]
            self._inputs.update({later: (earlier,) for earlier, later in pairwise(chain)})
            self._inputs[f"{name}_rope"] = (chain[-1],)
        self._inputs["values"] = ("v_bias" if config.qkv_bias else "v_proj",)
        order: list[Place] = [("embd", None)]
        order += [(step, layer) for layer in range(config.n_layer) for step in self._plan]
        order += [("result_norm", None), ("result_output", None)]
        self.order = {place: position for position, place in enumerate(order)}

    def inputs(self, place: Place) -> Iterator[Place]:
        """The places whose values a step reads."""
        step, layer = place
        for name in self._inputs.get(step, ()):
            yield self.source_of(name, layer)

    def source_of(self, name: str, layer: int | None) -> Place:
        """Where a value that a step reads by `name` is made: a layer's `inp` is the output of the layer before."""
        if name != "inp":
            return name, layer
        before = self.config.n_layer - 1 if layer is None else layer - 1
        return ("embd", None) if before < 0 else ("l_out", before)

    def needed(self, target: Place, known: Set[Place]) -> list[Place]:
        """The places to compute for `target`, itself included, in order; known ones are not computed."""
        found = {target}
        stack = [target]
        while stack:
            for place in self.inputs(stack.pop()):
                if place not in known and place not in found:
                    found.add(place)
                    stack.append(place)
        return sorted(found, key=self.order.__getitem__)


class Evaluation:
    """Steps of one pass over `ids`, computed from what is known of it.

    Args:
        known: places whose values are given, float [T, …] with the contract's shape.
        functions: the step functions, the reference's or with faults in them.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Weights,
        ids: Sequence[int],
        known: Mapping[Place, Array],
        functions: Mapping[str, StepFunction],
    ) -> None:
        self._graph = graph
        self._known = known
        self._functions = functions
        self._made: dict[Place, Array] = {}
        config = graph.config
        cache = ArrayCache(config, max(len(ids), 1))
        self._state = State(config, weights, cache, ids, np.arange(len(ids)), np.dtype(np.float32))

    def value(self, target: Place) -> Array:
        """The target as its functions make it from what is known before it, whatever is known of it itself."""
        with np.errstate(all="ignore"):
            for place in self._graph.needed(target, self._known.keys() | self._made.keys()):
                made = self._make(place)
        if target in self._known:
            del self._made[target]
        return made

    def at(self, place: Place) -> Array:
        """What a step reads from a place: the known value before a computed one."""
        if place in self._known:
            return self._known[place]
        return self._made[place] if place in self._made else self._make(place)

    def _make(self, place: Place) -> Array:
        step, layer = place
        state = self._state
        outer = state.layer, state.made
        state.layer, state.made = layer, _Inputs(self, self._graph, layer)
        try:
            self._made[place] = self._functions[step](state)
        finally:
            state.layer, state.made = outer
        return self._made[place]


class _Inputs(dict[str, Array]):
    """What `State.made` is here: the steps of one layer by name. A faulty step may read one that a right one does
    not, so whatever is missing is made when it is asked for."""

    def __init__(self, evaluation: Evaluation, graph: Graph, layer: int | None) -> None:
        super().__init__()
        self._evaluation, self._graph, self._layer = evaluation, graph, layer

    def __contains__(self, name: object) -> bool:
        return self._graph.source_of(str(name), self._layer) in self._graph.order

    def __getitem__(self, name: str) -> Array:
        return self._evaluation.at(self._graph.source_of(name, self._layer))
