"""Rules on where the data lies: is every byte where the header says, and nothing else.

The reader believes nothing about this section. It is judged from the tensor table alone: each tensor must begin
where the one before it, padded to the alignment, ends, and the last one must end with the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ggufkit.checks.context import Context
from ggufkit.checks.rule import Found, Need, rule
from ggufkit.container import Shard, Tensor
from ggufkit.findings import Confidence, Evidence, Severity

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO

_FETCH_AGAIN = "fetch the file again and compare its size or checksum with the publisher's"
_CHUNK = 1 << 20


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
        in_line = behind = 0  # where the next tensor may begin: in line with all before it, or behind the last one
        for tensor in shard.tensors:
            if tensor.nbytes is None:
                break  # what follows a tensor of unknown size cannot be placed
            place = tensor.relative_offset
            if place in (in_line, behind):
                in_line = place
            else:
                yield _out_of_order(tensor, in_line)
            in_line, behind = (_padded(start + tensor.nbytes, shard.alignment) for start in (in_line, place))


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
