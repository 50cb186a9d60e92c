"""The story of `ggufkit demo`: a small model that is healthy, and the same model damaged in two ways.

The model writes haiku and is part of the package (examples/train_demo_model.py made it). Each scene checks and
runs one file with the same code as `validate` and `run` do; nothing is recorded beforehand.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ggufkit import checks, reader, runtime
from ggufkit.container import GGUF
from ggufkit.conversation import Conversation, Reply, Words
from ggufkit.errors import GgufkitError
from ggufkit.findings import Report
from ggufkit.overview import Overview, overview
from ggufkit.runtime.engine import Edit

PROMPT = "Write a haiku about autumn leaves"
MODEL = Path(__file__).with_name("haiku.gguf")

#: the value whose bit is flipped
FLIPPED_TENSOR, FLIPPED_INDEX = "blk.2.attn_v.bias", 17
_TOP_EXPONENT_BIT = 1 << 30
_MOST_TOKENS = 40


@dataclass(frozen=True, slots=True)
class Scene:
    """One file and what became of it.

    Attributes:
        title, story: what was done to the file.
        prompt, reply: what was asked and answered; `error` when there was no answer.
    """

    title: str
    story: str
    overview: Overview
    report: Report
    prompt: str
    reply: Reply | None
    error: str | None


def scenes() -> Iterator[Scene]:
    """The healthy model, then one flipped bit, then all biases zeroed. The copies are gone afterwards."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ggufkit-demo-")))
        healthy = stack.enter_context(reader.open(MODEL))
        yield _scene("A healthy model", "It came with ggufkit and learned to write haiku.", MODEL)
        flip, before, after = flipped_bit(healthy)
        yield _scene(
            "One bit flipped",
            f"The top exponent bit of {flip.tensor}[{FLIPPED_INDEX}]: {before:.6g} became {after:.6g}.",
            damaged(healthy, folder / "flipped-bit.gguf", [flip]),
        )
        zeroed = zeroed_biases(healthy)
        yield _scene(
            "All biases zeroed",
            f"What somebody does who takes large biases for damage: {len(zeroed)} tensors set to 0.",
            damaged(healthy, folder / "zeroed-biases.gguf", zeroed),
        )


def flipped_bit(gguf: GGUF) -> tuple[Edit, float, float]:
    """The edit that flips the top exponent bit of one bias value, and that value before and after."""
    tensor = gguf.tensor(FLIPPED_TENSOR)
    before = gguf.read(tensor, 4 * FLIPPED_INDEX, 4).tobytes()
    after = struct.pack("<I", struct.unpack("<I", before)[0] ^ _TOP_EXPONENT_BIT)
    values = struct.unpack("<ff", before + after)
    return Edit(tensor.name, 4 * FLIPPED_INDEX, after), *values


def zeroed_biases(gguf: GGUF) -> list[Edit]:
    """The edits that set every bias to 0."""
    return [
        Edit(tensor.name, 0, bytes(tensor.nbytes or 0))
        for tensor in gguf.tensors.values()
        if tensor.name.endswith(".bias")
    ]


def damaged(gguf: GGUF, target: Path, edits: Sequence[Edit]) -> Path:
    """A copy of a single-file model with some bytes replaced."""
    shutil.copyfile(gguf.path, target)
    with target.open("r+b") as file:
        for edit in edits:
            file.seek(gguf.tensor(edit.tensor).offset + edit.start)
            file.write(edit.data)
    return target


def _scene(title: str, story: str, path: Path) -> Scene:
    report = checks.run(path)
    with reader.open(path) as gguf:
        reply, error = None, None
        try:
            reply = _ask(gguf)
        except GgufkitError as refused:
            error = str(refused)
        return Scene(title, story, overview(gguf), report, PROMPT, reply, error)


def _ask(gguf: GGUF) -> Reply:
    talk = Conversation(runtime.load(gguf, "cpu"), Words.of(gguf), n_predict=_MOST_TOKENS)
    for _ in talk.say(PROMPT):
        pass
    assert talk.reply is not None
    return talk.reply
