"""Outliers in biases and norms: damage, or the model's own?

The vectors of a model are small, are kept as floats, and are where both the strangest genuine values (Qwen2's key
biases of 200 and more) and the cheapest damage (one flipped bit) are found. A limit on magnitude calls every
healthy Qwen2 broken, so none is used. What is used is context: the same role in all other layers, the two channels
that rotary embedding turns together, and the number format that the training left its values in.

The thresholds stand well outside what healthy files show. In Qwen2.5-0.5B and SmolLM2-135M the largest value of a
role is at most 3.1 times the largest of any other layer, and gaps between neighbours among a role's largest values
stay below 1.6.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggufkit import arch
from ggufkit.checks.context import Context
from ggufkit.checks.rule import Found, Need, rule
from ggufkit.findings import Confidence, Evidence, Judgement, Severity

Vector = NDArray[np.float32]

#: a value this many times beyond everything else of its role is not the model's
_BEYOND = 8.0
#: how many of a role's largest values are looked at for such a gap
_TOP = 32
#: a rotated bias this far beyond its own layer and beyond its channel pair in other layers is suspicious
_ODD = 4.0
#: a largest magnitude this many times the median is worth a word of explanation
_NOTABLE = 20.0
#: with fewer values than this in a role nothing is said about its distribution
_ENOUGH = 64
#: nonzero magnitudes below this do not come out of training; an exponent's top bit was cleared
_VANISHING = 1e-30
_CLIPPED = 3

_BIAS_ROLES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
_ROTATED = ("attn_q.bias", "attn_k.bias")


@dataclass(frozen=True, slots=True)
class Role:
    """The vectors of one role: tensor name by layer (None outside the layers), and their values."""

    name: str
    tensors: Mapping[int | None, str]
    values: Mapping[int | None, Vector]

    def pooled(self) -> tuple[NDArray[np.float64], list[tuple[int | None, int]]]:
        """The largest finite magnitudes of the role, descending, and where each stands."""
        entries = []
        for layer, vector in self.values.items():
            size = _magnitudes(vector)
            top = np.argsort(-size, kind="stable")[:_TOP]
            entries += [(float(size[index]), layer, int(index)) for index in top]
        entries.sort(key=lambda entry: -entry[0])
        return np.array([size for size, _, _ in entries]), [(layer, index) for _, layer, index in entries]

    @property
    def count(self) -> int:
        return sum(vector.size for vector in self.values.values())


def _magnitudes(vector: Vector) -> NDArray[np.float64]:
    """Absolute values with everything that is not finite as 0: other rules speak of those."""
    return np.where(np.isfinite(vector), np.abs(vector.astype(np.float64)), 0.0)


def roles(context: Context) -> Iterator[Role]:
    """The float vectors of the model by role."""
    tensors: dict[str, dict[int | None, str]] = defaultdict(dict)
    for name in context.vectors:
        role, layer = arch.role_of(name)
        tensors[role][layer] = name
    for role, by_layer in tensors.items():
        yield Role(role, by_layer, {layer: context.vectors[name] for layer, name in by_layer.items()})


@rule("O201", "vector-outlier", Severity.ERROR, needs=[Need.DATA])
def vector_outlier(context: Context) -> Iterator[Found]:
    """Values of a bias or norm far beyond all others of their role.

    What. The largest magnitudes of a role (all attn_k.bias, all ffn_norm.weight ...) over all layers are put in
    order. Where one is eight times the next or more, everything above that gap is damage.

    Why. Training moves many values at once: huge biases come as a tail in which each has a neighbour of similar
    size, in its own or in another layer. A flipped exponent bit or a stray write makes one value that stands alone.

    Case. Qwen2.5-0.5B has key biases of -211, 158 and -145: a tail, and genuine. One 10,000 written into a query
    bias of the same file hardly moves its likelihood, and is damage all the same.

    Fix. Fetch the file again. If the value is in the original model too, keep it.
    """
    for role in roles(context):
        sizes, places = role.pooled()
        above = _above_gap(sizes) if role.count >= _ENOUGH else 0
        for (layer, index), size in zip(places[:above], sizes[:above], strict=True):
            yield _stands_alone(context, role, layer, index, float(size), float(sizes[above]))


def _above_gap(sizes: NDArray[np.float64]) -> int:
    """How many of the descending magnitudes stand above a gap of at least `_BEYOND`; 0 when there is none."""
    top = sizes[: _TOP + 1]
    if len(top) < 2 or top[-1] == 0:
        return 0
    gaps = np.flatnonzero(top[:-1] >= _BEYOND * top[1:])
    return int(gaps[-1]) + 1 if len(gaps) else 0


def _stands_alone(context: Context, role: Role, layer: int | None, index: int, size: float, following: float) -> Found:
    name = role.tensors[layer]
    vector = role.values[layer]
    value = float(vector[index])
    evidence = [
        Evidence(
            "context",
            f"{size / following:,.4g} times the next largest of the {role.count:,} values of {role.name} "
            f"in {len(role.values)} layers, which is {following:.6g}",
            {"ratio": size / following, "next_largest": following, "values": role.count},
        ),
        *_flip_evidence(vector, index),
        *_grid_evidence(vector, index),
    ]
    return Found(
        f"{name}[{index}] is {value:.6g}; everything else of its role stays within {following:.6g}",
        tensor=name,
        index=(index,),
        offset=context.element_offset(name, index),
        value=value,
        evidence=tuple(evidence),
        judgement=Judgement.CORRUPT,
        help="fetch the file again; compare this value with the original model's",
    )


def _flip_evidence(vector: Vector, index: int) -> Iterator[Evidence]:
    """A single exponent bit that, flipped back, brings the value among its neighbours."""
    bits = int(vector[index].view(np.uint32))
    typical = float(np.median(_magnitudes(vector))) or 1e-3
    for bit in range(30, 22, -1):
        restored = float(np.uint32(bits ^ (1 << bit)).view(np.float32))
        if np.isfinite(restored) and typical / 16 <= abs(restored) <= typical * 16:
            text = f"with bit {bit} (of its exponent) flipped back it would be {restored:.6g}, an ordinary value here"
            yield Evidence("numbers", text, {"bit": bit, "restored": restored})
            return


def _grid_evidence(vector: Vector, index: int) -> Iterator[Evidence]:
    grid = grid_of(np.delete(vector, index))
    if grid and not GRIDS[grid](vector[index : index + 1])[0]:
        text = f"all other values of the tensor are exact in {grid}; this one is not"
        yield Evidence("numbers", text, {"grid": grid})


# --- number formats ----------------------------------------------------------------------------------------------


def _on_bf16(vector: Vector) -> NDArray[np.bool_]:
    return (vector.view(np.uint32) & np.uint32(0xFFFF)) == 0


def _on_f16(vector: Vector) -> NDArray[np.bool_]:
    with np.errstate(over="ignore"):
        return vector == vector.astype(np.float16).astype(np.float32)


#: the formats that training leaves its values in, and whether each value of a float32 vector is exact there
GRIDS = {"bf16": _on_bf16, "f16": _on_f16}


def grid_of(vector: Vector) -> str | None:
    """The format in which every finite value of the vector is exact; None when there is none."""
    finite = np.ascontiguousarray(vector[np.isfinite(vector)])
    if not finite.size:
        return None
    return next((name for name, exact in GRIDS.items() if exact(finite).all()), None)


@rule("O202", "off-grid", Severity.ERROR, needs=[Need.DATA])
def off_grid(context: Context) -> Iterator[Found]:
    """Single values that break the number format of their tensor.

    What. A checkpoint that was trained in bf16 or f16 and stored as F32 holds only values whose low mantissa bits
    are zero. A tensor in which all values but a few are exact in such a format holds changed ones.

    Why. Nothing that a converter does touches single values. A flipped low bit is far too small to see in any
    other way.

    Case. All 27,648 biases of Qwen2.5-Coder-0.5B are exact in bf16, and all of its norms in f16.

    Fix. Fetch the file again. Somebody who edited single values on purpose may ignore this.
    """
    for name, vector in context.vectors.items():
        if vector.size < _ENOUGH // 2 or context.gguf.tensors[name].type_name not in ("F32", "F64"):
            continue
        for grid, off in _few_off(vector):
            yield from (_off_grid(context, name, vector, grid, int(index)) for index in off)
            break


def _few_off(vector: Vector) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """The formats that all but a few finite values are exact in, with the indices of those."""
    finite = np.isfinite(vector)
    clean = np.ascontiguousarray(np.where(finite, vector, 0))
    for grid, exact in GRIDS.items():
        off = np.flatnonzero(~exact(clean))
        if len(off) == 0:
            return
        if len(off) <= max(2, vector.size // 100):
            yield grid, off


def _off_grid(context: Context, name: str, vector: Vector, grid: str, index: int) -> Found:
    value = float(vector[index])
    return Found(
        f"{name}[{index}] is {value:.9g}, which is not exact in {grid}, as the tensor's other values are",
        tensor=name,
        index=(index,),
        offset=context.element_offset(name, index),
        value=value,
        evidence=(
            Evidence("numbers", f"{vector.size - 1:,} of {vector.size:,} values are exact in {grid}", {"grid": grid}),
            *_flip_evidence(vector, index),
        ),
        judgement=Judgement.CORRUPT,
        help="fetch the file again; compare this value with the original model's",
    )


@rule("O203", "vanishing-value", Severity.ERROR, needs=[Need.DATA])
def vanishing_value(context: Context) -> Iterator[Found]:
    """A value so small that only a cleared exponent bit explains it.

    What. A nonzero value of a bias or norm below 1e-30, in a tensor whose typical value is not.

    Why. The top exponent bit of a value of 2 or more, when it flips, divides it by 2^128.

    Case. A norm weight of 3.4 that became 1e-38 switches one channel off without a trace in the statistics.

    Fix. Fetch the file again.
    """
    for name, vector in context.vectors.items():
        size = _magnitudes(vector)
        if float(np.median(size)) < 1e6 * _VANISHING:
            continue
        for index in np.flatnonzero((size > 0) & (size < _VANISHING))[:_TOP]:
            value = float(vector[index])
            yield Found(
                f"{name}[{index}] is {value:.6g} where the tensor's typical magnitude is {np.median(size):.4g}",
                tensor=name,
                index=(int(index),),
                offset=context.element_offset(name, int(index)),
                value=value,
                evidence=tuple(_flip_evidence(vector, int(index))),
                judgement=Judgement.CORRUPT,
                help="fetch the file again; compare this value with the original model's",
            )


# --- odd, not impossible -----------------------------------------------------------------------------------------


@rule("O204", "odd-bias", Severity.WARNING, confidence=Confidence.MEDIUM, needs=[Need.CONFIG, Need.DATA])
def odd_bias(context: Context) -> Iterator[Found]:
    """A query or key bias that is large where no other layer has large ones.

    What. Rotary embedding turns channels i and i + D/2 of a head together, at a speed that depends on i alone. A
    bias at least four times the largest other value of its own layer, and four times what the other layers have at
    the same speed (all but the most extreme of them), is odd.

    Why. The slow pairs (i near D/2) hardly turn, a constant there shifts all scores of a row alike, and softmax does
    not care: that is where Qwen2's huge biases live. In the pairs that turn they would matter, and are rare.

    Case. A -34 planted at pair 12 of layer 12 of Qwen2.5-0.5B, whose own values stay below 5.1: too small for
    anything else to see.

    Fix. Run with --run: what the model does without the value decides. Compare it with the original model's.
    """
    config = context.config
    assert config is not None
    for role in roles(context):
        if role.name not in _ROTATED or len(role.values) < 4:
            continue
        pairs = {layer: _by_pair(vector, config.head_dim) for layer, vector in role.values.items()}
        for layer, vector in role.values.items():
            found = _odd(context, role, layer, vector, pairs, config.head_dim)
            if found is not None:
                yield found


def _by_pair(vector: Vector, head_dim: int) -> NDArray[np.float64]:
    """The largest magnitude at each rotary pair, over heads and both channels."""
    return _magnitudes(vector).reshape(-1, 2, head_dim // 2).max(axis=(0, 1))


def _odd(
    context: Context,
    role: Role,
    layer: int | None,
    vector: Vector,
    pairs: Mapping[int | None, NDArray[np.float64]],
    head_dim: int,
) -> Found | None:
    size = _magnitudes(vector)
    index = int(size.argmax())
    pair = index % (head_dim // 2)
    second = float(np.partition(size, -2)[-2])
    others = sorted(float(maxima[pair]) for key, maxima in pairs.items() if key != layer)
    usual = others[-2]
    if size[index] < _ODD * max(second, usual):
        return None
    name, value = role.tensors[layer], float(vector[index])
    return Found(
        f"{name}[{index}] is {value:.6g}; its layer stays within {second:.4g} elsewhere, and rotary pair {pair} within "
        f"{usual:.4g} in the other layers (but one)",
        tensor=name,
        index=(index,),
        offset=context.element_offset(name, index),
        value=value,
        evidence=(
            Evidence(
                "context",
                f"pair {pair} of {head_dim // 2}: {abs(value) / usual:.3g} times the other layers, "
                f"{abs(value) / second:.3g} times its own",
                {"pair": pair, "others": usual, "second": second},
            ),
        ),
        judgement=Judgement.SUSPICIOUS,
        help="run the model (--run) to see what it does without this value",
    )


@rule("O205", "clipped-bias", Severity.WARNING, confidence=Confidence.MEDIUM, needs=[Need.DATA])
def clipped_bias(context: Context) -> Iterator[Found]:
    """Biases that were cut off at a limit.

    What. The largest magnitude of a bias occurs three times or more.

    Why. Of the 72 biases of a pristine Qwen2.5-0.5B each has a unique largest magnitude. Somebody who clips "corrupt"
    biases to 10 leaves 10 many times over, and costs the model 0.7 nats a token.

    Case. Tools and patches that "sanitize" Qwen2's biases.

    Fix. Use the original file. The large values are genuine.
    """
    for name, vector in context.vectors.items():
        if not name.endswith(".bias"):
            continue
        size = _magnitudes(vector)
        largest = float(size.max(initial=0))
        times = int((size == largest).sum())
        if largest > 0 and times >= _CLIPPED and times < vector.size:
            yield Found(
                f"{name} holds its largest magnitude, {largest:g}, {times} times: it looks clipped",
                tensor=name,
                value=largest,
                evidence=(Evidence("numbers", f"{times} values of {largest:g}", {"times": times, "limit": largest}),),
                judgement=Judgement.SUSPICIOUS,
                help="use the original file: large attention biases are genuine in Qwen2",
            )


@rule("O206", "biases-zeroed", Severity.ERROR, needs=[Need.MODEL, Need.DATA])
def biases_zeroed(context: Context) -> Iterator[Found]:
    """Attention biases that were switched off.

    What. A Qwen2 model whose query, key or value biases are all zero, in one layer or in all.

    Why. They look corrupt and are the first thing that people switch off when a model talks garbage. Without them the
    same model's likelihood falls from 1.96 to 16.4 nats a token.

    Case. The mistake that this tool was written about.

    Fix. Use the original file; look for the fault in the engine (`ggufkit diagnose`).
    """
    if context.architecture not in arch.BIAS_ARCHITECTURES:
        return
    for role in roles(context):
        if role.name not in _BIAS_ROLES:
            continue
        zero = [layer for layer, vector in role.values.items() if not vector.any()]
        if not zero:
            continue
        everywhere = len(zero) == len(role.values)
        where = "every layer" if everywhere else "layer " + ", ".join(map(str, zero))
        yield Found(
            f"{role.name} is all zero in {where}: Qwen2's biases have been switched off",
            tensor=role.tensors[zero[0]],
            value=0.0,
            severity=Severity.ERROR if everywhere else Severity.WARNING,
            confidence=Confidence.HIGH if everywhere else Confidence.MEDIUM,
            judgement=Judgement.CORRUPT if everywhere else Judgement.SUSPICIOUS,
            help="use the original file: the biases are part of the model, however large they look",
        )


@rule("O207", "large-bias", Severity.INFO, needs=[Need.MODEL, Need.DATA])
def large_bias(context: Context) -> Iterator[Found]:
    """Large biases that are the model's own.

    What. The most extreme value of each attention bias, where it is at least twenty times its tensor's median and
    none of the rules above objects to it.

    Why. Qwen2 keeps constant offsets in channels that rotary embedding hardly turns. They reach 200 and more, look
    like damage, and are needed: mending them breaks the model.

    Case. blk.8.attn_k.bias of Qwen2.5-0.5B reaches -211, 287 times its median.

    Fix. Nothing. Keep biases in F32, attention scores in float32, and the key cache at 8 bits or better.
    """
    damaged = {
        (found.tensor, found.index) for check in (vector_outlier, odd_bias_if_modelled) for found in check(context)
    }
    for role in roles(context):
        if role.name not in _BIAS_ROLES or role.count < _ENOUGH:
            continue
        sizes, places = role.pooled()
        for (layer, index), size in zip(places, sizes, strict=True):
            if (role.tensors[layer], (index,)) in damaged:
                continue
            ratio = size / (float(np.median(_magnitudes(role.values[layer]))) or np.inf)
            if ratio >= _NOTABLE:
                yield _large(context, role, layer, index, float(ratio))
            break


def odd_bias_if_modelled(context: Context) -> Iterable[Found]:
    """`odd_bias`, which needs the hyperparameters, or nothing."""
    return odd_bias(context) if context.config else ()


def _large(context: Context, role: Role, layer: int | None, index: int, ratio: float) -> Found:
    name, vector = role.tensors[layer], role.values[layer]
    value = float(vector[index])
    others = sorted((float(_magnitudes(v).max()) for key, v in role.values.items() if key != layer), reverse=True)
    evidence = [
        Evidence("numbers", f"{ratio:.0f} times the tensor's median magnitude", {"ratio": ratio}),
        Evidence(
            "context",
            f"other layers reach {', '.join(f'{size:.4g}' for size in others[:3])}: a tail, not a stray value",
            {"others": others[:3]},
        ),
    ]
    if (grid := grid_of(vector)) is not None:
        evidence.append(Evidence("numbers", f"every value of the tensor is exact in {grid}", {"grid": grid}))
    if context.config is not None and role.name in _ROTATED:
        half = context.config.head_dim // 2
        pair = index % half
        partner = index + half if index % context.config.head_dim < half else index - half
        text = f"rotary pair {pair} of {half} (the last turn slowest); its partner [{partner}] is {vector[partner]:.4g}"
        evidence.append(Evidence("context", text, {"pair": pair, "partner": float(vector[partner])}))
    return Found(
        f"{role.name} reaches {value:.6g} ({name}[{index}]): large, and the model's own",
        tensor=name,
        index=(index,),
        offset=context.element_offset(name, index),
        value=value,
        evidence=tuple(evidence),
        judgement=Judgement.GENUINE,
    )
