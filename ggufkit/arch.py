"""Architectures as data: the hyperparameters of a model, the tensors it must hold, and what is known of real ones.

An architecture is a row of `ARCHITECTURES`. Its tensors are templates whose shapes are written in letters
(E embedding, HD query width, KD key width, D head size, F feed-forward, V vocabulary rows), out-features first.
An engine runs what `read_config` accepts; the rules of `checks` compare a file with `expected_tensors`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ggufkit.container import GGUF
from ggufkit.errors import FormatError, Unsupported

MAX_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS
MAX_EXPERTS = 512
DEFAULT_ROPE_BASE = 10_000.0  # what every loader assumes, silently, when the key is missing


@dataclass(frozen=True, slots=True)
class Config:
    """The hyperparameters of a dense decoder, checked against each other.

    Attributes:
        n_vocab: rows of token_embd (padding included).
        head_dim: channels of a head; not always n_embd / n_head.
        rope_base: theta of the rotary embedding; channel pair i turns by position · base^(-2i/head_dim).
        rope_scale: positions are divided by it (linear scaling); 1 for none.
        tied: the head is token_embd.
        qkv_bias, qk_norm: what the architecture adds to the projections.
    """

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    norm_eps: float
    rope_base: float
    rope_scale: float = 1.0
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def q_width(self) -> int:
        return self.n_head * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.n_head_kv * self.head_dim

    def sizes(self) -> dict[str, int]:
        """The letters of the shapes."""
        return {
            "E": self.n_embd,
            "F": self.n_ff,
            "V": self.n_vocab,
            "D": self.head_dim,
            "HD": self.q_width,
            "KD": self.kv_width,
        }


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of an architecture: `blk.{}.` names stand for every layer; `shape` is in letters."""

    name: str
    shape: tuple[str, ...]
    required: bool = True


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the table."""

    name: str
    tensors: tuple[TensorSpec, ...]
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor that a model of some Config must or may hold."""

    name: str
    shape: tuple[int, ...]
    role: str
    layer: int | None
    required: bool


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A published model's hyperparameters (from its configuration file)."""

    name: str
    arch: str
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    tied: bool
    n_vocab: int
    rope_bases: tuple[float, ...]


_OUTER = (
    TensorSpec("token_embd.weight", ("V", "E")),
    TensorSpec("output_norm.weight", ("E",)),
    TensorSpec("output.weight", ("V", "E"), required=False),
)
_LAYER = (
    TensorSpec("blk.{}.attn_norm.weight", ("E",)),
    TensorSpec("blk.{}.attn_q.weight", ("HD", "E")),
    TensorSpec("blk.{}.attn_k.weight", ("KD", "E")),
    TensorSpec("blk.{}.attn_v.weight", ("KD", "E")),
    TensorSpec("blk.{}.attn_output.weight", ("E", "HD")),
    TensorSpec("blk.{}.ffn_norm.weight", ("E",)),
    TensorSpec("blk.{}.ffn_gate.weight", ("F", "E")),
    TensorSpec("blk.{}.ffn_up.weight", ("F", "E")),
    TensorSpec("blk.{}.ffn_down.weight", ("E", "F")),
)
_QKV_BIAS = (
    TensorSpec("blk.{}.attn_q.bias", ("HD",)),
    TensorSpec("blk.{}.attn_k.bias", ("KD",)),
    TensorSpec("blk.{}.attn_v.bias", ("KD",)),
)
_QK_NORM = (
    TensorSpec("blk.{}.attn_q_norm.weight", ("D",)),
    TensorSpec("blk.{}.attn_k_norm.weight", ("D",)),
)

#: what ggufkit can run. Loaders treat Qwen2's biases as optional; the model does not: they are mandatory here
ARCHITECTURES: dict[str, Architecture] = {
    "qwen2": Architecture("qwen2", (*_OUTER, *_LAYER, *_QKV_BIAS), qkv_bias=True),
    "qwen3": Architecture("qwen3", (*_OUTER, *_LAYER, *_QK_NORM), qk_norm=True),
}

#: architectures whose query, key and value projections carry biases that cannot be left out
BIAS_ARCHITECTURES = frozenset({"qwen2", "qwen2moe", "qwen2vl"})

KNOWN_MODELS: tuple[KnownModel, ...] = (
    KnownModel("Qwen2.5-0.5B", "qwen2", 896, 24, 14, 2, 4864, True, 151936, (1e6,)),
    KnownModel("Qwen2.5-1.5B", "qwen2", 1536, 28, 12, 2, 8960, True, 151936, (1e6,)),
    KnownModel("Qwen2.5-3B", "qwen2", 2048, 36, 16, 2, 11008, True, 151936, (1e6,)),
    KnownModel("Qwen2.5-7B", "qwen2", 3584, 28, 28, 4, 18944, False, 152064, (1e6, 1e7)),
    KnownModel("Qwen2.5-14B", "qwen2", 5120, 48, 40, 8, 13824, False, 152064, (1e6, 1e7)),
    KnownModel("Qwen2.5-32B", "qwen2", 5120, 64, 40, 8, 27648, False, 152064, (1e6,)),
    KnownModel("Qwen3-0.6B", "qwen3", 1024, 28, 16, 8, 3072, True, 151936, (1e6,)),
    KnownModel("Qwen3-4B", "qwen3", 2560, 36, 32, 8, 9728, True, 151936, (1e6, 5e6)),
    KnownModel("Qwen3-8B", "qwen3", 4096, 36, 32, 8, 12288, False, 151936, (1e6,)),
    KnownModel("Qwen3-32B", "qwen3", 5120, 64, 64, 8, 25600, False, 151936, (1e6,)),
)

_LAYER_NAME = re.compile(r"blk\.(\d{1,6})\.(.+)")


def role_of(name: str) -> tuple[str, int | None]:
    """What a tensor is for, and its layer: `blk.7.attn_k.bias` → (`attn_k.bias`, 7)."""
    match = _LAYER_NAME.fullmatch(name)
    return (match[2], int(match[1])) if match else (name, None)


def expected_tensors(config: Config) -> dict[str, Expected]:
    """Every tensor that a model of this Config must or may hold, by name, in the order of the forward pass."""
    sizes = config.sizes()
    expected = {}
    for spec in ARCHITECTURES[config.arch].tensors:
        for layer in range(config.n_layer) if "{}" in spec.name else (None,):
            name = spec.name.format(layer)
            shape = tuple(sizes[letter] for letter in spec.shape)
            expected[name] = Expected(name, shape, role_of(name)[0], layer, spec.required)
    return expected


def known_models(config: Config) -> list[KnownModel]:
    """The published models with these dimensions."""
    keys = ("arch", "n_embd", "n_layer", "n_head", "n_head_kv", "n_ff")
    return [known for known in KNOWN_MODELS if all(getattr(known, key) == getattr(config, key) for key in keys)]


def read_config(gguf: GGUF) -> Config:
    """The hyperparameters of an opened file.

    Raises:
        Unsupported: the architecture, or its rope scaling, is not modelled here.
        FormatError: a key is missing, of the wrong type or range, or contradicts another.
    """
    keys = _Keys(gguf)
    arch = ARCHITECTURES.get(gguf.architecture or "")
    if arch is None:
        modelled = ", ".join(sorted(ARCHITECTURES))
        raise Unsupported(f"the architecture {gguf.architecture!r} is not modelled here", expected=modelled)
    n_embd = keys.integer("embedding_length", 1, 1 << 20)
    n_head = keys.integer("attention.head_count", 1, 1 << 14)
    head_dim = keys.integer("attention.key_length", 1, 1 << 14, default=n_embd // n_head)
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.dims) != 2:
        raise FormatError("token_embd.weight is missing or no matrix", path=str(gguf.path))
    config = Config(
        arch=arch.name,
        n_layer=keys.integer("block_count", 1, MAX_LAYERS),
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=keys.integer("attention.head_count_kv", 1, 1 << 14, default=n_head),
        head_dim=head_dim,
        n_ff=keys.integer("feed_forward_length", 1, 1 << 22),
        n_vocab=embedding.shape[0],
        n_ctx_train=keys.integer("context_length", 1, 1 << 30),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", 0.0, 1.0),
        rope_base=keys.number("rope.freq_base", 1.0, 1e12, default=DEFAULT_ROPE_BASE),
        rope_scale=_rope_scale(gguf, keys),
        tied="output.weight" not in gguf.tensors,
        qkv_bias=arch.qkv_bias,
        qk_norm=arch.qk_norm,
    )
    _consistent(config, keys)
    return config


def _rope_scale(gguf: GGUF, keys: _Keys) -> float:
    kind = gguf.metadata.get(keys.name("rope.scaling.type"), "none")
    if kind == "none":
        return 1.0
    if kind != "linear":
        raise Unsupported(f"rope scaling of type {kind!r} is not modelled here", expected="none or linear")
    return keys.number("rope.scaling.factor", 1e-3, 1e6, default=1.0)


def _consistent(config: Config, keys: _Keys) -> None:
    if config.n_head % config.n_head_kv:
        message = f"{config.n_head} query heads cannot share {config.n_head_kv} key heads evenly"
        raise FormatError(message, path=keys.path, help=f"check {keys.name('attention.head_count_kv')}")
    if config.head_dim % 2:
        raise FormatError(f"a head of {config.head_dim} channels cannot be rotated in pairs", path=keys.path)
    for key in ("attention.value_length", "rope.dimension_count"):
        value = keys.integer(key, 1, 1 << 14, default=config.head_dim)
        if value != config.head_dim:
            message = f"{keys.name(key)} is {value} where a head has {config.head_dim} channels"
            raise FormatError(message, path=keys.path, expected=str(config.head_dim))


class _Keys:
    """Typed access to `ARCH.something`."""

    def __init__(self, gguf: GGUF) -> None:
        self._gguf = gguf
        self._arch = gguf.architecture
        self.path = str(gguf.path)

    def name(self, key: str) -> str:
        return f"{self._arch}.{key}"

    def integer(self, key: str, low: int, high: int, *, default: int | None = None) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._wrong(key, value, f"an integer from {low:,} to {high:,}")
        return value

    def number(self, key: str, low: float, high: float, *, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise self._wrong(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def _value(self, key: str, default: Any) -> Any:
        name = self.name(key)
        if name in self._gguf.fields:
            return self._gguf.metadata[name]
        if default is None:
            raise FormatError(f"the key {name} is missing", path=self.path, help="convert the model again")
        return default

    def _wrong(self, key: str, value: Any, expected: str) -> FormatError:
        field = self._gguf.fields.get(self.name(key))
        shown = repr(value) if isinstance(value, int | float | str) else field.type_name if field else "missing"
        return FormatError(
            f"{self.name(key)} is {shown[:80]}",
            path=self.path,
            offset=field.value_offset if field else None,
            expected=expected,
        )
