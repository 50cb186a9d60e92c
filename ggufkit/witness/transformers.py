"""Hugging Face's implementation as a witness: its own modules with the file's dequantized weights.

Most steps are what goes into or comes out of a module, and are taken by hooks. Between the projections and the output
projection there are no modules, but transformers lets one name the function that attends; ours is theirs with a look
at its arguments. Two things are made anew, because no function hands them out: the products without their bias, and
the scores.

Nothing is fetched: the model is built from our Config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
import transformers

from ggufkit.arch import Config
from ggufkit.container import GGUF
from ggufkit.errors import Unsupported, UsageError
from ggufkit.runtime.engine import Edit, Logits, Which, check_ids, runnable
from ggufkit.runtime.weights import Weights
from ggufkit.steps import Array, Tap

_ATTENTION = "ggufkit_witness"

#: our architecture → the part of transformers, and the beginning of its classes' names
_FAMILIES = {"qwen2": "Qwen2", "qwen3": "Qwen3"}
#: role of a tensor → name of the parameter
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: what comes out of a layer's module
_OUTPUTS = {
    "input_layernorm": "attn_norm",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_out",
    "": "l_out",
}
#: what goes into it
_INPUTS = {"self_attn.o_proj": "kqv", "post_attention_layernorm": "ffn_inp", "mlp.down_proj": "ffn_act"}
_OUTER_OUTPUTS = {"model.embed_tokens": "embd", "model.norm": "result_norm", "lm_head": "result_output"}


class TransformersEngine:
    """transformers as an engine: see `runtime.engine.Engine`.

    Args:
        gguf: an opened file.
        dtype: of weights, activations and cache: float32 or float16.

    Raises:
        Unsupported: transformers has no such architecture here; or as `runnable`.
        UsageError: another dtype.
    """

    name = "transformers"
    device = "cpu"

    def __init__(self, gguf: GGUF, dtype: str | None = None) -> None:
        if dtype not in (None, "float32", "float16"):  # its norms are made in float32, so that float64 would be none
            raise UsageError(f"transformers does not compute in {dtype}", expected="float32 or float16")
        self.config = runnable(gguf)
        if self.config.arch not in _FAMILIES:
            message = f"{self.config.arch} is not built from transformers here"
            raise Unsupported(message, expected=" or ".join(_FAMILIES))
        self.dtype = dtype or "float32"
        transformers.AttentionInterface.register(_ATTENTION, _attend)
        transformers.AttentionMaskInterface.register(_ATTENTION, _eager_mask())
        self._model = _model(self.config, Weights(gguf, keep=False), getattr(torch, self.dtype))

    def new_cache(self, n_ctx: int) -> TransformersCache:
        return TransformersCache(n_ctx)

    def forward(
        self, ids: Sequence[int], cache: TransformersCache, *, logits: Which = "last", tap: Tap | None = None
    ) -> Logits:
        check_ids(ids, cache, self.config)
        tokens = torch.tensor([[int(token) for token in ids]])
        keep = 1 if logits == "last" else 0  # 0 means all
        with torch.inference_mode(), _watched(self._model, self.config, tap, keep):
            made = self._model(tokens, past_key_values=cache.kept, use_cache=True, logits_to_keep=keep)
        cache.length += len(ids)
        return _numpy(made.logits[0])

    def patched(self, edits: Iterable[Edit]) -> AbstractContextManager[None]:
        raise Unsupported("transformers runs the file as it is", help="patch one of our own engines")


class TransformersCache:
    """The keys and values of one sequence."""

    def __init__(self, n_ctx: int) -> None:
        self.n_ctx, self.length = n_ctx, 0
        self.kept = transformers.DynamicCache()

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        if not 0 <= length <= self.length:
            raise UsageError(f"a cache of {self.length} positions cannot be cut to {length}")
        if length == 0:
            self.kept = transformers.DynamicCache()
        elif length < self.length:
            self.kept.crop(length - self.length)  # how many to take away, as a negative number
        self.length = length


# --- building --------------------------------------------------------------------------------------------------


def _model(config: Config, weights: Weights, dtype: torch.dtype) -> Any:
    """A causal language model of transformers with the weights of a file."""
    family = _FAMILIES[config.arch]
    settings: dict[str, Any] = {} if config.rope_scale == 1 else {"rope_scaling": _linear(config.rope_scale)}
    theirs = getattr(transformers, f"{family}Config")(
        vocab_size=config.n_vocab,
        hidden_size=config.n_embd,
        intermediate_size=config.n_ff,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_head_kv,
        head_dim=config.head_dim,
        max_position_embeddings=config.n_ctx_train,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_base,
        tie_word_embeddings=config.tied,
        attn_implementation=_ATTENTION,
        **settings,
    )
    with torch.device("meta"):  # nothing is allocated, nothing drawn at random
        model = getattr(transformers, f"{family}ForCausalLM")(theirs)
    state = {_parameter(name): _tensor(weights, name, dtype) for name in weights.gguf.tensors if _parameter(name)}
    if config.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    missing = [name for name in model.state_dict() if name not in state]
    if missing:
        raise Unsupported(f"transformers {transformers.__version__} wants {missing[0]}, which this file has not")
    model.load_state_dict(state, assign=True, strict=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(theirs)  # its frequencies are no parameters
    return model.eval()


def _linear(scale: float) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": scale}


def _parameter(name: str) -> str:
    """What transformers calls a tensor of the file; empty when it has no such parameter."""
    if not name.startswith("blk."):
        return _OUTER.get(name, "")
    _, layer, role, kind = name.split(".", 3)
    return f"model.layers.{layer}.{_LAYER[role]}.{kind}" if role in _LAYER else ""


def _tensor(weights: Weights, name: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.array(weights[name])).to(dtype)


def _eager_mask() -> Callable[..., Any]:
    """The mask of transformers' plain attention: 0 and minus infinity, to be added to the scores."""
    eager: Callable[..., Any] = transformers.AttentionMaskInterface()["eager"]
    return eager


# --- watching --------------------------------------------------------------------------------------------------


class _Watch:
    """Shows tensors of the running pass to a tap."""

    def __init__(self, tap: Tap, config: Config, keep: int) -> None:
        self._tap, self.config, self._keep = tap, config, keep

    def show(self, step: str, layer: int | None, make: Callable[[], torch.Tensor]) -> None:
        """A tensor [1, T, …]; made only when the step is wanted."""
        if self._tap.wants(step, layer):
            rows = _numpy(make()[0])
            self._tap(step, layer, rows[-self._keep :] if step == "result_norm" else rows)


#: what watches the pass that is running; the attention function gets no argument of ours
_watching: _Watch | None = None


@contextmanager
def _watched(model: Any, config: Config, tap: Tap | None, keep: int) -> Iterator[None]:
    """With hooks on the modules that have something to show."""
    global _watching
    if tap is None:
        yield
        return
    _watching = _Watch(tap, config, keep)
    with ExitStack() as stack:
        for handle in _hooks(model, _watching):
            stack.callback(handle.remove)
        try:
            yield
        finally:
            _watching = None


def _hooks(model: Any, watch: _Watch) -> Iterator[Any]:
    for name, step in _OUTER_OUTPUTS.items():
        yield _after(model.get_submodule(name), watch, step, None)
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        yield from (_after(layer.get_submodule(name), watch, step, number) for name, step in _OUTPUTS.items())
        yield from (_before(layer.get_submodule(name), watch, step, number) for name, step in _INPUTS.items())
        yield from (_projected(getattr(attention, f"{kind}_proj"), watch, kind, number) for kind in "qkv")
        if watch.config.qk_norm:
            yield from (_after(getattr(attention, f"{kind}_norm"), watch, f"{kind}_norm", number) for kind in "qk")


def _after(module: Any, watch: _Watch, step: str, layer: int | None) -> Any:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        watch.show(step, layer, lambda: output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(hook)


def _before(module: Any, watch: _Watch, step: str, layer: int) -> Any:
    def hook(_module: Any, inputs: Any) -> None:
        watch.show(step, layer, lambda: inputs[0])

    return module.register_forward_pre_hook(hook)


def _projected(module: Any, watch: _Watch, kind: str, layer: int) -> Any:
    """The product alone, made anew, and the sum with the bias: torch makes both in one go."""

    def hook(_module: Any, inputs: Any, output: Any) -> None:
        watch.show(f"{kind}_proj", layer, lambda: torch.nn.functional.linear(inputs[0], module.weight))
        if module.bias is not None:
            watch.show(f"{kind}_bias", layer, lambda: output)

    return module.register_forward_hook(hook)


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own plain attention, seen from outside; query [1, H, T, D], key and value [1, K, S, D]."""
    theirs = import_module(type(module).__module__)
    mixed, shares = theirs.eager_attention_forward(module, query, key, value, mask, scaling=scaling, **rest)
    if _watching is not None:
        layer, n = module.layer_idx, query.shape[2]
        _watching.show("q_rope", layer, lambda: query.transpose(1, 2))
        _watching.show("k_rope", layer, lambda: key[:, :, -n:].transpose(1, 2))
        _watching.show("kq", layer, lambda: _scores(theirs, module, query, key, scaling).transpose(1, 2))
        _watching.show("kq_soft_max", layer, lambda: shares.transpose(1, 2))
    return mixed, shares


def _scores(theirs: Any, module: Any, query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    return torch.matmul(query, theirs.repeat_kv(key, module.num_key_value_groups).transpose(2, 3)) * scaling


def _numpy(tensor: torch.Tensor) -> Array:
    """As a NumPy array of float32 or float64."""
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()
