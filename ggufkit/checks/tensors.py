"""Rules on the list of tensors: are all there, under the right names, with the right shapes, and no others.

For the architectures that are modelled the list follows from the metadata (`arch.expected_tensors`). For all others
the blocks of the model are compared with each other: what all layers but one have is missing in that one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import lru_cache

from ggufkit import arch
from ggufkit.checks.context import Context
from ggufkit.checks.metadata import heads_that_fit
from ggufkit.checks.rule import Found, Need, rule
from ggufkit.container import Tensor
from ggufkit.findings import Confidence, Severity

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO

#: tensors that loaders take where they are there, beyond an architecture's own list
_OPTIONAL = re.compile(
    r"output\.bias|rope_(freqs|factors_long|factors_short)\.weight|cls(\.\w+)?\.(weight|bias)"
    r"|blk\.\d+\.(attn_qkv\.(weight|bias)|[a-z_]+\.(input_)?scale)"
)
#: of a model that fuses them, in the order of the rows
_FUSED = {f"attn_{part}.{kind}": f"attn_qkv.{kind}" for part in "qkv" for kind in ("weight", "bias")}
_BIAS_ROLES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
#: which key decides about a letter of a shape
_LETTER_KEYS = {
    "E": "embedding_length",
    "F": "feed_forward_length",
    "HD": "attention.head_count",
    "KD": "attention.head_count_kv",
    "D": "attention.key_length",
}
#: in the first and last blocks architectures may differ: dense before experts, prediction layers at the end
_FIRST_EDGE, _LAST_EDGE, _MIN_BLOCKS = 3, 1, 8
_MANY = 6
#: names that a missing one is compared with; comparing is slow
_COMPARED = 1000


@rule("M301", "tensor-missing", ERROR, needs=[Need.CONFIG])
def tensor_missing(context: Context) -> Iterator[Found]:
    """A tensor that the architecture must have is missing.

    What. Every name that follows from architecture and number of blocks. When an unexpected tensor has nearly the
    missing name, the message says so.

    Why. Loaders stop at the first one; where they take a tensor for optional they compute without it.

    Case. A tensor renamed by a merge script; the last layers of a conversion that ran out of disk.

    Fix. Convert the model again; if a name is merely misspelt, rename it.
    """
    unexpected = [name for name in context.gguf.tensors if name not in _expected(context)]
    present = {None, *_blocks(context)}  # a block of which nothing is there is a finding of its own
    missing = [
        name
        for name, expected in _expected(context).items()
        if expected.required and expected.layer in present and _is_missing(context, name)
    ]
    for role, names in _by_role(name for name in missing if arch.role_of(name)[0] not in _BIAS_ROLES).items():
        if len(names) > _MANY:
            yield Found(f"{len(names)} layers have no {role}: {_layers(names)}", names[0])
            continue
        for name in names:
            close = get_close_matches(name, unexpected[:_COMPARED], 1, 0.8)
            hint = f"there is {close[0]!r}, probably the same under a wrong name" if close else None
            yield Found(f"the tensor {name!r} is missing" + (f"; {hint}" if hint else ""), name, help=hint)


@rule("M302", "biases-missing", ERROR, needs=[Need.MODEL])
def biases_missing(context: Context) -> Iterator[Found]:
    """A Qwen2 model has no biases in its attention.

    What. attn_q.bias, attn_k.bias and attn_v.bias of every layer. They are part of the architecture and often huge
    (±200 in a healthy model), which tempts people to take them for damage.

    Why. Loaders treat them as optional and say nothing, and the model talks garbage: without them a healthy
    Qwen2.5-0.5B loses 14 nats a token, as good as everything it knows.

    Case. "The biases are corrupt, I switched them off": that was the bug, not the fix.

    Fix. Take the biases from the original model. Convert again with a converter that knows Qwen2.
    """
    if context.architecture not in arch.BIAS_ARCHITECTURES:
        return
    layers = {layer for name in context.gguf.tensors if (layer := arch.role_of(name)[1]) is not None}
    for role in _BIAS_ROLES:
        names = [f"blk.{layer}.{role}" for layer in sorted(layers) if _is_missing(context, f"blk.{layer}.{role}")]
        if names:
            where = "all layers" if len(names) == len(layers) else f"{len(names)} of {len(layers)} layers"
            message = f"{role} is missing in {where} ({_layers(names)}); {context.architecture} cannot do without"
            yield Found(message, names[0], help="convert the model again: the biases are no optional extra")


@rule("M303", "tensor-extra", ERROR, spec=INFO, needs=[Need.CONFIG])
def tensor_extra(context: Context) -> Iterator[Found]:
    """There is a tensor that the architecture does not have.

    What. Every name that is neither on the architecture's list nor one of the optional tensors that loaders know.

    Why. llama.cpp counts ("wrong number of tensors; expected N, got M") and refuses the file.

    Case. Left-over LoRA matrices, a rope frequency table, a tensor under a misspelt name.

    Fix. Remove it; if another finding misses a tensor of nearly this name, rename it.
    """
    expected = _expected(context)
    extra = [name for name in context.gguf.tensors if name not in expected and not _OPTIONAL.fullmatch(name)]
    for role, names in _by_role(extra).items():
        if len(names) > _MANY:
            yield Found(f"{len(names)} tensors {role!r} are not part of {context.architecture}", names[0])
            continue
        for name in names:
            yield Found(f"the tensor {name!r} is not part of {context.architecture}", name)


@rule("M304", "tensor-shape-wrong", ERROR, needs=[Need.CONFIG])
def tensor_shape_wrong(context: Context) -> Iterator[Found]:
    """A tensor has another shape than the hyperparameters say.

    What. Every tensor on the architecture's list. When a role is wrong in many layers, it is the hyperparameter that
    is wrong, and one finding names it.

    Why. Loaders stop; those that do not compute with rows of the wrong length.

    Case. A transposed matrix; feed_forward_length of another size of the same family.

    Fix. Compare the key in the message with the original model's config.json.
    """
    letters = _letters(context)
    attention_told = heads_that_fit(context) is not None
    wrong = [
        name
        for name, expected in _expected(context).items()
        if (tensor := context.gguf.tensors.get(name)) and tensor.shape != expected.shape
        and not (attention_told and {"HD", "KD"} & set(letters[expected.role]))
        and "V" not in letters[expected.role]
    ]  # fmt: skip
    for role, names in _by_role(wrong).items():
        key = _key_to_blame(context, role, names[0])
        if len(names) > _MANY:
            yield Found(
                f"{role} of {len(names)} layers ({_layers(names)}) {_differs(context, names[0])}", names[0], key
            )
        else:
            yield from (Found(f"{name!r} {_differs(context, name)}", name, key) for name in names)


def _differs(context: Context, name: str) -> str:
    found, expected = context.gguf.tensors[name].shape, _expected(context)[name].shape
    turned = "; it looks transposed" if found[::-1] == expected and len(expected) > 1 else ""
    return f"has the shape {list(found)}; the hyperparameters say {list(expected)}{turned}"


def _key_to_blame(context: Context, role: str, name: str) -> str | None:
    """The key that decides about the first dimension that differs."""
    found, expected = context.gguf.tensors[name].shape, _expected(context)[name].shape
    for letter, one, other in zip(_letters(context)[role], found, expected, strict=False):
        if one != other and letter in _LETTER_KEYS:
            return context.arch_key(_LETTER_KEYS[letter])
    return None


@rule("M305", "vocabulary-rows", ERROR, needs=[Need.MODEL, Need.VOCABULARY])
def vocabulary_rows(context: Context) -> Iterator[Found]:
    """The embedding has another number of rows than the vocabulary has tokens.

    What. Rows of token_embd and of output against the length of tokenizer.ggml.tokens, and against vocab_size.

    Why. llama.cpp refuses the file. Other engines give ids without a text, or tokens without a row.

    Case. Tokens added in a fine-tune without resizing the embedding; a tokenizer taken from another model.

    Fix. Convert the model again, with the tokenizer that it was trained with.
    """
    n_tokens = context.gguf.fields["tokenizer.ggml.tokens"].count
    for name in ("token_embd.weight", "output.weight"):
        tensor = context.gguf.tensors.get(name)
        if tensor is not None and len(tensor.dims) == 2 and tensor.shape[0] != n_tokens:
            message = f"{name!r} has {tensor.shape[0]:,} rows; the vocabulary has {n_tokens:,} tokens"
            yield Found(message, name, "tokenizer.ggml.tokens", value=tensor.shape[0])
    key = context.arch_key("vocab_size")
    size = context.integer(key)
    if size is not None and size != n_tokens:
        message = f"{key} is {size:,}; the vocabulary has {n_tokens:,} tokens"
        yield Found(message, key=key, offset=context.place(key), value=size, severity=WARNING)


@rule("M306", "block-count", ERROR, needs=[Need.MODEL])
def block_count(context: Context) -> Iterator[Found]:
    """The number of blocks is not the number of layers whose tensors are there.

    What. block_count against the numbers in the tensor names. Prediction layers (nextn) count, and may be left out.

    Why. Too high: loaders miss tensors. Too low: llama.cpp counts too many, others silently run half a model.

    Case. Pruned and merged models whose metadata was not adapted.

    Fix. Correct the key, or convert again.
    """
    key = context.arch_key("block_count")
    stated = context.integer(key)
    present = {layer for name in context.gguf.tensors if (layer := arch.role_of(name)[1]) is not None}
    if stated is None or not present:
        return
    optional = context.integer(context.arch_key("nextn_predict_layers")) or 0
    missing = sorted(set(range(min(stated, arch.MAX_LAYERS) - optional)) - present)
    beyond = sorted(layer for layer in present if layer >= stated)
    if missing:
        listed = ", ".join(map(str, missing[:_MANY])) + (" …" if len(missing) > _MANY else "")
        message = f"{key} is {stated}, but there are no tensors for {len(missing)} of the blocks: {listed}"
        yield Found(message, f"blk.{missing[0]}", key, offset=context.place(key), value=stated)
    if beyond:
        message = f"{key} is {stated}, but there are tensors up to block {beyond[-1]}"
        yield Found(message, f"blk.{beyond[0]}", key, offset=context.place(key), value=stated)


@rule("M307", "layer-differs", WARNING, confidence=Confidence.MEDIUM, needs=[Need.MODEL])
def layer_differs(context: Context) -> Iterator[Found]:
    """One layer lacks what all others have, or has it in another shape.

    What. For architectures that are not modelled here: a role that all inner blocks but one share. First and last
    blocks are left out, since many architectures treat them differently, and so are models whose layers differ by
    design (numbers of heads that are lists).

    Why. It is how a renamed or lost tensor shows when nobody knows the full list.

    Case. blk.11.ffn_up.weigth.

    Fix. Compare with the list of tensors of the original model.
    """
    blocks = _blocks(context)
    modelled = context.architecture in arch.ARCHITECTURES
    if modelled or len(blocks) < _MIN_BLOCKS or _layers_differ_by_design(context):
        return
    inner = {layer: blocks[layer] for layer in sorted(blocks)[_FIRST_EDGE : len(blocks) - _LAST_EDGE]}
    shares = Counter(role for roles in inner.values() for role in roles)
    for role, share in shares.items():
        if share == len(inner) - 1:
            yield _lacking(role, inner, {other for other in shares if shares[other] == 1})
        elif share == len(inner):
            yield from _odd_shape(role, [roles[role] for roles in inner.values()])


def _lacking(role: str, blocks: dict[int, dict[str, Tensor]], unique: set[str]) -> Found:
    """The one block without `role`; a role that only it has may be the same, misspelt."""
    layer = next(layer for layer, roles in blocks.items() if role not in roles)
    close = get_close_matches(role, unique & set(blocks[layer]), 1, 0.8)
    hint = f"; it has {close[0]!r} instead" if close else ""
    return Found(f"block {layer} has no {role!r}, which all other blocks have{hint}", f"blk.{layer}.{role}")


def _odd_shape(role: str, tensors: list[Tensor]) -> Iterator[Found]:
    (usual, count), *others = Counter(tensor.shape for tensor in tensors).most_common(2)
    if others and count == len(tensors) - 1:
        odd = next(tensor for tensor in tensors if tensor.shape != usual)
        message = f"{odd.name!r} has the shape {list(odd.shape)}; {role} of all other blocks has {list(usual)}"
        yield Found(message, odd.name)


@rule("M308", "tensor-type", WARNING, needs=[Need.MODEL])
def tensor_type(context: Context) -> Iterator[Found]:
    """A norm or a bias is quantized.

    What. Vectors are a thousandth of the model and multiply or shift everything; converters keep them in F32.

    Why. llama.cpp adds and multiplies them as F32 and aborts on block types; and quantizing Qwen2's biases destroys
    small ones beside huge ones.

    Case. A script that quantized "all tensors".

    Fix. Quantize again with vectors left alone.
    """
    for tensor in context.gguf.tensors.values():
        is_vector = tensor.name.endswith(("norm.weight", ".bias")) and len(tensor.dims) == 1
        if is_vector and tensor.type is not None and tensor.type.kind != "float":
            message = f"{tensor.name!r} is a vector in {tensor.type.name}; norms and biases are kept in F32"
            yield Found(message, tensor.name, offset=tensor.info_offset)


# -- what the rules share ------------------------------------------------------------------------------------------


def _expected(context: Context) -> dict[str, arch.Expected]:
    assert context.config is not None
    return _expected_tensors(context.config)


@lru_cache(maxsize=4)
def _expected_tensors(config: arch.Config) -> dict[str, arch.Expected]:
    return arch.expected_tensors(config)


def _letters(context: Context) -> dict[str, tuple[str, ...]]:
    """The letters of each role's shape."""
    described = arch.ARCHITECTURES[context.architecture or ""]
    return {spec.name.removeprefix("blk.{}."): spec.shape for spec in described.tensors}


def _is_missing(context: Context, name: str) -> bool:
    """Whether neither the tensor nor one that it is fused into is there."""
    role, layer = arch.role_of(name)
    fused = _FUSED.get(role)
    return name not in context.gguf.tensors and not (fused and f"blk.{layer}.{fused}" in context.gguf.tensors)


def _by_role(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[arch.role_of(name)[0]].append(name)
    return groups


def _layers(names: Iterable[str]) -> str:
    """`layers 0, 1, 2 …` of some tensor names."""
    layers = [str(layer) for name in names if (layer := arch.role_of(name)[1]) is not None]
    return "layers " + ", ".join(layers[:_MANY]) + (" …" if len(layers) > _MANY else "")


def _blocks(context: Context) -> dict[int, dict[str, Tensor]]:
    blocks: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for tensor in context.gguf.tensors.values():
        role, layer = arch.role_of(tensor.name)
        if layer is not None:
            blocks[layer][role] = tensor
    return blocks


def _layers_differ_by_design(context: Context) -> bool:
    keys = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    fields = (context.gguf.fields.get(context.arch_key(key)) for key in keys)
    return any(field is not None and field.element_type is not None for field in fields)
