"""Which known bug explains a foreign trace.

Every step of the trace is computed anew from the trace's own earlier steps (`evaluate`), so that each is judged
by itself: what came in wrong is not held against it, and rounding does not pile up. Where a step does not follow
from its inputs, every known fault that touches it, or touches a step between it and the nearest known ones, is
asked what it would have given; the fault whose numbers are the foreign ones is the answer. It is then taken for
granted, and the walk goes on: a second bug shows up as the next step that does not follow.

What counts as "the same numbers" depends on the step. Additions, norms and rotations of a healthy engine agree
to rounding (bf16 at worst); products of an engine that rounds its activations to int8 differ by some percent.
A fault is named only if it brings the numbers at least three times closer than the reference is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ggufkit.runtime.evaluate import Evaluation, Graph, Place
from ggufkit.runtime.faults import FAULTS, Variant
from ggufkit.runtime.faults.apart import told_apart
from ggufkit.runtime.faults.products import PRODUCTS
from ggufkit.runtime.reference import REFERENCE, StepFunction
from ggufkit.runtime.weights import Weights
from ggufkit.steps import Array, full_name
from ggufkit.trace import Mode

#: relative errors up to this are the order of additions, in any precision of 24 bits
EXACT = 2e-4
#: what rounding to bf16 leaves in a step without a product
ROUNDED = 8e-3
#: what activations rounded to int8 leave in a product, or in a chain of steps with one
INT8 = 0.1
#: a fault must explain at least this much of the error to be named
GAIN = 3.0
#: two faults whose numbers differ by less than this cannot be told apart
SAME = 1e-5

_FIRST_VALUES = 6


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a trace first does not follow from its own earlier steps.

    Attributes:
        position: the first position with the error.
        error: the largest relative error of a position (RMS of the difference over RMS of the expected).
        pattern: which positions and heads are wrong, in words.
    """

    step: str
    layer: int | None
    position: int
    error: float
    pattern: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """A known bug that reproduces the foreign numbers.

    Attributes:
        residual: relative error that is left when the bug is assumed, where it was first seen.
        error: the same without it.
        places: the steps that it explains, as full names in order.
        same_numbers_as: bugs that give the same numbers in this trace.
        tell_apart: for each of those what would tell it from this one, in a sentence.
    """

    name: str
    title: str
    explanation: str
    family: str
    residual: float
    error: float
    places: tuple[str, ...]
    same_numbers_as: tuple[tuple[str, str], ...] = ()
    tell_apart: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is wrong with the engine that wrote a trace.

    Attributes:
        first_divergence: None when every step follows from the ones before it.
        faults: the bugs found, in the order of the forward pass.
        unexplained: steps that do not follow and that no known bug explains, as full names.
        checked: how many steps were compared.
        noise: harmless roundings that were recognised, by title, with how many products they explain.
        ruled_out: names of the known bugs that were tried and do not fit.
    """

    first_divergence: Divergence | None
    faults: tuple[Explanation, ...]
    unexplained: tuple[str, ...]
    checked: int
    noise: Mapping[str, int] = field(default_factory=dict)
    ruled_out: tuple[str, ...] = ()


@dataclass(slots=True)
class _Sighting:
    """One step that does not follow, and the variants that explain it, best first."""

    place: Place
    error: float
    fits: list[tuple[float, Variant]]


@dataclass(frozen=True, slots=True)
class Part:
    """Some numbers of a step: what a printf shows, or a trace of a few positions.

    Attributes:
        at: which elements of the contract's [T, …], a slice an axis.
        values: float, of the shape that these slices give.
    """

    at: tuple[slice, ...]
    values: Array


def diagnose(
    graph: Graph,
    weights: Weights,
    ids: Sequence[int],
    known: Mapping[Place, Array],
    parts: Mapping[Place, Part] | None = None,
    mode: Mode = "prefill",
) -> Diagnosis:
    """Explain a foreign trace of one prompt.

    Args:
        ids: the token ids, from position 0 on.
        known: steps of which all positions of `ids` are given, float [T, …] with the contract's shapes.
        parts: steps of which only some numbers are given. What they leave open is taken to be as the reference,
            or the fault that explains them, has it.
        mode: how the engine ran; of faults with the same numbers, those that do harm in it come first.

    Returns:
        The diagnosis; `faults` is empty for a healthy engine.
    """
    return _Walk(graph, weights, ids, known, parts or {}, mode).run()


def relative_error(found: Array, expected: Array) -> NDArray[np.float64]:
    """For each position the RMS of the difference over the RMS of the expected, [T].

    A position whose own RMS is tiny is measured against the typical one, and one where only one of the two is
    finite is infinitely wrong.
    """
    found, expected = (array.reshape(len(array), -1).astype(np.float64) for array in (found, expected))
    finite = np.isfinite(found)
    apart = (finite != np.isfinite(expected)).any(axis=1)
    both = finite & np.isfinite(expected)
    difference = np.where(both, found - np.where(both, expected, 0), 0)
    size = _rms(np.where(both, expected, 0))
    floor = 1e-3 * float(np.median(size)) + 1e-30
    return np.where(apart, np.inf, _rms(difference) / np.maximum(size, floor))


def _rms(x: NDArray[np.float64]) -> NDArray[np.float64]:
    largest = np.abs(x).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest, 1)
    return np.sqrt(np.mean((x / scale) ** 2, axis=1)) * scale[:, 0]


class _Walk:
    def __init__(
        self,
        graph: Graph,
        weights: Weights,
        ids: Sequence[int],
        known: Mapping[Place, Array],
        parts: Mapping[Place, Part],
        mode: Mode,
    ) -> None:
        self.mode = mode
        self.graph, self.weights, self.ids = graph, weights, ids
        self.places = sorted({*known, *parts}, key=graph.order.__getitem__)
        self.known = {place: _whole_rows(place, array, len(ids)) for place, array in known.items()}
        self.parts = {place: part for place, part in parts.items() if place not in known}
        self.functions: dict[str, StepFunction] = dict(REFERENCE)
        self.evaluation = self._evaluation(self.functions)
        self.sightings: list[_Sighting] = []
        self.in_force: list[Variant] = []
        self.first: Divergence | None = None
        self.noise: dict[str, int] = {}
        self.tried: set[str] = set()
        layers = [layer for _, layer in self.places if layer is not None]
        self._early = min(layers, default=0) + 1

    def run(self) -> Diagnosis:
        for place in self.places:
            self._look(place)
        faults = tuple(self._explanations())
        explained = {place for fault in faults for place in fault.places}
        return Diagnosis(
            self.first,
            faults,
            tuple(n for s in self.sightings if (n := full_name(*s.place)) not in explained),
            len(self.places),
            self.noise,
            tuple(sorted(self.tried - {name for fault in faults for name in _names(fault)})),
        )

    def _evaluation(self, functions: Mapping[str, StepFunction]) -> Evaluation:
        return Evaluation(self.graph, self.weights, self.ids, self.known, functions)

    def _look(self, place: Place) -> None:
        """Compare one step with what its inputs give; where it does not follow, look for the fault that fits."""
        error = self._error(place, self.evaluation.value(place))
        assumed = self._assumed(place)
        healthy = self._error(place, self._evaluation(REFERENCE).value(place)) if assumed else error
        if healthy <= EXACT or (healthy <= error and self._is_noise(place, healthy)):
            self._assume(dict.fromkeys(assumed, None))
        else:
            self._diverged(place, healthy, error if assumed else None)
        if place in self.parts:  # what it did not show is best guessed by what explains what it did
            self.known[place] = self.evaluation.value(place)

    def _error(self, place: Place, expected: Array) -> float:
        return float(relative_error(*self._pair(place, expected)).max())

    def _pair(self, place: Place, expected: Array) -> tuple[Array, Array]:
        """The foreign numbers of a step, and the expected ones where there are foreign ones."""
        expected = _seen(place, expected)
        if place in self.parts:
            part = self.parts[place]
            return part.values, expected[part.at]
        return _seen(place, self.known[place]), expected

    def _computed(self, place: Place) -> list[Place]:
        """The steps that were computed for this one: itself and what is not known before it."""
        return self.graph.needed(place, self.known.keys())

    def _steps(self, place: Place) -> set[str]:
        return {step for step, _ in self._computed(place)}

    def _assumed(self, place: Place) -> set[str]:
        """The steps among the computed ones for which a fault is taken for granted."""
        return {step for step in self._steps(place) if self.functions[step] is not REFERENCE[step]}

    def _assume(self, changes: Mapping[str, StepFunction | None]) -> None:
        """From here on compute these steps so; None stands for the healthy way."""
        if changes:
            self.functions.update({step: change or REFERENCE[step] for step, change in changes.items()})
            self.evaluation = self._evaluation(self.functions)

    def _tolerance(self, place: Place) -> float:
        return INT8 if self._steps(place).intersection(PRODUCTS) else ROUNDED

    def _is_noise(self, place: Place, error: float) -> bool:
        """Whether rounding explains an error: one of the harmless faults reproduces it, or it is small and no fault
        explains it to the last bits. The faults are asked about small errors in the first layers only; one that
        hides in the noise there hides in it everywhere."""
        small, early = error <= self._tolerance(place), self._is_early(place)
        if small and not early:
            return True
        fits = self._fits(place, error, harmless=True)
        if fits and fits[0][0] < error / GAIN:
            title = fits[0][1].label
            self.noise[title] = self.noise.get(title, 0) + 1
            return True
        return small and not any(left < min(EXACT, error / 10 / GAIN) for left, _ in self._fits(place, error))

    def _is_early(self, place: Place) -> bool:
        return place[1] is None or place[1] <= self._early

    def _diverged(self, place: Place, error: float, left: float | None) -> None:
        """Note a step that does not follow, with the faults that explain it.

        Args:
            left: the error under the fault that is taken for granted, if one is. Where that is small it has
                explained the step already, and only in the first layers are its rivals asked again.
        """
        limit = min(self._tolerance(place), error / GAIN)
        explained = left is not None and left < limit
        if explained and not self._is_early(place):
            fits = [(left or 0.0, variant) for variant in self.in_force if variant.touches(self._steps(place))]
        else:
            among = [v for s in self.sightings for _, v in s.fits] if explained else None
            fits = [fit for fit in self._fits(place, error, among=among) if fit[0] < limit]
        self.sightings.append(_Sighting(place, error, fits))
        if self.first is None:
            self.first = self._divergence(place)
        if fits and not explained:
            self._assume({**dict.fromkeys(self._steps(place), None), **fits[0][1].step_functions()})
            alike = [variant for residual, variant in fits if residual - fits[0][0] < SAME]
            replaced = {variant.fault.name for variant in alike}
            self.in_force = [v for v in self.in_force if v.fault.name not in replaced] + alike

    def _divergence(self, place: Place) -> Divergence:
        found, expected = self._pair(place, self._evaluation(REFERENCE).value(place))
        errors = relative_error(found, expected)
        wrong = errors > max(EXACT, float(errors.max()) / 100)
        first = self.parts[place].at[0].start or 0 if place in self.parts else 0
        position = first + int(np.argmax(wrong))
        return Divergence(*place, position, float(errors.max()), pattern(found, expected))

    def _fits(
        self, place: Place, error: float, *, harmless: bool = False, among: Sequence[Variant] | None = None
    ) -> list[tuple[float, Variant]]:
        """Every variant that touches the step, or those `among` them, with the error that it leaves; best first."""
        steps = self._steps(place)
        if among is not None:
            batches = [list({_key(v): v for v in among if v.touches(steps)}.values())]
        else:
            faults = [f for f in FAULTS.values() if f.harmless == harmless and steps.intersection(f.steps)]
            self.tried.update(f.name for f in faults if not harmless)
            sizes = [f.variants(self.graph.config) for f in faults]
            batches = [[v for s in sizes for v in s[:_FIRST_VALUES]], [v for s in sizes for v in s[_FIRST_VALUES:]]]
        fits: list[tuple[float, Variant]] = []
        for batch in batches:  # the long lists of sizes come second, when nothing else has fitted
            fits += [(self._error(place, self._predicted(place, variant)), variant) for variant in batch]
            if fits and min(residual for residual, _ in fits) < error / 10 / GAIN:
                break
        return sorted(fits, key=lambda fit: fit[0])

    def _predicted(self, place: Place, variant: Variant) -> Array:
        functions = {**REFERENCE, **variant.step_functions()}
        return self._evaluation(functions).value(place)

    def _explanations(self) -> Iterator[Explanation]:
        """The fewest variants that explain the sightings: again and again the one that explains the most."""
        left = [sighting for sighting in self.sightings if sighting.fits]
        chosen: list[Explanation] = []
        while left:
            count: dict[tuple[str, str], int] = {}
            for sighting in left:
                best = sighting.fits[0][0]
                for residual, variant in sighting.fits:
                    if residual <= max(EXACT, 3 * best):
                        count[_key(variant)] = count.get(_key(variant), 0) + 1
            most = max(count.values())
            first = next(v for s in left for _, v in s.fits if count.get(_key(v)) == most)
            mine = [s for s in left if any(_key(v) == _key(first) for _, v in s.fits)]
            rivals = {k for k, n in count.items() if n == most and k != _key(first)}
            chosen.append(self._explanation(first, mine, rivals))
            left = [s for s in left if s not in mine]
        order = {full_name(*place): position for position, place in enumerate(self.places)}
        yield from sorted(chosen, key=lambda e: order[e.places[0]])

    def _explanation(self, variant: Variant, sightings: list[_Sighting], rivals: set[tuple[str, str]]) -> Explanation:
        place = sightings[0].place
        residual = next(r for r, v in sightings[0].fits if _key(v) == _key(variant))
        mine = self._pair(place, self._predicted(place, variant))[1]
        same = [
            v
            for _, v in sightings[0].fits
            if _key(v) in rivals and relative_error(self._pair(place, self._predicted(place, v))[1], mine).max() < SAME
        ]
        variant, *same = sorted([variant, *same], key=lambda v: self.mode not in v.fault.seen_in)
        known_fault, shown = variant.fault, {step for step, _ in self.places}
        return Explanation(
            known_fault.name,
            variant.label,
            known_fault.explanation,
            known_fault.family,
            residual,
            sightings[0].error,
            tuple(full_name(*s.place) for s in sightings),
            tuple((v.fault.name, v.label) for v in same),
            tuple(told_apart(known_fault, v.fault, self.mode, shown) for v in same),
        )


def _key(variant: Variant) -> tuple[str, str]:
    return variant.fault.name, variant.label


def _names(explanation: Explanation) -> set[str]:
    return {explanation.name, *(name for name, _ in explanation.same_numbers_as)}


def _whole_rows(place: Place, array: Array, n_keys: int) -> Array:
    """Scores and probabilities with a column for every key: an engine that saw fewer left the rest at 0."""
    if place[0] not in ("kq", "kq_soft_max") or array.shape[-1] >= n_keys:
        return array
    return np.pad(array, [(0, 0), (0, 0), (0, n_keys - array.shape[-1])])


def _seen(place: Place, array: Array) -> Array:
    """What may be compared: of the scores only those that the mask lets through, 0 elsewhere."""
    if place[0] != "kq":
        return array
    future = np.arange(array.shape[-1]) > np.arange(len(array))[:, None, None]
    return np.where(future, 0, array)


def pattern(found: Array, expected: Array) -> str:
    """Which positions and, where the step has heads, which heads are wrong, in words."""
    errors = relative_error(found, expected)
    limit = max(EXACT, float(errors.max()) / 100)
    said = [_runs("position", errors > limit)]
    if found.ndim == 3:
        by_head = np.stack([relative_error(found[:, h], expected[:, h]) for h in range(found.shape[1])]).max(axis=1)
        said.append(_runs("head", by_head > limit))
    return ", ".join(said)


def _runs(what: str, wrong: NDArray[np.bool_]) -> str:
    """`every position`, `position 3 alone`, `positions 1 on`, `heads 7-13`, `every odd position`."""
    places = np.flatnonzero(wrong)
    if len(places) == len(wrong):
        return f"every {what}"
    if len(places) == 0:
        return f"no {what} by itself"
    first, last = int(places[0]), int(places[-1])
    if len(places) == 1:
        return f"{what} {first} alone"
    if len(places) == last - first + 1:
        return f"{what}s {first} on" if last == len(wrong) - 1 else f"{what}s {first}-{last}"
    if np.array_equal(places, np.arange(first, len(wrong), 2)) and first < 2:
        return f"every {'odd' if first else 'even'} {what}"
    return f"{len(places)} of {len(wrong)} {what}s, the first {first}"
