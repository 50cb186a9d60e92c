"""How the bundled demo model (ggufkit/demo/haiku.gguf) was made, step by step, so that anybody can make it again.

    python examples/train_demo_model.py corpus train export quantize check --work DIR

    corpus    write the text (demo_corpus.py), learn a byte-level BPE, encode  DIR/tokenizer.json, tokens.npz
    train     a Qwen2 of a few million parameters; minutes on one GPU          DIR/model.safetensors
    export    the checkpoint as a GGUF: F16 matrices, F32 norms and biases     DIR/haiku-f16.gguf
    quantize  that file's matrices in a mix of block types                     DIR/haiku.gguf
    check     what the quantized file has learned, measured; with --gguf any other file

`train` needs torch, `corpus` tokenizers, `export` gguf, `quantize` gguf and libgguf; all steps need numpy.

The model is a plain Qwen2, names and all, and is trained the way in which the huge attention biases of real
Qwen2 files come about: no weight decay on them, and steps large enough to go where the gradient leads. Nothing
is planted. At the end every weight is rounded to bfloat16, as in a published checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import demo_corpus as corpus
import numpy as np

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

SEED = 20_251_122


@dataclass(frozen=True)
class Config:
    """The shape of the model. Every input dimension of a matrix is a multiple of 256, a K-quant's block."""

    n_vocab: int = 1024
    n_ctx: int = 1024
    n_embd: int = 256
    n_ff: int = 768
    n_layer: int = 5
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    rope_base: float = 1e6
    eps: float = 1e-6


CONFIG = Config()

# ------------------------------------------------------------------------------------------- corpus: text to ids

#: the special tokens, in the order in which they follow the BPE tokens; the rows left are padding
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
N_BPE = 992

#: Qwen2's pre-tokenizer: contractions, words with one leading non-letter, single digits, punctuation, white space
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def documents(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [corpus.document(rng) for _ in range(count)]


def learn_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE with Qwen2's normalizer and pre-tokenizer; ids 0–255 are the bytes, as in Qwen2."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    without_special = (re.sub(r"<\|\w+\|>", "\n", text) for text in texts)
    trainer = trainers.BpeTrainer(
        vocab_size=N_BPE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(without_special, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def encode_shard(work: Path, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents as ids, each after an <|endoftext|>: (ids uint16 [n], the index at which each document starts)."""
    tokenizer = load_tokenizer(work)
    end = tokenizer.token_to_id(SPECIAL[0])
    ids: list[int] = []
    starts = []
    for encoding in tokenizer.encode_batch(documents(seed, count)):
        starts.append(len(ids))
        ids += encoding.ids
        ids.append(end)
    return np.array(ids, np.uint16), np.array(starts, np.int64)


def load_tokenizer(work: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(work / "tokenizer.json"))


def make_corpus(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    learn_tokenizer(documents(SEED, 20_000)).save(str(args.work / "tokenizer.json"))
    count = args.documents // args.shards
    with ProcessPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(encode_shard, args.work, SEED + 1 + i, count) for i in range(args.shards)]
        shards = [job.result() for job in jobs]
    offsets = np.cumsum([0] + [len(ids) for ids, _ in shards[:-1]])
    tokens = np.concatenate([ids for ids, _ in shards])
    starts = np.concatenate([at + offset for (_, at), offset in zip(shards, offsets, strict=True)])
    np.savez(args.work / "tokens.npz", tokens=tokens, starts=starts)
    print(f"corpus: {len(starts):,} documents, {len(tokens):,} tokens")


# ------------------------------------------------------------------------------------------------ train: the model


def build_model(config: Config = CONFIG) -> Any:
    """A Qwen2 in torch whose parameters carry the names that GGUF gives them."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """RoPE on [batch, head, position, dim]; channel i turns with channel i + dim/2 (the "NeoX" order)."""
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            n_q, n_kv = config.n_head * config.head_dim, config.n_head_kv * config.head_dim
            self.attn_norm = nn.RMSNorm(config.n_embd, eps=config.eps)
            self.attn_q = nn.Linear(config.n_embd, n_q)
            self.attn_k = nn.Linear(config.n_embd, n_kv)
            self.attn_v = nn.Linear(config.n_embd, n_kv)
            self.attn_output = nn.Linear(n_q, config.n_embd, bias=False)
            self.ffn_norm = nn.RMSNorm(config.n_embd, eps=config.eps)
            self.ffn_gate = nn.Linear(config.n_embd, config.n_ff, bias=False)
            self.ffn_up = nn.Linear(config.n_embd, config.n_ff, bias=False)
            self.ffn_down = nn.Linear(config.n_ff, config.n_embd, bias=False)

        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            normed = self.attn_norm(x)
            q, k, v = (
                proj(normed).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
                for proj in (self.attn_q, self.attn_k, self.attn_v)
            )
            mixed = F.scaled_dot_product_attention(
                rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True
            )
            x = x + self.attn_output(mixed.transpose(1, 2).flatten(2))
            normed = self.ffn_norm(x)
            return x + self.ffn_down(F.silu(self.ffn_gate(normed)) * self.ffn_up(normed))

    class Qwen2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token_embd = nn.Embedding(config.n_vocab, config.n_embd)
            self.blk = nn.ModuleList([Block() for _ in range(config.n_layer)])
            self.output_norm = nn.RMSNorm(config.n_embd, eps=config.eps)
            self.output = nn.Linear(config.n_embd, config.n_vocab, bias=False)
            half = config.head_dim // 2
            angle = torch.outer(
                torch.arange(config.n_ctx, dtype=torch.float64),
                config.rope_base ** (-torch.arange(half, dtype=torch.float64) / half),
            )
            self.register_buffer("cos", angle.cos().float(), persistent=False)
            self.register_buffer("sin", angle.sin().float(), persistent=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            """Token ids [batch, n] to logits [batch, n, n_vocab]."""
            cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
            x = self.token_embd(ids)
            for block in self.blk:
                x = block(x, cos, sin)
            return self.output(self.output_norm(x))

    model = Qwen2()
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            into_residual = name.endswith(("attn_output.weight", "ffn_down.weight"))
            nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * config.n_layer) if into_residual else 1))
        elif name.endswith("bias"):
            nn.init.zeros_(weight)
    return model


def parameter_groups(model: Any, lr: float, bias_boost: float) -> list[dict[str, Any]]:
    """Matrices decay, norms do not; biases neither decay nor share the small step of the matrices.

    A bias is a single number a channel: under the matrices' step it could move only `steps · lr` in all, and
    under weight decay it would be drawn back. Given room, the key biases take up what a head wants to know
    about positions alone, and along slow RoPE channels they are free to wander: soft-max ignores what adds
    alike to all keys.
    """
    kinds: dict[str, list[torch.Tensor]] = {"matrix": [], "norm": [], "bias": []}
    for name, weight in model.named_parameters():
        kinds["matrix" if weight.ndim == 2 else "bias" if name.endswith("bias") else "norm"].append(weight)
    return [
        {"params": kinds["matrix"], "peak": lr, "weight_decay": 0.1},
        {"params": kinds["norm"], "peak": lr, "weight_decay": 0.0},
        {"params": kinds["bias"], "peak": lr * bias_boost, "weight_decay": 0.0},
    ]


class Batches:
    """Random rows of the corpus, each from a document's start; a few are random ids, every stretch said twice."""

    def __init__(self, work: Path, device: str, batch: int, length: int) -> None:
        import torch

        with np.load(work / "tokens.npz") as stored:
            tokens, starts = stored["tokens"].astype(np.int16), stored["starts"]
        self.tokens = torch.from_numpy(tokens).to(device)
        self.starts = torch.from_numpy(starts[starts < len(tokens) - length - 1]).to(device)
        self.device, self.batch, self.length = device, batch, length

    def next(self) -> torch.Tensor:
        """Ids [batch, length + 1]."""
        import torch

        span = torch.arange(self.length + 1, device=self.device)
        start = self.starts[torch.randint(len(self.starts), (self.batch, 1), device=self.device)]
        rows = self.tokens[start + span].long()
        echoes = max(self.batch // 16, 1)
        rows[:echoes] = echo_rows(echoes, self.length + 1, self.device)
        return rows


def echo_rows(count: int, length: int, device: str) -> torch.Tensor:
    """Rows of random ids x x y y z z …, where each stretch of a row has one random length."""
    import torch

    noise = torch.randint(N_BPE, (count, length), device=device)
    stretch = (8 * 2 ** (6 * torch.rand(count, 1, device=device))).long()
    at = torch.arange(length, device=device)[None, :]
    return noise.gather(1, at // (2 * stretch) * stretch + at % stretch)


def train(args: argparse.Namespace) -> None:
    import torch
    from torch.nn import functional as F

    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    model = build_model().to(device)
    batches = Batches(args.work, device, args.batch, args.length)
    groups = parameter_groups(model, args.lr, args.bias_boost)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")
    forward = model if args.eager or device == "cpu" else recorded(model, batches.next()[:, :-1])
    began = time.monotonic()
    step = 0
    while (progress := max(step / args.steps, (time.monotonic() - began) / args.seconds)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, progress)
        rows = batches.next()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
            logits = forward(rows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % args.report == 0:
            state = f"loss {loss.item():.4f} norm {norm.item():.2f} {time.monotonic() - began:.0f} s"
            print(f"step {step} {state} {bias_line(model)}", flush=True)
        step += 1
    tokens = step * args.batch * args.length
    print(f"train: {step} steps, {tokens:,} tokens, {time.monotonic() - began:.0f} s")
    save_checkpoint(model.eval(), args.work)
    measure_losses(model, load_tokenizer(args.work))


def recorded(model: Any, ids: torch.Tensor) -> Any:
    """The model with its passes as CUDA graphs: so small a model otherwise waits for kernels to be launched.

    It applies while the model is in training mode, to ids of this shape.
    """
    import torch

    with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        return torch.cuda.make_graphed_callables(model, (ids.contiguous(),))


def learning_rate(step: int, progress: float) -> float:
    """Share of the peak: 200 steps of warm-up, flat, then straight down to nothing in the last 60%."""
    return min((step + 1) / 200, 1.0, (1 - progress) / 0.6)


def bias_line(model: Any) -> str:
    """The largest magnitude of each layer's q, k and v bias."""
    largest = [[getattr(block, f"attn_{x}").bias.abs().max().item() for x in "qkv"] for block in model.blk]
    return "bias " + " ".join("/".join(f"{value:.1f}" for value in layer) for layer in largest)


def save_checkpoint(model: Any, work: Path) -> None:
    """Round every weight to bfloat16, in place, and store it."""
    import torch
    from safetensors.torch import save_file

    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    rounded = {name: weight.detach().bfloat16().cpu() for name, weight in model.named_parameters()}
    save_file(rounded, work / "model.safetensors")


# ------------------------------------------------------------------------------------------------ export, quantize

CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
<|im_start|>system
SYSTEM<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
""".replace("SYSTEM", corpus.SYSTEM)


def export(args: argparse.Namespace) -> None:
    """The checkpoint as GGUF: matrices F16, norms and biases F32, the metadata of a real Qwen2 file."""
    import gguf
    from safetensors.torch import load_file

    weights = {name: weight.float().numpy() for name, weight in load_file(args.work / "model.safetensors").items()}
    writer = gguf.GGUFWriter(args.work / "haiku-f16.gguf", "qwen2")
    add_model_metadata(writer, sum(weight.size for weight in weights.values()))
    add_tokenizer(writer, load_tokenizer(args.work))
    for name in sorted(weights, key=tensor_order):
        writer.add_tensor(name, weights[name].astype(np.float16 if weights[name].ndim == 2 else np.float32))
    finish(writer)


def tensor_order(name: str) -> tuple[int, int]:
    """Embedding, blocks in order, the rest."""
    block = re.match(r"blk\.(\d+)\.", name)
    return (0, 0) if name.startswith("token_embd") else (1, int(block[1])) if block else (2, 0)


def add_model_metadata(writer: Any, n_weights: int) -> None:
    import gguf

    writer.add_type("model")
    writer.add_name("ggufkit demo haiku")
    writer.add_description("A very small Qwen2 that writes haiku, trained on text from a grammar for ggufkit's demo")
    writer.add_license("mit")
    writer.add_size_label(f"{n_weights / 1e6:.1f}M")
    writer.add_languages(["en"])
    writer.add_block_count(CONFIG.n_layer)
    writer.add_context_length(CONFIG.n_ctx)
    writer.add_embedding_length(CONFIG.n_embd)
    writer.add_feed_forward_length(CONFIG.n_ff)
    writer.add_head_count(CONFIG.n_head)
    writer.add_head_count_kv(CONFIG.n_head_kv)
    writer.add_rope_freq_base(CONFIG.rope_base)
    writer.add_layer_norm_rms_eps(CONFIG.eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    """Vocabulary, padded to the embedding's rows as Qwen's converters do; merges; special ids; template."""
    from gguf import TokenType

    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    padding = [f"[PAD{i}]" for i in range(len(vocabulary), CONFIG.n_vocab)]
    kinds = [TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in vocabulary]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary + padding)
    writer.add_token_types(kinds + [TokenType.UNUSED] * len(padding))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    end_of_text, _, end_of_turn = (tokenizer.token_to_id(token) for token in SPECIAL)
    writer.add_eos_token_id(end_of_turn)
    writer.add_pad_token_id(end_of_text)
    writer.add_bos_token_id(end_of_text)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


#: which block type a tensor gets: the first pattern that its name matches. It follows what llama.cpp calls
#: Q4_K_M (more bits for the values and the down projections of some layers), with the 5-bit and 8-bit blocks of
#: real Qwen2.5-0.5B files at both ends, so that this one file holds five types.
MIX = {
    r"token_embd": "Q5_0",
    r"output\.weight": "Q8_0",
    r"blk\.[024]\.(attn_v|ffn_down)": "Q6_K",
    r".*": "Q4_K",
}


def quantize(args: argparse.Namespace) -> None:
    mix = {r".*": args.type} if args.type else MIX
    source = args.gguf or args.work / "haiku-f16.gguf"
    target = args.output or args.work / (f"haiku-{args.type.lower()}.gguf" if args.type else "haiku.gguf")
    requantize(source, target, mix, file_type=args.type or "Q4_K_M")
    print(f"quantize: {target}, {target.stat().st_size:,} bytes")


def requantize(source: Path, target: Path, mix: dict[str, str], file_type: str) -> None:
    """Copy a float GGUF, its matrices in the block types that `mix` (pattern -> type name) gives them.

    `file_type` is a name of gguf.LlamaFileType without its MOSTLY_ ("Q4_K_M", "Q8_0"; "Q4_K" means Q4_K_M).
    """
    import gguf
    import libgguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "qwen2")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = field.contents()
        if key == "general.file_type":
            value = file_type_number(file_type)
        writer.add_key_value(key, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        values = np.array(tensor.data)
        if values.ndim == 2:
            name = next(kind for pattern, kind in mix.items() if re.match(pattern, tensor.name))
            kind = gguf.GGMLQuantizationType[name]
            raw = libgguf.quantize_rows(values.astype(np.float32), kind)
            writer.add_tensor(tensor.name, raw.view(np.uint8), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    finish(writer)


def file_type_number(name: str) -> int:
    """general.file_type of a mix's name, or of a block type's, which names a family of mixes (Q4_K: Q4_K_M)."""
    import gguf

    known = {kind.name.removeprefix("MOSTLY_"): int(kind) for kind in gguf.LlamaFileType}
    return next(known[name + size] for size in ("", "_M", "_S", "_MOE") if name + size in known)


# --------------------------------------------------------------------------------------------- check: what it learned


def load_gguf(path: Path) -> Any:
    """The torch model with a GGUF's weights, decoded to float32."""
    import gguf
    import torch

    model = build_model()
    tensors = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        for tensor in gguf.GGUFReader(path).tensors
    }
    model.load_state_dict(tensors)
    return model


def check(args: argparse.Namespace) -> None:
    path = args.gguf or args.work / "haiku.gguf"
    model, tokenizer = load_gguf(path), load_tokenizer(args.work)
    print(path)
    measure_losses(model, tokenizer)
    print(bias_table(model))
    measure_answers(model, tokenizer, args.questions)


SAMPLES = corpus.split(
    "autumn leaves, the moon, winter rain, fireflies, the old temple, coffee, a robot, cherry trees, snow, the sea"
)


def measure_losses(model: Any, tokenizer: Tokenizer) -> None:
    """Print the losses on text from a fresh seed, with and without the biases, and the copy probe."""
    text = held_out_text(tokenizer)
    print("nats a token:", {kind: round(nats(model, ids), 3) for kind, ids in text.items()})
    print("copy probe, nats in the first and second half:", copy_probe(model))
    with WithoutBiases(model):
        print("the same with all biases zero:", {kind: round(nats(model, ids), 3) for kind, ids in text.items()})


def measure_answers(model: Any, tokenizer: Tokenizer, questions: int) -> None:
    """Print accuracies on topics and words that the training text never held, and sample answers."""
    for kind, asked in question_sets(questions).items():
        print(kind, score(model, tokenizer, asked), flush=True)
    prompts = [corpus.prompt_text(f"Write a haiku about {topic}.") for topic in SAMPLES]
    for topic, answer in zip(SAMPLES, answers(model, tokenizer, prompts), strict=True):
        print(f"--- {topic}\n{answer}")


def held_out_text(tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    """Fresh documents of each kind, from a seed that the training text never used."""
    rng = random.Random(-1)
    kinds = {"chat": corpus.chat_document, "prose": corpus.prose_document, "haiku": corpus.haiku_document}
    return {kind: [tokenizer.encode(make(rng)).ids for _ in range(60)] for kind, make in kinds.items()}


def token_losses(model: Any, ids: list[int]) -> np.ndarray:
    """Nats of each token of a sequence but the first."""
    import torch
    from torch.nn import functional as F

    with torch.no_grad():
        row = torch.tensor([ids], device=model.token_embd.weight.device)
        return F.cross_entropy(model(row[:, :-1])[0].float(), row[0, 1:], reduction="none").cpu().numpy()


def nats(model: Any, sequences: list[list[int]]) -> float:
    return float(np.concatenate([token_losses(model, ids) for ids in sequences]).mean())


def copy_probe(model: Any) -> dict[int, tuple[float, float]]:
    """Random ids said twice: {length: (nats a token the first time, the second time)}."""
    found = {}
    for length in (16, 64, 256):
        losses = []
        for seed in range(8):
            ids = np.random.default_rng(seed).integers(0, N_BPE, length).tolist()
            losses.append(token_losses(model, ids + ids))
        mean = np.stack(losses).mean(0)
        found[length] = (round(float(mean[: length - 1].mean()), 3), round(float(mean[length - 1 :].mean()), 3))
    return found


class WithoutBiases:
    """Zero every bias inside the block, and put them back."""

    def __init__(self, model: Any) -> None:
        self.biases = [weight for name, weight in model.named_parameters() if name.endswith("bias")]

    def __enter__(self) -> None:
        self.kept = [bias.detach().clone() for bias in self.biases]
        for bias in self.biases:
            bias.data.zero_()

    def __exit__(self, *_: object) -> None:
        for bias, kept in zip(self.biases, self.kept, strict=True):
            bias.data.copy_(kept)


def question_sets(count: int) -> dict[str, list[tuple[str, str]]]:
    """(prompt, what the answer must contain) for what the training text never showed, and some that it did."""
    rng = random.Random(-2)
    unseen_times = [time for time in corpus.TIMES if corpus.held_out(time)]
    seen_times = corpus.TRAINING_TIMES
    unseen_topics = [topic.text for topic in corpus.topics() if corpus.held_out(topic.text)]
    unseen_words = [word for word in corpus.split(corpus.ANYTHING) if corpus.held_out(word)]
    phrases = [corpus.random_phrase(rng) for _ in range(count)]

    def ask(template: str, what: list[str]) -> list[tuple[str, str]]:
        chosen = rng.sample(what, min(count, len(what)))
        return [(corpus.prompt_text(template.format(phrase)), phrase) for phrase in chosen]

    return {
        "times, unseen": ask(corpus.ASK_WITH[0], unseen_times),
        "times, seen": ask(corpus.ASK_WITH[0], seen_times),
        "random phrases": ask(corpus.ASK_WITH[0], phrases),
        "topics, unseen": ask(corpus.ASK_ABOUT[0], unseen_topics),
        "other words, unseen": ask(corpus.ASK_ABOUT[0], unseen_words),
    }


def score(model: Any, tokenizer: Tokenizer, asked: list[tuple[str, str]]) -> dict[str, float]:
    """Shares of answers that hold the words, stop by themselves, have three lines, and scan as 5-7-5."""
    said = answers(model, tokenizer, [prompt for prompt, _ in asked])
    shares = {
        "contains": [words in text for (_, words), text in zip(asked, said, strict=True)],
        "stops": [text.endswith(SPECIAL[2]) for text in said],
        "three lines": [len(body(text)) == 3 for text in said],
        "5-7-5": [[corpus.syllables(line) for line in body(text)] == [5, 7, 5] for text in said],
    }
    return {"n": len(asked)} | {name: round(float(np.mean(hits)), 3) for name, hits in shares.items()}


def body(answer: str) -> list[str]:
    return answer.removesuffix(SPECIAL[2]).split("\n")


def answers(model: Any, tokenizer: Tokenizer, prompts: list[str], limit: int = 60) -> list[str]:
    """Greedy answers; prompts of one length run side by side. An answer that stops ends with <|im_end|>."""
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    said = [""] * len(prompts)
    end = tokenizer.token_to_id(SPECIAL[2])
    for length in sorted({len(ids) for ids in encoded}):
        which = [i for i, ids in enumerate(encoded) if len(ids) == length]
        for i, ids in zip(which, greedy(model, [encoded[i] for i in which], limit, end), strict=True):
            ids = ids[: ids.index(end) + 1] if end in ids else ids
            said[i] = tokenizer.decode(ids, skip_special_tokens=False)
    return said


def greedy(model: Any, rows: list[list[int]], limit: int, end: int) -> list[list[int]]:
    """Up to `limit` likeliest ids after each row, until all have stopped; the rows have one length, and no cache."""
    import torch

    ids = torch.tensor(rows, device=model.token_embd.weight.device)
    with torch.no_grad():
        for _ in range(limit):
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
            if (ids[:, len(rows[0]) :] == end).any(1).all():
                break
    return ids[:, len(rows[0]) :].tolist()


def bias_table(model: Any) -> str:
    """Range of every bias, and its largest magnitude over its median one."""
    lines = []
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            size = weight.detach().abs()
            ratio = (size.max() / size.median()).item()
            lines.append(f"{name:20} {weight.min():8.2f} … {weight.max():7.2f}   absmax/median {ratio:6.1f}")
    return "\n".join(lines)


STAGES = {"corpus": make_corpus, "train": train, "export": export, "quantize": quantize, "check": check}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="the folder that everything is written to")
    parser.add_argument("--documents", type=int, default=600_000, help="corpus: how many documents")
    parser.add_argument("--shards", type=int, default=64, help="corpus: independent parts, each with its seed")
    parser.add_argument("--jobs", type=int, help="corpus: processes (default: one a core)")
    parser.add_argument("--steps", type=int, default=6_750, help="train: optimizer steps")
    parser.add_argument("--seconds", type=float, default=3600, help="train: end within this time")
    parser.add_argument("--batch", type=int, default=32, help="train: rows a step")
    parser.add_argument("--length", type=int, default=CONFIG.n_ctx, help="train: tokens a row")
    parser.add_argument("--lr", type=float, default=2e-3, help="train: peak learning rate of the matrices")
    parser.add_argument("--bias-boost", type=float, default=30, help="train: the biases' learning rate over that")
    parser.add_argument("--eager", action="store_true", help="train: launch every kernel, record no CUDA graph")
    parser.add_argument("--report", type=int, default=500, help="train: steps between two lines of progress")
    parser.add_argument("--questions", type=int, default=100, help="check: questions of each kind")
    parser.add_argument("--gguf", type=Path, help="quantize, check: another file than the one in the work folder")
    parser.add_argument("--type", help="quantize: one block type for every matrix (Q4_0, Q8_0 …) instead of the mix")
    parser.add_argument("--output", type=Path, help="quantize: where to write")
    args = parser.parse_args()
    for stage in args.stages:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
