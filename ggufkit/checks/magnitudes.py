"""Rules on weights whose size nothing around them explains, and on blocks that no quantizer made.

Thresholds are in octaves (factors of two) of a block's root mean square against what its row and column let
expect. In the healthy files that they were set with, blocks reach 5.1 octaves when they hold a single huge weight,
and 4.2 without it, then in company of others. Single weights hundreds of times their neighbours, strong rows and
columns, negative and subnormal scales are all healthy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from ggufkit import arch, quants
from ggufkit.checks.context import Context
from ggufkit.checks.rule import Found, Need, rule
from ggufkit.checks.weights import EMBEDDINGS, FETCH_AGAIN, expert_of, locate, matrices, measured
from ggufkit.container import Tensor
from ggufkit.findings import Confidence, Evidence, Judgement, Severity
from ggufkit.quants.fingerprint import MARKS

if TYPE_CHECKING:
    from ggufkit.stats import BlockDeviation, ScaleStats, TensorStats

ERROR, WARNING = Severity.ERROR, Severity.WARNING

#: octaves beyond which a block is no part of its tensor, and at which it is odd if it stands alone by `_ALONE`
_FAR, _ODD, _ALONE = 6.5, 3.0, 2.5
#: the same towards small values, where little can be said: dead channels are healthy
_VANISHED = -9.0
#: empty octaves below a few largest values of a float matrix; the largest genuine gap seen is 1.5
_VALUE_GAP = 6.0
#: the same above a few smallest scales; the largest genuine gap seen is 0.75
_SCALE_GAP = 3.0
_FEW = 8
#: files in which more of the blocks lack the quantizer's mark were made by a quantizer that leaves none
_UNMARKED_SHARE = 1e-3
_EXPERT_OCTAVES = 6.0
#: converters add one to these norms; where it is missing their mean is near zero
_SHIFTED_NORMS = frozenset({"qwen3next", "qwen35", "qwen35moe"})


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
    for tensor, stats in matrices(context):
        odd = _odd_blocks(context, tensor, stats)
        if odd and odd[0].rest >= _FAR:
            yield _out_of_place(tensor, stats, odd, None)
        elif odd and odd[0].rest >= _ODD and odd[0].rest - _third(odd, stats) >= _ALONE:
            yield _out_of_place(tensor, stats, odd[:2], WARNING)
        elif odd and odd[-1].octaves <= _VANISHED and tensor.name not in EMBEDDINGS:
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
    place = locate(tensor, stats, block.block)
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
    place = locate(tensor, stats, first.block)
    many = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    factor, direction = 2.0 ** abs(first.octaves), "larger" if first.octaves > 0 else "smaller"
    message = (
        f"a block of {tensor.name!r} at {list(place.index)}{expert_of(stats, place.index)}{many} is {factor:,.0f} "
        f"times {direction} than its row and column let expect"
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
        help=FETCH_AGAIN,
        evidence=(Evidence("numbers", text, numbers),),
    )


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
    marked = [(tensor, stats) for tensor, stats in matrices(context) if stats.marks is not None]
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
    place = locate(tensor, stats, marks.first_without)
    mark = MARKS[stats.type]
    count = f"{marks.n_without:,} blocks" if marks.n_without > 1 else "a block"
    message = (
        f"{count} of {tensor.name!r}, the first at {list(place.index)}{expert_of(stats, place.index)}, do not have "
        f"what the quantizer of {stats.type} leaves in every block: {mark}"
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
        help=FETCH_AGAIN,
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
    for tensor, stats in matrices(context):
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
        f"{count} of {tensor.name!r} reach {extreme.value:.4g}, at {list(index)}{expert_of(stats, index)}; all others "
        f"stay within {limit:.4g}"
    )
    return Found(
        message,
        tensor=tensor.name,
        index=index,
        offset=context.element_offset(tensor.name, extreme.index),
        value=extreme.value,
        judgement=Judgement.CORRUPT,
        help=FETCH_AGAIN,
    )


@rule("N113", "expert-out-of-place", WARNING, confidence=Confidence.MEDIUM, needs=[Need.DATA])
def expert_out_of_place(context: Context) -> Iterator[Found]:
    """One expert is of another size than its siblings.

    What. The root mean square of each expert's weights against the median of all, by six octaves (a factor of 64).

    Why. Experts are trained side by side; one that is 64 times larger or smaller was not.

    Case. A scale lost for one expert while stacking them.

    Fix. Convert the model again.
    """
    for tensor, stats in matrices(context):
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
    for tensor, stats in measured(context):
        role = arch.role_of(tensor.name)[0]
        if role.endswith("norm.weight") and role != "ssm_norm.weight" and abs(stats.mean) < 0.3:
            yield Found(f"{tensor.name!r} has the mean {stats.mean:.3g}; after conversion it is near 1", tensor.name)
        if role in ("ssm_a", "ssm_a.weight") and stats.max is not None and stats.max.value >= 0:
            yield Found(f"{tensor.name!r} reaches {stats.max.value:.3g}; every value must be below zero", tensor.name)


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
    for tensor, stats in matrices(context):
        for what, scales in (("scale", stats.scales), ("min", stats.mins)):
            if scales is None or stats.rows.n_constant:
                continue
            if what == "scale" and scales.n_zero > stats.blocks.n_zero * scales.per_block:
                message = f"{tensor.name!r} has {scales.n_zero:,} scales of zero in blocks that are not zero"
                yield Found(message, tensor.name, value=scales.n_zero)
            elif (count := _alone_below(scales, stats)) and scales.smallest is not None:
                place = locate(tensor, stats, scales.smallest.index // scales.per_block)
                several = f"{count} {what}s" if count > 1 else f"a {what}"
                message = (
                    f"{several} of {tensor.name!r} are far below all others, down to {scales.smallest.value:.3g} at "
                    f"{list(place.index)}{expert_of(stats, place.index)}"
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
