"""Rules on the hyperparameters: do they agree with each other, with the shapes of the tensors, and with what is known
of published models.
"""

from __future__ import annotations

from collections.abc import Iterator

from ggufkit import arch
from ggufkit.checks.context import Context
from ggufkit.checks.keys import key_missing, key_range, key_type
from ggufkit.checks.rule import Found, Need, rule
from ggufkit.errors import FormatError
from ggufkit.findings import Confidence, Evidence, Severity

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO

_CONVERT_AGAIN = "convert the model again with a current converter"


@rule("M201", "heads", ERROR, needs=[Need.MODEL])
def heads(context: Context) -> Iterator[Found]:
    """The numbers of heads do not fit the attention's tensors.

    What. Rows of attn_q and attn_k are heads times channels of a head. Two of the four numbers come from metadata,
    two from the shapes; they must agree in every layer.

    Why. A wrong head count cuts the rows at the wrong places: garbage, or a load error that names a tensor.

    Case. head_count halved; head_count_kv missing, so that loaders assume as many key heads as query heads.

    Fix. The message gives the numbers that would fit.
    """
    n_head, n_kv = context.integer(context.arch_key("attention.head_count")), _kv_heads(context)
    if context.architecture not in arch.ARCHITECTURES or n_head is None or n_kv is None:
        return
    key, place = context.arch_key("attention.head_count"), context.place(context.arch_key("attention.head_count"))
    if n_head == 0 or n_kv == 0 or n_head % n_kv:
        yield Found(f"{n_head} query heads cannot share {n_kv} key heads evenly", key=key, offset=place, value=n_head)
    elif fit := heads_that_fit(context):
        yield Found(f"{key} is {n_head} and {n_kv} key heads are given, but {fit}", key=key, offset=place, value=n_head)


def heads_that_fit(context: Context) -> str | None:
    """What the shapes of layer 0 say about the heads, when metadata says something else."""
    n_head, n_kv = context.integer(context.arch_key("attention.head_count")), _kv_heads(context)
    query, key = (context.gguf.tensors.get(f"blk.0.attn_{part}.weight") for part in "qk")
    n_embd = context.integer(context.arch_key("embedding_length"))
    if not (n_head and n_kv and n_embd and query and key and len(query.dims) == len(key.dims) == 2):
        return None
    stated = context.integer(context.arch_key("attention.key_length"))
    rows_q, rows_k, size = query.shape[0], key.shape[0], stated or n_embd // n_head
    if size and (rows_q, rows_k) == (n_head * size, n_kv * size):
        return None
    seen = f"attn_q has {rows_q} rows and attn_k {rows_k}"
    fits = []
    if stated and rows_q % stated == rows_k % stated == 0:
        fits.append(f"{rows_q // stated} query and {rows_k // stated} key heads of {stated}")
    elif not stated and rows_k and rows_q * n_kv % rows_k == 0 and rows_k % n_kv == 0:
        fits.append(f"{rows_q * n_kv // rows_k} query heads of {rows_k // n_kv}")
    if not stated and rows_q % n_head == 0 and rows_k % (rows_q // n_head) == 0:
        fits.append(f"{rows_k // (rows_q // n_head)} key heads of {rows_q // n_head}")
    return f"{seen}: that would be {', or '.join(fits)}" if fits else f"{seen}, which fits no such heads"


def _kv_heads(context: Context) -> int | None:
    key = context.arch_key("attention.head_count_kv")
    if key in context.gguf.fields:
        return context.integer(key)
    return context.integer(context.arch_key("attention.head_count"))


@rule("M202", "head-count-kv", WARNING, needs=[Need.MODEL])
def head_count_kv(context: Context) -> Iterator[Found]:
    """attention.head_count_kv is missing.

    What. Loaders then assume as many key heads as query heads.

    Why. Nearly all models of today share key heads; with the default, the tensors do not fit.

    Case. A converter older than grouped-query attention.

    Fix. Convert the model again.
    """
    key = context.arch_key("attention.head_count_kv")
    if context.architecture in arch.ARCHITECTURES and key not in context.gguf.fields:
        yield Found(f"{key} is missing: loaders take it as equal to the number of query heads", key=key)


@rule("M203", "hyperparameters", ERROR, needs=[Need.MODEL])
def hyperparameters(context: Context) -> Iterator[Found]:
    """The hyperparameters contradict each other.

    What. Whatever keeps the model's configuration from being read, unless a rule on single keys says it already:
    a head size that cannot be rotated, rope.dimension_count or value_length unequal to the head size.

    Why. llama.cpp aborts on some of these and computes nonsense with others.

    Case. rope.dimension_count left over from the model that a fork of the converter was made for.

    Fix. Convert the model again.
    """
    error = context.config_error
    if not isinstance(error, FormatError):
        return
    told = {found.key for check in (key_missing, key_type, key_range, heads) for found in check(context)}
    if not any(key and key in error.message for key in told) and context.arch_key("attention.head_count") not in told:
        expected = f"; expected {error.expected}" if error.expected else ""
        yield Found(error.message + expected, offset=error.offset, help=error.help)


@rule("M204", "key-length", ERROR, needs=[Need.MODEL])
def key_length(context: Context) -> Iterator[Found]:
    """attention.key_length is missing where the head size does not follow from the other numbers.

    What. Qwen3's heads have 128 channels although embedding length over head count often gives another number.

    Why. Loaders compute the head size by that division and cut the rows at the wrong places.

    Case. Qwen3-0.6B, 4B and 32B, converted by a program made for Qwen2.

    Fix. Convert the model again with a current converter.
    """
    key = context.arch_key("attention.key_length")
    described = arch.ARCHITECTURES.get(context.architecture or "")
    if described is None or not described.qk_norm or key in context.gguf.fields:
        return
    n_embd, n_head = (context.integer(context.arch_key(name)) for name in ("embedding_length", "attention.head_count"))
    norm = context.gguf.tensors.get("blk.0.attn_q_norm.weight")
    if n_embd and n_head and norm and norm.dims[:1] != (n_embd // n_head,):
        message = f"{key} is missing; blk.0.attn_q_norm.weight shows that a head has {norm.dims[0]} channels"
        yield Found(message, key=key, help=_CONVERT_AGAIN)


# -- keys against what is known ----------------------------------------------------------------------------------


@rule("M210", "rope-base", WARNING, needs=[Need.CONFIG])
def rope_base(context: Context) -> Iterator[Found]:
    """rope.freq_base is missing, or is not what published models of these dimensions have.

    What. The base of the rotary embedding. When the key is missing every loader takes 10,000, silently.

    Why. With a wrong base the first hundred tokens look fine, and then the model loses the thread.

    Case. Qwen1.5 conversions that lost their base of 1,000,000.

    Fix. Convert again, or override it at load (llama.cpp: --rope-freq-base).
    """
    assert context.config is not None
    key = context.arch_key("rope.freq_base")
    known = arch.known_models(context.config)
    bases = sorted({base for model in known for base in model.rope_bases})
    base, missing = context.config.rope_base, key not in context.gguf.fields
    if base in bases:
        return
    expected = " or ".join(f"{value:,.0f}" for value in bases)
    names = ", ".join(model.name for model in known)
    if bases:
        found = "missing, so that loaders take 10,000" if missing else f"{base:,.0f}"
        severity = ERROR if base == arch.DEFAULT_ROPE_BASE else WARNING
        message = f"{key} is {found}; models of these dimensions ({names}) have {expected}"
        yield Found(message, key=key, offset=context.place(key), value=base, severity=severity)
    elif missing:
        yield Found(f"{key} is missing: every loader silently takes 10,000", key=key)


@rule("M211", "known-dimensions", WARNING, confidence=Confidence.MEDIUM, needs=[Need.CONFIG])
def known_dimensions(context: Context) -> Iterator[Found]:
    """The hyperparameters are nearly those of a published model.

    What. Layers, embedding and feed-forward length of a known model, but other heads, epsilon or tying of the head.

    Why. A head count that is wrong in proportion fits every tensor and is visible in nothing but the output.

    Case. 7 query and 1 key heads in a copy of Qwen2.5-0.5B, which has 14 and 2.

    Fix. Compare with the original model's config.json.
    """
    config = context.config
    assert config is not None
    for model in arch.KNOWN_MODELS:
        sizes = ("arch", "n_embd", "n_layer", "n_ff")
        if any(getattr(model, name) != getattr(config, name) for name in sizes):
            continue
        if (model.n_head, model.n_head_kv) != (config.n_head, config.n_head_kv):
            key = context.arch_key("attention.head_count")
            message = (
                f"{config.n_head} query and {config.n_head_kv} key heads; {model.name}, which has the same layers and "
                f"widths, has {model.n_head} and {model.n_head_kv}"
            )
            yield Found(message, key=key, offset=context.place(key), value=config.n_head)
        if config.tied and not model.tied:
            message = f"output.weight is missing, so that loaders take token_embd; {model.name} has a head of its own"
            yield Found(message, "output.weight", severity=ERROR)


@rule("M212", "norm-epsilon", WARNING, needs=[Need.CONFIG])
def norm_epsilon(context: Context) -> Iterator[Found]:
    """The epsilon of the norms is unusual.

    What. Published models have 1e-6 or 1e-5.

    Why. A larger one weakens every small activation, a little in each layer.

    Case. An epsilon of 1e-2 typed by hand.

    Fix. Compare with rms_norm_eps in the original model's config.json.
    """
    assert context.config is not None
    eps, key = context.config.norm_eps, context.arch_key("attention.layer_norm_rms_epsilon")
    if not 0.9e-7 <= eps <= 1.1e-4:
        yield Found(f"{key} is {eps:g}; models have 1e-6 or 1e-5", key=key, offset=context.place(key), value=eps)


@rule("M213", "rope-scaling", ERROR, needs=[Need.MODEL])
def rope_scaling(context: Context) -> Iterator[Found]:
    """The rope scaling keys are incomplete.

    What. linear and yarn need a factor; yarn also needs the context length that it extends.

    Why. Without them loaders scale by one, or guess the original length: long prompts go wrong.

    Case. A scaling type copied from another model's metadata.

    Fix. Write the missing key, or remove the scaling.
    """
    kind = context.text(context.arch_key("rope.scaling.type"))
    factor = context.arch_key("rope.scaling.factor")
    if kind in ("linear", "yarn") and context.number(factor) is None:
        yield Found(f"the rope scaling is {kind!r}, but {factor} is missing", key=factor)
    original = context.arch_key("rope.scaling.original_context_length")
    if kind == "yarn" and context.integer(original) is None:
        yield Found(f"the rope scaling is 'yarn', but {original} is missing", key=original, severity=WARNING)


@rule("M214", "experts", ERROR, needs=[Need.MODEL])
def experts(context: Context) -> Iterator[Found]:
    """The numbers of experts contradict each other or the tensors.

    What. Used experts are at least one and at most all of them; stacked expert tensors have one slice each.

    Why. The router picks beyond the last expert, or divides by zero.

    Case. expert_used_count of 0.

    Fix. Convert the model again.
    """
    count_key, used_key = context.arch_key("expert_count"), context.arch_key("expert_used_count")
    count, used = context.integer(count_key), context.integer(used_key)
    if not count:
        return
    if used is not None and not 1 <= used <= count:
        yield Found(
            f"{used_key} is {used} of {count} experts", key=used_key, offset=context.place(used_key), value=used
        )
    for tensor in context.gguf.tensors.values():
        if "_exps." in tensor.name and len(tensor.dims) == 3 and tensor.dims[2] != count:
            message = f"{tensor.name!r} holds {tensor.dims[2]} experts; {count_key} is {count}"
            yield Found(message, tensor.name, count_key, value=tensor.dims[2])


@rule("M215", "projector", WARNING, needs=[Need.TENSORS])
def projector(context: Context) -> Iterator[Found]:
    """A multimodal projector does not say what it is for.

    What. clip.projector_type (or the one of its vision or audio part) and the width that it projects to.

    Why. Without them it can be paired with any model, and blinds it.

    Case. A projector of one model size loaded with the model of another.

    Fix. Take the mmproj file that was published with the model; its projection_dim must be the model's
    embedding_length.
    """
    if context.architecture != "clip":
        return
    kinds = [key for key in context.gguf.fields if key.endswith("projector_type")]
    if not kinds:
        yield Found("the projector does not say its type (clip.projector_type)", key="clip.projector_type")
    widths = {key: context.integer(key) for key in context.gguf.fields if key.endswith("projection_dim")}
    for key, width in widths.items():
        evidence = (Evidence("context", f"pair it with a model whose embedding_length is {width}", {"width": width}),)
        yield Found(f"the projector is made for models of width {width}", key=key, evidence=evidence, severity=INFO)
