"""Rules on weights that are no numbers, nothing, or the same thing over and over.

All judge the statistics of one pass (`stats`). What is looked for is what training and quantizing cannot leave
behind: NaN and infinity, stretches of zeros, copies. What healthy models do have must pass: dead rows of unused
tokens, sparse tensors, biases that are all zero, layers stacked twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ggufkit import arch, quants
from ggufkit.checks.context import Context
from ggufkit.checks.rule import Found, Need, rule
from ggufkit.checks.weights import EMBEDDINGS, FETCH_AGAIN, expert_of, locate, matrices, measured
from ggufkit.container import Tensor
from ggufkit.findings import Confidence, Evidence, Judgement, Severity
from ggufkit.vocabulary import TokenType

if TYPE_CHECKING:
    from ggufkit.stats import ByteRun, ExpertStats, ScaleStats, Span, TensorStats

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO

#: may be zero as a whole
_MAY_BE_ZERO = ("token_types.weight", "position_embd.weight", ".bias", "rope_freqs.weight")
#: a run of equal bytes is damage from here on, if it is also longer than a block and a half
_RUN = 64
#: share of zeros from which a float tensor counts as sparse, so that runs of zeros mean nothing
_SPARSE = 0.01
#: two blocks that hold less information than this, in bits, may be equal by chance
_COPY_BITS = 96.0


@rule("N101", "nonfinite-value", ERROR, needs=[Need.DATA])
def nonfinite_value(context: Context) -> Iterator[Found]:
    """A float tensor holds NaN or infinity.

    What. Every value of F32, F16, BF16 and F64 tensors; the first one is named, with its expert if it has one.

    Why. One NaN in a norm or a bias makes every logit NaN, or, after rounding to int8, plausible nonsense.

    Case. Answers of nothing but "!!!!" or "GGGG", which are the tokens that NaN logits choose.

    Fix. Fetch the file again. If the publisher's checksum agrees, the conversion overflowed: convert from bf16 or f32.
    """
    for tensor, stats in measured(context):
        if not (stats.n_nan or stats.n_inf) or tensor.type is None or tensor.type.is_block:
            continue
        first = min(place for place in (stats.first_nan, stats.first_inf) if place is not None)
        index = stats.coordinates(first)
        counts = {"NaN": stats.n_nan, "Inf": stats.n_inf}
        what = " and ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        yield Found(
            f"{tensor.name!r} holds {what}; the first is at {list(index)}{expert_of(stats, index)}",
            tensor=tensor.name,
            index=index,
            offset=context.element_offset(tensor.name, first),
            value=float("nan") if first == stats.first_nan else float("inf"),
            judgement=Judgement.CORRUPT,
            help=FETCH_AGAIN,
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
    for tensor, stats in measured(context):
        for what, scales in (("scale", stats.scales), ("min", stats.mins)):
            if scales is not None and scales.n_nonfinite:
                yield _nonfinite_scale(tensor, stats, what, scales)


def _nonfinite_scale(tensor: Tensor, stats: TensorStats, what: str, scales: ScaleStats) -> Found:
    block = scales.first_nonfinite or 0
    index = stats.block_coordinates(block)
    several = f"{scales.n_nonfinite:,} blocks have a {what}" if scales.n_nonfinite > 1 else f"a block has a {what}"
    message = (
        f"{tensor.name!r}: {several} that is NaN or Inf; the first is block {block:,}, at {list(index)}"
        f"{expert_of(stats, index)}"
    )
    numbers = {"nan": scales.n_nan, "inf": scales.n_inf, "blocks": scales.count}
    return Found(
        message,
        tensor=tensor.name,
        index=index,
        offset=tensor.offset + (scales.first_nonfinite_offset or 0),
        judgement=Judgement.CORRUPT,
        help=FETCH_AGAIN,
        evidence=(Evidence("numbers", f"{scales.n_nan:,} NaN and {scales.n_inf:,} Inf", numbers),),
    )


@rule("N103", "all-zero", ERROR, needs=[Need.DATA])
def all_zero(context: Context) -> Iterator[Found]:
    """A tensor, or one expert of it, is all zero.

    What. Every tensor. Biases and a few small tables are zero in healthy models and are only mentioned.

    Why. A zero norm or projection takes its layer out of the model; the rest often goes on talking.

    Case. A sparse download whose holes were never filled.

    Fix. Fetch the file again.
    """
    for tensor, stats in measured(context):
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
    for tensor, stats in matrices(context):
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
    if tensor.name not in EMBEDDINGS:
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
    for tensor, stats in matrices(context):
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
    if tensor.name in EMBEDDINGS and (whole_rows or stats.rows.n_constant):
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
        f"{expert_of(stats, index)}, are all {what}{hint}"
    )
    numbers = {"bytes": run.length, "byte": run.value}
    evidence = (Evidence("numbers", "quantized weights never repeat a byte that often", numbers),)
    judgement = Judgement.CORRUPT
    return Found(message, tensor.name, index=index, offset=offset, value=run.length, help=FETCH_AGAIN,
                 evidence=evidence, judgement=judgement)  # fmt: skip


@rule("N106", "zero-blocks", WARNING, confidence=Confidence.MEDIUM, needs=[Need.DATA])
def zero_blocks(context: Context) -> Iterator[Found]:
    """Blocks of a quantized matrix are zero where their rows are not.

    What. Blocks all of whose values are zero, outside rows that are zero altogether.

    Why. Training does not zero 32 neighbours; a scale that was set to zero does.

    Case. Two zeroed bytes: the scale of one block.

    Fix. Fetch the file again, unless the model was pruned in blocks.
    """
    for tensor, stats in matrices(context):
        if tensor.type is None or not tensor.type.is_block:
            continue
        per_row = stats.rows.length // stats.blocks.elements
        count = stats.blocks.n_zero - per_row * stats.rows.n_zero
        run = stats.blocks.longest_zero_run
        if count > 0 and run is not None:
            place = locate(tensor, stats, run.start)
            message = (
                f"{count:,} blocks of {tensor.name!r} are zero in rows that are not; the longest run is {run.length:,} "
                f"from {list(place.index)}{expert_of(stats, place.index)}"
            )
            yield Found(message, tensor.name, index=place.index, offset=place.offset, value=count)


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
    for tensor, stats in matrices(context):
        if tensor.name in EMBEDDINGS or stats.n_zero == stats.count:
            continue
        stretch, consecutive = stats.repeats.stretch, stats.repeats.consecutive
        if consecutive is not None and _is_telling(context, tensor, stats, consecutive.start):
            yield _copy(tensor, stats, consecutive.start, consecutive.length, "repeat the block before them")
        elif stretch is not None and _is_telling(context, tensor, stats, stretch.second, stretch.length):
            first = list(locate(tensor, stats, stretch.first).index)
            yield _copy(tensor, stats, stretch.second, stretch.length, f"are a copy of those at {first}")


def _is_telling(context: Context, tensor: Tensor, stats: TensorStats, block: int, count: int = 1) -> bool:
    """Whether blocks say too much to be equal by chance: nearly empty ones, and ternary codes, say little."""
    assert tensor.type is not None
    place = locate(tensor, stats, block)
    raw = context.gguf.read(tensor, place.start, min(place.nbytes * min(count, 16), (tensor.nbytes or 0) - place.start))
    _, times = np.unique(quants.dequantize(tensor.type, raw, byteorder=context.gguf.byteorder), return_counts=True)
    return float(-(times * np.log2(times / times.sum())).sum()) >= _COPY_BITS


def _copy(tensor: Tensor, stats: TensorStats, block: int, count: int, what: str) -> Found:
    place = locate(tensor, stats, block)
    per_row = max(1, stats.rows.length // stats.blocks.elements)
    whole_rows = block % per_row == 0 and count % per_row == 0
    blocks = f"{count:,} blocks" if count > 1 else "a block"
    message = f"{blocks} of {tensor.name!r} from {list(place.index)}{expert_of(stats, place.index)} {what}"
    return Found(
        message,
        tensor=tensor.name,
        index=place.index,
        offset=place.offset,
        value=count,
        severity=WARNING if whole_rows else None,
        confidence=Confidence.MEDIUM if whole_rows else None,
        help=FETCH_AGAIN,
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
    for tensor, stats in matrices(context):
        if stats.n_zero < stats.count and stats.std > 0:
            assert stats.min is not None
            assert stats.max is not None
            key = (stats.shape, stats.type, stats.mean, stats.std, stats.kurtosis, stats.min.value, stats.max.value)
            alike[key].append(tensor.name)
    groups = [names for names in alike.values() if len(names) > 1 and not set(names) <= EMBEDDINGS]
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


@rule("N112", "constant-rows", WARNING, confidence=Confidence.MEDIUM, needs=[Need.DATA])
def constant_rows(context: Context) -> Iterator[Found]:
    """Rows of a matrix hold one value over and over.

    What. Rows in which every weight is the same number, other than zero. In embeddings they are only mentioned.

    Why. Training leaves no such row; filling does.

    Case. Weights that were initialized and never trained or loaded.

    Fix. Compare with the original model.
    """
    for tensor, stats in matrices(context):
        if stats.rows.n_constant and stats.rows.length > 1:
            row = stats.rows.first_constant or 0
            index = stats.coordinates(row * stats.rows.length)
            count = stats.rows.n_constant
            message = f"{count:,} rows of {tensor.name!r} hold one value each, the first at {list(index)}"
            severity = INFO if tensor.name in EMBEDDINGS else None
            yield Found(message, tensor.name, index=index, value=stats.rows.n_constant, severity=severity)
