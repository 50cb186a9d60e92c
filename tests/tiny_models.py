"""Small random models as real GGUF files, written with gguf-py and quantized with libgguf.

What they say is noise, but they have all that a forward pass needs: a byte vocabulary with a few merges and
special tokens, grouped queries, biases with one huge key channel as Qwen2 has, norms that are not one.
K and IQ types pack 256 elements, so their models are wider.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import libgguf
import numpy as np

#: type name → gguf-py's number; what is not here cannot be written
_TYPE_IDS = {type_.name: type_ for type_ in gguf.GGMLQuantizationType}
_FLOATS = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
_ADD = {
    str: gguf.GGUFWriter.add_string,
    int: gguf.GGUFWriter.add_uint32,
    float: gguf.GGUFWriter.add_float32,
    bool: gguf.GGUFWriter.add_bool,
}
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MERGES = ("t h", "h e", "Ġ t", "Ġt he", "i n", "e r", "a n", "o n", "r e", "Ġ a", "o u", "an d", "Ġ w", "l l")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of a tiny model. Every row length is a multiple of 32, or of 256 in `WIDE`."""

    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 16
    n_ff: int = 96
    n_layer: int = 2
    n_vocab: int = 288
    n_ctx: int = 128
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6


NARROW = Shape()
WIDE = Shape(n_embd=256, n_head=4, n_head_kv=2, head_dim=64, n_ff=512)


def tiny_model(
    path: Path,
    *,
    arch: str = "qwen2",
    type: str = "F32",  # noqa: A002 - the word for it
    tied: bool = False,
    seed: int = 0,
    shape: Shape | None = None,
    types: Mapping[str, str] | None = None,
    metadata: Mapping[str, str | int | float | bool] | None = None,
    edit: Callable[[dict[str, np.ndarray]], object] | None = None,
) -> Path:
    """Write a random model and return its path.

    Args:
        arch: `qwen2` (biases) or `qwen3` (per-head norms).
        type: of every matrix; norms and biases are F32.
        tied: leave `output.weight` out.
        shape: by default `NARROW`, or `WIDE` for types of 256 elements a block.
        types: a role (`attn_v.weight`, `output.weight`) → its own type.
        metadata: more keys; numbers become uint32 and float32.
        edit: changes the float32 weights before they are packed.
    """
    chosen = {"default": type, **(types or {})}
    blocks = max(gguf.GGML_QUANT_SIZES[_TYPE_IDS[name]][0] for name in chosen.values())
    shape = shape or (WIDE if blocks > 32 else NARROW)
    writer = gguf.GGUFWriter(path, arch)
    _write_metadata(writer, arch, shape)
    for key, value in (metadata or {}).items():
        writer.kv_data[0].pop(key, None)
        _ADD[value.__class__](writer, key, value)
    weights = tensors(arch, shape, tied=tied, seed=seed)
    if edit is not None:
        edit(weights)
    for name, values in weights.items():
        role = name.split(".", 2)[2] if name.startswith("blk.") else name
        _write_tensor(writer, name, values, chosen.get(role, chosen["default"]) if values.ndim == 2 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(arch: str, shape: Shape, *, tied: bool, seed: int) -> dict[str, np.ndarray]:
    """The random weights, float32, by name."""
    rng = np.random.default_rng(seed)
    q_width, kv_width = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim

    def matrix(n_out: int, n_in: int, gain: float = 1.0) -> np.ndarray:
        return (gain * rng.standard_normal((n_out, n_in)) / np.sqrt(n_in)).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return (1 + 0.3 * rng.standard_normal(size)).astype(np.float32)

    made = {"token_embd.weight": matrix(shape.n_vocab, shape.n_embd, 4.0)}
    for layer in range(shape.n_layer):
        of_layer = {
            "attn_norm.weight": norm(shape.n_embd),
            "attn_q.weight": matrix(q_width, shape.n_embd, 1.5),
            "attn_k.weight": matrix(kv_width, shape.n_embd, 1.5),
            "attn_v.weight": matrix(kv_width, shape.n_embd),
            "attn_output.weight": matrix(shape.n_embd, q_width),
            "ffn_norm.weight": norm(shape.n_embd),
            "ffn_gate.weight": matrix(shape.n_ff, shape.n_embd),
            "ffn_up.weight": matrix(shape.n_ff, shape.n_embd),
            "ffn_down.weight": matrix(shape.n_embd, shape.n_ff),
        }
        if arch == "qwen2":
            of_layer |= {f"attn_{x}.bias": rng.standard_normal(n).astype(np.float32) for x, n in
                         (("q", q_width), ("k", kv_width), ("v", kv_width))}  # fmt: skip
            of_layer["attn_k.bias"][shape.head_dim // 2 - 1] = -40.0  # the slowest RoPE pair, as in real files
        else:
            of_layer |= {"attn_q_norm.weight": norm(shape.head_dim), "attn_k_norm.weight": norm(shape.head_dim)}
        made |= {f"blk.{layer}.{role}": values for role, values in of_layer.items()}
    made["output_norm.weight"] = norm(shape.n_embd)
    if not tied:
        made["output.weight"] = matrix(shape.n_vocab, shape.n_embd, 3.0)
    return made


def vocabulary(n_vocab: int) -> tuple[list[str], list[int]]:
    """Tokens and their types: every byte in GPT-2's alphabet, the merges' results, special tokens, then padding."""
    ordinary = [*_byte_alphabet(), *(merge.replace(" ", "") for merge in _MERGES)]
    padding = [f"[PAD{i}]" for i in range(n_vocab - len(ordinary) - len(_SPECIAL))]
    if len(ordinary) + len(_SPECIAL) > n_vocab:
        raise ValueError(f"a vocabulary of {n_vocab} has no room for {len(ordinary) + len(_SPECIAL)} tokens")
    kinds = gguf.TokenType
    types = [kinds.NORMAL] * len(ordinary) + [kinds.CONTROL] * len(_SPECIAL) + [kinds.UNUSED] * len(padding)
    return [*ordinary, *_SPECIAL, *padding], [int(kind) for kind in types]


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes: printable bytes are themselves, the others follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _write_metadata(writer: gguf.GGUFWriter, arch: str, shape: Shape) -> None:
    tokens, types = vocabulary(shape.n_vocab)
    writer.add_name("a tiny random model")
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    if arch != "qwen2" or shape.head_dim * shape.n_head != shape.n_embd:
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(list(_MERGES))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, type_name: str) -> None:
    if type_name in _FLOATS:
        writer.add_tensor(name, values.astype(_FLOATS[type_name]))
    else:
        packed = libgguf.quantize_rows(values, int(_TYPE_IDS[type_name])).view(np.uint8)
        writer.add_tensor(name, packed, raw_dtype=_TYPE_IDS[type_name])
