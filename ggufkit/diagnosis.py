"""A file and somebody's trace of it: the words first, then every step. What `ggufkit diagnose` answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ggufkit import again, foreign, misread
from ggufkit.container import GGUF
from ggufkit.conversation import Words
from ggufkit.foreign import Numbers
from ggufkit.misread import Mistake
from ggufkit.runtime.diagnose import Diagnosis
from ggufkit.runtime.diagnose import diagnose as explain_numbers
from ggufkit.runtime.evaluate import Graph
from ggufkit.runtime.reference import ReferenceEngine
from ggufkit.steps import full_name
from ggufkit.trace import Mode, Trace, model_digest


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found.

    Attributes:
        numbers: the steps of the trace, judged one by one.
        words: what is wrong with its token ids; None when they are right or the prompt is not known.
        words_checked: whether the prompt was known.
        notes: what was put right or left out while the trace was read.
        again: the smallest commands that show the first divergence again.
    """

    numbers: Diagnosis
    words: Mistake | None
    words_checked: bool
    notes: tuple[str, ...]
    again: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 healthy, 1 a divergence, 3 nothing could be compared."""
        if self.words is not None or self.numbers.first_divergence is not None:
            return 1
        return 0 if self.numbers.checked or self.words_checked else 3

    def as_document(self) -> dict[str, Any]:
        """The JSON document's body."""
        first = self.numbers.first_divergence
        divergence = None if first is None else asdict(first)
        faults = [asdict(fault) for fault in self.numbers.faults]
        for fault in faults:
            fault["same_numbers_as"] = [name for name, _ in fault["same_numbers_as"]]
        if self.words is not None:
            words = {
                "residual": 0.0,
                "error": 1.0,
                "places": ["token_ids"],
                "same_numbers_as": [],
                "tell_apart": [],
                **asdict(self.words),
            }
            faults.insert(0, words)
            divergence = {
                "step": "token_ids",
                "layer": None,
                "position": self.words.position,
                "error": 1.0,
                "pattern": "",
            }
        return {
            "first_divergence": divergence,
            "faults": faults,
            "ruled_out": list(self.numbers.ruled_out),
            "unexplained": list(self.numbers.unexplained),
            "noise": dict(self.numbers.noise),
            "checked": {"steps": self.numbers.checked, "words": self.words_checked},
            "notes": list(self.notes),
            "again": list(self.again),
        }


def diagnose(
    gguf: GGUF,
    trace: str | Path,
    *,
    token_ids: tuple[int, ...] | None = None,
    prompt: str | None = None,
    raw: bool = False,
    system: str | None = None,
) -> Answer:
    """Name the bug of the engine that wrote a trace.

    Args:
        trace: a safetensors file of the trace contract, or a text of printed numbers.
        token_ids: for a text that does not say them.
        prompt, raw, system: what the engine was asked, if the trace does not say it; the words are then compared.

    Raises:
        SourceError, TraceError: the trace cannot be read.
        Unsupported, FormatError: the model is not modelled here, or damaged.
    """
    words = _Asked(gguf, prompt, raw, system)
    if token_ids is None and prompt is not None:
        token_ids = tuple(words.ids()) if _is_text(trace) else None
    given = foreign.load(trace, token_ids)
    engine = ReferenceEngine(gguf)
    arranged = foreign.arrange(given, engine.config)
    mistake, checked = words.compare(given)
    mode: Mode = given.mode if isinstance(given, Trace) else "prefill"
    graph = Graph(engine.config)
    numbers = explain_numbers(graph, engine.weights, given.token_ids, arranged.known, arranged.parts, mode)
    notes = (*_other_model(gguf, given), *arranged.notes)
    return Answer(numbers, mistake, checked, notes, _again(gguf, given.token_ids, mode, numbers))


def _again(gguf: GGUF, token_ids: Sequence[int], mode: Mode, numbers: Diagnosis) -> tuple[str, ...]:
    first = numbers.first_divergence
    if first is None:
        return ()
    return again.of_one(str(gguf.path), token_ids, mode, full_name(first.step, first.layer), first.position)


def _is_text(path: str | Path) -> bool:
    return Path(path).suffix.lower() != ".safetensors"


def _other_model(gguf: GGUF, trace: Trace | Numbers) -> tuple[str, ...]:
    if isinstance(trace, Numbers) or trace.model in (None, model_digest(gguf)):
        return ()
    return ("the trace says that it is of another file: its header's checksum differs",)


@dataclass(frozen=True)
class _Asked:
    """What the engine was asked, as far as it is known."""

    gguf: GGUF
    prompt: str | None
    raw: bool
    system: str | None

    def ids(self) -> list[int]:
        words = Words.of(self.gguf, raw=self.raw)
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        return words.tokenizer.encode(words.render([*messages, {"role": "user", "content": self.prompt or ""}]))

    def compare(self, trace: Trace | Numbers) -> tuple[Mistake | None, bool]:
        """What is wrong with the trace's ids, and whether that could be checked."""
        prompt, system = self.prompt, self.system
        if isinstance(trace, Trace):
            prompt, system = prompt or trace.prompt, system or trace.system
        if prompt is None:
            return None, False
        return misread.explain(Words.of(self.gguf, raw=self.raw), prompt, system, trace.token_ids), True
