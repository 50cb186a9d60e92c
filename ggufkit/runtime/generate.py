"""Token ids in, token ids out: the loop around an engine, and the numbers that say how it went.

It knows no text. A `Session` keeps what its cache holds, so that a chat's next turn runs only what is new. The
last position of a prompt is run alone with every step watched: it multiplies with every weight and reads every
key and value of the prompt, so whatever is not finite in a way that matters shows there, at the price of one
token. After that the logits are watched.
"""

from __future__ import annotations

from collections.abc import Container, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np

from ggufkit.arch import Config
from ggufkit.errors import NotFinite, UsageError
from ggufkit.runtime.engine import Engine, Follower, Logits
from ggufkit.runtime.finite import FiniteWatch, Spot, first_not_finite
from ggufkit.runtime.sampling import GREEDY, Choice, Sampler, SamplingParams

Stop = Literal["end of turn", "length", "context full", "interrupted"]

#: a prompt is run in pieces of this many positions, which bounds what an engine needs for its scores
BATCH = 512
#: the context when nobody asks for one: this much, or what prompt and answer take if that is more
USUAL_CTX = 4096


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the answer and its log-probability (natural, under the unfiltered softmax)."""

    id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer in numbers.

    Attributes:
        n_prompt, n_reused: tokens of the prompt, and how many of them the cache held already.
        ids: what was said, without the token that ended it.
        stop, stop_id: why it ended, and that token.
        mean_logprob, min_logprob: of the tokens said; None when nothing was.
        repetition: share of 4-grams that occurred before.
        distinct: share of distinct 1-, 2- and 3-grams.
        padding: sampled ids that no text stands behind.
        steps_watched: how many steps of the pass over the prompt's last position were seen.
        not_finite: the first step that was NaN or infinite somewhere; None is as it should be.
        seconds_to_first: from the start to the first token.
        prompt_rate, decode_rate: tokens a second; None without any.
        seed: of the sampler; None if greedy.
    """

    n_prompt: int
    n_reused: int
    ids: tuple[int, ...]
    stop: Stop
    stop_id: int | None
    mean_logprob: float | None
    min_logprob: float | None
    repetition: float
    distinct: tuple[float, float, float]
    padding: tuple[int, ...]
    steps_watched: int
    not_finite: Spot | None
    seconds_to_first: float | None
    prompt_rate: float | None
    decode_rate: float | None
    seed: int | None


class Session:
    """One sequence of tokens and the cache that holds its beginning.

    Attributes:
        ids: the tokens that the cache holds.
    """

    def __init__(self, engine: Engine, n_ctx: int) -> None:
        self.engine = engine
        self.cache: Any = engine.new_cache(n_ctx)
        self.ids: list[int] = []

    @property
    def n_ctx(self) -> int:
        return int(self.cache.n_ctx)

    def keep_common(self, ids: Sequence[int]) -> int:
        """Forget all that is not a beginning of `ids`, and its last token; how many tokens stay."""
        common = 0
        while common < min(len(self.ids), len(ids) - 1) and self.ids[common] == ids[common]:
            common += 1
        self.cache.truncate(common)
        del self.ids[common:]
        return common

    def run(self, ids: Sequence[int], watch: FiniteWatch | None = None) -> Logits:
        """Add `ids`; the logits after the last of them, [V]."""
        logits = self.engine.forward(ids, self.cache, tap=watch)
        self.ids.extend(ids)
        return logits[-1]


def default_n_ctx(config: Config, n_prompt: int, n_predict: int | None) -> int:
    """The context when none was asked for: room for prompt and answer, within what the model was trained for."""
    return min(config.n_ctx_train, max(USUAL_CTX, n_prompt + (n_predict or 0)))


def generate(
    engine: Engine,
    ids: Sequence[int],
    params: SamplingParams = GREEDY,
    *,
    n_predict: int | None = None,
    stop_ids: Container[int] = (),
    padding_ids: Container[int] = (),
    session: Session | None = None,
    n_ctx: int | None = None,
    watch: bool = True,
) -> Answer:
    """Continue `ids`, token by token, as the returned iterator is read.

    Args:
        n_predict: at most so many tokens; None goes on to the end of the turn or of the context.
        stop_ids: tokens that end the answer; they are not part of it.
        padding_ids: tokens that no text stands behind; sampling one is counted.
        session: goes on with what this holds; `n_ctx` is then its own.
        n_ctx: positions of the cache; see `default_n_ctx`.
        watch: look at every step of the prompt's last position.

    Raises:
        UsageError: no tokens, an id outside the vocabulary, or a prompt longer than the context.
    """
    session = session or Session(engine, n_ctx or default_n_ctx(engine.config, len(ids), n_predict))
    if not ids:
        raise UsageError("there are no tokens to continue")
    if len(ids) > session.n_ctx:
        raise UsageError(
            f"the prompt has {len(ids):,} tokens, the context {session.n_ctx:,} positions",
            help="give a larger context (--ctx) or a shorter prompt",
        )
    return Answer(session, tuple(ids), Sampler(params), n_predict, stop_ids, padding_ids, watch=watch)


class Answer(Iterator[Token]):
    """The tokens of an answer as they come; `summary` at any time, `finish()` for all of it at once."""

    def __init__(
        self,
        session: Session,
        prompt: tuple[int, ...],
        sampler: Sampler,
        n_predict: int | None,
        stop_ids: Container[int],
        padding_ids: Container[int],
        *,
        watch: bool,
    ) -> None:
        self._session = session
        self._prompt = prompt
        self._sampler = sampler
        self._n_predict = n_predict
        self._stop_ids = stop_ids
        self._padding_ids = padding_ids
        self._watch = FiniteWatch(len(prompt) - 1) if watch else None
        self._not_finite: Spot | None = None
        self._n_reused = self._n_decoded = 0
        self._said: list[Token] = []
        self._stop: Stop = "interrupted"
        self._stop_id: int | None = None
        self._prompt_seconds = self._decode_seconds = 0.0
        self._seconds_to_first: float | None = None
        self._tokens = self._generate()

    def __next__(self) -> Token:
        return next(self._tokens)

    def finish(self) -> Generation:
        """Read to the end."""
        for _ in self:
            pass
        return self.summary

    def _generate(self) -> Iterator[Token]:
        started = perf_counter()
        logits = self._run_prompt()
        self._prompt_seconds = perf_counter() - started
        room = self._session.n_ctx - len(self._prompt) + 1  # the last token said is not run
        limit = room if self._n_predict is None else min(self._n_predict, room)
        with closing(self._choices(logits, limit)) as choices:
            for choice in choices:
                if choice.id in self._stop_ids:
                    self._stop, self._stop_id = "end of turn", choice.id
                    return
                self._said.append(Token(choice.id, choice.logprob))
                if self._seconds_to_first is None:
                    self._seconds_to_first = perf_counter() - started
                yield self._said[-1]
        self._stop = "length" if limit == self._n_predict else "context full"

    def _choices(self, logits: Logits, limit: int) -> Generator[Choice, None, None]:
        """What is chosen, `limit` times at most, beginning with the prompt's logits."""
        if limit < 1:
            return
        with self._explained():
            choice = self._sampler(logits)
        yield choice
        engine = self._session.engine
        if isinstance(engine, Follower):
            yield from self._follow(engine, choice, limit - 1)
            return
        for _ in range(limit - 1):
            logits = self._decode(choice.id)
            with self._explained():
                choice = self._sampler(logits)
            yield choice

    def _follow(self, engine: Follower, choice: Choice, limit: int) -> Generator[Choice, None, None]:
        """The rest of the choices by an engine that makes them itself."""
        session = self._session
        with closing(engine.follow(choice.id, session.cache, limit, self._sampler)) as following:
            while True:
                before = perf_counter()
                with self._explained():
                    found = self._next(following, choice)
                if found is None:
                    return
                self._decode_seconds += perf_counter() - before
                self._n_decoded += 1
                choice = found
                yield choice

    def _next(self, following: Iterator[Choice], fed: Choice) -> Choice | None:
        """The next choice; `fed` is what the cache holds by then."""
        session = self._session
        try:
            return next(following, None)
        finally:
            if session.cache.length > len(session.ids):
                session.ids.append(fed.id)

    def _run_prompt(self) -> Logits:
        """All of the prompt that the cache lacks: the last position alone, watched."""
        self._n_reused = self._session.keep_common(self._prompt)
        *rest, last = self._prompt[self._n_reused :]
        for start in range(0, len(rest), BATCH):
            self._session.run(rest[start : start + BATCH])
        logits = self._session.run([last], self._watch)
        if self._watch is not None and self._watch.bad:
            self._not_finite = self._locate()
        return logits

    def _decode(self, token: int) -> Logits:
        before = perf_counter()
        logits = self._session.run([token])
        self._decode_seconds += perf_counter() - before
        self._n_decoded += 1
        return logits

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say which step it is where logits are not finite."""
        try:
            yield
        except NotFinite as error:
            self._not_finite = self._not_finite or self._locate()
            message = f"{error.message}; the first step that is not finite is {self._not_finite}"
            raise NotFinite(message, help=error.help) from error

    def _locate(self) -> Spot | None:
        """Where the sequence so far first stops being finite, or at least where the watch saw it."""
        spot, _ = first_not_finite(self._session.engine, self._session.ids)
        return spot or (self._watch.first if self._watch else None)

    @property
    def summary(self) -> Generation:
        """What was said so far, in numbers."""
        ids = tuple(token.id for token in self._said)
        logprobs = [token.logprob for token in self._said]
        return Generation(
            n_prompt=len(self._prompt),
            n_reused=self._n_reused,
            ids=ids,
            stop=self._stop,
            stop_id=self._stop_id,
            mean_logprob=float(np.mean(logprobs)) if logprobs else None,
            min_logprob=min(logprobs, default=None),
            repetition=repetition(ids),
            distinct=(distinct(ids, 1), distinct(ids, 2), distinct(ids, 3)),
            padding=tuple(token for token in ids if token in self._padding_ids),
            steps_watched=self._watch.seen if self._watch else 0,
            not_finite=self._not_finite,
            seconds_to_first=self._seconds_to_first,
            prompt_rate=_rate(len(self._prompt) - self._n_reused, self._prompt_seconds),
            decode_rate=_rate(self._n_decoded, self._decode_seconds),
            seed=self._sampler.seed,
        )


def distinct(ids: Sequence[int], n: int) -> float:
    """Share of the n-grams of `ids` that are different ones; 1 when there are none."""
    grams = [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(ids: Sequence[int]) -> float:
    """Share of the 4-grams of `ids` that occurred before: 0 for prose, towards 1 for a loop."""
    return 1 - distinct(ids, 4)


def _rate(n: int, seconds: float) -> float | None:
    return n / seconds if n > 0 and seconds > 0 else None
