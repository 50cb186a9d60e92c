"""The third step of judging an odd value: run the model without it.

Every suspect of the static rules is mended (a value set to what the other layers have there, a block emptied, a
tensor zeroed) and the model is run as it is and mended. What mending does to the likelihood of a built-in text is
added to the finding as evidence, and moves its judgement by one table. Damage that the statics are sure of is
mended for good before anything else is tried, so that one wound does not hide another.

The same patches answer a question about a whole group of tensors: what is the model without them (`--ablate`)?
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase

import numpy as np

from ggufkit import arch, quants
from ggufkit.checks.context import Context
from ggufkit.checks.running import Running
from ggufkit.container import GGUF, Tensor
from ggufkit.errors import GgufkitError, UsageError
from ggufkit.findings import Confidence, Evidence, Finding, Judgement, Severity
from ggufkit.runtime import probes
from ggufkit.runtime.engine import Edit, Logits, element_edits

#: nats a token that mending must gain or cost to be seen
VISIBLE = 0.05
#: and how many times its own standard error over the text
_SURE = 2.0
#: every so many positions' whole distributions are compared
_STRIDE = 4
#: suspects tried; each takes a pass over a built-in text
_MOST = 8
#: a text that costs more than this share of chance says nothing about this model
_KNOWN_TEXT = 0.75
#: packed bytes on either side of a bad block in which its like are looked for, and how much larger they are
_AROUND, _LARGE = 1 << 18, 8.0


class Effect(Enum):
    """What mending does."""

    GAINS = "gains"
    COSTS = "costs"
    NONE = "no visible effect"


#: what the statics say, what mending does → judgement, severity and confidence where they change. Never from corrupt to
#: genuine: what a flipped bit does to one text is no excuse for it
_TABLE: dict[tuple[Judgement, Effect], tuple[Judgement, Severity | None, Confidence | None]] = {
    (Judgement.CORRUPT, Effect.GAINS): (Judgement.CORRUPT, None, Confidence.HIGH),
    (Judgement.SUSPICIOUS, Effect.GAINS): (Judgement.CORRUPT, Severity.ERROR, Confidence.HIGH),
    (Judgement.SUSPICIOUS, Effect.COSTS): (Judgement.GENUINE, Severity.INFO, Confidence.HIGH),
    (Judgement.GENUINE, Effect.GAINS): (Judgement.SUSPICIOUS, Severity.WARNING, Confidence.LOW),
    (Judgement.GENUINE, Effect.COSTS): (Judgement.GENUINE, None, Confidence.HIGH),
}
_ORDER = [Judgement.SUSPICIOUS, Judgement.CORRUPT, Judgement.GENUINE]


@dataclass(frozen=True, slots=True)
class Mend:
    """A repair: the edits, and what they do, in words that follow `mending it`."""

    edits: tuple[Edit, ...]
    how: str

    def overlaps(self, other: Mend) -> bool:
        """Whether both change some byte."""
        return any(
            one.tensor == two.tensor
            and max(one.start, two.start) < min(one.start + len(one.data), two.start + len(two.data))
            for one in self.edits
            for two in other.edits
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """Two runs of one text, `before` and `after` a change.

    Attributes:
        nats_before, nats_after: mean cost of a token; infinite where a run was not finite.
        delta, error: mean difference, negative where the change helps, and its standard error.
        mean_kl, top1: of the predictions, and the share of positions with the same likeliest token.
        judges: whether the model knows the text well enough for its likelihood to mean anything.
    """

    text: str
    nats_before: float
    nats_after: float
    delta: float
    error: float
    mean_kl: float
    top1: float
    judges: bool

    @property
    def effect(self) -> Effect:
        if not self.judges or abs(self.delta) <= max(VISIBLE, _SURE * self.error):
            return Effect.NONE
        return Effect.COSTS if self.delta > 0 else Effect.GAINS

    @property
    def numbers(self) -> dict[str, object]:
        names = ("text", "nats_before", "nats_after", "delta", "error", "mean_kl", "top1")
        return {"effect": self.effect.value} | {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        shift = f"{self.nats_before:.3f} → {self.nats_after:.3f} nats a token of {self.text}"
        kl = f"mean KL {self.mean_kl:.2g}, top-1 the same at {self.top1:.0%}"
        doubt = "" if self.judges else "; it knows none of the built-in texts, so that their likelihood judges nothing"
        return f"{shift}, {kl}{doubt}"


class Bench:
    """Where changes are tried: the text that this model knows, and its logits with the certain damage mended.

    Attributes:
        base: the edits that mend what is certain.
        text: the name of the text.
    """

    def __init__(self, running: Running, base: Collection[Edit] = ()) -> None:
        self.running = running
        self.base = tuple(base)
        limit = _KNOWN_TEXT * running.chance
        costs = ((name, running.nats(name, self.base)) for name in _first(running.texts, "prose", "conversation"))
        self.text, self.judges = next(((name, True) for name, cost in costs if cost < limit), ("prose", False))
        self.logits = running.logits(self.text, self.base)

    def compare(self, before: Collection[Edit], after: Collection[Edit], tokens: int | None = None) -> Outcome:
        """The same text, or its first tokens, with one and with another set of edits."""
        targets = self.running.texts[self.text].ids[1:][:tokens]
        first, second = (self._logits(edits, len(targets)) for edits in (before, after))
        costs = [probes.nats(logits, targets) for logits in (first, second)]
        with np.errstate(invalid="ignore"):
            differences = costs[1] - costs[0]
            differences[np.isnan(differences)] = 0.0  # neither run is finite there
            error = float(np.std(differences) / np.sqrt(len(targets))) if np.isfinite(differences).all() else 0.0
        from_, to = (first, second) if np.isfinite(costs[0]).all() else (second, first)
        shift = probes.distribution_shift(from_[::_STRIDE], to[::_STRIDE])
        return Outcome(
            text=self.text,
            nats_before=float(costs[0].mean()),
            nats_after=float(costs[1].mean()),
            delta=float(differences.mean()),
            error=error,
            mean_kl=shift.mean_kl,
            top1=float(np.mean(first.argmax(-1) == second.argmax(-1))),
            judges=self.judges,
        )

    def without(self, edits: Collection[Edit], tokens: int | None = None) -> Outcome:
        """What the edits do to the model with its certain damage mended."""
        return self.compare(self.base, (*self.base, *edits), tokens)

    def _logits(self, edits: Collection[Edit], n: int) -> Logits:
        return self.logits[:n] if set(edits) == set(self.base) else self.running.logits(self.text, edits, n)


def _first(names: Iterable[str], *favourites: str) -> list[str]:
    names = list(names)
    return [name for name in favourites if name in names] + [name for name in names if name not in favourites]


# -- findings ------------------------------------------------------------------------------------------------------


def with_function(running: Running, findings: Sequence[Finding]) -> list[Finding]:
    """The findings, with what mending them does added to those that can be mended."""
    mends = {at: mend for at, found in enumerate(findings) if (mend := mend_of(running.context, found)) is not None}
    certain = [mend for at, mend in mends.items() if findings[at].judgement is Judgement.CORRUPT]
    tried = [at for at in mends if findings[at].code[0] != "B"]  # those of this family come with their evidence
    suspects = sorted(tried, key=lambda at: _rank(findings[at]))
    chosen = list(dict.fromkeys(mends[at] for at in suspects))[:_MOST]
    outcomes = dict(_outcomes(running, chosen, certain))
    if left := sum(mends[at] not in outcomes for at in suspects):
        running.context.skip(f"{left} of {len(suspects)} odd values", f"{_MOST} others were tried by mending them")
    updated = list(findings)
    for at in suspects:
        if mends[at] in outcomes:
            updated[at] = _judged(findings[at], mends[at], outcomes[mends[at]])
    return [_of_biases(running, found) for found in updated]


def _rank(finding: Finding) -> tuple[int, int]:
    assert finding.judgement is not None
    return _ORDER.index(finding.judgement), -finding.severity.rank


def _outcomes(running: Running, mends: Sequence[Mend], certain: Sequence[Mend]) -> Iterator[tuple[Mend, Outcome]]:
    """Each mend as it is against mended, with all certain damage at other places mended."""
    if not mends:
        return
    bench = Bench(running, [edit for mend in certain for edit in mend.edits])
    for done, mend in enumerate(mends, 1):
        rest = [edit for other in certain if not mend.overlaps(other) for edit in other.edits]
        yield mend, bench.compare(rest, [*rest, *mend.edits])
        running.request.progress(0.5 + 0.5 * done / len(mends))


def _judged(finding: Finding, mend: Mend, outcome: Outcome) -> Finding:
    assert finding.judgement is not None
    judgement, severity, confidence = _TABLE.get((finding.judgement, outcome.effect), (finding.judgement, None, None))
    return replace(
        finding,
        judgement=judgement,
        severity=severity or finding.severity,
        confidence=confidence or finding.confidence,
        evidence=(*finding.evidence, evidence_of(mend, outcome)),
    )


def evidence_of(mend: Mend, outcome: Outcome) -> Evidence:
    did = {
        Effect.GAINS: f"gains {-outcome.delta:.3g} nats a token",
        Effect.COSTS: f"costs {outcome.delta:.3g} nats a token",
        Effect.NONE: "has no visible effect",
    }[outcome.effect]
    return Evidence("function", f"mending it ({mend.how}) {did}: {outcome}", outcome.numbers)


def _of_biases(running: Running, finding: Finding) -> Finding:
    """What else the model says of its biases: what large ones are worth, what is left where they were switched off."""
    if running.not_finite is not None or finding.code not in _BIAS_STORIES:
        return finding
    text, numbers = _BIAS_STORIES[finding.code](running, finding)
    return replace(finding, evidence=(*finding.evidence, Evidence("function", text, numbers)))


def _left(running: Running, finding: Finding) -> tuple[str, dict[str, object]]:
    nats = running.nats("prose")
    text = (
        f"as it is, prose costs {nats:.2f} nats a token; calling all tokens equally likely costs {running.chance:.2f}"
    )
    return text, {"nats": nats, "chance": running.chance}


def _worth(running: Running, finding: Finding) -> tuple[str, dict[str, object]]:
    role, _ = arch.role_of(finding.tensor or "")
    outcome = Bench(running).without([_zeroed(tensor) for tensor in _matching(running.gguf, f"blk.*.{role}")])
    return f"zeroing {role} in every layer: {outcome.delta:+.3g} nats a token; {outcome}", outcome.numbers


_BIAS_STORIES = {"M302": _left, "O205": _left, "O206": _left, "O207": _worth}


# -- mending -------------------------------------------------------------------------------------------------------


def mend_of(context: Context, finding: Finding) -> Mend | None:
    """How what was found could be mended; None where it cannot (what is lost is lost) or nothing is odd."""
    tensor = context.gguf.tensors.get(finding.tensor or "")
    if tensor is None or tensor.type is None or finding.index is None or finding.judgement is None:
        return None
    try:
        if finding.code == "O207":
            return Mend((_zeroed(tensor),), f"zeroing all of {tensor.name}")
        if tensor.name in context.vectors:
            return typical(context, tensor, finding.index[0])
        if finding.code in ("N105", "N107"):
            return None
        return _emptied(context, tensor, finding.index)
    except GgufkitError:  # a place that cannot be read or a type that cannot be edited
        return None


def _zeroed(tensor: Tensor) -> Edit:
    return Edit(tensor.name, 0, bytes(tensor.nbytes or 0))


def typical(context: Context, tensor: Tensor, index: int) -> Mend:
    """An element of a bias or norm as the median of the other layers; without other layers, of its own tensor."""
    role, layer = arch.role_of(tensor.name)
    vectors = context.vectors
    others = [
        vector[index]
        for name, vector in vectors.items()
        if arch.role_of(name)[0] == role and name != tensor.name and index < vector.size
    ]
    own = layer is None or not others
    values = np.array(vectors[tensor.name] if own else others, np.float64)
    value = float(np.median(values[np.isfinite(values)])) if np.isfinite(values).any() else 0.0
    edits = element_edits(context.gguf, tensor.name, {index: value})
    return Mend(tuple(edits), f"setting it to {value:.3g}, the median of {'its tensor' if own else 'the other layers'}")


def _emptied(context: Context, tensor: Tensor, index: tuple[int, ...]) -> Mend:
    """A block of a matrix zeroed, with those nearby that are as much too large; in float matrices the elements."""
    kind = tensor.type
    assert kind is not None
    element = int(np.ravel_multi_index(index, tensor.shape))
    block, size = element // kind.block_size, kind.type_size
    reach = max(1, _AROUND // size)
    first = max(0, block - reach)
    count = min((tensor.nbytes or 0) // size, block + reach) - first
    raw = context.gguf.read(tensor, first * size, count * size)
    values = quants.dequantize(kind, raw, byteorder=context.gguf.byteorder).reshape(count, kind.block_size)
    with np.errstate(all="ignore"):
        largest = np.abs(values).max(axis=1)
        usual = float(np.median(largest[np.isfinite(largest)])) if np.isfinite(largest).any() else 0.0
        bad = ~(largest <= _LARGE * usual)
    bad[block - first] = True
    edits = tuple(Edit(tensor.name, int(first + at) * size, bytes(size)) for at in np.flatnonzero(bad))
    what = "value" if kind.block_size == 1 else "block"
    return Mend(edits, f"zeroing {len(edits):,} {what}s around it" if len(edits) > 1 else f"zeroing the {what}")


# -- groups --------------------------------------------------------------------------------------------------------


def check_globs(gguf: GGUF, globs: Iterable[str]) -> None:
    """Whether each glob means something.

    Raises:
        UsageError: one matches no tensor.
    """
    for glob in globs:
        if not _matching(gguf, glob):
            raise UsageError(f"no tensor is called {glob!r}", help="`ggufkit inspect --tensors` lists them")


def ablate(running: Running) -> None:
    """Note what the model is without the tensors of each glob that was asked for."""
    if not running.request.ablate:
        return
    bench = Bench(running)
    for glob in running.request.ablate:
        tensors = _matching(running.gguf, glob)
        outcome = bench.without([_zeroed(tensor) for tensor in tensors])
        what = f"{len(tensors)} tensors" if len(tensors) > 1 else tensors[0].name
        text = f"without {glob} ({what} zeroed): {outcome.delta:+.3g} nats a token; {outcome}"
        running.note(f"ablate {glob}", {"tensors": len(tensors), **outcome.numbers}, text)


def _matching(gguf: GGUF, glob: str) -> list[Tensor]:
    return [tensor for name, tensor in gguf.tensors.items() if fnmatchcase(name, glob)]
