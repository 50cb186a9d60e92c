"""Rules on split sets: is every part there, and do they belong together.

Each part may be perfectly valid by itself while most of the model is missing, so that every part is held against
the names of the files and against what all the others say.
"""

from __future__ import annotations

from collections.abc import Iterator

from ggufkit.checks.context import Context
from ggufkit.checks.rule import Found, rule
from ggufkit.container import Shard, ValueType
from ggufkit.findings import Severity
from ggufkit.source import SPLIT_NAME

ERROR = Severity.ERROR


@rule("S120", "split-missing", ERROR)
def split_missing(context: Context) -> Iterator[Found]:
    """A file of the split set is missing or cannot be read.

    What. The name says how many parts there are; each is opened.

    Why. Every other part may be perfectly valid by itself, and still most of the model is not there.

    Case. The third of five downloads failed, unnoticed.

    Fix. Fetch the missing part into the same folder, under its original name.
    """
    missing = "fetch this part into the same folder, under its original name"
    yield from context.problems("shard-missing", "shard-unreadable", help_=missing)


@rule("S121", "split-keys", ERROR)
def split_keys(context: Context) -> Iterator[Found]:
    """The parts of a split set contradict each other.

    What. split.no counts 0, 1, 2 …; split.count and split.tensors.count are the same in every part and true.
    llama.cpp looks at some of this in the first part only.

    Why. A part of another set, or an old one, gives a model of two halves.

    Case. A re-upload with another number of parts, downloaded over the old one.

    Fix. Delete the set and fetch all parts again.
    """
    shards = context.gguf.shards
    for shard in shards:
        yield from _split_numbers(shard)
    if SPLIT_NAME.fullmatch(shards[0].source.path.name):
        yield from _split_total(context)
    elif "split.count" in shards[0].fields:
        yield from _lone_part(shards[0])


def _lone_part(shard: Shard) -> Iterator[Found]:
    """A file that stands alone, but says that it is one of several (a merged file says 0)."""
    field = shard.fields["split.count"]
    if not isinstance(field.scalar, int) or field.scalar <= 1:
        return
    part = shard.fields.get("split.no")
    number = part.scalar + 1 if part and isinstance(part.scalar, int) else "?"
    message = f"the file is part {number} of {field.scalar} of a split set, but its name does not say so"
    help_ = "give all parts their names NAME-00001-of-0000N.gguf back, in one folder"
    yield Found(message, key=field.key, offset=field.value_offset, value=field.scalar, help=help_)


def _split_numbers(shard: Shard) -> Iterator[Found]:
    match = SPLIT_NAME.fullmatch(shard.source.path.name)
    if match is None:
        return
    for name, type_, expected in (
        ("split.no", ValueType.UINT16, int(match["no"]) - 1),
        ("split.count", ValueType.UINT16, int(match["count"])),
    ):
        field = shard.fields.get(name)
        if field is not None and field.type is type_ and field.scalar == expected:
            continue
        shown = "missing" if field is None else f"{field.scalar} ({field.type_name})"
        message = f"{name} of {shard.source.path.name} is {shown}; it must be {expected} ({type_.name.lower()})"
        yield Found(message, key=name, offset=field.value_offset if field else None, value=field and field.scalar)


def _split_total(context: Context) -> Iterator[Found]:
    """The promised number of tensors, part by part, against those that are there."""
    shards = context.gguf.shards
    found = sum(len(shard.tensors) for shard in shards)
    if any(problem.kind.startswith("shard-") for problem in context.gguf.problems):
        return  # a part that is missing is a finding already
    for shard in shards:
        field = shard.fields.get("split.tensors.count")
        if field is not None and field.scalar != found:
            message = (
                f"{shard.source.path.name} says that the set has {field.scalar} tensors; its {len(shards)} files "
                f"hold {found}"
            )
            yield Found(message, key=field.key, offset=field.value_offset, value=field.scalar)
