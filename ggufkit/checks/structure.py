"""Rules on the header: what opening a file can end with, and what the reader met and could go on from.

The reader names each problem; here it gets a code, a severity in either profile, and advice. The files of a split
set are in `splits`, the layout of the data in `layout`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ggufkit import quants
from ggufkit.checks.context import Context
from ggufkit.checks.rule import Found, rule
from ggufkit.findings import Severity

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO

_FETCH_AGAIN = "fetch the file again and compare its size or checksum with the publisher's"
_CONVERT_AGAIN = "convert the model again with a current converter"
#: numbers that a well-known fork of llama.cpp gives to types of its own
_FORK_TYPES = range(97, 400)


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
    yield from context.problems("header-truncated", "header-too-long", "header-hopeless", help_=_FETCH_AGAIN)


@rule("S102", "count", ERROR)
def count(context: Context) -> Iterator[Found]:
    """The number of metadata pairs or tensors cannot be true.

    What. Each pair takes at least 13 bytes and each tensor entry 24; the claimed number does not fit into the file.

    Why. A reader that believes the number allocates for it. That was the first of the format's vulnerabilities
    (CVE-2024-23605, CVE-2024-21836).

    Case. Bytes 8 to 24 overwritten, or a file made to attack.

    Fix. Fetch the file again; do not open it with old software.
    """
    yield from context.problems("kv-count", "tensor-count", help_=_FETCH_AGAIN)


@rule("S103", "key", ERROR)
def key(context: Context) -> Iterator[Found]:
    """A metadata key is empty, too long or no UTF-8.

    What. Keys have 1 to 65,535 bytes of ASCII.

    Why. Loaders abort on an empty key, and no key that they look for can be among these.

    Case. A shifted header: one wrong length, and every key behind it is noise.

    Fix. Convert the model again, or fetch it again.
    """
    yield from context.problems("key-empty", "key-too-long", "key-not-utf8", help_=_FETCH_AGAIN)


@rule("S104", "key-duplicate", ERROR)
def key_duplicate(context: Context) -> Iterator[Found]:
    """A metadata key occurs twice.

    What. Both places are named; the first value is the one used here.

    Why. Which value counts depends on the loader, and newer ones refuse such files.

    Case. Scripts that "edit" metadata by appending a pair.

    Fix. Write the metadata again with one of the two values.
    """
    yield from context.problems("key-duplicate", help_="rewrite the header with one of the two values")


@rule("S105", "value-type", ERROR)
def value_type(context: Context) -> Iterator[Found]:
    """A metadata value has a type that does not exist.

    What. The types are 0 to 12; this one says how long the value is, so nothing behind it can be found.

    Why. The rest of the header is unreadable.

    Case. A damaged byte, or a wrong length just before it.

    Fix. Fetch the file again.
    """
    yield from context.problems("value-type", help_=_FETCH_AGAIN)


@rule("S106", "string-length", ERROR)
def string_length(context: Context) -> Iterator[Found]:
    """A string claims more bytes than there are.

    What. The length of a key, a value or a tensor name, compared with what is left of the file and with 64 MiB.

    Why. Believing it reads beyond the buffer (CVE-2024-23496), or silently takes what is left for the string.

    Case. A length of 2^62 in a 48-byte file.

    Fix. Fetch the file again.
    """
    yield from context.problems("string-too-long", help_=_FETCH_AGAIN)


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
    yield from context.problems("array-too-long", help_=_FETCH_AGAIN)


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
    yield from context.problems("bool-value", help_=_FETCH_AGAIN)


@rule("S111", "alignment", ERROR)
def alignment(context: Context) -> Iterator[Found]:
    """general.alignment is of the wrong type or value.

    What. A uint32, a power of two, at most 1 MiB; a multiple of 8 by the specification.

    Why. It decides where every tensor begins. Zero divides by zero in several readers; 2^31 makes others seek far
    beyond the file.

    Case. A 57-byte file with alignment 0, which crashed three libraries.

    Fix. Convert the model again.
    """
    yield from context.problems("alignment-type", "alignment-value", help_=_CONVERT_AGAIN)
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
    yield from context.problems("type-removed", help_="quantize the model again with a current type")


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
