"""llama.cpp as a witness: its own graph, node by node, through the evaluation callback of its scheduler.

llama.cpp uses a name several times (`Qcur-0` is the product, then the sum with the bias, then the rotated value)
and leaves others without one, so that a node is recognised by its operation and by what goes into it: a product with
`blk.0.attn_q.weight` is `q_proj-0`, whatever it is called. The numbers are there only while the callback runs.

A node's sizes, strides and inputs are read from ggml's own struct, which is no stable interface: before anything of it
is believed, it is held against what ggml's functions say of the same node.

Everything runs on the CPU, without flash attention (which makes no scores), and in one piece.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._ggml import libggml

from ggufkit.container import GGUF
from ggufkit.errors import Unsupported, UsageError
from ggufkit.runtime.engine import Edit, Logits, Which, check_ids, runnable
from ggufkit.steps import Array, Tap

#: operation, and the role of the tensor that goes into it → step
_BY_TENSOR = {
    ("GET_ROWS", "token_embd.weight"): "embd",
    ("MUL", "attn_norm.weight"): "attn_norm",
    ("MUL_MAT", "attn_q.weight"): "q_proj",
    ("MUL_MAT", "attn_k.weight"): "k_proj",
    ("MUL_MAT", "attn_v.weight"): "v_proj",
    ("ADD", "attn_q.bias"): "q_bias",
    ("ADD", "attn_k.bias"): "k_bias",
    ("ADD", "attn_v.bias"): "v_bias",
    ("MUL", "attn_q_norm.weight"): "q_norm",
    ("MUL", "attn_k_norm.weight"): "k_norm",
    ("MUL_MAT", "attn_output.weight"): "attn_out",
    ("MUL", "ffn_norm.weight"): "ffn_norm",
    ("MUL_MAT", "ffn_gate.weight"): "ffn_gate",
    ("MUL_MAT", "ffn_up.weight"): "ffn_up",
    ("MUL_MAT", "ffn_down.weight"): "ffn_out",
    ("MUL", "output_norm.weight"): "result_norm",
    ("MUL_MAT", "output.weight"): "result_output",
    ("MUL_MAT", "token_embd.weight"): "result_output",
}
#: operation, and what llama.cpp calls its result → step
_BY_NAME = {
    ("ROPE", "Qcur"): "q_rope",
    ("ROPE", "Kcur"): "k_rope",
    ("MUL_MAT", "kq"): "kq",
    ("SOFT_MAX", "kq_soft_max"): "kq_soft_max",
    ("CONT", "kqv_out"): "kqv",
    ("ADD", "ffn_inp"): "ffn_inp",
    ("SWIGLU", "ffn_swiglu"): "ffn_act",
    ("MUL", "ffn_gate_par"): "ffn_act",  # before SWIGLU was one operation
    ("ADD", "l_out"): "l_out",
}
_SCORES = ("kq", "kq_soft_max")
_HEADS = ("q_norm", "k_norm", "q_rope", "k_rope")
_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<role>.+)")
_NODE = re.compile(r"(?P<name>.+?)(?:-(?P<layer>\d+))?")

#: type of the weights → what llama.cpp rounds the inputs of their products to on a CPU
_ROUNDED_TO = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: dtype of the cache, as an option → ggml's number of the type
_CACHE_TYPES = {None: 1, "float16": 1, "float32": 0}
_NUMBERS: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}
_ERROR_LEVEL = 4

Place = tuple[str, int | None]


class Unreadable(Exception):
    """A node that is not as ggml's header has it."""


class _Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h, up to its name."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


def _foreign(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = getattr(libggml, name)
    function.restype, function.argtypes = result, arguments
    return function


class _Ggml:
    """The functions of ggml that say what a node is."""

    def __init__(self) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        try:
            self.name = _foreign("ggml_get_name", pointer, pointer)
            self.data = _foreign("ggml_get_data", pointer, pointer)
            self.op = _foreign("ggml_op_desc", ctypes.c_char_p, pointer)
            self.n_elements = _foreign("ggml_nelements", ctypes.c_int64, pointer)
            self.n_bytes = _foreign("ggml_nbytes", size, pointer)
            self.get = _foreign("ggml_backend_tensor_get", None, pointer, pointer, size, size)
        except AttributeError as error:
            raise _not_understood(str(error)) from error

    def check(self, pointer: int) -> None:
        """Hold the struct against what ggml's functions say of a node of plain numbers.

        Raises:
            Unreadable: they contradict each other.
        """
        node = _Tensor.from_address(pointer)
        sizes, strides = tuple(node.ne), tuple(node.nb)
        item = _NUMBERS[node.type].itemsize if node.type in _NUMBERS else 0
        told = {
            "name": (self.name(pointer), pointer + _Tensor.name.offset),
            "data": (self.data(pointer), node.data),
            "sizes": (self.n_elements(pointer), math.prod(sizes)),
            "strides": (
                self.n_bytes(pointer),
                item + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True)),
            ),
        }
        wrong = [what for what, (said, read) in told.items() if said != read]
        if wrong:
            raise Unreadable(f"a node's {' and '.join(wrong)} are not where ggml.h has them")

    def place(self, pointer: int) -> Place | None:
        """The step that a node computes."""
        node, op = _Tensor.from_address(pointer), self.op(pointer).decode()
        for source in (node.src[0], node.src[1]):
            if source and (match := _TENSOR.fullmatch(_name(source))):
                step = _BY_TENSOR.get((op, match["role"]))
                if step is not None:
                    return step, int(match["layer"]) if match["layer"] else None
        match = _NODE.fullmatch(_name(pointer))
        step = _BY_NAME.get((op, match["name"])) if match else None
        return (step, int(match["layer"])) if step and match and match["layer"] else None

    def array(self, pointer: int) -> Array:
        """A node's numbers, float32 [ne3, ne2, ne1, ne0]; a copy, in whatever order they lie in memory."""
        node = _Tensor.from_address(pointer)
        if node.type not in _NUMBERS:
            raise Unreadable(f"{_name(pointer)} is of ggml's type {node.type}, neither F32 nor F16")
        raw = ctypes.create_string_buffer(self.n_bytes(pointer))
        self.get(pointer, raw, 0, len(raw))
        view = np.ndarray(tuple(node.ne)[::-1], _NUMBERS[node.type], memoryview(raw), 0, tuple(node.nb)[::-1])
        return np.array(view, np.float32)


def _name(pointer: int) -> str:
    name: bytes = _Tensor.from_address(pointer).name
    return name.decode(errors="replace")


def _not_understood(reason: str) -> Unsupported:
    message = f"this version of llama-cpp-python ({llama_cpp.__version__}) is not understood: {reason}"
    return Unsupported(message, help="tell us the version; 0.3.36 is known to work")


class LlamaCppEngine:
    """llama.cpp as an engine: see `runtime.engine.Engine`. Its cache is float16, as by default there, or float32.

    Args:
        gguf: an opened file; llama.cpp opens it again by its path.
        dtype: of the cache. Activations are rounded to int8 in products with quantized weights, whatever it is.

    Raises:
        Unsupported: llama.cpp refuses the model or is of a version that is not understood; or as `runnable`.
        UsageError: a dtype that is no cache's.
    """

    name = "llama.cpp"
    device = "cpu"

    def __init__(self, gguf: GGUF, dtype: str | None = None) -> None:
        if dtype not in _CACHE_TYPES:
            raise UsageError(f"llama.cpp's cache is not kept in {dtype}", expected="float16 or float32")
        self.config = runnable(gguf)
        self._cache_type = _CACHE_TYPES[dtype]
        self.dtype = _dtype(gguf, dtype)
        self.ggml = _Ggml()
        with _messages() as said:
            parameters = llama_cpp.llama_model_default_params()
            parameters.n_gpu_layers = 0
            self._model = llama_cpp.llama_model_load_from_file(os.fsencode(gguf.path), parameters)
        if not self._model:
            raise Unsupported(f"llama.cpp refuses it: {' '.join(said) or 'no reason given'}", path=str(gguf.path))

    def new_cache(self, n_ctx: int) -> LlamaCppCache:
        return LlamaCppCache(self, self._model, n_ctx, self._cache_type)

    def forward(
        self, ids: Sequence[int], cache: LlamaCppCache, *, logits: Which = "last", tap: Tap | None = None
    ) -> Logits:
        check_ids(ids, cache, self.config)
        made = cache.decode(ids, _Reader(self, cache.length + len(ids), logits, tap))
        return made if logits == "all" else made[-1:]

    def patched(self, edits: Iterable[Edit]) -> AbstractContextManager[None]:
        raise Unsupported("llama.cpp runs the file as it is", help="patch one of our own engines")

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            llama_cpp.llama_model_free(self._model)


class LlamaCppCache:
    """A context of llama.cpp: the keys and values of one sequence."""

    def __init__(self, engine: LlamaCppEngine, model: Any, n_ctx: int, cache_type: int) -> None:
        self.n_ctx, self.length = n_ctx, 0
        self._engine = engine  # the model must outlive the context
        self._reader: _Reader | None = None
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._evaluated)
        parameters = llama_cpp.llama_context_default_params()
        for name, value in self._settings(n_ctx, cache_type).items():
            setattr(parameters, name, value)
        with _messages() as said:
            self._context = llama_cpp.llama_init_from_model(model, parameters)
        if not self._context:
            raise UsageError(f"llama.cpp makes no context of {n_ctx:,} positions: {' '.join(said)}")

    def _settings(self, n_ctx: int, cache_type: int) -> dict[str, Any]:
        n_threads = os.cpu_count() or 1
        return {
            "n_ctx": n_ctx,
            "n_batch": n_ctx,
            "n_ubatch": n_ctx,  # in one piece, or the callback would see a step in parts
            "n_threads": n_threads,
            "n_threads_batch": n_threads,
            "flash_attn_type": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
            "type_k": cache_type,
            "type_v": cache_type,
            "offload_kqv": False,
            "op_offload": False,
            "cb_eval": self._callback,
        }

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        if not 0 <= length <= self.length:
            raise UsageError(f"a cache of {self.length} positions cannot be cut to {length}")
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), 0, length, -1)
        self.length = length

    def decode(self, ids: Sequence[int], reader: _Reader) -> Logits:
        """Run ids at the next positions, showing every node to `reader`; the logits of all of them, [n, V]."""
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at] = int(token), self.length + at
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
            batch.logits[at] = 1  # or the last layer computes no others
        self._reader = reader
        try:
            with _messages() as said:
                status = llama_cpp.llama_decode(self._context, batch)
            reader.raise_failure()
            if status:
                raise Unsupported(f"llama.cpp stopped with status {status}: {' '.join(said)}")
            self.length += len(ids)
            return self._logits(len(ids))
        finally:
            self._reader = None
            llama_cpp.llama_batch_free(batch)

    def _logits(self, n: int) -> Logits:
        rows = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(rows, (n, self._engine.config.n_vocab)).copy()

    def _evaluated(self, pointer: int, ask: bool, _: Any) -> bool:
        """llama.cpp's callback: asked first whether a node is wanted, then told that it is computed."""
        if self._reader is None:
            return False
        return self._reader.wants(pointer) if ask else self._reader.see(pointer)

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            llama_cpp.llama_free(self._context)


class _Reader:
    """Shows the nodes of one call to a tap, as steps of the contract.

    No exception crosses C: the first is kept, and raised once llama.cpp has returned.
    """

    def __init__(self, engine: LlamaCppEngine, n_keys: int, logits: Which, tap: Tap | None) -> None:
        self._ggml, self._config = engine.ggml, engine.config
        self._n_keys, self._logits, self._tap = n_keys, logits, tap
        self._failure: BaseException | None = None
        self._checked = False

    def wants(self, pointer: int) -> bool:
        try:
            place = self._ggml.place(pointer)
            return self._tap is not None and self._failure is None and place is not None and self._tap.wants(*place)
        except BaseException as error:
            self._failure = error
            return False

    def see(self, pointer: int) -> bool:
        """Take a computed node; whether llama.cpp shall go on."""
        try:
            self._ggml.check(pointer)
            place = self._ggml.place(pointer)
            if place is not None and self._tap is not None:
                self._tap(*place, self._arranged(place[0], self._ggml.array(pointer)))
            return True
        except BaseException as error:
            self._failure = error
            return False

    def raise_failure(self) -> None:
        if isinstance(self._failure, Unreadable):
            raise _not_understood(str(self._failure)) from self._failure
        if self._failure is not None:
            raise self._failure

    def _arranged(self, step: str, array: Array) -> Array:
        """[1, …] as ggml has it → the step's own shape."""
        if step in _SCORES:  # [1, heads, positions, keys], with keys up to a multiple of 256
            scores = array[0].transpose(1, 0, 2)[..., : self._n_keys]
            return scores / np.float32(math.sqrt(self._config.head_dim)) if step == "kq" else scores
        if step in _HEADS:
            return array.reshape(-1, array.shape[-2], array.shape[-1])
        rows = array.reshape(-1, array.shape[-1])
        return rows[-1:] if step.startswith("result_") and self._logits == "last" else rows


def _dtype(gguf: GGUF, cache: str | None) -> str:
    """What the coarsest rounding of a pass is: of the inputs of products, or of the cache."""
    types = {tensor.type_name for tensor in gguf.tensors.values() if len(tensor.shape) > 1}
    rounded = {_ROUNDED_TO.get(name, "int8") for name in types}
    if cache != "float32":
        rounded.add("float16")
    return next(name for name in ("int8", "bfloat16", "float16", "float32") if name in rounded)


#: what llama.cpp's log goes to between calls
_SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)


@contextmanager
def _messages() -> Iterator[list[str]]:
    """Keep llama.cpp's log from the terminal; yields the list that its errors are put into."""
    said: list[str] = []

    def take(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR_LEVEL:
            said.append(text.decode(errors="replace").strip())

    callback = llama_cpp.llama_log_callback(take)
    llama_cpp.llama_log_set(callback, None)
    try:
        yield said
    finally:
        llama_cpp.llama_log_set(_SILENT, None)
