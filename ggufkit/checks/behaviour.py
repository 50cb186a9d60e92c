"""Rules on what the model does when it runs: the last word in every doubt.

Each judges a probe of soundness (every step finite, the cache changes nothing, the same twice, another engine says the
same, attention as it must be, nothing on padding, better than chance). They hold for every healthy model, trained for
whatever. All numbers stand in the report's `probes` as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np

from ggufkit import arch
from ggufkit.checks.ablate import Bench, Effect, evidence_of, typical
from ggufkit.checks.context import Context
from ggufkit.checks.rule import Found, Need, rule
from ggufkit.checks.running import COMPARED, WATCHED, Running
from ggufkit.container import Tensor
from ggufkit.findings import Confidence, Evidence, Judgement, Severity
from ggufkit.runtime import probes

ERROR, WARNING = Severity.ERROR, Severity.WARNING

#: positions that are run one by one
_ONE_BY_ONE = 10
#: models with fewer parameters may have been trained for something so narrow that no built-in text is any of it
_GENERAL = 50_000_000
#: prose costs the weakest published model of `arch.KNOWN_MODELS` 4.2 nats a token, and 6.9 without its key biases
_KNOWN_NATS = 6.5
_KL = 0.01  # of two ways to compute the same; rounding alone stays below 0.002
_APART = 0.01  # logits of two runs of the same
_ROWS = 1e-3
_PADDING = 0.05
#: a bias this many times the second largest of its tensor is tried, whatever the static rules say
_CANDIDATE = 4.0
_MOST_CANDIDATES = 16
#: tokens after which it is plain that a value does nothing, or is needed
_GLANCE = 32
#: mean KL divergence below which a change is like any other way of computing the same
_SAME = 0.01

#: step → the role of the tensor that makes it from finite inputs
_FED_BY = {
    "embd": "token_embd.weight",
    "attn_norm": "attn_norm.weight",
    "q_proj": "attn_q.weight",
    "k_proj": "attn_k.weight",
    "v_proj": "attn_v.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "attn_out": "attn_output.weight",
    "ffn_norm": "ffn_norm.weight",
    "ffn_gate": "ffn_gate.weight",
    "ffn_up": "ffn_up.weight",
    "ffn_out": "ffn_down.weight",
    "result_norm": "output_norm.weight",
    "result_output": "output.weight",
}


# -- soundness -----------------------------------------------------------------------------------------------------


def _running(context: Context) -> Running:
    assert context.running is not None  # Need.ENGINE
    return context.running


def _finite(context: Context) -> Running | None:
    """The running model, unless its numbers are none: then only B101 has something to say."""
    running = _running(context)
    return running if running.not_finite is None else None


@rule("B101", "step-not-finite", ERROR, needs=[Need.ENGINE])
def step_not_finite(context: Context) -> Iterator[Found]:
    """A step of the forward pass makes NaN or infinity.

    What. Every named step of a pass over 24 tokens, at every position. The first that is not finite is named, with
    the tensor that makes it out of what was finite until then.

    Why. Finite logits prove nothing: engines that round activations to 8 bits turn a NaN into a finite, plausible
    answer.

    Case. A NaN in one value bias of Qwen2.5-0.5B: llama.cpp answers in fluent nonsense, and every logit is finite.

    Fix. Fetch the file again. Where no tensor is to blame, a large value before it overflowed: see the O and N rules.
    """
    running = _running(context)
    spot = running.not_finite
    if spot is None:
        return
    role = _FED_BY.get(spot.step)
    tensor = _tensor_of(running, spot.layer, role) if role else None
    blame = f"; what goes into it is finite, so it is {tensor} that makes it" if tensor else ""
    token = running.ids[spot.position] if spot.step == "embd" else None
    yield Found(
        f"the first step that is not finite is {spot}{blame}",
        tensor=tensor,
        index=None if token is None else (token,),
        evidence=(Evidence("function", str(spot), {"step": spot.name, "nan": spot.nan, "infinite": spot.infinite}),),
        help="fetch the file again",
    )


def _tensor_of(running: Running, layer: int | None, role: str) -> str:
    if role == "output.weight" and running.engine.config.tied:
        return "token_embd.weight"
    return role if layer is None else f"blk.{layer}.{role}"


@rule("B102", "worse-than-chance", ERROR, needs=[Need.ENGINE])
def worse_than_chance(context: Context) -> Iterator[Found]:
    """The model predicts text worse than somebody who knows nothing.

    What. The cost of a token of built-in prose, code, Chinese and, with a chat template, conversation. Calling all V
    rows of the vocabulary equally likely costs ln V nats (11.9 for Qwen). A model of 50 million parameters or more
    that does worse on every text is broken; smaller ones may know only one narrow thing and are not judged. Models
    of the published Qwen dimensions are expected to find prose below 6.5 nats; beyond that is a warning.

    Why. Whatever a model was trained for, it learned that some tokens are commoner than others. Only damage makes it
    sure of what is wrong.

    Case. Qwen2.5-0.5B with its attention biases switched off costs 16.4 nats a token.

    Fix. Fetch the file again, or convert the original model. If other engines say the same of a fresh file, the
    conversion is to blame.
    """
    if (running := _finite(context)) is None:
        return
    costs = {name: _cost(running, name) for name in running.texts}
    prose, best = costs["prose"], min(costs, key=costs.__getitem__)
    if not costs[best] < running.chance and _parameters(context) >= _GENERAL:
        yield Found(
            f"every built-in text is less likely to this model than chance: {best}, the best, costs "
            f"{costs[best]:.2f} nats a token, where calling all tokens equally likely costs {running.chance:.2f}",
            value=costs[best],
            evidence=(Evidence("function", _listed(costs), {"nats": costs, "chance": running.chance}),),
            help="fetch the file again, or convert the original model",
        )
    elif prose > _KNOWN_NATS and (known := arch.known_models(running.engine.config)):
        yield Found(
            f"prose costs {prose:.2f} nats a token; published models of these dimensions ({known[0].name}) stay far "
            f"below {_KNOWN_NATS}",
            value=prose,
            severity=WARNING,
            confidence=Confidence.MEDIUM,
            evidence=(Evidence("function", _listed(costs), {"nats": costs}),),
            help="compare with the original model; a missing or damaged tensor costs this much",
        )


def _cost(running: Running, name: str) -> float:
    """Nats a token of a text, noted as bits per byte."""
    text, nats = running.texts[name], running.nats(name)
    bits = nats * len(text.ids) / math.log(2) / max(text.n_bytes, 1)
    running.note(
        f"bits_per_byte.{name}",
        {"bits_per_byte": bits, "nats": nats, "tokens": len(text.ids)},
        f"{name}: {bits:.2f} bits per byte, {nats:.2f} nats a token (chance {running.chance:.2f})",
        limit={"nats": running.chance},
    )
    return nats


def _listed(costs: dict[str, float]) -> str:
    return ", ".join(f"{name} {nats:.2f}" for name, nats in costs.items()) + " nats a token"


def _parameters(context: Context) -> int:
    return sum(tensor.n_elements for tensor in context.gguf.tensors.values())


@rule("B103", "padding-likely", ERROR, needs=[Need.ENGINE])
def padding_likely(context: Context) -> Iterator[Found]:
    """The model gives probability to tokens that do not exist.

    What. The rows of the vocabulary that no text stands behind (Qwen has 271), and the probability that they get
    together at a position of prose: 5% on average is too much.

    Why. They were never seen in training, which makes them as unlikely as can be. If they are not, the output matrix
    is damaged, or shifted against the vocabulary.

    Case. Healthy Qwen2.5-0.5B gives them 0.0002%, the small demo model, on prose that it never learned, 0.2%.

    Fix. Fetch the file again, or convert the model again with the tokenizer that belongs to it.
    """
    running, rows = _finite(context), _running(context).words.tokenizer.padding_ids
    if running is None or not rows:
        return
    seen = probes.padding(running.engine, running.ids[:WATCHED], rows)
    text = f"{seen.ids:,} padding rows get {seen.mean:.2g} of the probability, {seen.most:.2g} at most"
    running.note("padding", {"mean": seen.mean, "most": seen.most, "argmax": seen.argmax}, text, limit=_PADDING)
    if seen.mean > _PADDING:
        yield Found(f"{text}: the output rows and the vocabulary do not belong together", value=seen.mean)


@rule("B104", "attention-wrong", ERROR, needs=[Need.ENGINE])
def attention_wrong(context: Context) -> Iterator[Found]:
    """Attention that is no distribution over the past.

    What. Every row of every head of every layer at 24 positions: sums to one within 0.001, has nothing negative, and
    nothing on later positions.

    Why. It holds whatever the weights are. Where it does not, the engine is wrong, and nothing else that it says of
    this model counts.

    Case. Scores beyond the range of half precision, which Qwen2's key biases reach.

    Fix. Try --device cpu, and report it.
    """
    if (running := _finite(context)) is None:
        return
    seen = probes.attention(running.engine, running.ids[:WATCHED])
    text = (
        f"{seen.rows:,} rows of attention sum to 1 within {seen.sum_error:.1g}, {seen.future:.1g} of it in the future"
    )
    numbers = {"sum_error": seen.sum_error, "future": seen.future, "least": seen.least}
    running.note("attention", numbers, text, limit=_ROWS)
    if not (seen.sum_error <= _ROWS and seen.future == 0 and seen.least >= 0):
        yield Found(f"{text}, at least {seen.least:.1g}", help=_engine_fault(running))


@rule("B105", "cache-inconsistent", ERROR, needs=[Need.ENGINE])
def cache_inconsistent(context: Context) -> Iterator[Found]:
    """One by one through the cache gives something else than all at once.

    What. Ten tokens together and one by one: a mean KL divergence above 0.01 nats.

    Why. Both are the same computation. Differences of rounding stay below 0.002.

    Case. A cache whose positions are off by one answers the first token well and drifts from there.

    Fix. Try --device cpu, and report it. A file with damaged weights can blow rounding up: mend that first.
    """
    if (running := _finite(context)) is None:
        return
    shift = probes.cache_consistency(running.engine, running.ids[:_ONE_BY_ONE])
    text = f"{shift.positions} positions at once and one by one: mean KL {shift.mean_kl:.1g}, top-1 {shift.top1:.0%}"
    running.note("cache", {"mean_kl": shift.mean_kl, "top1": shift.top1, "max_abs": shift.max_abs}, text, limit=_KL)
    if not shift.mean_kl <= _KL:
        yield Found(text, value=shift.mean_kl, help=_engine_fault(running))


@rule("B106", "not-deterministic", ERROR, needs=[Need.ENGINE])
def not_deterministic(context: Context) -> Iterator[Found]:
    """The same input gives another output.

    What. Ten tokens twice, together and with the last one alone: logits that differ by more than 0.01.

    Why. Nothing else that is measured counts if it does not repeat.

    Case. A kernel that reads memory nobody wrote.

    Fix. Try --device cpu, and report it; test the machine's memory.
    """
    if (running := _finite(context)) is None:
        return
    seen = probes.determinism(running.engine, running.ids[:_ONE_BY_ONE])
    apart = "the same to the last bit" if seen.identical else f"apart by up to {seen.max_abs:.2g}"
    running.note("determinism", seen.max_abs, f"two runs of the same tokens are {apart}", limit=_APART)
    if not seen.max_abs <= _APART:
        yield Found(f"two runs of the same tokens are {apart}", value=seen.max_abs, help=_engine_fault(running))


@rule("B107", "engines-disagree", ERROR, needs=[Need.ENGINE])
def engines_disagree(context: Context) -> Iterator[Found]:
    """The engine and the reference compute different things.

    What. Six positions on the fast engine and on the plain NumPy reference (which itself is held against float64): a
    mean KL divergence above 0.01 nats.

    Why. The verdict on this file stands on the fast engine. Two programs of the same model differ by rounding, at most
    0.002.

    Case. A block type that one of them decodes wrongly.

    Fix. Report it; the numbers of this run prove nothing.
    """
    if (running := _finite(context)) is None:
        return
    other, trusted = running.judged
    ids = running.ids[:COMPARED]
    shift = probes.distribution_shift(trusted, probes.all_logits(running.engine, ids), ids[1:])
    names = f"{running.engine.name} and {other.name} ({np.dtype(other.dtype).name})"
    text = f"{names} at {shift.positions} positions: mean KL {shift.mean_kl:.1g}, logits within {shift.max_abs:.1g}"
    running.note("agreement", {"mean_kl": shift.mean_kl, "top1": shift.top1, "max_abs": shift.max_abs}, text, limit=_KL)
    if not shift.mean_kl <= _KL:
        yield Found(text, value=shift.mean_kl, help=_engine_fault(running))


def _engine_fault(running: Running) -> str:
    return f"this points at ggufkit's {running.engine.name} engine rather than at the file; try another --device"


# -- what no statistics see ----------------------------------------------------------------------------------------


@rule("B201", "harmful-value", Severity.ERROR, needs=[Need.ENGINE, Need.DATA])
def harmful_value(context: Context) -> Iterator[Found]:
    """A bias value that the model is better without.

    What. Values at least four times the second largest of their bias tensor that no static rule objects to. Each is
    set to the median of the other layers; where that makes the built-in text likelier by more than 0.05 nats a token,
    the value is damage.

    Why. In a value bias ten is not much, and nothing in its neighbourhood forbids it. Only the model can tell.

    Case. A single 10 in blk.3.attn_v.bias of Qwen2.5-0.5B costs 0.8 nats a token. Zeroing its genuine -211 in
    blk.8.attn_k.bias gains nothing.

    Fix. Fetch the file again; compare this value with the original model's.
    """
    found = list(islice(_candidates(context), _MOST_CANDIDATES))
    if (running := _finite(context)) is None or not found:
        return
    bench = Bench(running)
    mends = [(tensor, index, typical(context, tensor, index)) for tensor, index in found]
    if bench.without([edit for _, _, mend in mends for edit in mend.edits], _GLANCE).mean_kl < _SAME:
        return  # all of them together do nothing
    for tensor, index, mend in mends:
        glance = bench.without(mend.edits, _GLANCE)
        outcome = bench.without(mend.edits) if glance.delta < 0 and glance.mean_kl > _SAME else glance
        if outcome is not glance and outcome.effect is Effect.GAINS:
            value = float(context.vectors[tensor.name][index])
            yield Found(
                f"{tensor.name}[{index}] is {value:.6g}, and the model is better without it",
                tensor=tensor.name,
                index=(index,),
                offset=context.element_offset(tensor.name, index),
                value=value,
                evidence=(evidence_of(mend, outcome),),
                judgement=Judgement.CORRUPT,
                help="fetch the file again; compare this value with the original model's",
            )


def _candidates(context: Context) -> Iterator[tuple[Tensor, int]]:
    """Bias values that stand out of their own tensor."""
    for name, vector in context.vectors.items():
        size = np.abs(vector.astype(np.float64))
        if not name.endswith(".bias") or size.size < 2 or not np.isfinite(size).all():
            continue
        second, largest = np.partition(size, -2)[-2:]
        if largest >= _CANDIDATE * second > 0:
            yield context.gguf.tensors[name], int(size.argmax())
