"""The model of a file at work, for the rules that need to see it run.

It is loaded after the static rules, unless they found the file's structure damaged, and by default only where all of
it takes about a minute at most and fits into memory. Built-in texts are cut into the file's own tokens once. What the
model can do (copying, obeying, stopping) is only noted: that depends on what it was trained for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from ggufkit import arch, gpu
from ggufkit.checks.context import Context
from ggufkit.checks.rule import Need
from ggufkit.container import GGUF, Tensor
from ggufkit.conversation import Conversation, Words, message
from ggufkit.errors import GgufkitError
from ggufkit.findings import Finding, Severity
from ggufkit.quants import BY_NAME
from ggufkit.runtime import SMALL, load, probes, texts
from ggufkit.runtime.engine import Edit, Engine, Logits
from ggufkit.runtime.finite import Spot

#: tokens of each built-in text
TOKENS = 128
#: positions of which every step is looked at
WATCHED = 24
#: positions at which another engine is asked
COMPARED = 6
_COPIED = 32
_ANSWER = 40
_NOTES = 13  # numbers that a run notes, half of its time

#: parameters that one core gets through in a second, with all probes and a few suspects: 0.5e9 take 25 s on two
_RATE = 10e6
_PATIENCE = 60.0  # seconds that a default run may take
#: what an engine keeps in memory: bytes a weight, and besides
_WEIGHT_BYTES, _BESIDES = 1.5, 1 << 30


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What was said about running the model.

    Attributes:
        insist: it was asked for, so that a report without it is incomplete; else only where it fits.
        device: as in `runtime.load`.
        ablate: globs of tensors to be tried without.
        progress: called with the share that is done.
    """

    insist: bool = False
    device: str = "auto"
    ablate: tuple[str, ...] = ()
    progress: Callable[[float], None] = field(default=lambda share: None)


@dataclass(frozen=True, slots=True)
class Text:
    """The beginning of a built-in text: its ids and how many bytes they stand for."""

    ids: tuple[int, ...]
    n_bytes: int


class Running:
    """The model at work, and what was learned of it.

    Attributes:
        probes: name → `value`, `limit` (None where nothing is judged) and `text`, for the report.
    """

    def __init__(
        self,
        context: Context,
        engine: Engine,
        words: Words,
        request: RunRequest,
        judging: Future[tuple[Engine, Logits]] | None = None,
    ) -> None:
        self.context = context
        self.gguf = context.gguf
        self.engine = engine
        self.words = words
        self.request = request
        self.probes: dict[str, dict[str, Any]] = {}

        self._judging = judging

    def finish(self) -> None:
        """Wait for what is still computing: the file is closed after this."""
        if self._judging is not None:
            wait([self._judging])

    @cached_property
    def judged(self) -> tuple[Engine, Logits]:
        """An engine that is trusted, and its logits at the first `COMPARED` positions of the prose."""
        if self._judging is not None:
            return self._judging.result()
        return _judge(self.gguf, self.ids[:COMPARED], itself=self.engine.name == "reference")

    def note(self, name: str, value: object, text: str, limit: object = None) -> None:
        """Put a number into the report."""
        self.probes[name] = {"value": value, "limit": limit, "text": text}
        self.request.progress(0.5 * min(1.0, len(self.probes) / _NOTES))

    @property
    def chance(self) -> float:
        """Nats a token for somebody who calls every row of the vocabulary equally likely."""
        return math.log(self.engine.config.n_vocab)

    @cached_property
    def texts(self) -> dict[str, Text]:
        """The built-in texts by name, each cut to `TOKENS`; the conversation where the file has a chat template."""
        found = {"prose": texts.SHORT_PROSE, "code": texts.CODE, "Chinese": texts.CHINESE}
        if self.words.templated:
            turns = [message(role, said) for role, said in texts.CONVERSATION]
            found["conversation"] = self.words.render(turns)
        return {name: self._cut(text) for name, text in found.items()}

    def _cut(self, text: str) -> Text:
        ids = tuple(self.words.tokenizer.encode(text)[: min(TOKENS, self.engine.config.n_ctx_train)])
        return Text(ids, sum(len(self.words.tokenizer.token_bytes(token)) for token in ids))

    @property
    def ids(self) -> tuple[int, ...]:
        """Ordinary text, for probes that need some."""
        return self.texts["prose"].ids

    @cached_property
    def prose(self) -> Logits:
        """The logits at all positions of the prose but the last, as the model is. Kept, as much is compared with it."""
        return probes.all_logits(self.engine, self.ids[:-1])

    def nats(self, name: str, edits: Collection[Edit] = ()) -> float:
        """The mean cost of a token of a built-in text, as the model is or with `edits`."""
        ids = self.texts[name].ids
        return float(probes.nats(self.logits(name, edits), ids[1:]).mean())

    def logits(self, name: str, edits: Collection[Edit] = (), n: int | None = None) -> Logits:
        """The logits at the first `n` positions of a built-in text; by default at all but the last."""
        if name == "prose" and not edits:
            return self.prose[:n]
        with self.engine.patched(edits):
            return probes.all_logits(self.engine, self.texts[name].ids[:-1][:n])

    @cached_property
    def not_finite(self) -> Spot | None:
        """The first step of a short pass that is not finite."""
        seen = probes.finite(self.engine, self.ids[:WATCHED])
        found = "all finite" if seen.first is None else f"the first that is not: {seen.first}"
        self.note("finite", seen.first is None, f"{seen.steps:,} steps at {WATCHED} positions: {found}", limit=True)
        return seen.first


# -- starting ------------------------------------------------------------------------------------------------------


def begin(context: Context, request: RunRequest) -> Future[Running | None] | None:
    """Start to load the model onto a GPU, if there is one, while the static rules are at work.

    What the loader thinks of a damaged file is only heard if these find nothing wrong with its structure.
    """
    if request.device not in ("auto", "cuda") or _lacking(context):
        return None
    return _in_background(lambda: _load(context, request, ahead=True) if gpu.usable() else None)


def start(
    context: Context,
    request: RunRequest,
    findings: Sequence[Finding],
    loading: Future[Running | None] | None = None,
) -> Running | None:
    """Load the model, or say in the report why not.

    Args:
        findings: of the static rules; a damaged structure is not run.
        loading: what `begin` began.
    """
    wait([] if loading is None else [loading])
    reason = _obstacle(context, request, findings)
    if reason is None:
        try:
            return (loading and loading.result()) or _load(context, request)
        except GgufkitError as error:
            reason = str(error.message)
        except MemoryError:
            reason = "this machine has not enough memory for it"
    context.skip("running the model", reason, asked=request.insist)
    return None


def _load(context: Context, request: RunRequest, *, ahead: bool = False) -> Running:
    """With `ahead`, the reference begins to compute, too: it needs the processor, the engine only the GPU."""
    words, gguf = Words.of(context.gguf), _with_biases(context)
    ids = words.tokenizer.encode(texts.SHORT_PROSE)[:COMPARED]
    judging = _in_background(lambda: _judge(gguf, ids)) if ahead else None
    try:
        return Running(context, load(gguf, request.device), words, request, judging)
    except BaseException:
        wait([judging] if judging else [])  # the file is closed after this
        raise


def _judge(gguf: GGUF, ids: Sequence[int], *, itself: bool = False) -> tuple[Engine, Logits]:
    """The reference and its logits, which for itself are computed in double precision."""
    from ggufkit.runtime.reference import ReferenceEngine
    from ggufkit.runtime.weights import Weights

    weights = Weights(gguf, keep=itself, reuse=not itself)
    other = ReferenceEngine(gguf, np.float64 if itself else np.float32, weights=weights)
    return other, probes.all_logits(other, ids)


def _in_background(function: Callable[[], T]) -> Future[T]:
    """Run it in a thread of its own."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future


class _ZeroBiases(GGUF):
    """A file without its biases, read as loaders do that call them optional: as if they were all zero."""

    def __init__(self, gguf: GGUF, missing: Mapping[str, int]) -> None:
        self.__dict__.update(gguf.__dict__)
        f32 = BY_NAME["F32"]
        self._made = {
            name: Tensor(name, (size,), f32.id, f32, 0, 0, f32.nbytes(size), 0) for name, size in missing.items()
        }
        self.tensors = {**gguf.tensors, **self._made}

    def read_into(self, tensor: Tensor, buffer: memoryview, start: int = 0) -> None:
        if tensor.name in self._made:
            buffer.cast("B")[:] = bytes(buffer.nbytes)
        else:
            super().read_into(tensor, buffer, start)


def _with_biases(context: Context) -> GGUF:
    """The file, with zeros for the biases that its architecture must have and it has not: the model without its
    biases is what such a file is worth, and is what the report is asked about."""
    assert context.config is not None  # no obstacle
    missing = {
        name: expected.shape[0]
        for name, expected in arch.expected_tensors(context.config).items()
        if name.endswith(".bias") and expected.required and name not in context.gguf.tensors
    }
    return _ZeroBiases(context.gguf, missing) if missing else context.gguf


def _obstacle(context: Context, request: RunRequest, findings: Sequence[Finding]) -> str | None:
    """Why the model should not even be loaded."""
    broken = sorted({found.code for found in findings if found.code[0] == "S" and found.severity is Severity.ERROR})
    if broken:
        return f"the file's structure is damaged ({', '.join(broken)})"
    return _lacking(context) or _too_large(context, request)


def _lacking(context: Context) -> str | None:
    return context.lacks(Need.CONFIG) or context.lacks(Need.VOCABULARY)


def _too_large(context: Context, request: RunRequest) -> str | None:
    """Why this machine should not try, by the number of parameters; a GPU says itself what does not fit."""
    from ggufkit import doctor

    if request.device == "cuda" or (request.device == "auto" and gpu.usable()):
        return None
    parameters = sum(tensor.n_elements for tensor in context.gguf.tensors.values())
    seconds = parameters / (_RATE * doctor.cpu_count())
    if seconds > _PATIENCE and not request.insist:
        return f"it would take about {seconds / 60:.0f} minutes on this machine; --run does it"
    needed, memory = _WEIGHT_BYTES * parameters + _BESIDES, doctor.memory_bytes()
    if 4 * parameters > SMALL and memory is not None and memory[1] < needed:
        return f"it takes about {needed / 1e9:.1f} GB of memory, of which {memory[1] / 1e9:.1f} are free"
    return None


# -- ability -------------------------------------------------------------------------------------------------------


def abilities(running: Running) -> None:
    """Note what the model can do. Nothing of it is judged: it depends on size and training."""
    if running.not_finite is not None:
        return
    ordinary = sorted({token for text in running.texts.values() for token in text.ids})
    copy = probes.copy(running.engine, ordinary, n=_COPIED)
    text = f"{_COPIED} random tokens cost {copy.first:.2f} nats each, the same again {copy.second:.2f}"
    running.note("copy", {"first": copy.first, "second": copy.second}, text)
    if running.words.templated:
        _ask(running)


def _ask(running: Running) -> None:
    """Ask for a haiku with this very minute in it, which no canned answer can have."""
    minute = probes.minute_in_words(*time.localtime()[3:5])
    talk = Conversation(running.engine, running.words, n_predict=_ANSWER)
    try:
        answer = "".join(talk.say(probes.NONCE_PROMPT.format(words=minute)))
    except GgufkitError as error:
        running.context.skip("the probe of an answer", error.message)
        return
    assert talk.reply is not None
    numbers, said = talk.reply.numbers, probes.contains(answer, minute)
    verse = " / ".join(answer.split("\n"))
    text = f"asked for a haiku with {minute!r}, it {'says' if said else 'does not say'} it: {verse}"
    running.note("nonce", {"words": minute, "said": said, "answer": answer}, text)
    running.note("repetition", numbers.repetition, f"{numbers.repetition:.0%} of the answer's 4-grams are repeated")
    ended = numbers.stop == "end of turn"
    text = "the answer stops at the end of its turn" if ended else f"the answer had not ended after {_ANSWER} tokens"
    running.note("end_of_turn", ended, text)
