"""Rules on the container: is every byte where the header says, and nothing else.

The reader met most of these problems already and went on; here each gets its code, its severity and its advice.
The layout of the data section, which the reader believes nothing about, is judged from the tensor table alone:
each tensor must begin where the one before it, padded to the alignment, ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ggufkit import quants
from ggufkit.checks.context import Context
from ggufkit.checks.rule import Found, Need, rule
from ggufkit.container import Shard, Tensor, ValueType
from ggufkit.findings import Confidence, Evidence, Severity
from ggufkit.source import SPLIT_NAME

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO

_FETCH_AGAIN = "fetch the file again and compare its size or checksum with the publisher's"
_CONVERT_AGAIN = "convert the model again with a current converter"
#: numbers that a well-known fork of llama.cpp gives to types of its own
_FORK_TYPES = range(97, 400)
_CHUNK = 1 << 20


# -- opening -----------------------------------------------------------------------------------------------------


@rule("S001", "not-gguf", ERROR)
def not_gguf(context: Context) -> Iterator[Found]:
    """The file is something else.

    What. The first four bytes are not "GGUF". The first kilobytes are compared with what failed downloads and
    wrong arguments usually turn out to be.

    Why. No loader opens it, and all say the same unhelpful thing about its magic.

    Case. A 134-byte Git LFS pointer, a login page saved as model.gguf, a GGML file of 2023.

    Fix. The message names what the file is. Download the real one.
    """
    yield from ()  # `run` reports it when opening fails; whoever gets here has an open GGUF file


@rule("S002", "unreadable", ERROR)
def unreadable(context: Context) -> Iterator[Found]:
    """The fixed header is damaged beyond reading.

    What. The file ends inside its first 24 bytes, has version 0, or is GGUF version 1.

    Why. Nothing behind these bytes can be found without them.

    Case. A download that stopped at once; models of August 2023, written as version 1 for a few days.

    Fix. Fetch the file again; for version 1, find a current conversion.
    """
    yield from ()  # as above


@rule("S003", "newer-version", INFO)
def newer_version(context: Context) -> Iterator[Found]:
    """The container version is newer than this tool.

    What. The version field is above 3 and still plausible.

    Why. The file may be perfectly healthy; nothing can be said about it.

    Case. Version 3 itself, which readers of version 2 refused as corrupt.

    Fix. Update ggufkit.
    """
    yield from ()  # as above


# -- the header --------------------------------------------------------------------------------------------------


@rule("S101", "header-truncated", ERROR)
def header_truncated(context: Context) -> Iterator[Found]:
    """The file ends inside its header, or the header never ends.

    What. Metadata or tensor table need more bytes than the file has, or more than a gigabyte.

    Why. Not even the list of tensors is complete.

    Case. A download cut off in its first megabytes, usually inside the vocabulary.

    Fix. Fetch the file again.
    """
    yield from _helped(context.problems("header-truncated", "header-too-long", "header-hopeless"), _FETCH_AGAIN)


@rule("S102", "count", ERROR)
def count(context: Context) -> Iterator[Found]:
    """The number of metadata pairs or tensors cannot be true.

    What. Each pair takes at least 13 bytes and each tensor entry 24; the claimed number does not fit into the file.

    Why. A reader that believes the number allocates for it. That was the first of the format's vulnerabilities
    (CVE-2024-23605, CVE-2024-21836).

    Case. Bytes 8 to 24 overwritten, or a file made to attack.

    Fix. Fetch the file again; do not open it with old software.
    """
    yield from _helped(context.problems("kv-count", "tensor-count"), _FETCH_AGAIN)


@rule("S103", "key", ERROR)
def key(context: Context) -> Iterator[Found]:
    """A metadata key is empty, too long or no UTF-8.

    What. Keys have 1 to 65,535 bytes of ASCII.

    Why. Loaders abort on an empty key, and no key that they look for can be among these.

    Case. A shifted header: one wrong length, and every key behind it is noise.

    Fix. Convert the model again, or fetch it again.
    """
    yield from _helped(context.problems("key-empty", "key-too-long", "key-not-utf8"), _FETCH_AGAIN)


@rule("S104", "key-duplicate", ERROR)
def key_duplicate(context: Context) -> Iterator[Found]:
    """A metadata key occurs twice.

    What. Both places are named; the first value is the one used here.

    Why. Which value counts depends on the loader, and newer ones refuse such files.

    Case. Scripts that "edit" metadata by appending a pair.

    Fix. Write the metadata again with one of the two values.
    """
    for found in context.problems("key-duplicate"):
        yield _with_help(found, "rewrite the header with one of the two values")


@rule("S105", "value-type", ERROR)
def value_type(context: Context) -> Iterator[Found]:
    """A metadata value has a type that does not exist.

    What. The types are 0 to 12; this one says how long the value is, so nothing behind it can be found.

    Why. The rest of the header is unreadable.

    Case. A damaged byte, or a wrong length just before it.

    Fix. Fetch the file again.
    """
    yield from _helped(context.problems("value-type"), _FETCH_AGAIN)


@rule("S106", "string-length", ERROR)
def string_length(context: Context) -> Iterator[Found]:
    """A string claims more bytes than there are.

    What. The length of a key, a value or a tensor name, compared with what is left of the file and with 64 MiB.

    Why. Believing it reads beyond the buffer (CVE-2024-23496), or silently takes what is left for the string.

    Case. A length of 2^62 in a 48-byte file.

    Fix. Fetch the file again.
    """
    yield from _helped(context.problems("string-too-long"), _FETCH_AGAIN)


@rule("S107", "string-not-utf8", WARNING, spec=ERROR)
def string_not_utf8(context: Context) -> Iterator[Found]:
    """A metadata string is not UTF-8.

    What. Strings of the format are UTF-8; elements of arrays are not looked at here.

    Why. Loaders take any bytes, Python readers stop.

    Case. A name or a licence written in Latin-1; or a flipped bit.

    Fix. Write that value again.
    """
    yield from context.problems("string-not-utf8")


@rule("S108", "array-length", ERROR)
def array_length(context: Context) -> Iterator[Found]:
    """An array claims more elements than the file has bytes for.

    What. The count of an array, compared with the bytes that are left.

    Why. gguf-py 0.19 hangs on it and fills the memory; C readers overflowed (CVE-2024-21825).

    Case. 51 bytes that claim an array of 2^63.

    Fix. Fetch the file again.
    """
    yield from _helped(context.problems("array-too-long"), _FETCH_AGAIN)


@rule("S109", "array-nested", ERROR, spec=INFO)
def array_nested(context: Context) -> Iterator[Found]:
    """An array of arrays.

    What. The specification allows it, llama.cpp refuses it; more than four levels deep nobody needs it.

    Why. Readers that recurse can be driven to a stack overflow with a few kilobytes.

    Case. No published model is known to need it.

    Fix. Convert the model again with flat arrays.
    """
    yield from context.problems("array-nested")
    for found in context.problems("array-too-deep"):
        yield Found(found.message, key=found.key, offset=found.offset, severity=ERROR)


@rule("S110", "bool-value", WARNING, spec=ERROR)
def bool_value(context: Context) -> Iterator[Found]:
    """A bool is neither 0 nor 1.

    What. The specification calls such a model invalid; loaders take anything but 0 as true.

    Why. It shows that the byte was not written by a converter.

    Case. A flipped bit in tokenizer.ggml.add_bos_token.

    Fix. Fetch the file again.
    """
    yield from _helped(context.problems("bool-value"), _FETCH_AGAIN)


@rule("S111", "alignment", ERROR)
def alignment(context: Context) -> Iterator[Found]:
    """general.alignment is of the wrong type or value.

    What. A uint32, a power of two, at most 1 MiB; a multiple of 8 by the specification.

    Why. It decides where every tensor begins. Zero divides by zero in several readers; 2^31 makes others seek far
    beyond the file.

    Case. A 57-byte file with alignment 0, which crashed three libraries.

    Fix. Convert the model again.
    """
    yield from _helped(context.problems("alignment-type", "alignment-value"), _CONVERT_AGAIN)
    shard = context.gguf.shards[0]
    if shard.alignment % 8:
        severity = ERROR if context.profile == "spec" else WARNING
        message = f"general.alignment is {shard.alignment}; the specification wants a multiple of 8"
        field = shard.fields["general.alignment"]
        yield Found(message, key=field.key, offset=field.value_offset, value=shard.alignment, severity=severity)


@rule("S112", "tensor-name", ERROR)
def tensor_name(context: Context) -> Iterator[Found]:
    """A tensor name is empty, too long or no UTF-8.

    What. 1 to 63 bytes for llama.cpp, 64 by the specification.

    Why. llama.cpp's buffer has 64 bytes with the NUL at the end, and it refuses the file.

    Case. Names of merged adapters that kept a path of the training framework.

    Fix. Rename the tensor while converting.
    """
    yield from context.problems("name-empty", "name-not-utf8")
    for found in context.problems("name-too-long"):
        if context.profile == "llama.cpp" or len((found.tensor or "").encode("utf-8", "surrogateescape")) > 64:
            yield found


@rule("S113", "tensor-duplicate", ERROR)
def tensor_duplicate(context: Context) -> Iterator[Found]:
    """Two tensors have one name.

    What. Names are compared within each file and over all files of a split set.

    Why. Loaders refuse the file or silently take one of the two.

    Case. Shards of two different downloads in one folder; a head that was written twice.

    Fix. Convert or download again.
    """
    yield from context.problems("name-duplicate")
    first: dict[str, int] = {}
    for shard in context.gguf.shards:
        for tensor in shard.tensors:
            if first.setdefault(tensor.name, tensor.shard) != tensor.shard:
                one, two = (
                    context.gguf.shards[number].source.path.name for number in (first[tensor.name], tensor.shard)
                )
                message = f"the tensor {tensor.name!r} is in two files of the set: {one} and {two}"
                yield Found(message, tensor.name, offset=tensor.info_offset)


@rule("S114", "tensor-shape", ERROR)
def tensor_shape(context: Context) -> Iterator[Found]:
    """A tensor has an impossible shape.

    What. At most four dimensions, none negative, fewer than 2^63 elements and bytes, and rows that are whole blocks
    of the tensor's type. All of it in numbers that cannot wrap.

    Why. Sizes that wrap are the format's most repeated vulnerability (CVE-2025-53630, CVE-2026-33298).

    Case. Two dimensions near 2^33; a row of 896 packed in blocks of 256.

    Fix. Fetch the file again; if the row does not fit the block, quantize with another type.
    """
    yield from context.problems("dims-count", "dims-value", "shape-too-large", "shape-block")


@rule("S115", "type-removed", ERROR)
def type_removed(context: Context) -> Iterator[Found]:
    """A tensor has a block type that was removed from the format.

    What. The numbers 4, 5, 31 to 33 and 36 to 38.

    Why. Current loaders refuse the file; older ones, or a fork, could read it.

    Case. Q4_0_4_4 files for ARM of 2024; BitNet's I2_S, which reuses number 36.

    Fix. Quantize again (for the ARM types: plain Q4_0, which is repacked while loading).
    """
    yield from _helped(context.problems("type-removed"), "quantize the model again with a current type")


@rule("S116", "type-unknown", WARNING)
def type_unknown(context: Context) -> Iterator[Found]:
    """A tensor has a block type that this tool does not know.

    What. A number that the format does not use yet; above a thousand it is damage.

    Why. The file may be newer than this tool, or made by a fork: its data cannot be judged.

    Case. Types of the ik_llama.cpp fork, numbered from 97 on, opened with llama.cpp.

    Fix. Update ggufkit, or use the program that the file was made for.
    """
    for shard in context.gguf.shards:
        for tensor in shard.tensors:
            if tensor.type is not None or tensor.type_id in quants.REMOVED:
                continue
            number = tensor.type_id
            message = f"tensor {tensor.name!r} has type {number}, which no version of the format has"
            if tensor.is_newer:
                message = f"tensor {tensor.name!r} has type {number}, which this version of ggufkit does not know"
            fork = "the ik_llama.cpp fork uses numbers in this range" if number in _FORK_TYPES else None
            severity = None if tensor.is_newer else ERROR
            yield Found(message, tensor.name, offset=tensor.info_offset, value=number, help=fork, severity=severity)


@rule("S117", "big-endian", WARNING, spec=INFO)
def big_endian(context: Context) -> Iterator[Found]:
    """The file is big-endian.

    What. The format has no flag for the byte order; the version is only plausible when read this way.

    Why. It is healthy on a big-endian machine; llama.cpp refuses it elsewhere ("endianness mismatch?").

    Case. A conversion for IBM Z that ended up on a PC.

    Fix. Use the little-endian file, or convert it (gguf-py's gguf_convert_endian).
    """
    if context.gguf.byteorder == "big":
        yield Found("the file is big-endian: llama.cpp loads it on big-endian machines only", offset=4)


# -- the split set -----------------------------------------------------------------------------------------------


@rule("S120", "split-missing", ERROR)
def split_missing(context: Context) -> Iterator[Found]:
    """A file of the split set is missing or cannot be read.

    What. The name says how many parts there are; each is opened.

    Why. Every other part may be perfectly valid by itself, and still most of the model is not there.

    Case. The third of five downloads failed, unnoticed.

    Fix. Fetch the missing part into the same folder, under its original name.
    """
    missing = "fetch this part into the same folder, under its original name"
    yield from _helped(context.problems("shard-missing", "shard-unreadable"), missing)


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


# -- the layout of the data --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Extent:
    """Where a tensor's bytes lie in its file."""

    tensor: Tensor
    start: int
    end: int


def _extents(shard: Shard) -> list[_Extent]:
    """The tensors of a file whose size is known, by place; empty ones take none."""
    extents = [_Extent(t, t.offset, t.offset + t.nbytes) for t in shard.tensors if t.nbytes]
    return sorted(extents, key=lambda extent: extent.start)


@rule("S201", "data-outside", ERROR, needs=[Need.TENSORS])
def data_outside(context: Context) -> Iterator[Found]:
    """Tensor data lies outside the file.

    What. Data start plus offset plus size, in numbers that cannot wrap, against the file's size. When all that is
    missing is at the end, the file was cut short, and one finding says by how much.

    Why. Old loaders gave silent garbage; a tool that rewrites such a file copies foreign memory (CVE-2026-7482).

    Case. An interrupted download: the commonest damage of all.

    Fix. Fetch the file again, or let the download go on from where it stopped.
    """
    for shard in context.gguf.shards:
        size = shard.source.size
        outside = [extent for extent in _extents(shard) if extent.end > size]
        if not outside:
            continue
        if _is_cut(shard, outside):
            yield _cut(shard, outside)
        else:
            for extent in outside:
                yield _outside(extent, size)


def _is_cut(shard: Shard, outside: list[_Extent]) -> bool:
    """Whether the tensors lie side by side, so that the file simply ends too early."""
    extents = _extents(shard)
    step = shard.alignment
    adjacent = all(0 <= two.start - one.end < step for one, two in pairwise(extents))
    return adjacent and outside == extents[-len(outside) :]


def _cut(shard: Shard, outside: list[_Extent]) -> Found:
    size, end = shard.source.size, outside[-1].end
    first = outside[0].tensor
    message = (
        f"the file ends at byte {size:,}, {end - size:,} bytes too early: {len(outside)} of {len(shard.tensors)} "
        f"tensors are cut off or missing, the first is {first.name!r} at byte {outside[0].start:,}"
    )
    numbers = {"file_size": size, "needed": end, "missing": end - size, "tensors": len(outside)}
    evidence = (Evidence("layout", f"{size / end:.1%} of the file is there", numbers),)
    return Found(message, first.name, offset=outside[0].start, help=_FETCH_AGAIN, evidence=evidence)


def _outside(extent: _Extent, size: int) -> Found:
    tensor = extent.tensor
    message = (
        f"{tensor.name!r} has its data at bytes {extent.start:,} to {extent.end:,}, outside the file, "
        f"which ends at {size:,}"
    )
    return Found(message, tensor.name, offset=tensor.info_offset, value=tensor.relative_offset, help=_FETCH_AGAIN)


@rule("S202", "data-misaligned", ERROR, needs=[Need.TENSORS])
def data_misaligned(context: Context) -> Iterator[Found]:
    """A tensor's offset is no multiple of the alignment.

    What. Offsets count from the start of the data, which is aligned itself.

    Why. llama.cpp refuses it; a kernel that relies on alignment reads the wrong bytes or faults.

    Case. Offsets laid out for alignment 1 under a header that says 32.

    Fix. Convert the model again.
    """
    for shard in context.gguf.shards:
        for tensor in shard.tensors:
            if tensor.relative_offset % shard.alignment:
                message = (
                    f"the data of {tensor.name!r} begins at offset {tensor.relative_offset:,}, which is no multiple "
                    f"of the alignment {shard.alignment}"
                )
                yield Found(message, tensor.name, offset=tensor.info_offset, value=tensor.relative_offset)


@rule("S203", "data-overlap", ERROR, needs=[Need.TENSORS])
def data_overlap(context: Context) -> Iterator[Found]:
    """Two tensors share bytes.

    What. Every tensor's range of bytes against the one before it; empty tensors share nothing.

    Why. At most one of them can be right. gguf-py reads such a file without a word.

    Case. An offset with one flipped bit.

    Fix. Fetch the file again or convert it again.
    """
    for shard in context.gguf.shards:
        last: _Extent | None = None
        for extent in _extents(shard):
            if last is not None and extent.start < last.end:
                shared = min(last.end, extent.end) - extent.start
                message = (
                    f"{extent.tensor.name!r} begins at byte {extent.start:,}, inside the data of {last.tensor.name!r} "
                    f"({last.start:,} to {last.end:,}): {shared:,} bytes belong to both"
                )
                yield Found(message, extent.tensor.name, offset=extent.tensor.info_offset, help=_FETCH_AGAIN)
            if last is None or extent.end > last.end:
                last = extent


@rule("S204", "data-order", ERROR, spec=INFO, needs=[Need.TENSORS])
def data_order(context: Context) -> Iterator[Found]:
    """The data has holes, or does not follow the order of the tensor table.

    What. Each tensor must begin exactly where the one before it ends, padded. The specification does not ask for
    it; llama.cpp does.

    Why. llama.cpp refuses the file; and a hole is often where a tensor was meant to be.

    Case. A damaged offset, or a tool that deleted a tensor from the table but not its data.

    Fix. Convert the model again.
    """
    for shard in context.gguf.shards:
        places = {0}  # where the next tensor may begin: in line with the last one, and where that should have been
        for tensor in shard.tensors:
            if tensor.nbytes is None:
                break  # what follows a tensor of unknown size cannot be placed
            if tensor.relative_offset not in places:
                yield _out_of_order(tensor, max(places))
                places.add(tensor.relative_offset)
            else:
                places = {tensor.relative_offset}
            places = {_padded(place + tensor.nbytes, shard.alignment) for place in places}


def _out_of_order(tensor: Tensor, expected: int) -> Found:
    gap = tensor.relative_offset - expected
    what = f"{gap:,} bytes after" if gap > 0 else f"{-gap:,} bytes before"
    message = (
        f"the data of {tensor.name!r} begins at offset {tensor.relative_offset:,}, {what} where the tensor before it "
        f"ends (offset {expected:,})"
    )
    return Found(message, tensor.name, offset=tensor.info_offset, value=tensor.relative_offset)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


@rule("S205", "padding", WARNING, spec=ERROR, needs=[Need.TENSORS])
def padding(context: Context) -> Iterator[Found]:
    """The padding between tensors is not zero.

    What. The bytes between the end of a tensor and the next multiple of the alignment.

    Why. Converters write zeros there. Anything else was put there later, or the tensor is longer than it says.

    Case. A payload hidden between the tensors; a header that was rewritten with a wrong size.

    Fix. Compare the file with the publisher's checksum.
    """
    for shard in context.gguf.shards:
        extents = _extents(shard)
        if extents:
            yield from _dirty(shard, "the header", shard.header_end, shard.data_start, None)
        ends = [extent.start for extent in extents[1:]] + [shard.source.size]
        for extent, end in zip(extents, ends, strict=False):
            stop = min(end, _padded(extent.end, shard.alignment))
            yield from _dirty(shard, repr(extent.tensor.name), extent.end, stop, extent.tensor.name)


def _dirty(shard: Shard, what: str, start: int, stop: int, tensor: str | None) -> Iterator[Found]:
    if stop <= start:
        return
    data = shard.source.read(start, stop - start)
    if data.strip(b"\x00"):
        first = len(data) - len(data.lstrip(b"\x00"))
        yield Found(f"the {len(data)} padding bytes behind {what} are not all zero", tensor, offset=start + first)


@rule("S206", "last-padding", ERROR, spec=WARNING, needs=[Need.TENSORS])
def last_padding(context: Context) -> Iterator[Found]:
    """The padding behind the last tensor is missing.

    What. All weights are there, but the file ends before the next multiple of the alignment.

    Why. ggml reads the padded size at once and fails; programs that read tensor by tensor do not notice.

    Case. A writer that pads before each tensor instead of behind it, or a download that lost its last bytes.

    Fix. Append zero bytes up to the size that the message gives, or fetch the file again.
    """
    for shard in context.gguf.shards:
        extents = _extents(shard)
        end = max((extent.end for extent in extents), default=0)
        wanted = shard.data_start + _padded(end - shard.data_start, shard.alignment)
        if extents and end <= shard.source.size < wanted:
            missing = wanted - shard.source.size
            last = extents[-1].tensor.name
            message = (
                f"the file ends {missing} bytes before the padding behind its last tensor does: all weights are "
                f"there, but the file must have {wanted:,} bytes"
            )
            yield Found(message, last, offset=shard.source.size, value=missing)


@rule("S207", "trailing", WARNING, needs=[Need.HEADER])
def trailing(context: Context) -> Iterator[Found]:
    """There are bytes behind the last tensor.

    What. Everything beyond the padded end of the data. If it begins with another GGUF header, files of a split set
    were joined; zeros alone are harmless.

    Why. Loaders ignore it, so with joined files they run a model that lacks most of its layers.

    Case. `cat part-1 part-2 > model.gguf`, where llama-gguf-split --merge was meant.

    Fix. Fetch the parts again and open the first one, or merge them with llama-gguf-split.
    """
    for shard in context.gguf.shards:
        if any(tensor.nbytes is None for tensor in shard.tensors):
            continue
        ends = (extent.end for extent in _extents(shard))
        end = shard.data_start + _padded(max(ends, default=shard.data_start) - shard.data_start, shard.alignment)
        if shard.tensors and shard.source.size > end:
            yield _trailing(shard, end)


def _trailing(shard: Shard, end: int) -> Found:
    count = shard.source.size - end
    head = shard.source.read(end, 8)
    if head[:4] == b"GGUF":
        message = f"another GGUF header begins at byte {end:,}, behind the data: files of a split set were joined"
        help_ = "open the parts as they were published, or merge them with llama-gguf-split --merge"
        return Found(message, offset=end, value=count, help=help_, severity=ERROR)
    message = f"{count:,} bytes follow the last tensor"
    if _all_zero(shard, end):
        return Found(f"{message}, all zero", offset=end, value=count, severity=INFO)
    return Found(f"{message}; nothing says what they are", offset=end, value=count, confidence=Confidence.MEDIUM)


def _all_zero(shard: Shard, start: int) -> bool:
    """Whether the file holds only zeros from `start` on; of a long tail the first 64 MiB are looked at."""
    for at in range(start, min(shard.source.size, start + 64 * _CHUNK), _CHUNK):
        if shard.source.read(at, _CHUNK).strip(b"\x00"):
            return False
    return True


@rule("S208", "empty-tensor", INFO, needs=[Need.TENSORS])
def empty_tensor(context: Context) -> Iterator[Found]:
    """A tensor has no elements.

    What. One of its dimensions is zero.

    Why. Loaders accept it, and some divide by the dimension.

    Case. A 53-byte file that crashed llama.cpp until 2026.

    Fix. None is needed if the model is known to have it; otherwise convert again.
    """
    for shard in context.gguf.shards:
        for tensor in shard.tensors:
            if 0 in tensor.dims:
                yield Found(f"{tensor.name!r} has the shape {list(tensor.shape)}: no elements", tensor.name)


def _helped(problems: Iterator[Found], help_: str) -> Iterator[Found]:
    for found in problems:
        yield _with_help(found, help_)


def _with_help(found: Found, help_: str) -> Found:
    return Found(found.message, found.tensor, found.key, offset=found.offset, help=help_)
