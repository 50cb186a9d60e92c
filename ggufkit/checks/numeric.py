"""Rules on the numbers in the weights: every value and every block scale of every tensor.

All judge the statistics of one pass (`stats`). What is looked for is what training and quantizing cannot leave
behind: values that are no numbers, stretches of zeros or copies, blocks whose size nothing around them explains,
blocks without the mark that the quantizer leaves. What healthy models do have must pass: single weights hundreds of
times their neighbours, dead rows of unused tokens, negative and subnormal scales, biases that are all zero.

Thresholds are in octaves (factors of two) of a block's root mean square against what its row and column let
expect. In the healthy files that they were set with, blocks reach 5.1 octaves when they hold a single huge weight,
and 4.2 without it, then in company of others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from ggufkit import arch, quants
from ggufkit.checks.context import Context
from ggufkit.checks.rule import Found, Need, rule
from ggufkit.container import Tensor
from ggufkit.findings import Confidence, Evidence, Judgement, Severity
from ggufkit.quants.fingerprint import MARKS
from ggufkit.vocabulary import TokenType

if TYPE_CHECKING:
    from ggufkit.stats import BlockDeviation, ByteRun, ExpertStats, ScaleStats, Span, TensorStats

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO

_FETCH_AGAIN = "fetch the file again and compare its checksum with the publisher's"
#: one row a token: rows of tokens that were never trained may be zero, equal or tiny
_EMBEDDINGS = frozenset({"token_embd.weight", "output.weight", "position_embd.weight", "token_types.weight"})
#: may be zero as a whole
_MAY_BE_ZERO = ("token_types.weight", "position_embd.weight", ".bias", "ssm_dt.bias", "rope_freqs.weight")
#: a run of equal bytes is damage from here on, if it is also longer than a block and a half
_RUN = 64
#: share of zeros from which a float tensor counts as sparse, so that runs of zeros mean nothing
_SPARSE = 0.01
#: octaves beyond which a block is no part of its tensor, and at which it is odd if it stands alone by `_ALONE`
_FAR, _ODD, _ALONE = 6.5, 3.0, 2.5
#: the same towards small values, where little can be said: dead channels are healthy
_VANISHED = -9.0
#: empty octaves below a few largest values of a float matrix; the largest genuine gap seen is 1.5
_VALUE_GAP = 6.0
_FEW = 8
#: the same below a few smallest scales; the largest genuine gap seen is 0.75
_SCALE_GAP = 3.0
#: files in which more of the blocks lack the quantizer's mark were made by a quantizer that leaves none
_UNMARKED_SHARE = 1e-3
#: two blocks that hold less information than this, in bits, may be equal by chance
_COPY_BITS = 96.0
#: converters add one to these norms; where it is missing their mean is near zero
_SHIFTED_NORMS = frozenset({"qwen3next", "qwen35", "qwen35moe"})
_EXPERT_OCTAVES = 6.0


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a block is: its first element's index, its byte in the file, its length in bytes."""

    index: tuple[int, ...]
    offset: int
    nbytes: int
    start: int


def _place(tensor: Tensor, stats: TensorStats, block: int) -> _Place:
    assert tensor.type is not None
    index = stats.block_coordinates(block)
    element = int(np.ravel_multi_index(index, stats.shape)) if index else 0
    start = tensor.type.nbytes(element)
    count = min(stats.blocks.elements, stats.rows.length - (index[-1] if index else 0))
    return _Place(index, tensor.offset + start, tensor.type.nbytes(count), start)


def _measured(context: Context) -> Iterator[tuple[Tensor, TensorStats]]:
    for name, stats in context.stats.items():
        if stats.count:
            yield context.gguf.tensors[name], stats


def _matrices(context: Context) -> Iterator[tuple[Tensor, TensorStats]]:
    return ((tensor, stats) for tensor, stats in _measured(context) if len(stats.shape) > 1)


def _expert(stats: TensorStats, index: tuple[int, ...]) -> str:
    """` of expert 17` for a stacked tensor."""
    return f" of expert {index[0]}" if stats.experts and index else ""


# -- no numbers ----------------------------------------------------------------------------------------------------


@rule("N101", "nonfinite-value", ERROR, needs=[Need.DATA])
def nonfinite_value(context: Context) -> Iterator[Found]:
    """A float tensor holds NaN or infinity.

    What. Every value of F32, F16, BF16 and F64 tensors; the first one is named, with its expert if it has one.

    Why. One NaN in a norm or a bias makes every logit NaN, or, after rounding to int8, plausible nonsense.

    Case. Answers of nothing but "!!!!" or "GGGG", which are the tokens that NaN logits choose.

    Fix. Fetch the file again. If the publisher's checksum agrees, the conversion overflowed: convert from bf16 or f32.
    """
    for tensor, stats in _measured(context):
        if not (stats.n_nan or stats.n_inf) or tensor.type is None or tensor.type.is_block:
            continue
        first = min(place for place in (stats.first_nan, stats.first_inf) if place is not None)
        index = stats.coordinates(first)
        counts = {"NaN": stats.n_nan, "Inf": stats.n_inf}
        what = " and ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        yield Found(
            f"{tensor.name!r} holds {what}; the first is at {list(index)}{_expert(stats, index)}",
            tensor=tensor.name,
            index=index,
            offset=context.element_offset(tensor.name, first),
            value=float("nan") if first == stats.first_nan else float("inf"),
            judgement=Judgement.CORRUPT,
            help=_FETCH_AGAIN,
            evidence=(Evidence("numbers", f"{what} of {stats.count:,} values", counts),),
        )


@rule("N102", "nonfinite-scale", ERROR, needs=[Need.DATA])
def nonfinite_scale(context: Context) -> Iterator[Found]:
    """A block's scale or min is NaN or infinity.

    What. The scale, and where there is one the min, of every block of every quantized tensor.

    Why. It makes all 32 or 256 weights of the block NaN. In a rarely used expert nobody notices for weeks.

    Case. Quantizations with an importance matrix that had zeros for experts the calibration text never reached.

    Fix. Fetch the file again. If it is the same, take another quantization, or one made without that matrix.
    """
    for tensor, stats in _measured(context):
        for what, scales in (("scale", stats.scales), ("min", stats.mins)):
            if scales is not None and scales.n_nonfinite:
                yield _nonfinite_scale(tensor, stats, what, scales)


def _nonfinite_scale(tensor: Tensor, stats: TensorStats, what: str, scales: ScaleStats) -> Found:
    block = scales.first_nonfinite or 0
    index = stats.block_coordinates(block)
    several = f"{scales.n_nonfinite:,} blocks have a {what}" if scales.n_nonfinite > 1 else f"a block has a {what}"
    message = (
        f"{tensor.name!r}: {several} that is NaN or Inf; the first is block {block:,}, at {list(index)}"
        f"{_expert(stats, index)}"
    )
    numbers = {"nan": scales.n_nan, "inf": scales.n_inf, "blocks": scales.count}
    return Found(
        message,
        tensor=tensor.name,
        index=index,
        offset=tensor.offset + (scales.first_nonfinite_offset or 0),
        judgement=Judgement.CORRUPT,
        help=_FETCH_AGAIN,
        evidence=(Evidence("numbers", f"{scales.n_nan:,} NaN and {scales.n_inf:,} Inf", numbers),),
    )


# -- nothing, over and over ----------------------------------------------------------------------------------------


@rule("N103", "all-zero", ERROR, needs=[Need.DATA])
def all_zero(context: Context) -> Iterator[Found]:
    """A tensor, or one expert of it, is all zero.

    What. Every tensor. Biases and a few small tables are zero in healthy models and are only mentioned.

    Why. A zero norm or projection takes its layer out of the model; the rest often goes on talking.

    Case. A sparse download whose holes were never filled.

    Fix. Fetch the file again.
    """
    for tensor, stats in _measured(context):
        if stats.n_zero == stats.count:
            harmless = tensor.name.endswith(_MAY_BE_ZERO)
            unusual = None if context.is_model else WARNING
            message = f"{tensor.name!r} is all zero ({stats.count:,} values)"
            yield Found(message, tensor.name, offset=tensor.offset, value=0.0, severity=INFO if harmless else unusual)
            continue
        rows = stats.rows.count // max(1, len(stats.experts))
        for expert in stats.experts:
            if rows and expert.n_zero_rows == rows:
                message = f"expert {expert.index} of {tensor.name!r} is all zero"
                yield Found(message, tensor.name, index=(expert.index,), value=0.0)


@rule("N104", "zero-rows", WARNING, confidence=Confidence.MEDIUM, needs=[Need.DATA])
def zero_rows(context: Context) -> Iterator[Found]:
    """Whole rows of a matrix are zero.

    What. Rows, each the weights of one output channel. Rows of an embedding are only mentioned when they belong to
    control, unused or unknown tokens, which are often never trained.

    Why. The channel is switched off. Pruned models have such rows; in others the data was lost.

    Case. A zeroed sector of the disk.

    Fix. Fetch the file again, unless the model was pruned on purpose.
    """
    for tensor, stats in _matrices(context):
        count = stats.rows.n_zero - sum(expert.n_zero_rows for expert in _dead_experts(stats))
        if not 0 < count < stats.rows.count:
            continue
        run = stats.rows.longest_zero_run
        where = f"; the longest run is rows {run.start:,} to {run.start + run.length - 1:,}" if run else ""
        message = f"{count:,} of {stats.rows.count:,} rows of {tensor.name!r} are all zero{where}"
        index = (run.start,) if run else None
        severity = INFO if run is not None and _untrained(context, tensor, run) else None
        yield Found(message, tensor.name, index=index, value=count, severity=severity)


def _untrained(context: Context, tensor: Tensor, rows: Span) -> bool:
    """Whether these rows of an embedding belong to tokens that are no ordinary text; yes, when nothing tells."""
    if tensor.name not in _EMBEDDINGS:
        return False
    types = None if context.lacks(Need.VOCABULARY) else context.words.types
    if types is None:
        return True
    return not np.isin(types[rows.start : rows.start + rows.length], (TokenType.NORMAL, TokenType.BYTE)).any()


def _dead_experts(stats: TensorStats) -> Iterator[ExpertStats]:
    rows = stats.rows.count // max(1, len(stats.experts))
    return (expert for expert in stats.experts if rows and expert.n_zero_rows == rows)


@rule("N105", "zero-stretch", ERROR, needs=[Need.DATA])
def zero_stretch(context: Context) -> Iterator[Found]:
    """A stretch of a tensor's bytes is zero, or all the same byte.

    What. The longest run of one byte value in each matrix, when it is longer than 64 bytes and a block and a half.
    Rows of unused tokens and tensors that are sparse anyway are left out.

    Why. Quantized weights look like noise: 32 equal bytes in a row occur in no healthy file that was tried. The
    likelihood does not see it (a zeroed 4 kB moved it by 0.0008 nats).

    Case. A bad sector, a download manager's hole, a page that was never written.

    Fix. Fetch the file again.
    """
    for tensor, stats in _matrices(context):
        run = stats.repeats.equal_bytes
        if run is None or stats.n_zero == stats.count or not _is_damage(tensor, stats, run):
            continue
        yield _stretch(tensor, stats, run)


def _is_damage(tensor: Tensor, stats: TensorStats, run: ByteRun) -> bool:
    assert tensor.type is not None
    if run.length < max(_RUN, tensor.type.type_size * 3 // 2):
        return False
    others = stats.n_zero - run.length // tensor.type.type_size * tensor.type.block_size
    row_bytes = tensor.type.nbytes(stats.rows.length)
    whole_rows = run.length + 2 * tensor.type.type_size >= row_bytes and stats.rows.n_zero > 0
    if tensor.name in _EMBEDDINGS and (whole_rows or stats.rows.n_constant):
        return False
    return tensor.type.is_block or run.value != 0 or others < _SPARSE * stats.count


def _stretch(tensor: Tensor, stats: TensorStats, run: ByteRun) -> Found:
    assert tensor.type is not None
    offset = tensor.offset + run.start
    element = run.start // tensor.type.type_size * tensor.type.block_size
    index = stats.coordinates(min(element, stats.count - 1))
    what = "zero" if run.value == 0 else f"the byte 0x{run.value:02X}"
    aligned = next((unit for unit in (1 << 20, 4096, 512) if offset % unit == 0), None)
    hint = f", beginning at a multiple of {aligned:,}, as a lost page or sector does" if aligned else ""
    message = (
        f"{run.length:,} bytes of {tensor.name!r}, from byte {offset:,} of the file at {list(index)}"
        f"{_expert(stats, index)}, are all {what}{hint}"
    )
    numbers = {"bytes": run.length, "byte": run.value}
    evidence = (Evidence("numbers", "quantized weights never repeat a byte that often", numbers),)
    judgement = Judgement.CORRUPT
    return Found(message, tensor.name, index=index, offset=offset, value=run.length, help=_FETCH_AGAIN,
                 evidence=evidence, judgement=judgement)  # fmt: skip


@rule("N106", "zero-blocks", WARNING, confidence=Confidence.MEDIUM, needs=[Need.DATA])
def zero_blocks(context: Context) -> Iterator[Found]:
    """Blocks of a quantized matrix are zero where their rows are not.

    What. Blocks all of whose values are zero, outside rows that are zero altogether.

    Why. Training does not zero 32 neighbours; a scale that was set to zero does.

    Case. Two zeroed bytes: the scale of one block.

    Fix. Fetch the file again, unless the model was pruned in blocks.
    """
    for tensor, stats in _matrices(context):
        if tensor.type is None or not tensor.type.is_block:
            continue
        per_row = stats.rows.length // stats.blocks.elements
        count = stats.blocks.n_zero - per_row * stats.rows.n_zero
        run = stats.blocks.longest_zero_run
        if count > 0 and run is not None:
            place = _place(tensor, stats, run.start)
            message = (
                f"{count:,} blocks of {tensor.name!r} are zero in rows that are not; the longest run is {run.length:,} "
                f"from {list(place.index)}{_expert(stats, place.index)}"
            )
            yield Found(message, tensor.name, index=place.index, offset=place.offset, value=count)


# -- copies ----------------------------------------------------------------------------------------------------------


@rule("N107", "repeated-blocks", ERROR, needs=[Need.DATA])
def repeated_blocks(context: Context) -> Iterator[Found]:
    """A piece of a matrix is a copy of another piece of it.

    What. Blocks that occur twice, in a row or far apart; blocks with few distinct codes do not count, and whole rows
    only as a warning, since heads are sometimes repeated on purpose. In embeddings copies are usual: tokens that were
    never trained are alike.

    Why. Two trained blocks of 256 weights are never equal to the last bit.

    Case. A download that wrote one part twice; a buffer that was flushed again.

    Fix. Fetch the file again.
    """
    for tensor, stats in _matrices(context):
        if tensor.name in _EMBEDDINGS or stats.n_zero == stats.count:
            continue
        stretch, consecutive = stats.repeats.stretch, stats.repeats.consecutive
        if consecutive is not None and _is_telling(context, tensor, stats, consecutive.start):
            yield _copy(tensor, stats, consecutive.start, consecutive.length, "repeat the block before them")
        elif stretch is not None and _is_telling(context, tensor, stats, stretch.second, stretch.length):
            first = list(_place(tensor, stats, stretch.first).index)
            yield _copy(tensor, stats, stretch.second, stretch.length, f"are a copy of those at {first}")


def _is_telling(context: Context, tensor: Tensor, stats: TensorStats, block: int, count: int = 1) -> bool:
    """Whether blocks say too much to be equal by chance: nearly empty ones, and ternary codes, say little."""
    assert tensor.type is not None
    place = _place(tensor, stats, block)
    raw = context.gguf.read(tensor, place.start, min(place.nbytes * min(count, 16), (tensor.nbytes or 0) - place.start))
    _, times = np.unique(quants.dequantize(tensor.type, raw, byteorder=context.gguf.byteorder), return_counts=True)
    return float(-(times * np.log2(times / times.sum())).sum()) >= _COPY_BITS


def _copy(tensor: Tensor, stats: TensorStats, block: int, count: int, what: str) -> Found:
    place = _place(tensor, stats, block)
    per_row = max(1, stats.rows.length // stats.blocks.elements)
    whole_rows = block % per_row == 0 and count % per_row == 0
    blocks = f"{count:,} blocks" if count > 1 else "a block"
    message = f"{blocks} of {tensor.name!r} from {list(place.index)}{_expert(stats, place.index)} {what}"
    return Found(
        message,
        tensor=tensor.name,
        index=place.index,
        offset=place.offset,
        value=count,
        severity=WARNING if whole_rows else None,
        confidence=Confidence.MEDIUM if whole_rows else None,
        help=_FETCH_AGAIN,
    )


@rule("N108", "copied-tensor", ERROR, confidence=Confidence.MEDIUM, needs=[Need.DATA])
def copied_tensor(context: Context) -> Iterator[Found]:
    """Two tensors hold the same values.

    What. Matrices whose count, extremes and moments agree to the last bit. An output that repeats the embedding is
    healthy, and so are layers that are copies as a whole (models stacked from another one's layers).

    Why. It is the sign of a wrong offset or of a tensor written twice.

    Case. Two entries of the tensor table that point to one place.

    Fix. Fetch the file again, or convert again.
    """
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for tensor, stats in _matrices(context):
        if stats.n_zero < stats.count and stats.std > 0:
            assert stats.min is not None
            assert stats.max is not None
            key = (stats.shape, stats.type, stats.mean, stats.std, stats.kurtosis, stats.min.value, stats.max.value)
            alike[key].append(tensor.name)
    groups = [names for names in alike.values() if len(names) > 1 and not set(names) <= _EMBEDDINGS]
    for names in groups:
        if not _copied_layers(context, names, groups):
            yield Found(f"{', '.join(map(repr, names[:4]))} hold the same values", names[1])


def _copied_layers(context: Context, names: list[str], groups: list[list[str]]) -> bool:
    """Whether these are the same role in layers that are copies of each other altogether."""
    roles = {arch.role_of(name)[0] for name in names}
    layers = [arch.role_of(name)[1] for name in names]
    if len(roles) != 1 or None in layers:
        return False
    copied = sum({arch.role_of(name)[1] for name in group} >= set(layers) for group in groups)
    of_layer = sum(arch.role_of(name)[1] == layers[0] for name, stats in context.stats.items() if len(stats.shape) > 1)
    return copied > of_layer // 2


# -- values that do not belong ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Odd:
    """A block and how far it is from its row and column, in octaves: as it is, and without its largest values."""

    block: int
    octaves: float
    rest: float


@rule("N109", "block-out-of-place", ERROR, needs=[Need.DATA])
def block_out_of_place(context: Context) -> Iterator[Found]:
    """A block's values are far larger than its row and column let expect.

    What. Each block's root mean square against its row and column, with the block's two largest values left out: one
    huge weight is healthy (the "super weights" of ffn_down), 30 huge ones at once are a wrong scale or foreign bytes.
    6.5 octaves (a factor of 90) are an error; from 3 octaves on a block that stands alone is a warning.

    Why. It is how random bytes, a flipped bit in a scale's exponent, and a multiplied scale look. They are finite, so
    that a search for NaN passes them.

    Case. A scale × 1024, which no other tool noticed; 4 kB of noise, which cost 16.7 nats a token.

    Fix. Fetch the file again.
    """
    for tensor, stats in _matrices(context):
        odd = _odd_blocks(context, tensor, stats)
        if odd and odd[0].rest >= _FAR:
            yield _out_of_place(tensor, stats, odd, None)
        elif odd and odd[0].rest >= _ODD and odd[0].rest - _third(odd, stats) >= _ALONE:
            yield _out_of_place(tensor, stats, odd[:2], WARNING)
        elif odd and odd[-1].octaves <= _VANISHED and tensor.name not in _EMBEDDINGS:
            yield _out_of_place(tensor, stats, odd[::-1][:1], WARNING)


def _odd_blocks(context: Context, tensor: Tensor, stats: TensorStats) -> list[_Odd]:
    """The worst blocks, by what is left of them without their largest values; the largest first."""
    worst = [block for block in stats.blocks.worst if abs(block.octaves) >= _ODD]
    if not worst or tensor.type is None:
        return []
    odd = [_without_largest(context, tensor, stats, block) for block in worst]
    return sorted(odd, key=lambda block: -block.rest)


def _without_largest(context: Context, tensor: Tensor, stats: TensorStats, block: BlockDeviation) -> _Odd:
    assert tensor.type is not None
    place = _place(tensor, stats, block.block)
    raw = context.gguf.read(tensor, place.start, place.nbytes)
    values = quants.dequantize(tensor.type, raw, byteorder=context.gguf.byteorder).ravel()
    squares = np.sort(np.where(np.isfinite(values), values, np.float32(0)).astype(np.float64) ** 2)
    whole, rest = squares.mean(), squares[: -max(2, len(squares) // 64)].mean() if len(squares) > 2 else 0.0
    left = block.octaves + 0.5 * float(np.log2(rest / whole)) if rest > 0 and whole > 0 else -np.inf
    return _Odd(block.block, block.octaves, min(left, block.octaves))


def _third(odd: list[_Odd], stats: TensorStats) -> float:
    """The third largest deviation, which stands for the rest of the tensor: damage may hit a pair of blocks."""
    ordinary = [block.octaves for block in stats.blocks.worst if abs(block.octaves) < _ODD]
    sizes = sorted([block.rest for block in odd] + ordinary, reverse=True)
    return sizes[2] if len(sizes) > 2 else 0.0


def _out_of_place(tensor: Tensor, stats: TensorStats, odd: list[_Odd], severity: Severity | None) -> Found:
    first = odd[0]
    place = _place(tensor, stats, first.block)
    many = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    factor, direction = 2.0 ** abs(first.octaves), "larger" if first.octaves > 0 else "smaller"
    message = (
        f"a block of {tensor.name!r} at {list(place.index)}{_expert(stats, place.index)}{many} is {factor:,.0f} times "
        f"{direction} than its row and column let expect"
    )
    numbers = {"octaves": first.octaves, "without_largest": first.rest, "spread": stats.blocks.spread}
    text = f"{first.octaves:+.1f} octaves, {first.rest:+.1f} without its two largest values"
    return Found(
        message,
        tensor=tensor.name,
        index=place.index,
        offset=place.offset,
        value=first.octaves,
        severity=severity,
        confidence=Confidence.MEDIUM if severity else None,
        judgement=Judgement.SUSPICIOUS if severity else Judgement.CORRUPT,
        help=_FETCH_AGAIN,
        evidence=(Evidence("numbers", text, numbers),),
    )


@rule("N115", "scale-too-small", WARNING, confidence=Confidence.MEDIUM, needs=[Need.DATA])
def scale_too_small(context: Context) -> Iterator[Found]:
    """A block's scale or min is zero or far below all others, and the block is not.

    What. Scales that are zero although the block's values are not all zero; and a few scales or mins below a gap of
    three empty octaves (a factor of 8), fewer than half a row of blocks.

    Why. The block loses its details and keeps its offset: its size hardly changes, so that nothing else sees it.
    Scales of a healthy tensor form one unbroken range; the widest gap seen at its lower end is under one octave.

    Case. The scale of a Q4_K block divided by 1024.

    Fix. Fetch the file again.
    """
    for tensor, stats in _matrices(context):
        for what, scales in (("scale", stats.scales), ("min", stats.mins)):
            if scales is None or stats.rows.n_constant:
                continue
            if what == "scale" and scales.n_zero > stats.blocks.n_zero * scales.per_block:
                message = f"{tensor.name!r} has {scales.n_zero:,} scales of zero in blocks that are not zero"
                yield Found(message, tensor.name, value=scales.n_zero)
            elif (count := _alone_below(scales, stats)) and scales.smallest is not None:
                place = _place(tensor, stats, scales.smallest.index // scales.per_block)
                several = f"{count} {what}s" if count > 1 else f"a {what}"
                message = (
                    f"{several} of {tensor.name!r} are far below all others, down to {scales.smallest.value:.3g} at "
                    f"{list(place.index)}{_expert(stats, place.index)}"
                )
                yield Found(message, tensor.name, index=place.index, offset=place.offset, value=scales.smallest.value)


def _alone_below(scales: ScaleStats, stats: TensorStats) -> int:
    """How many of the smallest magnitudes lie below a gap; 0 when there is none, or when they could be a row."""
    counts = scales.histogram.counts
    bins = np.flatnonzero(counts)
    below = np.cumsum(counts[bins])[:-1]
    per_row = max(1, scales.per_block * stats.rows.length // stats.blocks.elements)
    alone = (np.diff(bins) > 4 * _SCALE_GAP) & (below <= min(_FEW, max(1, per_row // 2)))
    return int(below[alone][-1]) if alone.any() else 0


@rule("N110", "unmarked-block", ERROR, needs=[Need.DATA])
def unmarked_block(context: Context) -> Iterator[Found]:
    """A block lacks the mark that the quantizer leaves in every block.

    What. ggml's quantizers choose a block's scale so that its largest value gets the last code of the range. Where
    all blocks of a file bear this mark but for a few, those few were changed afterwards.

    Why. It sees random and foreign bytes, flipped signs of scales and flipped bits in the decisive code, none of
    which need to change a magnitude.

    Case. A Q5_0 scale with its sign flipped, which moves the likelihood by less than its noise.

    Fix. Fetch the file again.
    """
    marked = [(tensor, stats) for tensor, stats in _matrices(context) if stats.marks is not None]
    blocks = sum(stats.marks.count for _, stats in marked if stats.marks)
    without = [(tensor, stats) for tensor, stats in marked if stats.marks and stats.marks.n_without]
    total = sum(stats.marks.n_without for _, stats in without if stats.marks)
    if total > max(_FEW, _UNMARKED_SHARE * blocks) or len(without) > max(1, len(marked) // 4):
        return  # another quantizer's file
    for tensor, stats in without:
        yield _unmarked(tensor, stats)


def _unmarked(tensor: Tensor, stats: TensorStats) -> Found:
    marks = stats.marks
    assert marks is not None
    assert marks.first_without is not None
    place = _place(tensor, stats, marks.first_without)
    mark = MARKS[stats.type]
    count = f"{marks.n_without:,} blocks" if marks.n_without > 1 else "a block"
    message = (
        f"{count} of {tensor.name!r}, the first at {list(place.index)}{_expert(stats, place.index)}, do not have what "
        f"the quantizer of {stats.type} leaves in every block: {mark}"
    )
    text = f"{marks.count - marks.n_without:,} of {marks.count:,} blocks have it"
    numbers = {"without": marks.n_without, "blocks": marks.count}
    return Found(
        message,
        tensor=tensor.name,
        index=place.index,
        offset=place.offset,
        value=marks.n_without,
        judgement=Judgement.CORRUPT,
        help=_FETCH_AGAIN,
        evidence=(Evidence("numbers", text, numbers),),
    )


@rule("N111", "value-out-of-range", ERROR, confidence=Confidence.MEDIUM, needs=[Need.DATA])
def value_out_of_range(context: Context) -> Iterator[Found]:
    """A few values of a float matrix are far beyond all others.

    What. In F32, F16 and BF16 matrices: at most eight values above a gap of six empty octaves (a factor of 64).

    Why. Genuine huge weights come with others half their size; a flipped exponent bit makes one that stands alone.

    Case. 1e30 in the middle of a matrix: no NaN, no Inf, and nothing but garbage comes out.

    Fix. Fetch the file again.
    """
    for tensor, stats in _matrices(context):
        if tensor.type is None or tensor.type.kind != "float" or stats.absmax is None:
            continue
        counts = stats.histogram.counts
        bins = np.flatnonzero(counts)
        gaps = np.diff(bins)
        for at in np.flatnonzero(gaps > 4 * _VALUE_GAP):  # four bins an octave
            above = int(counts[bins[at + 1] :].sum())
            if above <= _FEW and above < stats.count - stats.n_zero:
                yield _beyond(context, tensor, stats, above, float(stats.histogram.edges[bins[at] + 1]))
                break


def _beyond(context: Context, tensor: Tensor, stats: TensorStats, above: int, limit: float) -> Found:
    extreme = stats.absmax
    assert extreme is not None
    index = stats.coordinates(extreme.index)
    count = f"{above} values" if above > 1 else "one value"
    message = (
        f"{count} of {tensor.name!r} reach {extreme.value:.4g}, at {list(index)}{_expert(stats, index)}; all others "
        f"stay within {limit:.4g}"
    )
    return Found(
        message,
        tensor=tensor.name,
        index=index,
        offset=context.element_offset(tensor.name, extreme.index),
        value=extreme.value,
        judgement=Judgement.CORRUPT,
        help=_FETCH_AGAIN,
    )


@rule("N112", "constant-rows", WARNING, confidence=Confidence.MEDIUM, needs=[Need.DATA])
def constant_rows(context: Context) -> Iterator[Found]:
    """Rows of a matrix hold one value over and over.

    What. Rows in which every weight is the same number, other than zero. In embeddings they are only mentioned.

    Why. Training leaves no such row; filling does.

    Case. Weights that were initialized and never trained or loaded.

    Fix. Compare with the original model.
    """
    for tensor, stats in _matrices(context):
        if stats.rows.n_constant and stats.rows.length > 1:
            row = stats.rows.first_constant or 0
            index = stats.coordinates(row * stats.rows.length)
            count = stats.rows.n_constant
            message = f"{count:,} rows of {tensor.name!r} hold one value each, the first at {list(index)}"
            severity = INFO if tensor.name in _EMBEDDINGS else None
            yield Found(message, tensor.name, index=index, value=stats.rows.n_constant, severity=severity)


@rule("N113", "expert-out-of-place", WARNING, confidence=Confidence.MEDIUM, needs=[Need.DATA])
def expert_out_of_place(context: Context) -> Iterator[Found]:
    """One expert is of another size than its siblings.

    What. The root mean square of each expert's weights against the median of all, by six octaves (a factor of 64).

    Why. Experts are trained side by side; one that is 64 times larger or smaller was not.

    Case. A scale lost for one expert while stacking them.

    Fix. Convert the model again.
    """
    for tensor, stats in _matrices(context):
        sizes = [expert.rms for expert in stats.experts if expert.rms > 0 and np.isfinite(expert.rms)]
        middle = median(sizes) if len(sizes) > 3 else 0.0
        for expert in stats.experts if middle > 0 else ():
            if expert.rms > 0 and abs(np.log2(expert.rms / middle)) >= _EXPERT_OCTAVES:
                sizes_text = f"an rms of {expert.rms:.3g}; the median is {middle:.3g}"
                message = f"expert {expert.index} of {tensor.name!r} has {sizes_text}"
                yield Found(message, tensor.name, index=(expert.index,), value=expert.rms)


@rule("N114", "hybrid-norms", ERROR, needs=[Need.DATA])
def hybrid_norms(context: Context) -> Iterator[Found]:
    """The norms or decays of a Qwen3-Next or Qwen3.5 model were not transformed by the converter.

    What. In these architectures converters add one to every norm but ssm_norm (means near 1), and store ssm_a as a
    negative number.

    Why. Without that the model loads and talks garbage; nothing else in the file is odd.

    Case. Conversions from MLX checkpoints.

    Fix. Convert again from the original safetensors with a current converter.
    """
    if context.architecture not in _SHIFTED_NORMS:
        return
    for tensor, stats in _measured(context):
        role = arch.role_of(tensor.name)[0]
        if role.endswith("norm.weight") and role != "ssm_norm.weight" and abs(stats.mean) < 0.3:
            yield Found(f"{tensor.name!r} has the mean {stats.mean:.3g}; after conversion it is near 1", tensor.name)
        if role in ("ssm_a", "ssm_a.weight") and stats.max is not None and stats.max.value >= 0:
            yield Found(f"{tensor.name!r} reaches {stats.max.value:.3g}; every value must be below zero", tensor.name)
