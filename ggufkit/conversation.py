"""Text in, text out: what joins a file's tokenizer and chat template to an engine that knows token ids only.

A conversation is the list of its messages. For every turn the whole of it is rendered anew and cut into tokens;
the session keeps what its cache holds of them already, so that only the new part is run. Without a chat template,
or when it is not wanted, the messages are one running text.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ggufkit import chat
from ggufkit.container import GGUF
from ggufkit.runtime.engine import Engine
from ggufkit.runtime.generate import Answer, Generation, Session, default_n_ctx, generate
from ggufkit.runtime.sampling import GREEDY, SamplingParams
from ggufkit.tokenizer import Tokenizer

#: an answer that nobody limits ends here
MOST_TOKENS = 1024

_EQUAL = 1e-4  # a log-probability this near to that of a uniform choice is one

Message = dict[str, str]  # `role` and `content`, as templates know them


@dataclass(slots=True)
class Words:
    """A file's way from messages to token ids.

    Attributes:
        templated: whether the chat template is used; without it the messages' contents are joined as they are.
        last: what was rendered last, which takes a process of its own: somebody may have done it ahead.
    """

    tokenizer: Tokenizer
    metadata: Mapping[str, Any]
    templated: bool
    last: tuple[Sequence[Message], str] | None = None

    @classmethod
    def of(cls, gguf: GGUF, *, raw: bool = False) -> Words:
        """The file's own tokenizer and, unless `raw`, its chat template.

        Raises:
            FormatError, NewerThanTool, Unsupported: the tokenizer cannot be built.
        """
        templated = not raw and "default" in chat.templates(gguf.metadata)
        return cls(Tokenizer.from_metadata(gguf.metadata), gguf.metadata, templated)

    def render(self, messages: Sequence[Message]) -> str:
        """The text that the model is given, ready to be encoded.

        Raises:
            TemplateError: the template is damaged.
            UsageError: it refuses the messages.
        """
        if self.last is not None and self.last[0] == messages:
            return self.last[1]
        rendered = chat.format_turns(self.metadata, self.tokenizer, messages) if self.templated else None
        text = "".join(message["content"] for message in messages) if rendered is None else rendered
        self.last = ([dict(message) for message in messages], text)
        return text


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer.

    Attributes:
        prompt: the text that was cut into `prompt_ids`: all turns so far, rendered.
        text: what was said.
        numbers: the same as ids, with what proves its sanity.
        problems: why the answer cannot be trusted, in sentences; empty is as it should be.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    text: str
    numbers: Generation
    problems: tuple[str, ...]


@dataclass
class Conversation:
    """The turns so far, and what answers.

    Attributes:
        n_ctx: positions of the cache; None decides at the first turn.
        n_predict: at most so many tokens an answer.
        messages: every turn.
        reply: the last answer, when it has ended.
    """

    engine: Engine
    words: Words
    params: SamplingParams = GREEDY
    n_ctx: int | None = None
    n_predict: int | None = MOST_TOKENS
    messages: list[Message] = field(default_factory=list)
    reply: Reply | None = None
    _session: Session | None = None

    def say(self, text: str) -> Generator[str, None, None]:
        """Say something; the answer comes piece by piece, never half a character. `reply` is set when it ends,
        also when the iterator is closed before.

        Raises:
            UsageError: the conversation no longer fits into the context.
            TemplateError: the template refuses the messages.
        """
        turn = [*self.messages, message("user", text)]
        prompt = self.words.render(turn)
        ids = self.words.tokenizer.encode(prompt)
        if self._session is None:
            n_ctx = self.n_ctx or default_n_ctx(self.engine.config, len(ids), self.n_predict)
            self._session = Session(self.engine, n_ctx)
        tokenizer = self.words.tokenizer
        answer = generate(
            self.engine,
            ids,
            self.params,
            n_predict=self.n_predict,
            stop_ids=tokenizer.stop_ids,
            padding_ids=tokenizer.padding_ids,
            session=self._session,
        )
        return self._stream(turn, prompt, ids, answer)

    def clear(self) -> None:
        """Forget every turn but the system's."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def _stream(self, turn: list[Message], prompt: str, ids: list[int], answer: Answer) -> Generator[str, None, None]:
        decoder = self.words.tokenizer.stream(skip_special=True)
        said: list[str] = []
        try:
            for token in answer:
                said.append(decoder.push(token.id))
                if said[-1]:
                    yield said[-1]
            said.append(decoder.flush())
            yield said[-1]
        finally:
            self.messages = [*turn, message("assistant", "".join(said))]
            numbers = answer.summary
            found = problems(numbers, self.engine.config.n_vocab)
            self.reply = Reply(prompt, tuple(ids), "".join(said), numbers, found)


def message(role: str, content: str) -> Message:
    """One turn."""
    return {"role": role, "content": content}


def problems(numbers: Generation, n_vocab: int) -> tuple[str, ...]:
    """What is wrong with an answer whatever the model's ability: nothing of this ever happens to a healthy one."""
    found = []
    if numbers.not_finite is not None:
        found.append(f"the first step that is not finite is {numbers.not_finite}")
    if numbers.mean_logprob is not None and abs(numbers.mean_logprob + math.log(n_vocab)) < _EQUAL:
        found.append("the logits say nothing: every token of the vocabulary is equally likely")
    if numbers.padding:
        found.append(f"{len(numbers.padding)} sampled tokens are padding that no text stands behind")
    return tuple(found)
